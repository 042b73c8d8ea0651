//! What `kvern bench` is told to time.

use super::values::parse_count;
use std::fmt;

/// `kvern bench`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchConfig {
    /// Empty: those of [`Workload::defaults`] that the model and the limits allow.
    pub workloads: Vec<Workload>,
    /// Rounds that count, of each workload.
    pub rounds: u32,
    /// Steps of a round of decoding.
    pub steps: u32,
    /// The machine's limits are measured too, in the same rounds.
    pub limits: bool,
    /// One JSON object per line instead of a table.
    pub json: bool,
}

/// Work whose tokens per second are of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// The prompt of one sequence, from its first token, in chunks of at most `--max-num-batched-tokens`.
    Prefill { tokens: u32 },
    /// One token a step for each of `streams` sequences, which hold `context` tokens before the first step.
    Decode { streams: u32, context: u32 },
    /// Attention alone, in all layers, of the last token of each sequence: streams of some context, then of another one.
    Attention { groups: [(u32, u32); 2] },
    /// Attention alone, in all layers, of all tokens of a prompt.
    PromptAttention { tokens: u32 },
    /// Sampling alone, a token a step of each of `rows` rows of logits.
    Sampling { rows: u32, kind: Sampling },
}

/// What the rows of a workload ask of sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    Greedy,
    /// A temperature, and nothing else.
    Temperature,
    /// Top-k 50 and top-p 0.95.
    Filtered,
    /// The same, with penalties for what was seen.
    Penalties,
}

impl Sampling {
    const ALL: [Sampling; 4] = [Sampling::Greedy, Sampling::Temperature, Sampling::Filtered, Sampling::Penalties];

    fn name(self) -> &'static str {
        match self {
            Sampling::Greedy => "greedy",
            Sampling::Temperature => "temperature",
            Sampling::Filtered => "filtered",
            Sampling::Penalties => "penalties",
        }
    }
}

impl Workload {
    /// What is timed where nothing is asked for.
    #[must_use]
    pub fn defaults() -> Vec<Workload> {
        let prefill = [512, 2048].map(|tokens| Workload::Prefill { tokens });
        let decode = [(1, 4096), (1, 128), (2, 128), (4, 128), (8, 128), (16, 128), (32, 128), (64, 128)]
            .map(|(streams, context)| Workload::Decode { streams, context });
        prefill.into_iter().chain(decode).collect()
    }

    /// Sequences that run at once.
    #[must_use]
    pub fn streams(self) -> u32 {
        match self {
            Workload::Prefill { .. } | Workload::PromptAttention { .. } => 1,
            Workload::Decode { streams, .. } => streams,
            Workload::Attention { groups: [(first, _), (second, _)] } => first.saturating_add(second),
            Workload::Sampling { rows, .. } => rows,
        }
    }

    /// Tokens that sequence number `sequence` holds before the first step.
    #[must_use]
    pub fn context(self, sequence: u32) -> u32 {
        match self {
            Workload::Prefill { .. } | Workload::Sampling { .. } => 0,
            Workload::Decode { context, .. } => context,
            // K and V of all tokens are there before their attention.
            Workload::PromptAttention { tokens } => tokens,
            Workload::Attention { groups: [(streams, context), (_, further)] } => {
                if sequence < streams {
                    context
                } else {
                    further
                }
            }
        }
    }

    /// Most tokens that sequence number `sequence` comes to hold when decoding takes `steps`.
    #[must_use]
    pub fn tokens_max(self, sequence: u32, steps: u32) -> u32 {
        match self {
            Workload::Prefill { tokens } => tokens,
            Workload::Decode { context, .. } => context.saturating_add(steps),
            Workload::Attention { .. } | Workload::PromptAttention { .. } | Workload::Sampling { .. } => {
                self.context(sequence)
            }
        }
    }

