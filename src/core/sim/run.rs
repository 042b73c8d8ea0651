//! One run: the turns, and what is checked after each.

use super::Failure;
use super::client::{Client, refusal, request_of};
use super::device::Device;
use super::replay::Log;
use super::rng::Rng;
use super::workload::Workload;
use crate::fault::Fault;
use crate::{
    CancelReason, Effect, Engine, FinishReason, Input, InvariantId, Micros, RequestId, StepPlan, Timed, WorkerId,
    policy,
};

/// How often the interesting things happened.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    steps: u64,
    tokens: u64,
    preemptions: u64,
    prefix_hits: u64,
    collisions: u64,
    stopped: u64,
    cancelled: u64,
    cancelled_in_flight: u64,
    failed: u64,
    failed_steps: u64,
    refused: u64,
    out_of_order: u64,
}

impl Coverage {
    fn counts(&mut self) -> [(&'static str, &mut u64); 12] {
        [
            ("steps", &mut self.steps),
            ("tokens", &mut self.tokens),
            ("preemptions", &mut self.preemptions),
            ("prefix hits", &mut self.prefix_hits),
            ("collisions", &mut self.collisions),
            ("stops", &mut self.stopped),
            ("cancels", &mut self.cancelled),
            ("cancels in flight", &mut self.cancelled_in_flight),
            ("failures", &mut self.failed),
            ("failed steps", &mut self.failed_steps),
            ("refusals", &mut self.refused),
            ("steps out of order", &mut self.out_of_order),
        ]
    }

    pub(crate) fn add(&mut self, other: &Coverage) {
        let mut other = other.clone();
        for ((_, sum), (_, count)) in self.counts().into_iter().zip(other.counts()) {
            *sum += *count;
        }
    }

    /// A run that never meets the hard cases proves nothing.
    pub(crate) fn assert_all_seen(mut self) {
        for (name, count) in self.counts() {
            assert!(*count > 0, "the seeds saw no {name}");
        }
    }
}

/// The state of one run. Request `n` is the n-th that was submitted.
pub(crate) struct Run {
    rng: Rng,
    workload: Workload,
    engine: Engine,
    devices: Vec<Device>,
    clients: Vec<Client>,
    in_flight: Vec<StepPlan>,
    effects: Vec<Effect>,
    now: Micros,
    coverage: Coverage,
    /// All that went in and came out, when it is wanted.
    pub(crate) log: Option<Log>,
}

impl Run {
    pub(crate) fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut rng = Rng::new(seed);
        let workload = Workload::new(&mut rng);
        let config = &workload.config;
        let mut engine = Engine::new(config.clone());
        engine.fault = fault;
        engine.workers.iter_mut().for_each(|worker| worker.pool.fault = fault);
        let devices = config.workers.iter().map(|spec| Device::new(spec.num_blocks, config.block_size)).collect();
        Run {
            rng,
            engine,
            devices,
            clients: Vec::new(),
            in_flight: Vec::new(),
            effects: Vec::new(),
            now: Micros(0),
            coverage: Coverage::default(),
            log: None,
            workload,
        }
    }

    pub(crate) fn config(&self) -> &crate::CoreConfig {
        &self.workload.config
    }

    /// Runs until every request is finished.
    pub(crate) fn finish(mut self) -> Result<Coverage, Failure> {
        self.drive()?;
        Ok(self.coverage)
    }

    /// As [`Run::finish`], for those who want the log.
    pub(crate) fn drive(&mut self) -> Result<(), Failure> {
        for _ in 0..20_000 {
            let all_submitted = self.clients.len() as u64 == self.workload.num_requests;
            if all_submitted && self.engine.is_idle() {
                return self.check_end();
            }
            self.now.0 += u64::from(self.rng.below(1_000));
            match self.rng.below(5) {
                0 if !all_submitted => self.submit()?,
                1 => self.cancel()?,
                _ => self.complete()?,
            }
            // A worker may stay idle for a while, so that several inputs come between two plans.
            for at in 0..self.devices.len() {
                if self.rng.percent(80) {
                    self.plan(WorkerId(at as u8))?;
                }
            }
            self.engine.check().map_err(|(id, detail)| Failure::new(id, detail))?;
            self.check_in_flight()?;
        }
        Err(Failure::new("progress", "the run does not end".to_owned()))
    }

