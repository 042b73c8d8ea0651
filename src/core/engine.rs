//! The two verbs of the core, [`Engine::apply`] and [`Engine::plan`]: dispatch only. What follows from an input is in
//! `intake.rs`, `completion.rs`, `suspects.rs` and `handoff.rs`, how a step is filled in `scheduler.rs`, and the third verb,
//! [`Engine::plan_ahead`], in `ahead.rs`.
//!
//! Owner: the server's engine thread. Nothing here locks, waits, reads a clock or draws a random number: equal calls in
//! equal order give equal effects and plans (see `record.rs`). In the steady state of a running batch (nothing admitted,
//! nothing finished) neither verb allocates, provided that the caller reuses its plan, its effects and, by
//! [`Engine::recycle_sampled`], the vectors of its `StepDone`s.

use crate::cost::Estimator;
use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::kv::KvPool;
use crate::prefill::Prefill;
use crate::queue::Waiting;
use crate::request::{Arrival, RequestIndex, Requests};
use crate::scheduler::StepFiller;
use crate::suspects::Quarantine;
use crate::tenants::Tenants;
use crate::visitors::Visitors;
use crate::worker::Worker;
use crate::{
    ClassId, CoreConfig, DeviceShare, Effect, Input, Micros, RequestId, Role, Sampled, StepId, StepPlan, TenantSpec,
    Timed, TransferId, WorkerId, policy,
};
use std::collections::{BTreeMap, BTreeSet};

/// The core: queues, requests, KV pools, and each worker's step.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) config: CoreConfig,
    pub(crate) pools: Vec<KvPool>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) requests: Requests,
    pub(crate) waiting: Waiting,
    pub(crate) tenants: Tenants,
    /// Requests that a decode worker is to take over.
    pub(crate) ready: BTreeMap<(ClassId, Arrival), RequestIndex>,
    pub(crate) transfers: BTreeMap<TransferId, RequestIndex>,
    pub(crate) deadlines: BTreeSet<(Micros, RequestIndex)>,
    pub(crate) quarantine: Quarantine,
    pub(crate) estimator: Estimator,
    pub(crate) visitors: Visitors,
    /// The latest time of an input.
    pub(crate) now: Micros,
    /// Counts what may let a waiting request start that could not before.
    pub(crate) changes: u64,
    /// A request has the right to blocks that nobody can give at present: the next step that is reported counts as a change.
    pub(crate) claim_waits: bool,
    /// That count when no ready request could be handed over.
    pub(crate) hand_off_blocked_at: Option<u64>,
    /// When a running request last finished, and the moving average of the time between two.
    pub(crate) last_finish: Option<Micros>,
    pub(crate) finish_interval_us: u64,
    /// The moving average of the output of requests that ended by themselves, in 1/256 tokens.
    pub(crate) output_tokens: u64,
    pub(crate) next_arrival: u64,
    pub(crate) next_transfer: u64,
    next_step: u64,
    /// Calls of [`Engine::plan`] that filled a step, even with nothing.
    pub(crate) num_plans: u64,
    /// The counters of [`Stats`]; its gauges are computed when asked for.
    pub(crate) totals: Stats,
    /// Emptied vectors of past `StepDone`s, at most one for each worker.
    pub(crate) spare: Vec<Vec<(RequestId, Sampled)>>,
    /// The prefills of the step that is being filled; empty between plans.
    pub(crate) prefills: Vec<Prefill>,
    /// Requests with blocks that the step that is being reported has filled; empty between inputs.
    pub(crate) filled: Vec<RequestIndex>,
    #[cfg(test)]
    pub(crate) fault: Option<crate::fault::Fault>,
}

/// What metrics read; a copy, taken after `apply` or `plan`. O(workers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests with blocks: running, or on their way from one worker to another.
    pub running: u32,
    pub waiting: u32,
    pub blocks_total: u32,
    /// Blocks referenced by a request. `blocks_live / blocks_total` is the KV usage.
    pub blocks_live: u32,
    /// Totals since start, in tokens, as vLLM counts them: looked up in, and found in, the prefix cache. A request counts
    /// when it is first scheduled, not again after a preemption.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
}

