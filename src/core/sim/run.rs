//! One run: the turns, and what is checked after each.

use super::client::{Client, request_of};
use super::coverage::Coverage;
use super::device::{Device, LastSampled, Step, Tables};
use super::order::Ledger;
use super::replay::Log;
use super::rng::Rng;
use super::shares::Others;
use super::watch::{Before, Right, check_ceilings};
use super::workload::Workload;
use super::{Failure, check};
use crate::fault::Fault;
use crate::{
    BlockId, CacheSalt, CancelReason, Effect, Engine, FinishReason, Input, InvariantId, Micros, Refusal, RequestId,
    StepPlan, Submission, TenantSpec, Timed, TokenId, TransferId, WorkerId,
};
use std::collections::{HashMap, HashSet};

/// Blocks on their way.
struct Transfer {
    id: TransferId,
    request: RequestId,
    from: WorkerId,
    to: WorkerId,
    blocks: Vec<(BlockId, BlockId)>,
}

/// The state of one run. Request `n` is the n-th that was submitted.
pub(crate) struct Run {
    rng: Rng,
    pub(super) workload: Workload,
    pub(super) engine: Engine,
    /// By pool.
    pub(super) devices: Vec<Device>,
    /// By worker.
    pub(super) tables: Vec<Tables>,
    last_sampled: Vec<LastSampled>,
    /// The step that failed before the one in flight.
    pub(super) failed: Vec<Option<StepPlan>>,
    pub(super) clients: Vec<Client>,
    /// Those of a worker in order.
    pub(super) in_flight: Vec<Step>,
    transfers: Vec<Transfer>,
    ledger: Ledger,
    tenants: Vec<TenantSpec>,
    /// Tenants whose ceiling was lowered below what they held.
    lowered: HashSet<u32>,
    quarantine: HashMap<(CacheSalt, Vec<TokenId>), Micros>,
    effects: Vec<Effect>,
    now: Micros,
    pub(super) coverage: Coverage,
    pub(crate) log: Option<Log>,
}