    fn submit(&mut self) -> Result<(), Failure> {
        let request = RequestId(self.clients.len() as u64);
        let submission = self.workload.submission(&mut self.rng, request);
        let refusal = refusal(&self.workload.config, self.engine.stats().waiting, &submission);
        self.clients.push(Client::new(submission.clone(), refusal));
        self.apply(Input::Submit(submission))?;
        let is_refused = self.clients[request.0 as usize].is_finished;
        check(is_refused == refusal.is_some(), "refusal", || format!("{request:?} expected {refusal:?}"))
    }

    fn cancel(&mut self) -> Result<(), Failure> {
        if !self.rng.percent(self.workload.cancels) {
            return Ok(());
        }
        // One past the known ones, too.
        let request = RequestId(u64::from(self.rng.below(self.clients.len() as u32 + 1)));
        let reasons =
            [CancelReason::ClientGone, CancelReason::SlowReader, CancelReason::StopString, CancelReason::Shutdown];
        let reason = self.rng.pick(&reasons);
        let is_in_flight = self.in_flight.iter().flat_map(|plan| &plan.slices).any(|slice| slice.request == request);
        let was_finished = self.clients.get(request.0 as usize).is_none_or(|client| client.is_finished);
        if let Some(client) = self.clients.get_mut(request.0 as usize) {
            client.cancel(reason);
        }
        self.apply(Input::Cancel { request, reason })?;
        self.coverage.cancelled_in_flight += u64::from(is_in_flight && !was_finished);
        let is_finished = self.clients.get(request.0 as usize).is_none_or(|client| client.is_finished);
        let at_once = was_finished || !is_in_flight;
        check(is_finished == at_once, "cancel", || format!("{request:?}, in flight: {is_in_flight}"))
    }

    /// Executes and reports one of the steps in flight.
    fn complete(&mut self) -> Result<(), Failure> {
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let at = self.rng.below(self.in_flight.len() as u32) as usize;
        self.coverage.out_of_order += u64::from(at > 0);
        let plan = self.in_flight.remove(at);
        let device = &mut self.devices[usize::from(plan.worker.0)];
        let step_fails = self.rng.percent(self.workload.failures) && self.rng.percent(20);
        if step_fails {
            device.fail(&plan, &mut self.clients)?;
            self.coverage.failed_steps += 1;
            self.apply(Input::StepFailed { worker: plan.worker, step: plan.step })?;
        } else {
            let mut sampled = self.engine.recycle_sampled();
            device.run(&plan, &mut self.clients, &mut self.rng, self.workload.failures, &mut sampled)?;
            self.apply(Input::StepDone { worker: plan.worker, step: plan.step, sampled })?;
        }
        for slice in &plan.slices {
            let client = &self.clients[slice.request.0 as usize];
            let must_end = client.has_failed && !client.is_finished;
            check(!must_end, "finish reason", || format!("{:?} failed and goes on", slice.request))?;
        }
        Ok(())
    }

    fn apply(&mut self, input: Input) -> Result<(), Failure> {
        let input = Timed { at: self.now, input };
        if let Some(log) = &mut self.log {
            log.input(&input);
        }
        self.engine.apply(input, &mut self.effects);
        self.take_effects()
    }

    fn plan(&mut self, worker: WorkerId) -> Result<(), Failure> {
        let mut plan = StepPlan::empty();
        let is_planned = self.engine.plan(worker, &mut plan, &mut self.effects);
        check(is_planned != plan.slices.is_empty(), "plan", || format!("{is_planned} with {plan:?}"))?;
        if is_planned {
            if let Some(log) = &mut self.log {
                log.plan(&plan);
            }
            self.check_plan(&plan)?;
            self.coverage.steps += 1;
        }
        self.take_effects()?;
        if is_planned {
            self.in_flight.push(plan);
        }
        Ok(())
    }