impl Engine {
    /// An engine without requests; all blocks are free, all workers alive and idle.
    ///
    /// # Panics
    /// When the configuration is out of bounds; see [`CoreConfig`].
    #[must_use]
    pub fn new(config: CoreConfig) -> Self {
        if let Some(problem) = config.problem() {
            panic!("{problem}");
        }
        let workers: Vec<_> = config.workers.iter().map(|spec| Worker::new(*spec)).collect();
        let mut engine = Engine {
            spare: Vec::with_capacity(workers.len()),
            prefills: Vec::with_capacity(policy::running_max(&config).min(4096)),
            filled: Vec::with_capacity(policy::running_max(&config).min(4096)),
            pools: config.pools.iter().map(|num_blocks| KvPool::new(*num_blocks, config.block_size)).collect(),
            workers,
            requests: Requests::default(),
            waiting: Waiting::new(&config),
            tenants: Tenants::new(),
            ready: BTreeMap::new(),
            transfers: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            quarantine: Quarantine::default(),
            estimator: Estimator::new(config.cost),
            visitors: Visitors::default(),
            now: Micros(0),
            changes: 0,
            claim_waits: false,
            hand_off_blocked_at: None,
            last_finish: None,
            finish_interval_us: 0,
            output_tokens: 0,
            config,
            next_arrival: 0,
            next_transfer: 0,
            next_step: 0,
            num_plans: 0,
            totals: Stats::default(),
            #[cfg(test)]
            fault: None,
        };
        engine.make_tenants();
        engine
    }

    /// Takes one input; what follows from it is appended to `effects`. The engine's time is the latest of all inputs'.
    ///
    /// Complexity: `Submit` O(prompt) for the hashes and the lookup; `Cancel` O(log waiting + its blocks); `StepDone`
    /// O(slices) and, for each finished request, its blocks; `WorkerLost` O(requests + blocks).
    ///
    /// # Panics
    /// When the caller breaks the protocol: a request id twice, a result of a step that is not in flight or of one that was
    /// planned ahead of it, a `StepDone` whose `sampled` are not exactly the step's sampling slices in order, or a worker that does not exist, is lost twice or comes
    /// back unlost. No content of a [`crate::Submission`] panics, and a result of a transfer that is over is ignored.
    pub fn apply(&mut self, input: Timed<Input>, effects: &mut Vec<Effect>) {
        self.now = self.now.max(input.at);
        match input.input {
            Input::Submit(submission) => self.submit(submission, effects),
            Input::Cancel { request, reason } => self.cancel(request, reason, effects),
            Input::StepDone { worker, step, device_us, sampled } => {
                self.step_done(worker, step, device_us, sampled, effects);
            }
            Input::StepFailed { worker, step } => self.step_failed(worker, step, &[], effects),
            Input::SetTenants(specs) => self.set_tenants(&specs),
            Input::Tick => {}
            Input::TransferDone { transfer } => self.transfer_done(transfer, effects),
            Input::TransferFailed { transfer } => self.transfer_failed(transfer, effects),
            Input::WorkerLost { worker } => self.worker_lost(worker, effects),
            Input::WorkerBack { worker } => self.worker_back(worker),
        }
        self.expire(effects);
        self.hand_off(effects);
    }

    /// Fills `plan` with the next step of an idle worker; `false`, with an empty plan, when the worker is busy, lost, or has
    /// nothing to run. The step is then in flight until its `StepDone`, and [`Engine::plan_ahead`] may give the next one.
    ///
    /// # Panics
    /// When there is no such worker.
    pub fn plan(&mut self, worker: WorkerId, plan: &mut StepPlan, effects: &mut Vec<Effect>) -> bool {
        plan.clear();
        let state = &mut self.workers[usize::from(worker.0)];
        if state.step.is_some() || !state.is_alive {
            return false;
        }
        // All of them may fill a block at once, and not before a long time.
        plan.blocks.reserve(state.num_running());
        self.pools[state.pool()].choose_anew();
        self.num_plans += 1;
        let share = self.share(worker);
        StepFiller::new(self, worker, plan, effects).fill();
        if plan.slices.is_empty() {
            self.assert_nothing_to_run(worker);
            return false;
        }
        let (taken, budget) = (plan.tokens.len(), self.config.step_tokens_max);
        assert!(taken <= budget as usize, "{}: {taken} tokens in a step of {budget}", InvariantId::Sch1);
        (plan.worker, plan.share) = (worker, share);
        plan.step = self.new_step();
        let state = &mut self.workers[usize::from(worker.0)];
        (state.step, state.share) = (Some(plan.step), share);
        true
    }

    pub(crate) fn new_step(&mut self) -> StepId {
        self.next_step += 1;
        StepId(self.next_step - 1)
    }

