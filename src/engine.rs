//! The loop between requests and steps: inputs -> core -> effects. Owns the core and the stream table; the only module
//! that knows both the core and the workers.
//!
//! One thread. Everything that happens reaches it through one bounded inbox; a turn drains the inbox, withdraws requests
//! whose clients have gone, plans a step for each idle worker, and where the core is made for it a step ahead for those that
//! are at one, and tells the streams what came of it. Cost of a turn: O(inputs + streams + workers) with a few nanoseconds a
//! stream.

mod handle;
mod links;
mod outlook;
mod streams;
mod threads;

pub(crate) use threads::{serve_mover, serve_worker};

pub use handle::{EngineHandle, EngineLimits};
pub use outlook::Outlook;

use crate::record::Recorder;
use crate::telemetry::Telemetry;
use crate::worker::{StepCommand, StepResult, Transfer};
use handle::{Message, Shared};
use kvern_core::{
    CancelReason, Effect, Engine as Core, Input, Micros, StepPlan, TenantId, Timed, TransferId, WorkerId,
};
use links::{Links, Parts};
use outlook::Observer;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::{Duration, Instant};
use streams::Streams;

/// Most inbox messages of one turn, so that a flood of submissions cannot keep a finished step waiting.
const MESSAGES_PER_TURN_MAX: usize = 256;

/// A turn at least this often, so that what is told of the load is of now.
const TURN: Duration = Duration::from_secs(1);

/// The engine thread's state.
pub struct EngineLoop {
    core: Core,
    recorder: Option<Recorder>,
    streams: Streams,
    inbox: Receiver<Message>,
    links: Links,
    /// Where blocks are moved between pools; `None` with one pool.
    mover: Option<SyncSender<Transfer>>,
    /// Transfers under way.
    moving: Vec<(TransferId, WorkerId, WorkerId)>,
    /// Workers that are gone, but for transfers from or to them.
    dying: Vec<WorkerId>,
    shared: Arc<Shared>,
    telemetry: Arc<Telemetry>,
    observer: Observer,
    tenant_names: HashMap<TenantId, Arc<str>>,
    started: Instant,
    effects: Vec<Effect>,
    /// What follows from the effects that were dispatched; empty between turns.
    following: Vec<Input>,
}

/// What an engine is made of.
pub(crate) struct EngineParts {
    pub(crate) core: Core,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) inbox: Receiver<Message>,
    /// To the idle workers, in the core's order; they report to the inbox. Each takes two commands without waiting.
    pub(crate) workers: Vec<SyncSender<StepCommand>>,
    /// To the thread that moves blocks between pools, where there are several.
    pub(crate) mover: Option<SyncSender<Transfer>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) telemetry: Arc<Telemetry>,
    /// Saturation that replicas should have, in thousandths.
    pub(crate) target_saturation: u32,
}

impl EngineLoop {
    #[must_use]
    pub(crate) fn new(parts: EngineParts) -> Self {
        let EngineParts { core, recorder, inbox, workers, mover, shared, telemetry, target_saturation } = parts;
        let steps_max = if core.plans_ahead() { 2 } else { 1 };
        EngineLoop {
            core,
            recorder,
            streams: Streams::new(Arc::clone(&shared), Arc::clone(&telemetry)),
            inbox,
            links: Links::new(workers, steps_max),
            mover,
            moving: Vec::new(),
            dying: Vec::new(),
            shared,
            telemetry,
            observer: Observer::new(target_saturation),
            tenant_names: HashMap::new(),
            started: Instant::now(),
            effects: Vec::new(),
            following: Vec::new(),
        }
    }

    /// Runs until it has drained or all workers are lost.
    pub fn run(mut self) {
        while self.take_messages() {
            self.withdraw_closed();
            self.start_steps();
            let now = self.now();
            if let Some(recorder) = &mut self.recorder {
                recorder.turn(now);
            }
            self.publish();
            if self.shared.is_draining() && self.core.is_idle() {
                break;
            }
        }
    }

