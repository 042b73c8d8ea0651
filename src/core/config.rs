//! What the core is told once, at construction.

/// Limits and shapes of one core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreConfig {
    pub workers: Vec<WorkerSpec>,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Most tokens (prefill and decode together) in one step.
    pub step_tokens_max: u32,
    /// Most requests that run at once on one worker; also the most slices of a step.
    pub running_max: u32,
    /// Most requests that wait; the engine refuses a submission beyond it.
    pub waiting_max: u32,
    /// Most tokens (prompt and output) of one request.
    pub request_tokens_max: u32,
    pub prefix_caching: bool,
    /// Bits of the block hash that are used: 128 in production; fewer make the simulator see collisions.
    pub hash_bits: u32,
}

/// One worker and its KV pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    pub role: Role,
    pub num_blocks: u32,
}

/// What a worker may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Mixed,
}
