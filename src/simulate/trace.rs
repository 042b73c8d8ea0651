//! Arrivals, one after the other, from whatever holds them. Nothing but the present line is held in memory.

use super::synthetic::Generator;
use super::{azure, jsonl};
use crate::config::TraceSource;
use kvern_core::{Micros, TokenId};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

/// Longest line: a hundred thousand block hashes and more.
const LINE_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error(
        "{path}: expected lines of JSON or a header with TIMESTAMP, ContextTokens and GeneratedTokens, found `{found}`"
    )]
    Format { path: String, found: String },
    #[error("{path}, line {line}: {problem}")]
    Line { path: String, line: u64, problem: String },
}

/// A request that comes.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrival {
    /// After the first one.
    pub at: Micros,
    pub prompt_tokens: u32,
    /// Tokens that the model makes if nothing stops it earlier.
    pub output_tokens: u32,
    /// Tokens that the client allows; at least `output_tokens`.
    pub output_tokens_max: u32,
    pub content: Content,
    /// The first tokens that prompts of all tenants share.
    pub shared_tokens: u32,
    pub tenant: Option<String>,
    pub class: u8,
    /// After its arrival.
    pub timeout: Option<Micros>,
}

/// What is known of a prompt: which tokens it shares with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing.
    Unique,
    /// One id for each 512 tokens, the last for what is left; equal ids are equal tokens after equal prefixes.
    Blocks(Vec<u64>),
    /// It begins with the first tokens of a text that this number names.
    Prefix { text: u64, tokens: u32 },
}

/// Tokens of a block of Mooncake's traces.
pub(super) const BLOCK_TOKENS: u32 = 512;

/// The low bits of odd multiples of the golden ratio: as good as random, and cheap.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// Token `at` of the text that `text` names: 31 bits.
pub(super) fn token(text: u64, at: u32) -> TokenId {
    (text.wrapping_add(u64::from(at).wrapping_mul(STRIDE)) >> 33) as TokenId
}