impl Run {
    pub(crate) fn new(seed: u64, fault: Option<Fault>) -> Self {
        let mut rng = Rng::new(seed);
        let workload = Workload::new(&mut rng, Rng::new(!seed), seed % 5 < 2, seed % 7 > 4);
        let config = &workload.config;
        let mut engine = Engine::new(config.clone());
        engine.fault = fault;
        engine.waiting.fault = fault;
        engine.pools.iter_mut().for_each(|pool| pool.fault = fault);
        Run {
            rng,
            engine,
            devices: config.pools.iter().map(|blocks| Device::new(*blocks, config.block_size)).collect(),
            tables: config.workers.iter().map(|_| Tables::default()).collect(),
            last_sampled: config.workers.iter().map(|_| LastSampled::default()).collect(),
            failed: config.workers.iter().map(|_| None).collect(),
            clients: Vec::new(),
            in_flight: Vec::new(),
            transfers: Vec::new(),
            ledger: Ledger::new(config),
            tenants: Vec::new(),
            lowered: HashSet::new(),
            quarantine: HashMap::new(),
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
        self.set_tenants()?;
        for _ in 0..20_000 {
            let all_submitted = self.clients.len() as u64 == self.workload.num_requests;
            if all_submitted && self.engine.is_idle() {
                return self.check_end();
            }
            self.now.0 += u64::from(self.rng.below(1_000));
            match self.rng.below(10) {
                0 | 1 if !all_submitted => self.submit()?,
                2 | 3 => self.cancel()?,
                4 | 5 => self.transfer()?,
                6 => self.lose_or_return()?,
                7 => self.pass_time()?,
                _ => self.complete()?,
            }
            // A worker may stay idle for a while, so that several inputs come between two plans.
            for at in 0..self.engine.workers.len() {
                if self.rng.percent(80) {
                    self.plan(WorkerId(at as u8))?;
                }
                if self.workload.config.plan_ahead && self.workload.ahead.percent(80) {
                    self.plan_ahead(WorkerId(at as u8))?;
                }
            }
            self.engine.check().map_err(|(id, detail)| Failure::new(id, detail))?;
            self.check_in_flight()?;
            self.check_ceilings()?;
        }
        Err(Failure::new("progress", format!("the run does not end: {:?}", self.engine.stats())))
    }

    pub(super) fn pool(&self, worker: WorkerId) -> usize {
        usize::from(self.workload.config.workers[usize::from(worker.0)].pool.0)
    }

    fn set_tenants(&mut self) -> Result<(), Failure> {
        let specs = self.workload.tenants(&mut self.rng);
        self.lowered.extend(specs.iter().filter(|spec| spec.ceiling_blocks.is_some()).map(|spec| spec.tenant.0));
        self.ledger.set_tenants(&specs);
        self.tenants.clone_from(&specs);
        self.apply(Input::SetTenants(specs))
    }

    /// Now and then new settings, mostly nothing.
    fn pass_time(&mut self) -> Result<(), Failure> {
        if self.rng.percent(3) { self.set_tenants() } else { self.apply(Input::Tick) }
    }

    fn submit(&mut self) -> Result<(), Failure> {
        let request = RequestId(self.clients.len() as u64);
        let again = self.rng.below(self.clients.len() as u32 + 1) as usize;
        let again = self.clients.get(again).map(|client| client.submission.clone());
        let submission = self.workload.submission(&mut self.rng, request, self.now, again.as_ref());
        let expected = self.refusal(&submission);
        let queued = (self.engine.stats().waiting, self.engine.signals().queued_tokens);
        self.engine_apply(Input::Submit(submission.clone()));
        let refused = self.effects.iter().position(|effect| request_of(effect) == request);
        let found = match refused.map(|at| self.effects.remove(at)) {
            None => None,
            Some(Effect::Finish { reason: FinishReason::Refused(refusal), .. }) => Some(refusal),
            Some(effect) => return Err(Failure::new("refusal", format!("{effect:?}"))),
        };
        self.coverage.refused(found);
        self.check_refusal(&submission, expected, found, queued)?;
        let block_size = self.workload.config.block_size;
        let mut client = Client::new(submission.clone(), found.is_some(), block_size);
        client.is_poisoned = self.rng.percent(self.workload.poisoned);
        self.clients.push(client);
        if found.is_none() {
            self.ledger.insert(request, self.class(&submission), submission.tenant);
        }
        self.take_effects()?;
        self.check_deadlines()
    }

    fn class(&self, submission: &Submission) -> usize {
        usize::from(submission.class.0).min(self.workload.config.classes.len() - 1)
    }

    /// What must be answered at once to a submission, by the contract's own words, as far as it depends on no prediction.
    fn refusal(&self, submission: &Submission) -> Option<&'static str> {
        let config = &self.workload.config;
        let tokens = submission.prompt.len() as u64 + u64::from(submission.max_new_tokens);
        let spec = self.tenants.iter().rev().find(|spec| spec.tenant == submission.tenant).copied();
        let ceiling = spec.and_then(|spec| spec.ceiling_blocks).unwrap_or(u32::MAX);
        let blocks = config.pools.iter().copied().min().unwrap_or(0).min(ceiling);
        let slots = u64::from(blocks) * u64::from(config.block_size);
        let until = self.quarantine.get(&(submission.salt, submission.prompt.clone()));
        if submission.prompt.is_empty() || submission.max_new_tokens == 0 {
            Some("empty")
        } else if spec.is_none() && submission.tenant.0 != 0 {
            Some("unknown tenant")
        } else if tokens > u64::from(config.request_tokens_max) || tokens > slots + 1 {
            Some("too long")
        } else if until.is_some_and(|until| *until > self.now) {
            Some("quarantined")
        } else if self.engine.stats().waiting >= config.waiting_max {
            Some("queue full")
        } else {
            None
        }
    }

