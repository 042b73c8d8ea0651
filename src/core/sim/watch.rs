//! What a plan must keep: the step's limits, the promises of `policy.rs`, and whose blocks may be taken for it. Everything
//! here is judged from the state before and after the plan, by searching all of it.

use super::visits::Visits;
use super::{Failure, check};
use crate::cost::StepWork;
use crate::request::{Arrival, Phase, RequestIndex};
use crate::tenants::TenantSlot;
use crate::{BlockId, ClassId, Effect, Engine, InvariantId, RequestId, StepPlan, WorkerId, policy};

/// A tenant's part of a pool.
#[derive(Clone, Copy)]
struct Holding {
    live: u32,
    cached: u32,
    floor: u32,
    share: u32,
}

impl Holding {
    /// 0 below the floor, 1 within the share, 2 above it.
    fn standing(&self) -> u32 {
        if self.live <= self.share.min(self.floor) { 0 } else { 1 + u32::from(self.live > self.share) }
    }

    fn is_above(&self) -> bool {
        self.live + self.cached > self.share
    }
}

/// A request that holds blocks of the pool.
struct Holder {
    request: RequestId,
    tenant: usize,
    rank: (u32, ClassId, Arrival),
    is_moving: bool,
}

/// The pool of a worker before the worker's plan.
pub(crate) struct Before {
    holdings: Vec<Holding>,
    holders: Vec<Holder>,
    /// Its free blocks that lookups find, and whose they are.
    cached: Vec<(BlockId, TenantSlot)>,
    has_suspects: bool,
    /// What the last step's decodes take alone.
    decodes_us: u64,
    owed: Option<(RequestId, Right)>,
    visits: Visits,
}

/// What a tenant may start by although others are in its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    Place,
    Floor,
}

fn pool_of(engine: &Engine, worker: WorkerId) -> usize {
    usize::from(engine.config.workers[usize::from(worker.0)].pool.0)
}

fn holdings(engine: &Engine, pool: usize) -> Vec<Holding> {
    let state = &engine.pools[pool];
    let held = |slot| state.num_live_of(slot) + state.num_cached_of(slot);
    let is_active = |slot| held(slot) > 0 || engine.requests.iter().any(|(_, r)| r.tenant == slot && !r.is_over);
    let active = engine.tenants.iter().filter(|(slot, _)| is_active(*slot));
    let sum: u64 = active.map(|(_, tenant)| u64::from(tenant.spec.weight.max(1))).sum();
    let holding = |(slot, tenant): (TenantSlot, &crate::tenants::Tenant)| {
        let part = u64::from(state.num_blocks()) * u64::from(tenant.spec.weight.max(1)) / sum.max(1);
        let floor = tenant.spec.floor_blocks;
        let (live, cached) = (state.num_live_of(slot), state.num_cached_of(slot));
        Holding { live, cached, floor, share: floor.max(part as u32) }
    };
    engine.tenants.iter().map(holding).collect()
}

impl Before {
    pub(crate) fn new(engine: &Engine, worker: WorkerId) -> Self {
        let pool = pool_of(engine, worker);
        let holdings = holdings(engine, pool);
        let is_here = |phase| match phase {
            Phase::Waiting => false,
            Phase::Running(at) | Phase::Ready(at) => pool_of(engine, at) == pool,
            Phase::Moving { from, to, .. } => pool_of(engine, from) == pool || pool_of(engine, to) == pool,
        };
        let here = engine.requests.iter().filter(|(_, request)| is_here(request.phase) && !request.is_over);
        let holder = |(_, request): (_, &crate::request::Request)| {
            let tenant = request.tenant.0 as usize;
            let rank = rank(&holdings, request);
            Holder { request: request.id, tenant, rank, is_moving: matches!(request.phase, Phase::Moving { .. }) }
        };
        let holders = here.map(holder).collect();
        let has_suspects = !engine.workers[usize::from(worker.0)].suspects.is_empty();
        let state = &engine.pools[pool];
        let cached = state.free_blocks().filter(|block| state.published(*block).is_some());
        let cached = cached.map(|block| (block, state.owner(block))).collect();
        let owed = if has_suspects { None } else { owed(engine, worker) };
        let last = engine.workers[usize::from(worker.0)].work;
        let decodes = StepWork { prefill_tokens: 0, prefill_context: 0, ..last };
        let decodes_us = engine.estimator.predict_us(&decodes);
        let visits = Visits::new(engine, worker);
        Before { holdings, holders, cached, has_suspects, decodes_us, owed, visits }
    }

