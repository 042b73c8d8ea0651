//! The stream table: who waits for which request's tokens. Lookup O(1).

use super::handle::Shared;
use super::links::Change;
use crate::request::{Request, TokenEvent, TokenLogprobs};
use crate::telemetry::{RequestInfo, RequestTimeline, Telemetry};
use crate::worker::{SequenceChange, SequenceSampling};
use kvern_core::{Effect, Micros, RequestId, Submission, WorkerId};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) struct Streams {
    table: HashMap<RequestId, Stream>,
    /// What workers must learn with their next steps.
    changes: Vec<Change>,
    shared: Arc<Shared>,
    telemetry: Arc<Telemetry>,
}

struct Stream {
    events: mpsc::Sender<TokenEvent>,
    timeline: RequestTimeline,
    sampling: Arc<SequenceSampling>,
    /// Who has the sampling; `None` until the first step.
    worker: Option<WorkerId>,
    /// Of the token that the core is about to confirm.
    logprobs: Option<Box<TokenLogprobs>>,
}

impl Streams {
    pub(super) fn new(shared: Arc<Shared>, telemetry: Arc<Telemetry>) -> Self {
        Streams { table: HashMap::new(), changes: Vec::new(), shared, telemetry }
    }

    /// Opens a stream and gives the request's part that the core needs.
    pub(super) fn open(&mut self, request: Request, events: mpsc::Sender<TokenEvent>, now: Micros) -> Submission {
        let info = RequestInfo {
            id: request.id,
            external_id: request.external_id,
            max_new_tokens: request.max_new_tokens,
            n: request.n,
        };
        let timeline = RequestTimeline::new(info, request.prompt.len() as u32, now);
        let sampling = Arc::new(SequenceSampling::new(&request.prompt, request.sampling));
        let submission = Submission {
            request: request.id,
            prompt: request.prompt,
            max_new_tokens: request.max_new_tokens,
            min_new_tokens: sampling.params.min_tokens,
            needs_tokens: sampling.params.needs_tokens(),
            stop_tokens: sampling.params.stop_tokens.clone(),
            salt: request.terms.salt,
            shared_tokens: request.terms.shared_tokens,
            tenant: request.terms.tenant,
            class: request.terms.class,
            deadline: request.terms.timeout.map(|timeout| Micros(now.0.saturating_add(timeout.as_micros() as u64))),
        };
        self.table.insert(request.id, Stream { events, timeline, sampling, worker: None, logprobs: None });
        submission
    }

    /// Tells a stream that its request was taken, unless it has ended.
    pub(super) fn accept(&mut self, request: RequestId) {
        if let Some(stream) = self.table.get(&request) {
            // The first event of a new channel: there is room, or nobody listens any more.
            let _ = stream.events.try_send(TokenEvent::Accepted);
        }
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = RequestId> {
        self.table.keys().copied()
    }

    /// Requests whose client has gone.
    pub(super) fn closed(&self) -> impl Iterator<Item = RequestId> {
        self.table.iter().filter(|(_, s)| s.events.is_closed()).map(|(id, _)| *id)
    }

    /// Keeps the log-probabilities of a step until the core has confirmed its tokens.
    pub(super) fn attach_logprobs(&mut self, logprobs: Vec<(RequestId, Box<TokenLogprobs>)>) {
        for (id, logprobs) in logprobs {
            if let Some(stream) = self.table.get_mut(&id) {
                stream.logprobs = Some(logprobs);
            }
        }
    }

    /// Hands on what changed for the workers, in order.
    pub(super) fn drain_changes(&mut self, tell: impl FnMut(Change)) {
        self.changes.drain(..).for_each(tell);
    }

    /// The request's next steps are this worker's.
    fn assign(&mut self, request: RequestId, worker: WorkerId) {
        let Some(stream) = self.table.get_mut(&request) else { return };
        let before = stream.worker.replace(worker);
        if before == Some(worker) {
            return;
        }
        match before {
            Some(before) => self.changes.push((before, SequenceChange::Forget(request))),
            None => self.shared.leave_queue(),
        }
        self.changes.push((worker, SequenceChange::Admit(request, Arc::clone(&stream.sampling))));
    }

    /// Tells one stream; returns the request when its client reads too slowly.
    pub(super) fn take(&mut self, effect: Effect, now: Micros) -> Option<RequestId> {
        match effect {
            Effect::Scheduled { request, worker, cached_tokens } => {
                self.assign(request, worker);
                let stream = self.table.get_mut(&request)?;
                stream.timeline.on_scheduled(&self.telemetry, now, cached_tokens);
                None
            }
            Effect::Moved { request, worker } => {
                self.assign(request, worker);
                None
            }
            // It may come back to the same worker, which keeps what it knows.
            Effect::Preempted { .. } => None,
            // Between pools, not to a client.
            Effect::Transfer { .. } => None,
            Effect::Token { request, token, .. } => {
                let stream = self.table.get_mut(&request)?;
                stream.timeline.on_token(&self.telemetry, now);
                let event = TokenEvent::Token { token, logprobs: stream.logprobs.take() };
                matches!(stream.events.try_send(event), Err(mpsc::error::TrySendError::Full(_))).then_some(request)
            }
            Effect::Finish { request, reason, usage } => {
                let stream = self.table.remove(&request)?;
                match stream.worker {
                    None => self.shared.leave_queue(),
                    Some(worker) => self.changes.push((worker, SequenceChange::Forget(request))),
                }
                stream.timeline.on_finish(&self.telemetry, now, reason, usage);
                // A full or closed channel says the same by its end: events stop without a `Finished`.
                let _ = stream.events.try_send(TokenEvent::Finished { reason, usage });
                None
            }
        }
    }
}
