//! The way in: what other threads hold of the engine. Nothing here blocks.

use crate::request::{Engine, EngineHealth, NamedTenant, Request, SubmitError, TokenEvent, TokenRx};
use crate::telemetry::Telemetry;
use crate::worker::StepResult;
use kvern_core::{Backoff, CancelReason, Refusal, RequestId, Signals, TransferId, WorkerId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Events that a stream may lag behind; a client that lets more pile up is cancelled.
const STREAM_EVENTS_MAX: usize = 1024;

/// What reaches the engine thread.
pub(crate) enum Message {
    Submit(Box<Request>, mpsc::Sender<TokenEvent>),
    Cancel(RequestId, CancelReason),
    SetTenants(Vec<NamedTenant>),
    StepDone(Box<StepResult>),
    Transferred(TransferId, Result<(), String>),
    /// Look at the flags again.
    Wake,
    /// Cancel all that is left.
    Shutdown,
    WorkerLost(WorkerId),
}

#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Most requests that wait to be scheduled for the first time.
    pub waiting_max: u32,
    /// Without a finished step for this long while there is work, the engine is no longer live.
    pub stall_max: Duration,
}

/// State that the engine thread and its handles share: counters and flags only.
pub(crate) struct Shared {
    limits: EngineLimits,
    waiting: AtomicU32,
    next_id: AtomicU64,
    draining: AtomicBool,
    stopped: AtomicBool,
    busy: AtomicBool,
    started: Instant,
    /// Milliseconds after `started` of the last finished step, or of when work came that was not there before.
    last_progress_ms: AtomicU64,
    /// Until a full queue is expected to take a request again.
    retry_in_us: AtomicU64,
    /// Thousandths.
    saturation: AtomicU32,
}

impl Shared {
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// One request fewer waits for its first step.
    pub(crate) fn leave_queue(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// A step was finished.
    pub(crate) fn progress(&self) {
        self.last_progress_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether there is work. Only the engine thread calls this.
    pub(crate) fn set_busy(&self, busy: bool) {
        if busy && !self.busy.load(Ordering::Relaxed) {
            self.progress();
        }
        self.busy.store(busy, Ordering::Release);
    }

    /// What answers say of the load.
    pub(crate) fn tell(&self, signals: &Signals) {
        let waiting: u32 = signals.waiting.iter().sum();
        let one_us = signals.queued_prefill.0 / u64::from(waiting.max(1));
        self.retry_in_us.store(one_us, Ordering::Relaxed);
        self.saturation.store(signals.saturation, Ordering::Relaxed);
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

/// A handle on the engine; cloning shares it. The engine ends when it has drained.
#[derive(Clone)]
pub struct EngineHandle {
    inbox: SyncSender<Message>,
    shared: Arc<Shared>,
    telemetry: Arc<Telemetry>,
}

impl EngineHandle {
    pub(crate) fn new(limits: EngineLimits, telemetry: Arc<Telemetry>) -> (Self, Receiver<Message>, Arc<Shared>) {
        // Room for every waiting request and its cancellation, and for what the worker reports.
        let (inbox, messages) = sync_channel(limits.waiting_max as usize * 2 + 1024);
        let shared = Arc::new(Shared {
            limits,
            waiting: AtomicU32::new(0),
            next_id: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            started: Instant::now(),
            last_progress_ms: AtomicU64::new(0),
            retry_in_us: AtomicU64::new(0),
            saturation: AtomicU32::new(0),
        });
        (EngineHandle { inbox, shared: Arc::clone(&shared), telemetry }, messages, shared)
    }

    /// The worker's way to report; blocks while the inbox is full, which the engine thread always empties.
    pub(crate) fn reporter(&self) -> SyncSender<Message> {
        self.inbox.clone()
    }

    /// Takes no new work; the engine thread ends when what runs has finished.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
        // A full inbox wakes the loop as well.
        let _ = self.inbox.try_send(Message::Wake);
    }

    /// Cancels all requests, after [`EngineHandle::drain`] took too long.
    pub fn abort(&self) {
        let _ = self.inbox.try_send(Message::Shutdown);
    }

    /// The engine thread has ended.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }
}

impl Engine for EngineHandle {
    fn submit(&self, request: Request) -> Result<TokenRx, SubmitError> {
        let shared = &self.shared;
        if self.has_stopped() {
            return Err(SubmitError::Stopped);
        }
        if shared.is_draining() {
            return Err(SubmitError::Draining);
        }
        let limit = shared.limits.waiting_max;
        let full = |waiting| {
            self.telemetry.on_rejected(Refusal::QueueFull(Backoff::default()));
            let retry_in = Duration::from_micros(shared.retry_in_us.load(Ordering::Relaxed));
            SubmitError::QueueFull { waiting, limit, retry_in }
        };
        let waiting = shared.waiting.fetch_add(1, Ordering::Relaxed);
        if waiting >= limit {
            shared.leave_queue();
            return Err(full(waiting));
        }
        // Its tokens, `Accepted` and `Finished`.
        let room = (request.max_new_tokens as usize).saturating_add(2).min(STREAM_EVENTS_MAX);
        let (events, receiver) = mpsc::channel(room);
        match self.inbox.try_send(Message::Submit(Box::new(request), events)) {
            Ok(()) => Ok(receiver),
            Err(error) => {
                shared.leave_queue();
                Err(match error {
                    TrySendError::Full(_) => full(waiting),
                    TrySendError::Disconnected(_) => SubmitError::Stopped,
                })
            }
        }
    }

    fn cancel(&self, id: RequestId, reason: CancelReason) {
        // When the inbox is full, the dropped receiver says the same a turn later.
        let _ = self.inbox.try_send(Message::Cancel(id, reason));
    }

    fn next_id(&self) -> RequestId {
        RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    fn health(&self) -> EngineHealth {
        let shared = &self.shared;
        let now = shared.started.elapsed();
        let busy = shared.busy.load(Ordering::Acquire);
        let last = Duration::from_millis(shared.last_progress_ms.load(Ordering::Relaxed));
        let stalled = busy && now.saturating_sub(last) > shared.limits.stall_max;
        let draining = shared.is_draining();
        EngineHealth { ready: !self.has_stopped(), live: !stalled && (draining || !self.has_stopped()), draining }
    }

    fn metrics_text(&self) -> String {
        self.telemetry.render()
    }

    fn saturation(&self) -> f32 {
        self.shared.saturation.load(Ordering::Relaxed) as f32 / 1000.0
    }

    fn set_tenants(&self, tenants: &[NamedTenant]) -> bool {
        self.inbox.try_send(Message::SetTenants(tenants.to_vec())).is_ok()
    }
}
