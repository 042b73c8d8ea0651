//! The loop between requests and steps: inputs -> core -> effects. Owns the core and the stream table; the only module
//! that knows both the core and the workers.
//!
//! One thread. Everything that happens reaches it through one bounded inbox; a turn drains the inbox, withdraws requests
//! whose clients have gone, plans a step for an idle worker, and tells the streams what came of it. Cost of a turn:
//! O(inputs + streams) with a few nanoseconds a stream.

mod handle;
mod streams;

pub use handle::{EngineHandle, EngineLimits};

use crate::record::Recorder;
use crate::telemetry::Telemetry;
use crate::worker::{StepCommand, StepResult};
use handle::{Message, Shared};
use kvern_core::{CancelReason, Effect, Engine as Core, Input, Micros, RequestId, Sampled, StepPlan, Timed, WorkerId};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;
use streams::Streams;

/// The one worker of this version.
const WORKER: WorkerId = WorkerId(0);

/// Most inbox messages of one turn, so that a flood of submissions cannot keep a finished step waiting.
const MESSAGES_PER_TURN_MAX: usize = 256;

/// The engine thread's state.
pub struct EngineLoop {
    core: Core,
    recorder: Option<Recorder>,
    streams: Streams,
    inbox: Receiver<Message>,
    worker: SyncSender<StepCommand>,
    shared: Arc<Shared>,
    telemetry: Arc<Telemetry>,
    started: Instant,
    effects: Vec<Effect>,
    /// The plan to fill next; `None` while the worker has it.
    idle_plan: Option<StepPlan>,
    sampled: Vec<(RequestId, Sampled)>,
    cancels: Vec<(RequestId, CancelReason)>,
}

impl EngineLoop {
    /// `worker` leads to an idle worker that reports to the inbox.
    #[must_use]
    pub(crate) fn new(
        (core, recorder): (Core, Option<Recorder>),
        inbox: Receiver<Message>,
        worker: SyncSender<StepCommand>,
        telemetry: Arc<Telemetry>,
        shared: Arc<Shared>,
    ) -> Self {
        EngineLoop {
            core,
            recorder,
            streams: Streams::new(Arc::clone(&shared), Arc::clone(&telemetry)),
            inbox,
            worker,
            shared,
            telemetry,
            started: Instant::now(),
            effects: Vec::new(),
            idle_plan: Some(StepPlan::empty()),
            sampled: Vec::new(),
            cancels: Vec::new(),
        }
    }

    /// Runs until it has drained or the worker is lost.
    pub fn run(mut self) {
        while self.take_messages() {
            self.withdraw_closed();
            self.start_step();
            self.publish_stats();
            if self.shared.is_draining() && self.core.is_idle() {
                break;
            }
        }
    }

    /// Applies what is in the inbox; waits for a message when there is nothing else to do. `false` when the worker
    /// is lost.
    fn take_messages(&mut self) -> bool {
        let must_wait = self.idle_plan.is_none() || self.core.is_idle();
        let mut next = if must_wait { self.inbox.recv().ok() } else { self.inbox.try_recv().ok() };
        if must_wait && next.is_none() {
            return false;
        }
        for _ in 0..MESSAGES_PER_TURN_MAX {
            match next {
                None => break,
                Some(Message::Submit(request, events)) => {
                    let id = request.id;
                    let submission = self.streams.open(*request, events, self.now());
                    self.apply(Input::Submit(submission));
                    self.streams.accept(id);
                }
                Some(Message::Cancel(request, reason)) => self.apply(Input::Cancel { request, reason }),
                Some(Message::SetTenants(tenants)) => self.apply(Input::SetTenants(tenants)),
                Some(Message::StepDone(result)) => self.step_done(*result),
                Some(Message::Wake) => {}
                Some(Message::Shutdown) => {
                    self.cancels.extend(self.streams.ids().map(|id| (id, CancelReason::Shutdown)));
                    self.apply_cancels();
                }
                Some(Message::WorkerLost) => return false,
            }
            next = self.inbox.try_recv().ok();
        }
        true
    }