    /// Waits for a message, a deadline or the next turn, and applies what is in the inbox. `false` when nobody is left to
    /// work.
    fn take_messages(&mut self) -> bool {
        let mut next = match self.inbox.recv_timeout(self.patience()) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return false,
        };
        let mut left = MESSAGES_PER_TURN_MAX;
        while let Some(message) = next {
            self.take(message);
            if self.links.are_all_lost() {
                return false;
            }
            left -= 1;
            // The rest stays in the inbox.
            if left == 0 {
                break;
            }
            next = match self.inbox.try_recv() {
                Ok(message) => Some(message),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => return false,
            };
        }
        if self.core.next_deadline().is_some_and(|deadline| deadline <= self.now()) {
            self.apply(Input::Tick);
        }
        true
    }

    /// How long there is nothing to do without a message.
    fn patience(&self) -> Duration {
        let until = |deadline: Micros| Duration::from_micros(deadline.0.saturating_sub(self.now().0));
        self.core.next_deadline().map_or(TURN, |deadline| until(deadline).min(TURN))
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Submit(request, events) => {
                let id = request.id;
                let submission = self.streams.open(*request, events, self.now());
                self.apply(Input::Submit(submission));
                self.streams.accept(id);
            }
            Message::Cancel(request, reason) => self.apply(Input::Cancel { request, reason }),
            Message::SetTenants(tenants) => {
                let specs = tenants.iter().map(|tenant| tenant.spec).collect();
                self.tenant_names.extend(tenants.into_iter().map(|tenant| (tenant.spec.tenant, tenant.name)));
                self.apply(Input::SetTenants(specs));
            }
            Message::StepDone(result) => self.step_done(*result),
            Message::Transferred(transfer, outcome) => self.transferred(transfer, outcome),
            Message::Wake => {}
            Message::Shutdown => {
                let cancel = |request| Input::Cancel { request, reason: CancelReason::Shutdown };
                self.following.extend(self.streams.ids().map(cancel));
                self.apply_following();
            }
            Message::WorkerLost(worker) => self.worker_lost(worker),
        }
    }

    fn now(&self) -> Micros {
        Micros(self.started.elapsed().as_micros() as u64)
    }

    /// Applies an input, and all that follow from it.
    fn apply(&mut self, input: Input) {
        self.apply_one(input);
        self.apply_following();
    }

    /// Not without end: a cancel finishes its request, and a failed transfer is computed again.
    fn apply_following(&mut self) {
        while let Some(input) = self.following.pop() {
            self.apply_one(input);
        }
    }

    fn apply_one(&mut self, input: Input) {
        let input = Timed { at: self.now(), input };
        if let Some(recorder) = &mut self.recorder {
            recorder.input(&input);
        }
        self.core.apply(input, &mut self.effects);
        self.dispatch();
    }

    fn step_done(&mut self, result: StepResult) {
        let StepResult { plan, sampled, changes, logprobs, device_us, busy, idle, error } = result;
        let worker = plan.worker;
        if self.links.is_lost(worker) {
            return;
        }
        self.telemetry.on_step(plan.tokens.len());
        self.telemetry.on_device_time(worker, busy, idle);
        let StepPlan { step, share, slices, tokens, .. } = &plan;
        tracing::trace!(step = step.0, ?share, slices = slices.len(), tokens = tokens.len(), device_us, "step");
        self.streams.attach_logprobs(logprobs);
        let sampled = match error {
            None => {
                self.shared.progress();
                self.apply(Input::StepDone { worker, step: plan.step, device_us, sampled });
                self.core.recycle_sampled()
            }
            Some(error) => {
                tracing::error!(step = plan.step.0, slices = plan.slices.len(), error, "step failed");
                self.apply(Input::StepFailed { worker, step: plan.step });
                sampled
            }
        };
        self.links.finish(worker, Parts { plan, changes, sampled });
    }

    fn transferred(&mut self, transfer: TransferId, outcome: Result<(), String>) {
        self.moving.retain(|(other, ..)| *other != transfer);
        match outcome {
            Ok(()) => self.apply(Input::TransferDone { transfer }),
            Err(error) => {
                tracing::error!(transfer = transfer.0, error, "a transfer between KV pools failed");
                self.apply(Input::TransferFailed { transfer });
            }
        }
        self.bury();
    }

    /// A worker's thread has ended, and with it the step that it was at.
    fn worker_lost(&mut self, worker: WorkerId) {
        if !self.links.is_lost(worker) {
            tracing::error!(worker = worker.0, "a worker is lost; its requests go on elsewhere");
            self.links.lose(worker);
            self.dying.push(worker);
            self.bury();
        }
    }

    /// Tells the core of lost workers whose pool nobody touches any more.
    fn bury(&mut self) {
        let moving = std::mem::take(&mut self.moving);
        let is_touched = |worker: &WorkerId| moving.iter().any(|(_, from, to)| from == worker || to == worker);
        let gone: Vec<WorkerId> = self.dying.iter().copied().filter(|worker| !is_touched(worker)).collect();
        self.moving = moving;
        self.dying.retain(|worker| !gone.contains(worker));
        for worker in gone {
            self.apply(Input::WorkerLost { worker });
        }
    }

    /// Cancels requests whose receiver was dropped. Streams that produce tokens would show it at the next send; those
    /// that wait or prefill would not.
    fn withdraw_closed(&mut self) {
        let cancel = |request| Input::Cancel { request, reason: CancelReason::ClientGone };
        self.following.extend(self.streams.closed().map(cancel));
        self.apply_following();
    }

    fn start_steps(&mut self) {
        for worker in self.links.ids() {
            if let Some(plan) = self.links.idle_plan(worker) {
                self.start_step(worker, plan);
            }
            if let Some(plan) = self.links.plan_ahead(worker) {
                self.start_ahead(worker, plan);
            }
        }
    }

    fn start_ahead(&mut self, worker: WorkerId, mut plan: StepPlan) {
        let planned = self.core.plan_ahead(worker, &mut plan);
        if let Some(recorder) = &mut self.recorder {
            recorder.planned_ahead(worker, &plan, planned);
            // There never are any; the digest comes with them.
            recorder.effects(&[]);
        }
        if !planned {
            return self.links.keep(worker, plan);
        }
        self.telemetry.on_step_ahead(worker);
        self.links.start(worker, plan);
    }

    fn start_step(&mut self, worker: WorkerId, mut plan: StepPlan) {
        let planned = self.core.plan(worker, &mut plan, &mut self.effects);
        if let Some(recorder) = &mut self.recorder {
            recorder.planned(worker, &plan, planned);
        }
        self.dispatch();
        self.apply_following();
        if planned { self.links.start(worker, plan) } else { self.links.keep(worker, plan) }
    }

    /// Tells streams, workers and the mover. What follows from it is left in `following`: streams that cannot take a token are
    /// cancelled, and a transfer that nobody takes has failed.
    fn dispatch(&mut self) {
        let now = self.now();
        if let Some(recorder) = &mut self.recorder {
            recorder.effects(&self.effects);
        }
        for effect in self.effects.drain(..) {
            if let Effect::Transfer { transfer, from, to, blocks, .. } = effect {
                let job = Transfer { transfer, from, to, blocks };
                match self.mover.as_ref().map(|mover| mover.try_send(job)) {
                    Some(Ok(())) => self.moving.push((transfer, from, to)),
                    // It is computed again, which always works.
                    _ => self.following.push(Input::TransferFailed { transfer }),
                }
            } else if let Some(slow) = self.streams.take(effect, now) {
                self.following.push(Input::Cancel { request: slow, reason: CancelReason::SlowReader });
            }
        }
        self.streams.drain_changes(|change| self.links.tell(change));
    }

    fn publish(&mut self) {
        let stats = self.core.stats();
        self.telemetry.on_stats(&stats);
        self.shared.set_busy(stats.running + stats.waiting > 0 || self.links.is_any_busy());
        let now = self.now();
        if let Some(outlook) = self.observer.refresh(&self.core, now) {
            self.telemetry.on_outlook(outlook, &self.tenant_names);
            self.shared.tell(&outlook.signals);
        }
    }
}

/// However the loop ends, its handles must know: new requests are refused, and the streams end with the table.
impl Drop for EngineLoop {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

#[cfg(test)]
mod tests;