    /// Gives every effect to its client, and checks what no client can see alone.
    fn take_effects(&mut self) -> Result<(), Failure> {
        let effects = std::mem::take(&mut self.effects);
        for (at, effect) in effects.iter().enumerate() {
            let request = request_of(effect);
            let index = request.0 as usize;
            let is_known = index < self.clients.len();
            check(is_known, "unknown request", || format!("{effect:?}"))?;
            self.clients[index].take(effect, &self.workload.config)?;
            match *effect {
                Effect::Scheduled { cached_tokens, .. } => {
                    self.coverage.prefix_hits += u64::from(cached_tokens > 0);
                    let is_oldest = !self.clients[..index].iter().any(|older| older.is_waiting);
                    check(is_oldest, "admission order", || format!("{effect:?} although an older one waits"))?;
                    let thrashes = effects[..at].contains(&Effect::Preempted { request });
                    check(!thrashes, "thrash", || format!("{request:?} lost its blocks in the same plan"))?;
                }
                Effect::Token { .. } => self.coverage.tokens += 1,
                Effect::Preempted { .. } => self.coverage.preemptions += 1,
                Effect::Finish { reason, .. } => {
                    self.coverage.stopped += u64::from(reason == FinishReason::Stop);
                    self.coverage.cancelled += u64::from(matches!(reason, FinishReason::Cancelled(_)));
                    self.coverage.failed += u64::from(reason == FinishReason::Error);
                    self.coverage.refused += u64::from(matches!(reason, FinishReason::Refused(_)));
                }
            }
        }
        if let Some(log) = &mut self.log {
            log.effects(&effects);
        }
        self.effects = effects;
        self.effects.clear();
        Ok(())
    }

    /// The step's limits, and that `policy.rs` keeps its promise: the oldest request of a worker is in each of its steps
    /// and keeps its blocks, each decode is in each step, and nobody is left out while there is budget.
    fn check_plan(&self, plan: &StepPlan) -> Result<(), Failure> {
        let config = &self.workload.config;
        let budget = config.step_tokens_max as usize;
        check(plan.tokens.len() <= budget, InvariantId::Sch1, || format!("{} of {budget}", plan.tokens.len()))?;
        check(plan.slices.len() <= policy::running_max(config), "slices", || format!("{}", plan.slices.len()))?;
        let worker = &self.engine.workers[usize::from(plan.worker.0)];
        for (at, (_, index)) in worker.iter_running().enumerate() {
            let request = &self.engine.requests[index];
            let slices = plan.slices.iter().filter(|slice| slice.request == request.id).count();
            let must_run = at == 0 || request.remaining() == 1 || plan.tokens.len() < budget;
            check(slices == 1 || (slices == 0 && !must_run), "fairness", || {
                format!("{:?}, number {at} in age, has {slices} slices", request.id)
            })?;
        }
        // An effect of this plan tells who was preempted; those who kept their blocks must be older.
        let oldest = worker.iter_running().next().map(|(_, index)| self.engine.requests[index].id);
        let youngest_first = self.effects.iter().all(|effect| match *effect {
            Effect::Preempted { request } => oldest.is_some_and(|oldest| oldest < request),
            _ => true,
        });
        check(youngest_first, "preemption order", || format!("{:?} with {oldest:?} running", self.effects))
    }

    /// The device may still read and write the blocks of each step in flight.
    fn check_in_flight(&self) -> Result<(), Failure> {
        for plan in &self.in_flight {
            let pool = &self.engine.workers[usize::from(plan.worker.0)].pool;
            let freed = plan.block_tables.iter().find(|block| pool.is_free(**block));
            check(freed.is_none(), InvariantId::Kv3, || format!("{freed:?} is free while {:?} uses it", plan.step))?;
        }
        Ok(())
    }

    fn check_end(&mut self) -> Result<(), Failure> {
        for (at, client) in self.clients.iter().enumerate() {
            check(client.is_finished, InvariantId::Out2, || format!("request {at} has no last word"))?;
        }
        let stats = self.engine.stats();
        check(stats.blocks_live == 0, "leak", || format!("{stats:?}"))?;
        check(stats.running == 0 && stats.waiting == 0 && self.in_flight.is_empty(), "leak", || format!("{stats:?}"))?;
        let preemptions = self.clients.iter().map(|client| u64::from(client.preemptions)).sum::<u64>();
        check(stats.preemptions == preemptions, "stats", || format!("{stats:?}, {preemptions} preemptions"))?;
        check(stats.prefix_hits <= stats.prefix_queries, "stats", || format!("{stats:?}"))?;
        self.coverage.collisions = self.engine.hash_collisions();
        Ok(())
    }
}

fn check(holds: bool, name: impl std::fmt::Display, detail: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::new(name, detail())) }
}