    fn check_refusal(
        &self,
        submission: &Submission,
        expected: Option<&'static str>,
        found: Option<Refusal>,
        (waiting, queued): (u32, u64),
    ) -> Result<(), Failure> {
        let limit = self.workload.config.queue_tokens_max;
        let promised = self.workload.config.classes[self.class(submission)].ttft;
        let is_over = waiting > 0 && queued + submission.prompt.len() as u64 > limit;
        let must_be_over = waiting > 0 && queued >= limit;
        let fits = match found {
            None => {
                expected.is_none() && !must_be_over && submission.deadline.is_none_or(|deadline| deadline > self.now)
            }
            Some(Refusal::Empty) => expected == Some("empty"),
            Some(Refusal::UnknownTenant) => expected == Some("unknown tenant"),
            Some(Refusal::TooLong) => expected == Some("too long"),
            Some(Refusal::Quarantined(backoff)) => expected == Some("quarantined") && backoff.retry_in.0 > 0,
            Some(Refusal::QueueFull(backoff)) => expected == Some("queue full") && backoff.queue_depth == waiting,
            Some(Refusal::QueueTokens(backoff)) => expected.is_none() && is_over && backoff.queue_depth == waiting,
            Some(Refusal::Deadline(_)) => expected.is_none() && (submission.deadline.is_some() || promised.is_some()),
        };
        check(fits, "refusal", || {
            format!("expected {expected:?}, found {found:?}, {waiting} wait with {queued} tokens")
        })
    }

    fn is_busy(&self, request: RequestId) -> bool {
        let plans = self.in_flight.iter().map(|step| &step.plan).chain(self.failed.iter().flatten());
        let in_step = plans.flat_map(|plan| &plan.slices).any(|slice| slice.request == request);
        in_step || self.transfers.iter().any(|transfer| transfer.request == request)
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
        let is_busy = self.is_busy(request);
        let was_finished = self.clients.get(request.0 as usize).is_none_or(|client| client.is_finished);
        if let Some(client) = self.clients.get_mut(request.0 as usize) {
            client.cancel(reason);
        }
        self.apply(Input::Cancel { request, reason })?;
        self.coverage.cancelled_in_flight += u64::from(is_busy && !was_finished);
        let is_finished = self.clients.get(request.0 as usize).is_none_or(|client| client.is_finished);
        let at_once = was_finished || !is_busy;
        check(is_finished == at_once, "cancel", || format!("{request:?}, at a device: {is_busy}"))
    }

    /// Executes and reports one of the steps in flight.
    fn complete(&mut self) -> Result<(), Failure> {
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let at = self.rng.below(self.in_flight.len() as u32) as usize;
        // A worker's first.
        let worker = self.in_flight[at].plan.worker;
        let at = self.in_flight.iter().position(|step| step.plan.worker == worker).unwrap_or(at);
        self.coverage.out_of_order += u64::from(at > 0);
        let step = self.in_flight.remove(at);
        if let Some(failed) = self.failed[usize::from(worker.0)].take() {
            self.complete_behind(&step, &failed)?;
            return self.check_ended(&failed);
        }
        self.execute(&step)?;
        self.check_ended(&step.plan)
    }

