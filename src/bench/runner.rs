//! Sequences in a KV cache, and one timed round of a workload on them.
//!
//! Every sequence is one endless text: its token at a position is fixed, so what any workload leaves in the cache is what
//! every other one would have put there, and a context is filled once. Blocks lie scattered, as after hours of service.

use super::BenchError;
use super::attention::AttentionAlone;
use super::sampling::SamplingAlone;
use crate::config::{EngineConfig, Workload};
use crate::worker::batch::BatchBuffers;
use kvern_core::{BlockId, RequestId, SeqSlice, StepPlan};
use kvern_kernels::{Device, KernelError, KvCache, StepClock, StepSpan};
use kvern_models::{LoadOptions, LoadedModel, ModelFiles, StepLimits};
use std::ops::Range;
use std::time::{Duration, Instant};

/// What the workloads take at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Most tokens that each sequence comes to hold.
    contexts: Vec<u32>,
    /// Most tokens of a step.
    step_tokens: u32,
    /// Most rows of attention that is timed alone.
    attention_rows: u32,
    /// Most rows of sampling that is timed alone.
    sampling_rows: u32,
}

impl Room {
    /// For these workloads, with prompts computed `chunk` tokens at a time.
    pub(super) fn for_workloads(workloads: &[Workload], steps: u32, chunk: u32) -> Room {
        let streams = workloads.iter().map(|workload| workload.streams()).max().unwrap_or(0);
        let context = |sequence| {
            let users = workloads.iter().filter(|workload| sequence < workload.streams());
            users.map(|workload| workload.tokens_max(sequence, steps)).max().unwrap_or(0)
        };
        let attention_rows = workloads.iter().map(|workload| workload.attention_rows()).max().unwrap_or(0);
        let sampling = workloads.iter().filter(|workload| matches!(workload, Workload::Sampling { .. }));
        let sampling_rows = sampling.map(|workload| workload.streams()).max().unwrap_or(0);
        let contexts = (0..streams).map(context).collect();
        Room { contexts, step_tokens: chunk.max(streams), attention_rows, sampling_rows }
    }

    fn blocks(&self, block_size: u32) -> u32 {
        self.contexts.iter().map(|tokens| tokens.div_ceil(block_size)).sum()
    }
}

/// What a round took.
pub(super) struct Round {
    pub(super) time: Duration,
    /// Of decode steps: the part of it for which the device waited between two of them.
    pub(super) idle_share: Option<f64>,
}

impl From<Duration> for Round {
    fn from(time: Duration) -> Self {
        Round { time, idle_share: None }
    }
}

/// A sequence's part of the cache.
pub(super) struct Sequence {
    pub(super) blocks: Vec<BlockId>,
    /// Tokens whose K and V are there.
    filled: u32,
}

/// A model, its cache and the sequences in it.
pub(super) struct Runner {
    device: Device,
    loaded: LoadedModel,
    kv: KvCache,
    sequences: Vec<Sequence>,
    /// Most tokens of a chunk of prefill.
    chunk: u32,
    plan: StepPlan,
    batch: BatchBuffers,
    clock: StepClock,
    /// If any workload is of it.
    attention: Option<AttentionAlone>,
    sampling: Option<SamplingAlone>,
}

impl Runner {
    /// Loads `files`; `admit` is asked whether a cache of so many bytes may be had.
    pub(super) fn open(
        device: &Device,
        files: &ModelFiles,
        engine: &EngineConfig,
        room: Room,
        admit: impl FnOnce(u64) -> Result<(), BenchError>,
    ) -> Result<Runner, BenchError> {
        let limits = StepLimits {
            tokens_max: room.step_tokens as usize,
            sequences_max: room.contexts.len().max(1),
            context_max: room.contexts.iter().copied().max().unwrap_or(1) as usize,
        };
        let options = LoadOptions { precision: engine.precision, format: engine.device.load_format, limits };
        let mut loaded = kvern_models::load(device, files, &options, &mut |_| {})?;
        // A cache has a block, also where nothing that is timed uses it.
        let blocks = scattered(room.blocks(engine.block_size).max(1));
        let shape = loaded.kv_shape(blocks.len(), engine.block_size as usize, crate::device::kv_dtype(engine, device)?);
        admit(shape.blocks as u64 * shape.block_bytes() as u64)?;
        let mut blocks = blocks.into_iter();
        let sequences = room.contexts.iter().map(|context| {
            let count = context.div_ceil(engine.block_size) as usize;
            Sequence { blocks: blocks.by_ref().take(count).collect(), filled: 0 }
        });
        let attention = match room.attention_rows as usize {
            0 => None,
            tokens_max => Some(AttentionAlone::new(device, &loaded.config, StepLimits { tokens_max, ..limits })?),
        };
        let sampling = match room.sampling_rows as usize {
            0 => None,
            rows => SamplingAlone::new(device, loaded.config.vocab_size, rows)?
                .ok_or_else(|| BenchError::Sampling { device: device.describe() })
                .map(Some)?,
        };
        let mut kv = KvCache::new(device, shape)?;
        loaded.model.capture(&mut kv, &mut |_, _| {})?;
        Ok(Runner {
            sequences: sequences.collect(),
            kv,
            device: device.clone(),
            chunk: engine.step_tokens_max(device),
            plan: StepPlan::empty(),
            batch: BatchBuffers::new(limits, engine.block_size, false),
            clock: StepClock::new(device)?,
            attention,
            sampling,
            loaded,
        })
    }

