//! What the core is told once, at construction.

use crate::{CostModel, Micros, PoolId};

/// Limits and shapes of one core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreConfig {
    /// Blocks of each KV pool; 1 to 256 pools. A request may come to any of them, so one that does not fit the smallest is
    /// refused.
    pub pools: Vec<u32>,
    /// 1 to 256.
    pub workers: Vec<WorkerSpec>,
    /// Tokens per KV block; at least 1.
    pub block_size: u32,
    /// Most tokens (prefill and decode together) in one step; at least 1.
    pub step_tokens_max: u32,
    /// Most requests that run at once on one worker; also the most slices of a step. At least 1. Where it exceeds
    /// `step_tokens_max`, that is the limit, so that each running request can have a token in each step.
    pub running_max: u32,
    /// Most requests that wait; a submission beyond it is refused.
    pub waiting_max: u32,
    /// Most prompt tokens, less those that were cached on arrival, that wait; a submission beyond it is refused, unless
    /// nothing waits.
    pub queue_tokens_max: u64,
    /// Most tokens (prompt and output) of one request; at most 2^31.
    pub request_tokens_max: u32,
    /// Whether requests share the blocks of equal prefixes.
    pub prefix_caching: bool,
    /// Bits of the block hash that are used, 1 to 128: 128 in production; fewer make the simulator see collisions.
    pub hash_bits: u32,
    /// 1 to 8 priority classes, the most urgent first.
    pub classes: Vec<ClassSpec>,
    /// Starts of other classes while a class waits, after which it is that class's turn; at least 1.
    pub bypasses_max: u32,
    /// Starts of younger requests of the same class and tenant, for their longer cached prefixes, after which it is the
    /// oldest one's turn.
    pub overtakes_max: u32,
    /// Prefill tokens that a step takes even where the objective for the inter-token latency leaves room for none; at least
    /// 1, and the least that the oldest prefill gets, unless it gives way to another tenant, with one token.
    pub chunk_tokens_min: u32,
    /// Uncached prompt tokens up to which a prompt rides along with a decode worker's step although there is a prefill
    /// worker; 0 means that every prompt runs beside.
    pub ride_along_tokens_max: u32,
    /// How long the prompt of a request that made a step fail is refused.
    pub quarantine: Micros,
    /// Whether decode steps are planned while the one before is in flight; see [`crate::Engine::plan_ahead`].
    pub plan_ahead: bool,
    /// Whether workers that share a pool, and so a device, have a part each of that device, for steps beside the
    /// others': see [`crate::DeviceShare`]. Where not, every step has the whole.
    pub device_parts: bool,
    /// What a step costs, as measured at start; corrected while running. Of a step beside others where devices have
    /// parts.
    pub cost: CostModel,
}

impl CoreConfig {
    /// One mixed worker with a pool of `num_blocks` blocks of `block_size` tokens, one class without objectives, and no
    /// limit that a test does not set.
    #[must_use]
    pub fn mixed(num_blocks: u32, block_size: u32) -> Self {
        CoreConfig {
            pools: vec![num_blocks],
            workers: vec![WorkerSpec { role: Role::Mixed, pool: PoolId(0) }],
            block_size,
            step_tokens_max: 8192,
            running_max: 256,
            waiting_max: 1024,
            queue_tokens_max: u64::MAX,
            request_tokens_max: 1 << 30,
            prefix_caching: true,
            hash_bits: 128,
            classes: vec![ClassSpec::default()],
            bypasses_max: 16,
            overtakes_max: 16,
            chunk_tokens_min: 16,
            ride_along_tokens_max: 64,
            quarantine: Micros(60_000_000),
            plan_ahead: false,
            device_parts: false,
            cost: CostModel::default(),
        }
    }

    /// The first field that is out of the bounds that its documentation gives.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let blocks = |pick: fn(u32, u32) -> u32| self.pools.iter().copied().reduce(pick).unwrap_or(0).into();
        let stray = self.workers.iter().filter(|worker| usize::from(worker.pool.0) >= self.pools.len()).count() as u64;
        let bounded = [
            ("pools", self.pools.len() as u64, 1, 256),
            ("workers", self.workers.len() as u64, 1, 256),
            ("workers without a pool", stray, 0, 0),
            ("blocks in the smallest pool", blocks(u32::min), 1, u64::from(u32::MAX - 2)),
            ("blocks in the largest pool", blocks(u32::max), 1, u64::from(u32::MAX - 2)),
            ("tokens in a block", u64::from(self.block_size), 1, u64::from(u32::MAX)),
            ("tokens in a step", u64::from(self.step_tokens_max), 1, u64::from(u32::MAX)),
            ("running requests", u64::from(self.running_max), 1, u64::from(u32::MAX)),
            ("tokens of a request", u64::from(self.request_tokens_max), 0, 1 << 31),
            ("hash bits", u64::from(self.hash_bits), 1, 128),
            ("classes", self.classes.len() as u64, 1, 8),
            ("bypasses", u64::from(self.bypasses_max), 1, u64::from(u32::MAX)),
            ("tokens in the smallest chunk", u64::from(self.chunk_tokens_min), 1, u64::from(u32::MAX)),
        ];
        let broken = bounded.into_iter().find(|(_, found, min, max)| !(min..=max).contains(&found));
        broken.map(|(what, found, min, max)| format!("expected {min} to {max} {what}, found {found}"))
    }
}

/// One worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerSpec {
    pub role: Role,
    /// Workers of one device share its pool: what one has computed, the others read in place.
    pub pool: PoolId,
}

/// What a worker is for. Where no decode worker is left, prefill workers decode, and the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Prefill and decode.
    Mixed,
    /// Computes prompts up to their first new token, then hands them to a decode worker.
    Prefill,
    /// Takes over what prefill workers have computed; computes short prompts itself.
    Decode,
}

/// What a priority class is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ClassSpec {
    /// A request that would have to wait behind others, with a predicted time to its first token beyond this, is refused.
    pub ttft: Option<Micros>,
    /// A step with decodes of this class takes no more prefill than keeps its predicted time within this.
    pub itl: Option<Micros>,
}