    fn execute(&mut self, step: &Step) -> Result<(), Failure> {
        let Step { plan, tables } = step;
        let (pool, at) = (self.pool(plan.worker), usize::from(plan.worker.0));
        let device = &mut self.devices[pool];
        let is_poisoned = plan.slices.iter().any(|slice| self.clients[slice.request.0 as usize].is_poisoned);
        if is_poisoned || (self.rng.percent(self.workload.failures) && self.rng.percent(20)) {
            device.fail(plan, tables)?;
            self.last_sampled[at].note(&[]);
            self.coverage.failed_steps += 1;
            self.coverage.bisections += u64::from(plan.slices.len() > 1);
            if self.in_flight.iter().any(|other| other.plan.worker == plan.worker) {
                // What is behind it is on the device already.
                self.failed[at] = Some(plan.clone());
                return self.apply(Input::StepFailed { worker: plan.worker, step: plan.step });
            }
            // It may have failed before the worker had kept any of it.
            if self.workload.later.percent(50) {
                plan.slices.iter().for_each(|slice| self.tables[at].forget(slice.request));
            }
            if let [slice] = &plan.slices[..] {
                self.blame(slice.request);
            }
            self.apply(Input::StepFailed { worker: plan.worker, step: plan.step })?;
        } else {
            let mut sampled = self.engine.recycle_sampled();
            let chance = (&mut self.rng, self.workload.failures);
            device.run(step, &self.last_sampled[at], &mut self.clients, chance, &mut sampled)?;
            self.last_sampled[at].note(&sampled);
            for slice in &plan.slices {
                let client = &self.clients[slice.request.0 as usize];
                self.coverage.slices_over += u64::from(client.is_finished);
                self.coverage.failed_over += u64::from(client.is_finished && client.has_failed);
                if self.clients[slice.request.0 as usize].has_failed {
                    self.blame(slice.request);
                }
            }
            let device_us = u64::from(self.rng.pick(&[0, 1, 300]) * self.rng.below(40));
            self.apply(Input::StepDone { worker: plan.worker, step: plan.step, device_us, sampled })?;
        }
        Ok(())
    }

    /// Who failed in a step that was reported has ended.
    fn check_ended(&self, plan: &StepPlan) -> Result<(), Failure> {
        for slice in &plan.slices {
            let client = &self.clients[slice.request.0 as usize];
            let must_end = client.has_failed && !client.is_finished;
            check(!must_end, "finish reason", || format!("{:?} failed and goes on", slice.request))?;
        }
        Ok(())
    }

    /// The core is about to learn that this request failed.
    pub(super) fn blame(&mut self, request: RequestId) {
        let client = &mut self.clients[request.0 as usize];
        if client.is_finished {
            return;
        }
        client.has_failed = true;
        if !client.is_ending() {
            let key = (client.submission.salt, client.submission.prompt.clone());
            self.quarantine.insert(key, Micros(self.now.0.saturating_add(self.workload.config.quarantine.0)));
        }
    }

    /// Executes and reports one of the transfers on their way.
    fn transfer(&mut self) -> Result<(), Failure> {
        if self.transfers.is_empty() {
            // Nobody asked for it, or it is long over.
            return self.apply(Input::TransferDone { transfer: TransferId(u64::MAX) });
        }
        let at = self.rng.below(self.transfers.len() as u32) as usize;
        let transfer = self.transfers.remove(at);
        let fails = self.rng.percent(self.workload.transfer_failures);
        let (from, to) = (self.pool(transfer.from), self.pool(transfer.to));
        for (source, target) in &transfer.blocks {
            let content = self.devices[from].read(*source);
            self.devices[to].write(*target, Some(&content[..]).filter(|_| !fails));
        }
        self.coverage.transfers += u64::from(!fails);
        self.coverage.failed_transfers += u64::from(fails);
        let transfer = transfer.id;
        self.apply(if fails { Input::TransferFailed { transfer } } else { Input::TransferDone { transfer } })
    }

