//! The two verbs of the core, [`Engine::apply`] and [`Engine::plan`]: dispatch only. What follows from an input is in
//! `intake.rs` and `completion.rs`, how a step is filled in `scheduler.rs`.
//!
//! Owner: the server's engine thread. Nothing here locks, waits, reads a clock or draws a random number: equal calls in
//! equal order give equal effects and plans (see `record.rs`). In the steady state of a running batch (nothing admitted,
//! nothing finished) neither verb allocates, provided that the caller reuses its plan, its effects and, by
//! [`Engine::recycle_sampled`], the vectors of its `StepDone`s.

use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::request::{Requests, Waiting};
use crate::scheduler::StepFiller;
use crate::worker::Worker;
use crate::{CoreConfig, Effect, Input, RequestId, Sampled, StepId, StepPlan, Timed, WorkerId};

/// The core: queues, requests, and each worker's KV pool and step.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) config: CoreConfig,
    pub(crate) workers: Vec<Worker>,
    pub(crate) requests: Requests,
    pub(crate) waiting: Waiting,
    pub(crate) next_arrival: u64,
    next_step: u64,
    /// The counters of [`Stats`]; its gauges are computed when asked for.
    pub(crate) totals: Stats,
    /// Emptied vectors of past `StepDone`s, at most one for each worker.
    pub(crate) spare: Vec<Vec<(RequestId, Sampled)>>,
    #[cfg(test)]
    pub(crate) fault: Option<crate::fault::Fault>,
}

/// What metrics read; a copy, taken after `apply` or `plan`. O(1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
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
    /// An engine without requests; all blocks are free.
    ///
    /// # Panics
    /// When the configuration is out of bounds; see [`CoreConfig`].
    #[must_use]
    pub fn new(config: CoreConfig) -> Self {
        if let Some(problem) = config.problem() {
            panic!("{problem}");
        }
        let workers: Vec<_> = config.workers.iter().map(|spec| Worker::new(spec, config.block_size)).collect();
        Engine {
            spare: Vec::with_capacity(workers.len()),
            workers,
            config,
            requests: Requests::default(),
            waiting: Waiting::default(),
            next_arrival: 0,
            next_step: 0,
            totals: Stats::default(),
            #[cfg(test)]
            fault: None,
        }
    }

    /// Takes one input; what follows from it is appended to `effects`.
    ///
    /// Complexity: `Submit` O(prompt) for the hashes; `Cancel` O(log waiting + its blocks); `StepDone` O(slices) and, for
    /// each finished request, its blocks.
    ///
    /// # Panics
    /// When the caller breaks the protocol: a request id twice, a result of a step that is not in flight, or a `StepDone` whose
    /// `sampled` are not exactly the step's sampling slices in order. No content of a [`crate::Submission`] panics.
    pub fn apply(&mut self, input: Timed<Input>, effects: &mut Vec<Effect>) {
        match input.input {
            Input::Submit(submission) => self.submit(submission, effects),
            Input::Cancel { request, reason } => self.cancel(request, reason, effects),
            Input::StepDone { worker, step, sampled } => self.step_done(worker, step, sampled, effects),
            Input::StepFailed { worker, step } => self.step_failed(worker, step, effects),
        }
    }

    /// Fills `plan` with the next step of an idle worker; `false`, with an empty plan, when the worker is busy or has
    /// nothing to run. The step is then in flight until its `StepDone`.
    ///
    /// # Panics
    /// When there is no such worker.
    pub fn plan(&mut self, worker: WorkerId, plan: &mut StepPlan, effects: &mut Vec<Effect>) -> bool {
        plan.slices.clear();
        plan.tokens.clear();
        plan.block_tables.clear();
        let state = &mut self.workers[usize::from(worker.0)];
        if state.step.is_some() {
            return false;
        }
        // What the running requests may come to need, so that the plan does not grow with every block that they fill.
        plan.block_tables.reserve(state.table_blocks_max);
        let budget = self.config.step_tokens_max + u32::from(planted!(self, ExceedBudget));
        StepFiller {
            config: &self.config,
            id: worker,
            worker: state,
            requests: &mut self.requests,
            waiting: &mut self.waiting,
            totals: &mut self.totals,
            plan,
            effects,
            budget,
            #[cfg(test)]
            fault: self.fault,
        }
        .fill();
        if plan.slices.is_empty() {
            let has_none = state.num_running() == 0 && self.waiting.is_empty();
            assert!(has_none, "{}: {worker:?} is idle although a request could run", InvariantId::Sch5);
            return false;
        }
        let (taken, budget) = (plan.tokens.len(), self.config.step_tokens_max);
        assert!(taken <= budget as usize, "{}: {taken} tokens in a step of {budget}", InvariantId::Sch1);
        plan.worker = worker;
        plan.step = StepId(self.next_step);
        self.next_step += 1;
        state.step = Some(plan.step);
        true
    }

    /// What metrics read. O(workers).
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { waiting: self.waiting.len() as u32, ..self.totals };
        for worker in &self.workers {
            stats.running += worker.num_running() as u32;
            stats.blocks_total += worker.pool.num_blocks();
            stats.blocks_live += worker.pool.num_live();
        }
        stats
    }

    /// Times that a prefix lookup met a block of equal hash and different content, since start. Harmless, as contents are
    /// compared; in production anything but 0 means that somebody makes collisions on purpose.
    #[must_use]
    pub fn hash_collisions(&self) -> u64 {
        self.workers.iter().map(|worker| worker.pool.collisions()).sum()
    }

    /// No request is known: nothing waits, runs or is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.len() == 0
    }

    /// An empty vector for the next `StepDone`: one that an earlier `StepDone` brought, while there is one.
    #[must_use]
    pub fn recycle_sampled(&mut self) -> Vec<(RequestId, Sampled)> {
        self.spare.pop().unwrap_or_default()
    }
}