    /// Bytes of the packed weights.
    pub(super) fn weight_bytes(&self) -> usize {
        self.loaded.weight_bytes
    }

    /// Bytes of a value of K or V.
    pub(super) fn kv_value_bytes(&self) -> usize {
        self.kv.shape().dtype.bytes()
    }

    /// Runs one round; the time of filling the contexts that decoding starts from does not count.
    pub(super) fn round(&mut self, workload: Workload, steps: u32) -> Result<Round, KernelError> {
        match workload {
            Workload::Prefill { tokens } => {
                let started = Instant::now();
                self.prefill(0, 0..tokens, true)?;
                self.device.synchronize()?;
                Ok(started.elapsed().into())
            }
            Workload::Decode { streams, context } => {
                self.fill(workload)?;
                self.decode(streams, context..context + steps)
            }
            Workload::Attention { .. } | Workload::PromptAttention { .. } => {
                self.attend(workload, steps).map(Round::from)
            }
            Workload::Sampling { rows, kind } => {
                let sampling = self.sampling.as_mut().expect("there is room for every workload");
                self.device.synchronize()?;
                let started = Instant::now();
                sampling.run(&self.device, kind, rows, steps)?;
                self.device.synchronize()?;
                Ok(Round::from(started.elapsed()))
            }
        }
    }

    /// A step for each of `positions`. As in the server, the next one is put on the device before the last one's end is
    /// waited for.
    fn decode(&mut self, streams: u32, positions: Range<u32>) -> Result<Round, KernelError> {
        let mut spans: Vec<StepSpan> = Vec::with_capacity(positions.len());
        let (first, started) = (positions.start, Instant::now());
        for position in positions {
            self.clock.begin(&self.device)?;
            self.step((0..streams).map(|sequence| (sequence, position..position + 1)), true)?;
            self.clock.end(&self.device)?;
            if position > first {
                spans.push(self.clock.take()?);
            }
        }
        spans.push(self.clock.take()?);
        Ok(Round { time: started.elapsed(), idle_share: Some(idle_share(&spans)) })
    }

    /// All layers' attention, `steps` times.
    fn attend(&mut self, workload: Workload, steps: u32) -> Result<Duration, KernelError> {
        self.fill(workload)?;
        let Runner { device, kv, sequences, attention, .. } = self;
        let attention = attention.as_mut().expect("there is room for every workload");
        attention.update(device, sequences, workload, kv)?;
        device.synchronize()?;
        let started = Instant::now();
        for _ in 0..steps {
            attention.run(device, kv)?;
        }
        device.synchronize()?;
        Ok(started.elapsed())
    }

    /// Brings into the cache what the sequences of a workload hold before its first step.
    fn fill(&mut self, workload: Workload) -> Result<(), KernelError> {
        for sequence in 0..workload.streams() {
            let (filled, context) = (self.sequences[sequence as usize].filled, workload.context(sequence));
            self.prefill(sequence, filled.min(context)..context, false)?;
        }
        self.device.synchronize()
    }

    /// Computes `positions` of a sequence in chunks; the last one's logits are computed if `sample`.
    fn prefill(&mut self, sequence: u32, positions: Range<u32>, sample: bool) -> Result<(), KernelError> {
        let mut start = positions.start;
        while start < positions.end {
            let end = positions.end.min(start.saturating_add(self.chunk));
            self.step([(sequence, start..end)].into_iter(), sample && end == positions.end)?;
            start = end;
        }
        Ok(())
    }