    /// Who had a right to start has started, unless room had to be made for decodes; gives the right.
    pub(crate) fn check_rights(&self, engine: &Engine, effects: &[Effect]) -> Result<Option<Right>, Failure> {
        let Some((owed, right)) = self.owed else { return Ok(None) };
        let started = |effect: &Effect| matches!(effect, Effect::Scheduled { request, .. } if *request == owed);
        let at = effects.iter().position(started);
        let makes_room = engine.requests.iter().any(|(_, request)| request.yields)
            || effects.iter().any(|effect| matches!(effect, Effect::Preempted { .. }));
        let name = if right == Right::Place { "place" } else { "floor" };
        check(at.is_some() || makes_room, name, || format!("{owed:?} has a right to start and waits"))?;
        Ok(at.map(|_| right))
    }

    /// Who was preempted for the plan: nobody's floor for those above their share, and not the best of all.
    pub(crate) fn check_victims(&self, engine: &Engine, effects: &[Effect]) -> Result<(), Failure> {
        let victim = effects.iter().find_map(|effect| match effect {
            Effect::Preempted { request } => self.holders.iter().find(|holder| holder.request == *request),
            _ => None,
        });
        let Some(victim) = victim else { return Ok(()) };
        let tenant = engine.tenants.iter().nth(victim.tenant).map(|(_, tenant)| tenant.spec);
        if tenant.is_some_and(|spec| spec.ceiling_blocks.is_some()) {
            return Ok(());
        }
        let others = || self.holders.iter().filter(|other| other.request != victim.request);
        let is_spared = |other: &Holder| other.rank.0 == 2 && !other.is_moving;
        check(victim.rank.0 > 0 || !others().any(is_spared), InvariantId::Ten1, || {
            format!("{:?} is below its floor and was preempted by one above its share", victim.request)
        })?;
        check(others().any(|other| other.rank < victim.rank), "preemption order", || {
            format!("{:?} was preempted although it is the best", victim.request)
        })
    }

    /// Whose cached blocks were taken: of no tenant within its share while another above it has some.
    pub(crate) fn check_evictions(&self, engine: &Engine, worker: WorkerId, effects: &[Effect]) -> Result<(), Failure> {
        if effects.iter().any(|effect| matches!(effect, Effect::Preempted { .. })) {
            return Ok(());
        }
        let after = holdings(engine, pool_of(engine, worker));
        let was_spared = |(before, after): (&Holding, &Holding)| {
            let unchanged = (before.live, before.cached) == (after.live, after.cached);
            unchanged && before.is_above() && after.is_above() && after.cached > 0
        };
        let spared = self.holdings.iter().zip(&after).any(was_spared);
        let pool = &engine.pools[pool_of(engine, worker)];
        let taken = self.cached.iter().filter(|(block, _)| pool.published(*block).is_none());
        // One that took blocks itself may have been above its share in between.
        let is_robbed = |owner: &&TenantSlot| {
            let (before, after) = (&self.holdings[owner.0 as usize], &after[owner.0 as usize]);
            !before.is_above() && before.live == after.live
        };
        let robbed = taken.map(|(_, owner)| owner).find(is_robbed);
        check(robbed.is_none() || !spared, "eviction order", || format!("{robbed:?} lost cached blocks"))
    }