    fn now(&self) -> Micros {
        Micros(self.started.elapsed().as_micros() as u64)
    }

    fn apply(&mut self, input: Input) {
        let input = Timed { at: self.now(), input };
        if let Some(recorder) = &mut self.recorder {
            recorder.input(&input);
        }
        self.core.apply(input, &mut self.effects);
        self.dispatch();
    }

    fn step_done(&mut self, result: StepResult) {
        let StepResult { plan, sampled, logprobs, device_us, error } = result;
        self.telemetry.on_step(plan.tokens.len());
        tracing::trace!(step = plan.step.0, slices = plan.slices.len(), tokens = plan.tokens.len(), device_us, "step");
        self.streams.attach_logprobs(logprobs);
        match error {
            None => {
                self.apply(Input::StepDone { worker: WORKER, step: plan.step, device_us, sampled });
                self.sampled = self.core.recycle_sampled();
            }
            Some(error) => {
                tracing::error!(step = plan.step.0, slices = plan.slices.len(), error, "step failed");
                self.apply(Input::StepFailed { worker: WORKER, step: plan.step });
                self.sampled = sampled;
            }
        }
        self.idle_plan = Some(plan);
    }

    /// Cancels requests whose receiver was dropped. Streams that produce tokens would show it at the next send; those
    /// that wait or prefill would not.
    fn withdraw_closed(&mut self) {
        self.cancels.extend(self.streams.closed().map(|id| (id, CancelReason::ClientGone)));
        self.apply_cancels();
    }

    fn apply_cancels(&mut self) {
        while let Some((request, reason)) = self.cancels.pop() {
            self.apply(Input::Cancel { request, reason });
        }
    }

    fn start_step(&mut self) {
        let Some(mut plan) = self.idle_plan.take() else { return };
        let planned = self.core.plan(WORKER, &mut plan, &mut self.effects);
        if let Some(recorder) = &mut self.recorder {
            recorder.planned(WORKER, &plan, planned);
        }
        self.dispatch();
        if !planned {
            self.idle_plan = Some(plan);
            return;
        }
        let (admitted, forgotten) = self.streams.take_sampling_changes();
        let command = StepCommand { plan, admitted, forgotten, sampled: std::mem::take(&mut self.sampled) };
        if self.worker.try_send(command).is_err() {
            // Its thread says so in the inbox, too; until then there is no plan to fill.
            tracing::error!("the worker is gone");
        }
    }

    /// Tells the streams; those that cannot take a token are cancelled.
    fn dispatch(&mut self) {
        let now = self.now();
        if let Some(recorder) = &mut self.recorder {
            recorder.effects(&self.effects);
        }
        for effect in self.effects.drain(..) {
            if let Some(slow) = self.streams.take(effect, now) {
                self.cancels.push((slow, CancelReason::SlowReader));
            }
        }
        // Not recursive without end: a cancel finishes its request, so each one shrinks the table.
        self.apply_cancels();
    }

    fn publish_stats(&self) {
        let stats = self.core.stats();
        self.telemetry.on_stats(&stats);
        self.shared.progress(stats.running + stats.waiting > 0);
    }
}

/// However the loop ends, its handles must know: new requests are refused, and the streams end with the table.
impl Drop for EngineLoop {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// The body of a worker's thread: serves steps and reports to the engine's inbox; says so if it ends early.
pub(crate) fn serve_worker(
    worker: crate::worker::Worker,
    commands: &Receiver<StepCommand>,
    inbox: &SyncSender<Message>,
) {
    worker.run(commands, |result| {
        // The engine is gone only when the process ends.
        let _ = inbox.send(Message::StepDone(Box::new(result)));
    });
    let _ = inbox.try_send(Message::WorkerLost);
}
