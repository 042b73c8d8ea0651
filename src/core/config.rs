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
    /// Panics when a field is out of the bounds that its documentation gives.
    pub(crate) fn assert_valid(&self) {
        let num_workers = self.workers.len();
        assert!((1..=256).contains(&num_workers), "expected 1 to 256 workers, found {num_workers}");
        for worker in &self.workers {
            let num_blocks = worker.num_blocks;
            let fits = (1..u32::MAX - 1).contains(&num_blocks);
            assert!(fits, "expected a pool of 1 to 2^32 - 3 blocks, found {num_blocks}");
        }
        assert!(self.block_size > 0, "expected a block size of at least 1, found 0");
        assert!(self.step_tokens_max > 0, "expected a step of at least 1 token, found 0");
        assert!(self.running_max > 0, "expected at least 1 running request, found 0");
        let tokens_max = self.request_tokens_max;
        assert!(tokens_max <= 1 << 31, "expected at most 2^31 tokens of a request, found {tokens_max}");
        let bits = self.hash_bits;
        assert!((1..=128).contains(&bits), "expected 1 to 128 hash bits, found {bits}");
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