    /// The step's limits, and who must be in it.
    pub(crate) fn check_step(&self, engine: &Engine, plan: &StepPlan, effects: &[Effect]) -> Result<(), Failure> {
        let config = &engine.config;
        let budget = config.step_tokens_max as usize;
        check(plan.tokens.len() <= budget, InvariantId::Sch1, || format!("{} of {budget}", plan.tokens.len()))?;
        check(plan.slices.len() <= policy::running_max(config), "slices", || format!("{}", plan.slices.len()))?;
        let worker = &engine.workers[usize::from(plan.worker.0)];
        check(worker.num_taken() <= policy::running_max(config), "running", || format!("{}", worker.num_taken()))?;
        if self.has_suspects {
            return Ok(());
        }
        let running = || worker.iter_running().map(|(_, _, index)| &engine.requests[index]);
        let slice_of = |request| plan.slices.iter().find(|slice| slice.request == request);
        // One that has just started may lack its last token only, and is a prefill all the same.
        let is_new = |id| effects.iter().any(|e| matches!(e, Effect::Scheduled { request, .. } if *request == id));
        let prefills = running().filter(|request| request.remaining() > 1 || is_new(request.id));
        let oldest = prefills.map(|request| request.arrival).min();
        let visits = Visits::new(engine, plan.worker);
        let mut work = StepWork::default();
        let mut itl = None;
        for request in running() {
            let is_this =
                |effect: &Effect| matches!(effect, Effect::Scheduled { request: new, .. } if *new == request.id);
            let is_old = !effects.iter().any(is_this);
            let is_decode =
                is_old && request.remaining() == 1 && slice_of(request.id).is_none_or(|slice| slice.start > 0);
            let count = plan.slices.iter().filter(|slice| slice.request == request.id).count();
            let has_promise = config.classes.iter().any(|c| c.itl.is_some()) || running().any(|r| r.deadline.is_some());
            let may_give_way = engine.tenants.len() > 1 && self.visits.may_be_busy(&visits, engine, request.tenant);
            let left = itl.is_none() && plan.tokens.len() < budget && !has_promise && !may_give_way;
            let must_run = (is_decode && !worker.is_stalled) || oldest == Some(request.arrival) || left;
            check(count == 1 || (count == 0 && (!must_run || worker.is_stalled)), "fairness", || {
                format!("{:?} has {count} slices", request.id)
            })?;
        }
        for slice in &plan.slices {
            let request = running().find(|request| request.id == slice.request);
            let Some(request) = request else { return Err(Failure::new(InvariantId::Sch2, format!("{slice:?}"))) };
            let is_this =
                |effect: &Effect| matches!(effect, Effect::Scheduled { request: new, .. } if *new == request.id);
            let is_new = effects.iter().any(is_this);
            if slice.tokens.len() == 1 && slice.sample && !is_new {
                work.add_decode(slice.start + 1);
                let objective = config.classes[usize::from(request.class.0)].itl.map(|itl| itl.0);
                // As long as it can be kept: decodes alone may take as long as the last step's or this one's.
                let pace = engine.pace_us(request).filter(|pace| *pace >= self.decodes_us);
                itl = [itl, objective, pace].into_iter().flatten().min();
            } else {
                work.add_prefill(slice.start, slice.tokens.len() as u32);
            }
        }
        let predicted = engine.estimator.predict_ps(&work) / 1_000_000;
        let within = itl.is_none_or(|itl| predicted <= itl);
        let is_least = work.prefill_tokens <= u64::from(config.chunk_tokens_min);
        check(within || is_least, "inter-token latency", || format!("{predicted} us of {itl:?} with {work:?}"))?;
        self.visits.check(engine, plan, effects)
    }
}