    /// SCH-5 of a worker that has just planned nothing.
    fn assert_nothing_to_run(&self, id: WorkerId) {
        let worker = &self.workers[usize::from(id.0)];
        let has_room = self.pools[worker.pool()].num_live() == 0;
        let could_start = !self.waiting.is_empty() && has_room && self.duty(id).admits_max == u32::MAX;
        let could_go_on = worker.num_running() > 0 && !self.is_short(worker.pool());
        assert!(!could_start && !could_go_on, "{}: {id:?} is idle although a request could run", InvariantId::Sch5);
    }

    /// What a worker does at present, given who else is alive.
    pub(crate) fn duty(&self, id: WorkerId) -> policy::Duty {
        let is_there = |role| self.workers.iter().any(|worker| worker.is_alive && worker.spec.role == role);
        let role = self.workers[usize::from(id.0)].spec.role;
        if role == Role::Mixed {
            return policy::duty(role, false, false, 0);
        }
        let (has_prefill, has_decode) = (is_there(Role::Prefill), is_there(Role::Decode));
        policy::duty(role, has_prefill, has_decode, self.config.ride_along_tokens_max)
    }

    /// The other workers of a worker's device, as far as they are alive.
    fn beside(&self, id: WorkerId) -> impl Iterator<Item = &Worker> {
        let (at, pool) = (usize::from(id.0), self.workers[usize::from(id.0)].pool());
        let others = self.workers.iter().enumerate().filter(move |(other, _)| *other != at);
        others.map(|(_, worker)| worker).filter(move |worker| worker.is_alive && worker.pool() == pool)
    }

    /// How much of its device a worker's next step has, as others are at work now.
    pub(crate) fn share(&self, id: WorkerId) -> DeviceShare {
        if planted!(self, IgnoreOthers) {
            return DeviceShare::Whole;
        }
        let is_at_work = |worker: &Worker| worker.step.is_some() || worker.num_running() > 0;
        let are_others = self.beside(id).any(is_at_work) || planted!(self, KeepToPart);
        policy::share(self.config.device_parts, are_others)
    }

    /// Whether the cost model learns from the step that a worker reports.
    pub(crate) fn teaches(&self, id: WorkerId) -> bool {
        let share = self.workers[usize::from(id.0)].share;
        policy::teaches(self.config.device_parts, share, self.beside(id).next().is_some())
    }

    /// Whether a decode on this pool waits for a block.
    pub(crate) fn is_short(&self, pool: usize) -> bool {
        self.workers.iter().any(|worker| worker.pool() == pool && worker.waits_for_block())
    }

    /// Whether a decode of another worker waits for a block of this one's pool; its own next plan looks anew.
    pub(crate) fn is_short_by_others(&self, id: WorkerId) -> bool {
        let pool = self.workers[usize::from(id.0)].pool();
        let mut others = self.workers.iter().enumerate().filter(|(at, _)| *at != usize::from(id.0));
        others.any(|(_, worker)| worker.pool() == pool && worker.waits_for_block())
    }

    fn set_tenants(&mut self, specs: &[TenantSpec]) {
        self.tenants.set(specs);
        self.make_tenants();
        self.changes += 1;
    }

    fn make_tenants(&mut self) {
        self.pools.iter_mut().for_each(|pool| pool.make_tenants(self.tenants.len()));
        self.waiting.make_tenants(self.tenants.len());
    }

    /// What metrics read. O(workers).
    #[must_use]
    pub fn stats(&self) -> Stats {
        let running = self.requests.len() - self.waiting.len();
        let mut stats = Stats { waiting: self.waiting.len() as u32, running: running as u32, ..self.totals };
        for pool in &self.pools {
            stats.blocks_total += pool.num_blocks();
            stats.blocks_live += pool.num_live();
        }
        stats
    }

    /// Times that a prefix lookup met a block of equal hash and different content, since start. Harmless, as contents are
    /// compared; in production anything but 0 means that somebody makes collisions on purpose.
    #[must_use]
    pub fn hash_collisions(&self) -> u64 {
        self.pools.iter().map(KvPool::collisions).sum()
    }

    /// No request is known: nothing waits, runs or is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.len() == 0
    }

    /// When the next request must be stopped, if any has a deadline: an [`Input::Tick`] then does it.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Micros> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// An empty vector for the next `StepDone`: one that an earlier `StepDone` brought, while there is one.
    #[must_use]
    pub fn recycle_sampled(&mut self) -> Vec<(RequestId, Sampled)> {
        self.spare.pop().unwrap_or_default()
    }
}
