//! Random configurations and submissions, small enough that everything rare happens often.

use super::rng::Rng;
use crate::{
    CacheSalt, ClassId, ClassSpec, CoreConfig, CostModel, Micros, PoolId, RequestId, Role, Submission, TenantId,
    TenantSpec, TokenId, WorkerSpec,
};

/// Few tokens, so that prompts meet and stop tokens come.
pub(crate) const VOCABULARY: u32 = 5;

/// Pools by worker: mixed ones alone and with one another, prefill and decode workers with shared pools and apart.
const LAYOUTS: [&[(Role, u8)]; 9] = [
    &[(Role::Mixed, 0)],
    &[(Role::Mixed, 0)],
    &[(Role::Mixed, 0), (Role::Mixed, 1)],
    &[(Role::Mixed, 0), (Role::Mixed, 0), (Role::Mixed, 1)],
    &[(Role::Prefill, 0), (Role::Decode, 0)],
    &[(Role::Prefill, 0), (Role::Decode, 1)],
    &[(Role::Prefill, 0), (Role::Prefill, 1), (Role::Decode, 2), (Role::Decode, 2)],
    &[(Role::Prefill, 0), (Role::Decode, 0), (Role::Decode, 1)],
    &[(Role::Mixed, 0), (Role::Prefill, 1), (Role::Decode, 0)],
];

/// What one seed runs.
pub(crate) struct Workload {
    pub(crate) config: CoreConfig,
    pub(crate) num_requests: u64,
    /// In percent: turns that may cancel; samples; steps, requests that make every step fail; transfers; turns that may lose
    /// a worker.
    pub(crate) cancels: u32,
    pub(crate) failures: u32,
    pub(crate) poisoned: u32,
    pub(crate) transfer_failures: u32,
    pub(crate) losses: u32,
    /// In percent of submissions.
    deadlines: u32,
    /// Tenant 0 and others; one more is never named.
    num_tenants: u32,
    has_floors: bool,
    has_ceilings: bool,
    /// Long outputs from short prompts are what makes a pool run out.
    max_new_tokens: u32,
    salts: Vec<CacheSalt>,
    /// Starts that prompts share.
    stems: Vec<Vec<TokenId>>,
    /// In percent of submissions: those with public blocks.
    shared: u32,
    /// Draws what came later to the simulator, so that a seed still means the run that it was named for.
    pub(crate) later: Rng,
    /// The same for steps ahead.
    pub(crate) ahead: Rng,
    /// In percent of submissions: those that no step is planned ahead of.
    needs_tokens: u32,
}

fn tokens(rng: &mut Rng, len: u32) -> Vec<TokenId> {
    (0..len).map(|_| rng.below(VOCABULARY)).collect()
}

impl Workload {
    pub(crate) fn new(rng: &mut Rng, mut later: Rng, plans_ahead: bool, has_parts: bool) -> Self {
        let mut ahead = Rng::new(later.seed().rotate_left(32));
        let stems = (0..3).map(|_| tokens(rng, 40)).collect();
        let is_split = rng.percent(50);
        Workload {
            config: CoreConfig { plan_ahead: plans_ahead, device_parts: has_parts, ..config(rng) },
            num_requests: u64::from(8 + rng.below(24)),
            cancels: rng.pick(&[0, 10, 40]),
            failures: rng.pick(&[0, 0, 2]),
            poisoned: rng.pick(&[0, 0, 0, 10]),
            transfer_failures: rng.pick(&[0, 10, 50]),
            losses: if is_split { rng.pick(&[0, 0, 2]) } else { 0 },
            deadlines: rng.pick(&[0, 0, 30]),
            num_tenants: 1 + rng.below(4),
            has_floors: rng.percent(40),
            has_ceilings: rng.percent(30),
            max_new_tokens: rng.pick(&[6, 24, 60]),
            salts: rng.pick(&[&[0][..], &[0, 1], &[0, 1 << 64, u128::MAX]]).iter().map(|x| CacheSalt(*x)).collect(),
            stems,
            shared: later.pick(&[0, 50, 90]),
            later,
            needs_tokens: if plans_ahead { ahead.pick(&[0, 0, 20]) } else { 0 },
            ahead,
        }
    }

    /// Settings for all tenants but the one that is never named; tenant 0 now and then is not named either.
    pub(crate) fn tenants(&self, rng: &mut Rng) -> Vec<TenantSpec> {
        let smallest = self.config.pools.iter().copied().min().unwrap_or(0);
        let from = u32::from(rng.percent(20));
        let spec = |tenant| TenantSpec {
            tenant: TenantId(tenant),
            weight: rng.pick(&[0, 1, 1, 2, 5]),
            floor_blocks: if self.has_floors { rng.below(smallest) } else { 0 },
            ceiling_blocks: (self.has_ceilings && rng.percent(60)).then(|| 1 + rng.below(smallest)),
        };
        (from..self.num_tenants).map(spec).collect()
    }