    fn lose_or_return(&mut self) -> Result<(), Failure> {
        let at = self.rng.below(self.engine.workers.len() as u32) as usize;
        let worker = WorkerId(at as u8);
        if !self.engine.workers[at].is_alive {
            return self.apply(Input::WorkerBack { worker });
        }
        if !self.rng.percent(self.workload.losses * 5) {
            return Ok(());
        }
        self.coverage.lost_workers += 1;
        let pool = self.pool(worker);
        for Step { plan, tables } in self.in_flight.extract_if(.., |step| step.plan.worker == worker) {
            self.coverage.lost_ahead += u64::from(plan.slices.iter().any(|slice| slice.last_sampled));
            self.devices[pool].fail(&plan, &tables)?;
        }
        self.failed[at] = None;
        self.tables[at].forget_all();
        for transfer in self.transfers.extract_if(.., |transfer| transfer.from == worker || transfer.to == worker) {
            let to = usize::from(self.workload.config.workers[usize::from(transfer.to.0)].pool.0);
            transfer.blocks.iter().for_each(|(_, target)| self.devices[to].write(*target, None));
        }
        let others = self.engine.workers.iter().enumerate().filter(|(other, _)| *other != at);
        let is_shared =
            others.into_iter().any(|(_, worker)| worker.is_alive && usize::from(worker.spec.pool.0) == pool);
        if !is_shared {
            self.devices[pool].wipe();
        }
        self.apply(Input::WorkerLost { worker })
    }

    fn engine_apply(&mut self, input: Input) {
        let input = Timed { at: self.now, input };
        if let Some(log) = &mut self.log {
            log.input(&input);
        }
        self.clients.iter_mut().for_each(|client| client.before(self.now));
        self.engine.apply(input, &mut self.effects);
        if let Some(log) = &mut self.log {
            log.effects(&self.effects);
        }
    }

    pub(super) fn apply(&mut self, input: Input) -> Result<(), Failure> {
        self.engine_apply(input);
        self.take_effects()?;
        self.check_deadlines()
    }

    /// Nobody is past its deadline but those that a device is at.
    fn check_deadlines(&mut self) -> Result<(), Failure> {
        for at in 0..self.clients.len() {
            let is_due = self.clients[at].after();
            let request = RequestId(at as u64);
            check(!is_due || self.is_busy(request), "deadline", || format!("{request:?} is past its deadline"))?;
        }
        Ok(())
    }

    fn plan(&mut self, worker: WorkerId) -> Result<(), Failure> {
        let mut plan = StepPlan::empty();
        let (before, others) = (Before::new(&self.engine, worker), Others::new(&self.engine, worker));
        let is_planned = self.engine.plan(worker, &mut plan, &mut self.effects);
        check(is_planned != plan.slices.is_empty(), "plan", || format!("{is_planned} with {plan:?}"))?;
        if let Some(log) = &mut self.log {
            log.plan(worker, is_planned, &plan);
            log.effects(&self.effects);
        }
        if is_planned {
            before.check_step(&self.engine, &plan, &self.effects)?;
            self.coverage.steps += 1;
            self.coverage.stalls += u64::from(self.engine.workers[usize::from(worker.0)].is_stalled);
            self.check_share(&plan, &others)?;
        }
        match before.check_rights(&self.engine, &self.effects)? {
            Some(Right::Place) => self.coverage.places_claimed += 1,
            Some(Right::Floor) => self.coverage.floors_claimed += 1,
            None => {}
        }
        before.check_victims(&self.engine, &self.effects)?;
        before.check_evictions(&self.engine, worker, &self.effects)?;
        self.take_effects()?;
        if is_planned {
            let tables = &mut self.tables[usize::from(worker.0)];
            tables.take(&plan)?;
            let tables = tables.of_plan(&plan);
            self.in_flight.push(Step { plan, tables });
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
            let (class, tenant) = (self.class(&self.clients[index].submission), self.clients[index].submission.tenant);
            let (was_waiting, known) = (self.clients[index].is_waiting, self.clients[index].known());
            let is_first = self.clients[index].is_fresh();
            self.clients[index].take(effect, &self.workload.config)?;
            self.coverage.effect(effect);
            match effect {
                Effect::Scheduled { cached_tokens, .. } => {
                    self.ledger.start(request)?;
                    if is_first {
                        self.ledger.charge(class, tenant, known - cached_tokens);
                    }
                    let thrashes = effects[..at].contains(&Effect::Preempted { request });
                    check(!thrashes, "thrash", || format!("{request:?} lost its blocks in the same plan"))?;
                }
                Effect::Preempted { .. } => {
                    self.ledger.insert(request, class, tenant);
                    self.forget_tables(request, 50);
                }
                Effect::Token { .. } => self.ledger.charge(class, tenant, 1),
                Effect::Finish { .. } => {
                    if was_waiting {
                        self.ledger.remove(request);
                    }
                    let uncharged = self.clients[index].num_uncharged();
                    self.coverage.refunds += u64::from(uncharged > 0);
                    self.ledger.refund(class, tenant, uncharged);
                    self.forget_tables(request, 100);
                }
                Effect::Transfer { transfer, from, to, blocks, .. } => {
                    let (id, from, to, blocks) = (*transfer, *from, *to, blocks.clone());
                    self.transfers.push(Transfer { id, request, from, to, blocks });
                }
                Effect::Moved { worker, .. } => {
                    let here = usize::from(worker.0);
                    let others = self.tables.iter_mut().enumerate().filter(|(at, _)| *at != here);
                    others.for_each(|(_, tables)| tables.forget(request));
                }
            }
        }
        self.effects = effects;
        self.effects.clear();
        Ok(())
    }

