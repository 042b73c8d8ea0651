//! What the core is told once, at construction.

/// Limits and shapes of one core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreConfig {
    /// 1 to 256. A request may run on any of them, so one that does not fit the smallest pool is refused.
    pub workers: Vec<WorkerSpec>,
    /// Tokens per KV block; at least 1.
    pub block_size: u32,
    /// Most tokens (prefill and decode together) in one step; at least 1.
    pub step_tokens_max: u32,
    /// Most requests that run at once on one worker; also the most slices of a step. At least 1. Where it exceeds
    /// `step_tokens_max`, that is the limit, so that each running request can have a token in each step.
    pub running_max: u32,
    /// Most requests that wait; the engine refuses a submission beyond it.
    pub waiting_max: u32,
    /// Most tokens (prompt and output) of one request; at most 2^31.
    pub request_tokens_max: u32,
    /// Whether requests share the blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Bits of the block hash that are used, 1 to 128: 128 in production; fewer make the simulator see collisions.
    pub hash_bits: u32,
}

impl CoreConfig {
    /// The first field that is out of the bounds that its documentation gives.
    pub(crate) fn problem(&self) -> Option<String> {
        let bounded = [
            ("workers", self.workers.len() as u64, 1, 256),
            ("blocks in the smallest pool", self.blocks(u32::min), 1, u64::from(u32::MAX - 2)),
            ("blocks in the largest pool", self.blocks(u32::max), 1, u64::from(u32::MAX - 2)),
            ("tokens in a block", u64::from(self.block_size), 1, u64::from(u32::MAX)),
            ("tokens in a step", u64::from(self.step_tokens_max), 1, u64::from(u32::MAX)),
            ("running requests", u64::from(self.running_max), 1, u64::from(u32::MAX)),
            ("tokens of a request", u64::from(self.request_tokens_max), 0, 1 << 31),
            ("hash bits", u64::from(self.hash_bits), 1, 128),
        ];
        let broken = bounded.into_iter().find(|(_, found, min, max)| !(min..=max).contains(&found));
        broken.map(|(what, found, min, max)| format!("expected {min} to {max} {what}, found {found}"))
    }

    /// The block counts of all pools, folded.
    fn blocks(&self, pick: fn(u32, u32) -> u32) -> u64 {
        self.workers.iter().map(|worker| worker.num_blocks).reduce(pick).unwrap_or(0).into()
    }
}

/// One worker and its KV pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    pub role: Role,
    /// At least 1.
    pub num_blocks: u32,
}

/// What a worker may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Prefill and decode.
    Mixed,
}