    /// Most tokens that any worker can hold for one request.
    fn tokens_max(&self) -> u32 {
        let smallest = self.config.pools.iter().copied().min().unwrap_or(0);
        (smallest * self.config.block_size).min(self.config.request_tokens_max)
    }

    /// A random request; a few are empty, too long, or of a tenant that nobody named. `again` is a prompt to repeat.
    pub(crate) fn submission(
        &mut self,
        rng: &mut Rng,
        request: RequestId,
        now: Micros,
        again: Option<&Submission>,
    ) -> Submission {
        let stem = rng.below(self.stems.len() as u32) as usize;
        let shared = rng.pick(&[0, 4, 16, 16, 40]).min(rng.below(41)) as usize;
        let mut prompt = self.stems[stem][..shared].to_vec();
        let own = 1 + rng.below(6);
        prompt.extend(tokens(rng, own));
        let mut max_new_tokens = 1 + rng.below(self.max_new_tokens);
        if rng.percent(90) {
            // Mostly what fits, and often only just.
            let prompt_max = (self.tokens_max() - 1).min(prompt.len() as u32);
            prompt.truncate(prompt_max as usize);
            max_new_tokens = max_new_tokens.min(self.tokens_max() - prompt_max);
        }
        match rng.below(60) {
            0 => prompt.clear(),
            1 => max_new_tokens = 0,
            2 => max_new_tokens = u32::MAX,
            3 => prompt = tokens(rng, 90),
            _ => {}
        }
        let mut stop_tokens = if rng.percent(40) { tokens(rng, 2) } else { Vec::new() };
        stop_tokens.sort_unstable();
        let mut salt = rng.pick(&self.salts);
        if let Some(again) = again.filter(|_| rng.percent(10)) {
            (prompt, salt) = (again.prompt.clone(), again.salt);
        }
        let is_due = rng.percent(self.deadlines);
        let is_shared = self.later.percent(self.shared);
        let most = self.later.pick(&[8, 40, 60, 60]);
        let shared_tokens = if is_shared { self.later.below(most) } else { 0 };
        Submission {
            request,
            prompt,
            max_new_tokens,
            min_new_tokens: rng.pick(&[0, 0, 3, 8]),
            needs_tokens: self.ahead.percent(self.needs_tokens),
            stop_tokens,
            salt,
            shared_tokens,
            tenant: TenantId(rng.below(self.num_tenants) + 100 * u32::from(rng.percent(1))),
            class: ClassId(rng.below(4) as u8),
            deadline: is_due.then(|| Micros(now.0 + u64::from(rng.below(60_000)))),
        }
    }
}

fn config(rng: &mut Rng) -> CoreConfig {
    let block_size = rng.pick(&[1, 2, 3, 4, 16]);
    let layout = rng.pick(&LAYOUTS);
    let num_pools = 1 + layout.iter().map(|(_, pool)| *pool).max().unwrap_or(0);
    // Room for one to a few requests.
    let mut pool = |_| (rng.pick(&[30, 50, 70]) + rng.below(60)).div_ceil(block_size);
    let class = |rng: &mut Rng| ClassSpec {
        ttft: rng.percent(10).then(|| Micros(u64::from(rng.below(40_000)))),
        itl: rng.percent(30).then(|| Micros(u64::from(rng.below(6_000)))),
    };
    CoreConfig {
        pools: (0..num_pools).map(&mut pool).collect(),
        workers: layout.iter().map(|(role, pool)| WorkerSpec { role: *role, pool: PoolId(*pool) }).collect(),
        block_size,
        step_tokens_max: 1 + rng.pick(&[4, 12, 40]).min(rng.below(41)),
        running_max: 1 + rng.below(8),
        waiting_max: rng.pick(&[4, 30, 30]),
        queue_tokens_max: rng.pick(&[40, 200, u64::MAX, u64::MAX]),
        request_tokens_max: 30 + rng.below(60),
        prefix_caching: rng.percent(85),
        hash_bits: rng.pick(&[128, 128, 64, 3, 3, 1]),
        classes: (0..1 + rng.below(3)).map(|_| class(rng)).collect(),
        bypasses_max: rng.pick(&[1, 2, 16]),
        overtakes_max: rng.pick(&[0, 1, 16]),
        chunk_tokens_min: rng.pick(&[1, 1, 4, 100]),
        ride_along_tokens_max: rng.pick(&[0, 4, 1_000]),
        quarantine: Micros(rng.pick(&[0, 20_000, u64::MAX])),
        plan_ahead: false,
        device_parts: false,
        cost: CostModel { step_ps: u64::from(rng.below(1_000_000_000)), ..CostModel::default() },
    }
}