    /// Workers may forget a request that is not on them; `percent` of them do.
    fn forget_tables(&mut self, request: RequestId, percent: u32) {
        for tables in &mut self.tables {
            if self.workload.later.percent(percent) {
                tables.forget(request);
            }
        }
    }

    /// The devices may still read and write the blocks of each step in flight, and of each transfer.
    fn check_in_flight(&self) -> Result<(), Failure> {
        for Step { plan, tables } in &self.in_flight {
            let pool = &self.engine.pools[self.pool(plan.worker)];
            let mut blocks = plan.slices.iter().flat_map(|slice| tables.of(slice));
            let freed = blocks.find(|block| pool.is_free(**block));
            check(freed.is_none(), InvariantId::Kv3, || format!("{freed:?} is free while {:?} uses it", plan.step))?;
        }
        for transfer in &self.transfers {
            let (from, to) = (self.pool(transfer.from), self.pool(transfer.to));
            let pools = &self.engine.pools;
            let freed = |(source, target): &&(_, _)| pools[from].is_free(*source) || pools[to].is_free(*target);
            let freed = transfer.blocks.iter().find(freed);
            check(freed.is_none(), InvariantId::Hnd1, || format!("{freed:?} is free while {:?} copies", transfer.id))?;
        }
        Ok(())
    }

    fn check_ceilings(&mut self) -> Result<(), Failure> {
        // A lowered ceiling holds again once the tenant has come down to it.
        let engine = &self.engine;
        self.lowered.retain(|tenant| check_ceilings(engine, |other| other == *tenant).is_err());
        check_ceilings(engine, |tenant| !self.lowered.contains(&tenant))
    }

    fn check_end(&mut self) -> Result<(), Failure> {
        for (at, client) in self.clients.iter().enumerate() {
            check(client.is_finished, InvariantId::Out2, || format!("request {at} has no last word"))?;
        }
        let stats = self.engine.stats();
        check(stats.blocks_live == 0, "leak", || format!("{stats:?}"))?;
        let is_empty = self.in_flight.is_empty() && self.transfers.is_empty();
        check(stats.running == 0 && stats.waiting == 0 && is_empty, "leak", || format!("{stats:?}"))?;
        let preemptions = self.clients.iter().map(|client| u64::from(client.preemptions)).sum::<u64>();
        check(stats.preemptions == preemptions, "stats", || format!("{stats:?}, {preemptions} preemptions"))?;
        check(stats.prefix_hits <= stats.prefix_queries, "stats", || format!("{stats:?}"))?;
        let signals = self.engine.signals();
        let is_calm = signals.queued_tokens == 0 && signals.blocks_live + signals.blocks_pinned + signals.running == 0;
        check(is_calm && signals.queue_pressure == 0, "signals", || format!("{signals:?}"))?;
        self.coverage.collisions = self.engine.hash_collisions();
        Ok(())
    }
}