/// A number with its bits well mixed: the finalizer of splitmix64.
pub(super) fn mix(number: u64) -> u64 {
    let mut x = number.wrapping_add(STRIDE);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Arrival {
    /// The prompt; `own` names the tokens that it shares with nobody.
    #[must_use]
    pub fn prompt(&self, own: u64) -> Vec<TokenId> {
        let len = self.prompt_tokens;
        let mut prompt = Vec::with_capacity(len as usize);
        match &self.content {
            Content::Unique => prompt.extend((0..len).map(|at| token(own, at))),
            Content::Prefix { text, tokens } => {
                prompt.extend((0..*tokens).map(|at| token(*text, at)));
                prompt.extend((*tokens..len).map(|at| token(own, at)));
            }
            Content::Blocks(ids) => {
                for (block, id) in (0..).zip(ids) {
                    let left = (len - block * BLOCK_TOKENS).min(BLOCK_TOKENS);
                    let text = mix(*id);
                    prompt.extend((0..left).map(|at| token(text, at)));
                }
            }
        }
        prompt
    }
}

/// A line of a file, as its format reads it: with a time of its own clock.
pub(super) struct Row {
    pub(super) at_us: i64,
    pub(super) arrival: Arrival,
}

enum Format {
    Jsonl,
    Azure(azure::Columns),
}

enum Source {
    Lines { format: Format, lines: BufReader<Box<dyn Read>>, path: String, line: u64, first: String },
    Synthetic(Box<Generator>),
}

/// Iterates over the arrivals of a trace, and ends after the first error. Times begin with 0 and never go back.
pub struct Trace {
    source: Source,
    speed_up: f64,
    /// The first row's time.
    origin_us: Option<i64>,
    last: Micros,
    out_of_order: u64,
    has_failed: bool,
}

impl Trace {
    /// Opens a trace whose arrivals come `speed_up` times as fast.
    ///
    /// # Errors
    /// When the file cannot be read or is of no known format.
    pub fn open(source: &TraceSource, speed_up: f64) -> Result<Self, TraceError> {
        match source {
            TraceSource::Synthetic(kind) => {
                Ok(Trace::new(Source::Synthetic(Box::new(Generator::new(*kind))), speed_up))
            }
            TraceSource::File(path) => {
                let shown = path.display().to_string();
                let file = File::open(path).map_err(|source| TraceError::Read { path: shown.clone(), source })?;
                Trace::read(Box::new(file), shown, speed_up)
            }
        }
    }

    /// As [`Trace::open`], of the bytes of a file; `path` is for errors.
    ///
    /// # Errors
    /// As [`Trace::open`].
    pub fn read(bytes: Box<dyn Read>, path: String, speed_up: f64) -> Result<Self, TraceError> {
        let (mut lines, mut line) = (BufReader::with_capacity(1 << 16, bytes), 0);
        let first = next_line(&mut lines, &path, &mut line)?.unwrap_or_default();
        let first = first.trim_start_matches('\u{feff}').to_owned();
        let (format, first) = if first.starts_with('{') {
            (Format::Jsonl, first)
        } else if let Some(columns) = azure::Columns::of(&first) {
            (Format::Azure(columns), String::new())
        } else {
            return Err(TraceError::Format { path, found: first.chars().take(60).collect() });
        };
        Ok(Trace::new(Source::Lines { format, lines, path, line, first }, speed_up))
    }

    fn new(source: Source, speed_up: f64) -> Self {
        Trace { source, speed_up, origin_us: None, last: Micros(0), out_of_order: 0, has_failed: false }
    }

    /// Rows with an earlier time than the one before, which count as if they came together.
    #[must_use]
    pub fn out_of_order(&self) -> u64 {
        self.out_of_order
    }

    fn row(&mut self) -> Result<Option<Row>, TraceError> {
        let (format, lines, path, line, first) = match &mut self.source {
            Source::Synthetic(generator) => return Ok(Some(generator.next())),
            Source::Lines { format, lines, path, line, first } => (format, lines, path, line, first),
        };
        let text = if first.is_empty() { next_line(lines, path, line)? } else { Some(std::mem::take(first)) };
        let Some(text) = text else { return Ok(None) };
        let row = match format {
            Format::Jsonl => jsonl::row(&text),
            Format::Azure(columns) => columns.row(&text),
        };
        row.map(Some).map_err(|problem| TraceError::Line { path: path.clone(), line: *line, problem })
    }
}

/// The next line that is not empty, without its end.
fn next_line(lines: &mut impl BufRead, path: &str, line: &mut u64) -> Result<Option<String>, TraceError> {
    loop {
        let mut bytes = Vec::new();
        let read = lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes);
        let read = read.map_err(|source| TraceError::Read { path: path.to_owned(), source })?;
        *line += 1;
        let bad = |problem: String| TraceError::Line { path: path.to_owned(), line: *line, problem };
        if read == 0 {
            return Ok(None);
        }
        if read as u64 == LINE_BYTES_MAX {
            return Err(bad(format!("expected less than {LINE_BYTES_MAX} bytes, found more")));
        }
        let text = String::from_utf8(bytes).map_err(|_| bad("expected UTF-8, found other bytes".to_owned()))?;
        if !text.trim().is_empty() {
            return Ok(Some(text.trim().to_owned()));
        }
    }
}

impl Iterator for Trace {
    type Item = Result<Arrival, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_failed {
            return None;
        }
        match self.row() {
            Ok(None) => None,
            Ok(Some(Row { at_us, mut arrival })) => {
                let origin = *self.origin_us.get_or_insert(at_us);
                let after = at_us.saturating_sub(origin).max(0) as f64 / self.speed_up;
                let at = Micros(after as u64);
                self.out_of_order += u64::from(at < self.last || at_us < origin);
                self.last = self.last.max(at);
                arrival.at = self.last;
                Some(Ok(arrival))
            }
            Err(error) => {
                self.has_failed = true;
                Some(Err(error))
            }
        }
    }
}