    /// One forward pass over parts of sequences.
    fn step(&mut self, parts: impl Iterator<Item = (u32, Range<u32>)>, sample: bool) -> Result<(), KernelError> {
        let vocab_size = self.loaded.config.vocab_size as u32;
        let Runner { plan, sequences, .. } = self;
        plan.slices.clear();
        plan.tokens.clear();
        plan.blocks.clear();
        for (number, positions) in parts {
            let sequence = &mut sequences[number as usize];
            sequence.filled = sequence.filled.max(positions.end);
            let (token, block) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
            plan.tokens.extend(positions.clone().map(|position| token_at(number, position, vocab_size)));
            plan.blocks.extend(&sequence.blocks);
            plan.slices.push(SeqSlice {
                request: RequestId(u64::from(number)),
                start: positions.start,
                tokens: token..token + positions.len() as u32,
                table_len: 0,
                blocks: block..block + sequence.blocks.len() as u32,
                sample,
                last_sampled: false,
            });
        }
        let batch = self.batch.fill(plan).expect("a plan that brings whole tables and known tokens can be laid out");
        self.loaded.model.forward(&batch, &mut self.kv).map(drop)
    }
}

/// The part of some steps' time that is between two of them; what is before the first does not count.
fn idle_share(spans: &[StepSpan]) -> f64 {
    let busy: Duration = spans.iter().map(|span| span.busy).sum();
    let idle: Duration = spans.iter().skip(1).filter_map(|span| span.gap).sum();
    idle.as_secs_f64() / (busy + idle).as_secs_f64().max(f64::MIN_POSITIVE)
}

/// The token of a sequence at a position: any will do, as time does not depend on them, but always the same.
fn token_at(sequence: u32, position: u32, vocab_size: u32) -> u32 {
    (sequence.wrapping_mul(7919)).wrapping_add(position.wrapping_mul(37)) % vocab_size
}

/// Each of `0..count` once, neighbours far apart.
fn scattered(count: u32) -> Vec<BlockId> {
    // A stride shares no factor with the count if it is a prime that does not divide it; one of the two never does,
    // as both would need a count of 40 million blocks or more.
    let stride = if count.is_multiple_of(6143) { 6353 } else { 6143 };
    (0..u64::from(count)).map(|index| BlockId((index * stride % u64::from(count)) as u32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_blocks_are_a_permutation() {
        for count in [0, 1, 2, 17, 6143, 6353, 2 * 6143, 10_000] {
            let mut blocks: Vec<u32> = scattered(count).iter().map(|block| block.0).collect();
            blocks.sort_unstable();
            assert!(blocks.into_iter().eq(0..count), "{count}");
        }
        assert_eq!(scattered(10_000)[..3], [BlockId(0), BlockId(6143), BlockId(2286)]);
    }

    #[test]
    fn time_between_steps_is_idle_and_time_before_them_is_not() {
        let span = |busy, gap: Option<u64>| StepSpan {
            busy: Duration::from_micros(busy),
            gap: gap.map(Duration::from_micros),
        };
        let cases = [
            (vec![], 0.0),
            (vec![span(7, Some(100))], 0.0),
            (vec![span(30, Some(500)), span(45, Some(5)), span(20, None)], 0.05),
            (vec![span(0, None), span(0, Some(4))], 1.0),
        ];
        for (spans, expected) in cases {
            assert_eq!(idle_share(&spans), expected, "{spans:?}");
        }
    }

    #[test]
    fn a_sequence_has_room_for_the_longest_workload_that_uses_it() {
        let decode = |streams, context| Workload::Decode { streams, context };
        let skewed = Workload::Attention { groups: [(1, 900), (2, 100)] };
        let cases: [(&[Workload], &[u32]); 6] = [
            (&[Workload::PromptAttention { tokens: 700 }, decode(2, 128)], &[700, 136]),
            (&[skewed, decode(4, 128)], &[900, 136, 136, 136]),
            (&[], &[]),
            (&[Workload::Prefill { tokens: 512 }], &[512]),
            (&[decode(1, 4096), decode(3, 128)], &[4104, 136, 136]),
            (&[Workload::Prefill { tokens: 200 }, decode(2, 128)], &[200, 136]),
        ];
        for (workloads, contexts) in cases {
            assert_eq!(contexts_of(workloads), contexts, "{workloads:?}");
        }
    }

    fn contexts_of(workloads: &[Workload]) -> Vec<u32> {
        Room::for_workloads(workloads, 8, 512).contexts
    }
}