    /// Rows of one run of attention, where that is timed alone; else none.
    #[must_use]
    pub fn attention_rows(self) -> u32 {
        match self {
            Workload::Prefill { .. } | Workload::Decode { .. } | Workload::Sampling { .. } => 0,
            Workload::Attention { .. } => self.streams(),
            Workload::PromptAttention { tokens } => tokens,
        }
    }

    /// Most tokens that any sequence comes to hold.
    #[must_use]
    pub fn context_max(self, steps: u32) -> u32 {
        // Contexts differ between the first and the last at most.
        self.tokens_max(0, steps).max(self.tokens_max(self.streams().saturating_sub(1), steps))
    }

    /// Tokens of a round.
    #[must_use]
    pub fn tokens(self, steps: u32) -> u64 {
        match self {
            Workload::Prefill { tokens } => u64::from(tokens),
            Workload::PromptAttention { tokens } => u64::from(tokens) * u64::from(steps),
            Workload::Decode { .. } | Workload::Attention { .. } | Workload::Sampling { .. } => {
                u64::from(self.streams()) * u64::from(steps)
            }
        }
    }
}

/// `prefill 512`, `decode 16x128`, `attention 1x32768+31x1024`, `attention 2048`, `sampling greedy:32`.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Workload::Prefill { tokens } => write!(f, "prefill {tokens}"),
            Workload::Decode { streams, context } => write!(f, "decode {streams}x{context}"),
            Workload::PromptAttention { tokens } => write!(f, "attention {tokens}"),
            Workload::Attention { groups: [(streams, context), (0, _)] } => write!(f, "attention {streams}x{context}"),
            Workload::Attention { groups: [(streams, context), (more, further)] } => {
                write!(f, "attention {streams}x{context}+{more}x{further}")
            }
            Workload::Sampling { rows, kind } => write!(f, "sampling {}:{rows}", kind.name()),
        }
    }
}

pub(super) fn parse_prefill(text: &str) -> Result<Workload, String> {
    Ok(Workload::Prefill { tokens: parse_count(text)? })
}

/// `STREAMSxCONTEXT`.
pub(super) fn parse_decode(text: &str) -> Result<Workload, String> {
    let expected = || format!("expected STREAMSxCONTEXT such as 16x128, found `{text}`");
    let (streams, context) = parse_group(text).ok_or_else(expected)?;
    Ok(Workload::Decode { streams, context })
}

/// `STREAMSxCONTEXT`, or two of them with a plus between; or the tokens of a prompt.
pub(super) fn parse_attention(text: &str) -> Result<Workload, String> {
    let expected = || {
        format!("expected STREAMSxCONTEXT such as 32x4096 or 1x32768+31x4096, or tokens such as 2048, found `{text}`")
    };
    if let Ok(tokens) = parse_count(text) {
        return Ok(Workload::PromptAttention { tokens });
    }
    let (first, second) = text.split_once('+').map_or((text, None), |(first, second)| (first, Some(second)));
    let second = second.map_or(Some((0, 0)), parse_group).ok_or_else(expected)?;
    Ok(Workload::Attention { groups: [parse_group(first).ok_or_else(expected)?, second] })
}

/// `KIND:ROWS`.
pub(super) fn parse_sampling(text: &str) -> Result<Workload, String> {
    let expected = || {
        let kinds = Sampling::ALL.map(Sampling::name).join(", ");
        format!("expected KIND:ROWS such as greedy:32, of {kinds}, found `{text}`")
    };
    let (kind, rows) = text.split_once(':').ok_or_else(expected)?;
    let kind = Sampling::ALL.into_iter().find(|known| known.name() == kind).ok_or_else(expected)?;
    Ok(Workload::Sampling { rows: parse_count(rows).map_err(|_| expected())?, kind })
}

fn parse_group(text: &str) -> Option<(u32, u32)> {
    let (streams, context) = text.split_once('x')?;
    Some((parse_count(streams).ok()?, parse_count(context).ok()?))
}