/// Who has the right to start on a worker whatever others hold there, as far as it is plain to see: without ceilings, and where
/// one of the others that could yield is enough.
fn owed(engine: &Engine, id: WorkerId) -> Option<(RequestId, Right)> {
    let worker = &engine.workers[usize::from(id.0)];
    let pool_number = worker.pool();
    let is_open = worker.is_alive && worker.step.is_none() && engine.duty(id).admits_max == u32::MAX;
    if !is_open || engine.tenants.has_ceilings() || engine.is_short(pool_number) || engine.waiting.is_empty() {
        return None;
    }
    let is_full = worker.num_taken() >= policy::running_max(&engine.config);
    if !is_full && !engine.tenants.has_floors() {
        return None;
    }
    // What others hold grows, and whose turn it is changes, without notice: it is looked at again after the next change.
    if worker.blocked_at == Some(engine.changes) {
        return None;
    }
    let candidate = engine.waiting.clone().next(|_, _| true)?;
    let request = &engine.requests[candidate.index];
    let pool = &engine.pools[pool_number];
    let holdings = holdings(engine, pool_number);
    let own = &holdings[request.tenant.0 as usize];
    let taken: usize = engine.workers.iter().filter(|other| other.pool() == pool_number).map(|w| w.num_taken()).sum();
    let blocks = request.num_tokens().div_ceil(engine.config.block_size);
    let needed = blocks + taken as u32;
    let tenants: Vec<_> =
        worker.iter_running().map(|(class, _, index)| (class, engine.requests[index].tenant)).collect();
    let count = |tenant| tenants.iter().filter(|(_, other)| *other == tenant).count();
    if is_full {
        let yields = |(class, tenant): &(ClassId, TenantSlot)| {
            *class >= request.class && count(*tenant) >= 2 && holdings[tenant.0 as usize].standing() > 0
        };
        let is_owed = count(request.tenant) == 0 && tenants.iter().any(yields) && pool.num_free() >= needed;
        return is_owed.then_some((request.id, Right::Place));
    }
    let is_within = own.live + pool.num_tables_of(request.tenant) + blocks <= own.floor;
    let ranked = |index: RequestIndex| (rank(&holdings, &engine.requests[index]), index);
    let best = engine.holders(pool_number).map(ranked).min();
    let is_at_rest = |index: RequestIndex| {
        let holder = &engine.requests[index];
        !holder.in_flight && !matches!(holder.phase, Phase::Moving { .. })
    };
    let at_rest = engine.holders(pool_number).filter(|index| is_at_rest(*index)).map(ranked);
    let first = at_rest.filter(|holder| Some(*holder) != best).max();
    let is_enough = first.is_some_and(|(rank, index)| {
        let own = engine.requests[index].table.iter().filter(|block| pool.ref_count(**block) == 1).count() as u32;
        rank.0 == 2 && pool.num_free() + own >= needed
    });
    let is_owed = is_within && pool.num_free() < needed && is_enough;
    is_owed.then_some((request.id, Right::Floor))
}

fn rank(holdings: &[Holding], request: &crate::request::Request) -> (u32, ClassId, Arrival) {
    (holdings[request.tenant.0 as usize].standing(), request.class, request.arrival)
}

/// No tenant of `exact` ceilings holds more of a pool than its ceiling, but for one request alone.
pub(crate) fn check_ceilings(engine: &Engine, is_exact: impl Fn(u32) -> bool) -> Result<(), Failure> {
    for (slot, tenant) in engine.tenants.iter().filter(|(_, tenant)| is_exact(tenant.spec.tenant.0)) {
        let ceiling = tenant.spec.ceiling_blocks.unwrap_or(u32::MAX);
        for (pool, state) in engine.pools.iter().enumerate() {
            let live = state.num_live_of(slot);
            let own = engine.holders(pool).filter(|index| engine.requests[*index].tenant == slot).count();
            check(live <= ceiling || own <= 1, InvariantId::Ten2, || {
                format!("{slot:?} holds {live} of {ceiling} blocks")
            })?;
        }
    }
    Ok(())
}
