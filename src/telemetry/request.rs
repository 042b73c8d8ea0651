//! The times of one request: what its histograms and its line in the log are made of.
//!
//! Owner: the engine thread, one per request that it knows.
//!
//! ```text
//! arrived ---- queue ---- scheduled ---- prefill ---- first token ---- decode ---- last token --- finish
//!    |                        \_______________ inference ____________________________/              |
//!    \__________ TTFT ___________________________/                                                  |
//!    \__________ end to end _________________________________________________________________________/
//! ```

use super::Telemetry;
use kvern_core::{CancelReason, FinishReason, Micros, Refusal, RequestId, Usage};
use std::sync::Arc;

/// What is known of a request when it arrives.
#[derive(Clone, Debug)]
pub struct RequestInfo {
    pub id: RequestId,
    /// What answers and logs call it.
    pub external_id: Arc<str>,
    /// Its token limit.
    pub max_new_tokens: u32,
    /// Choices that its caller asked for, this one among them.
    pub n: u32,
}

/// The times of a request so far.
#[derive(Debug)]
pub struct RequestTimeline {
    info: RequestInfo,
    arrived: Micros,
    progress: Progress,
    prompt_tokens: u32,
    cached_tokens: u32,
}

/// How far it came; each stage has the times that it needs.
#[derive(Clone, Copy, Debug)]
enum Progress {
    Waiting,
    Scheduled { at: Micros },
    Decoding { scheduled: Micros, first: Micros, last: Micros },
}

impl RequestTimeline {
    /// A request of `prompt_tokens` arrived.
    #[must_use]
    pub fn new(info: RequestInfo, prompt_tokens: u32, arrived: Micros) -> Self {
        RequestTimeline { info, arrived, progress: Progress::Waiting, prompt_tokens, cached_tokens: 0 }
    }

    /// The request is in a step. Later times, after preemptions, do not count.
    pub fn on_scheduled(&mut self, telemetry: &Telemetry, now: Micros, cached_tokens: u32) {
        if let Progress::Waiting = self.progress {
            self.progress = Progress::Scheduled { at: now };
            self.cached_tokens = cached_tokens;
            telemetry.queue.observe(seconds(self.arrived, now));
        }
    }

    /// A new token. Called for each; neither locks nor allocates.
    pub fn on_token(&mut self, telemetry: &Telemetry, now: Micros) {
        telemetry.generation_tokens.inc();
        match &mut self.progress {
            Progress::Decoding { last, .. } => {
                telemetry.inter_token.observe(seconds(*last, now));
                *last = now;
            }
            Progress::Scheduled { .. } | Progress::Waiting => {
                // A token of a request that was never scheduled cannot be; should it, its prefill took no time.
                let scheduled = if let Progress::Scheduled { at } = self.progress { at } else { now };
                telemetry.ttft.observe(seconds(self.arrived, now));
                telemetry.prompt_tokens.inc_by(u64::from(self.prompt_tokens));
                telemetry.prompt_tokens_cached.inc_by(u64::from(self.cached_tokens));
                self.progress = Progress::Decoding { scheduled, first: now, last: now };
            }
        }
    }

    /// The last word: observes what is known only now and writes the request's line.
    pub fn on_finish(self, telemetry: &Telemetry, now: Micros, reason: FinishReason, usage: Usage) {
        telemetry.count_finish(reason);
        if !matches!(reason, FinishReason::Refused(_)) {
            self.observe_finish(telemetry, now, usage);
        }
        self.log_finish(now, reason, usage);
    }

    fn observe_finish(&self, telemetry: &Telemetry, now: Micros, usage: Usage) {
        telemetry.e2e.observe(seconds(self.arrived, now));
        if let Progress::Decoding { scheduled, first, last } = self.progress {
            telemetry.prefill.observe(seconds(scheduled, first));
            telemetry.decode.observe(seconds(first, last));
            telemetry.inference.observe(seconds(scheduled, last));
        }
        if let Some(gap) = self.mean_gap(usage) {
            telemetry.time_per_output_token.observe(gap);
        }
        for (histogram, count) in [
            (&telemetry.request_prompt_tokens, usage.prompt_tokens),
            (&telemetry.request_generation_tokens, usage.completion_tokens),
            (&telemetry.request_max_generation_tokens, usage.completion_tokens),
            (&telemetry.request_params_max_tokens, self.info.max_new_tokens),
            (&telemetry.request_params_n, self.info.n),
            (&telemetry.request_computed_tokens, usage.prompt_tokens.saturating_sub(usage.cached_tokens)),
            (&telemetry.request_preemptions, usage.preemptions),
        ] {
            histogram.observe(f64::from(count));
        }
    }

    /// Mean gap between tokens in seconds; `None` for fewer than two.
    fn mean_gap(&self, usage: Usage) -> Option<f64> {
        match self.progress {
            Progress::Decoding { first, last, .. } if usage.completion_tokens > 1 => {
                Some(seconds(first, last) / f64::from(usage.completion_tokens - 1))
            }
            _ => None,
        }
    }

    fn log_finish(&self, now: Micros, reason: FinishReason, usage: Usage) {
        let (scheduled, first) = match self.progress {
            Progress::Waiting => (None, None),
            Progress::Scheduled { at } => (Some(at), None),
            Progress::Decoding { scheduled, first, .. } => (Some(scheduled), Some(first)),
        };
        let since_arrival = |time: Micros| seconds(self.arrived, time) * 1e3;
        tracing::info!(
            target: "kvern::request",
            id = %self.info.external_id,
            request = self.info.id.0,
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens,
            completion_tokens = usage.completion_tokens,
            preemptions = usage.preemptions,
            reason = reason_name(reason),
            queue_ms = scheduled.map(since_arrival),
            ttft_ms = first.map(since_arrival),
            itl_ms = self.mean_gap(usage).map(|gap| gap * 1e3),
            e2e_ms = since_arrival(now),
            "finished"
        );
    }
}

/// Seconds from one time to a later one.
fn seconds(from: Micros, to: Micros) -> f64 {
    to.0.saturating_sub(from.0) as f64 * 1e-6
}

/// What the log calls a reason: finer than the metric's label.
fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Cancelled(CancelReason::StopString) => "stop_string",
        FinishReason::Length => "length",
        FinishReason::Cancelled(CancelReason::ClientGone) => "client_gone",
        FinishReason::Cancelled(CancelReason::SlowReader) => "slow_reader",
        FinishReason::Cancelled(CancelReason::Shutdown) => "shutdown",
        FinishReason::Error => "error",
        FinishReason::Deadline => "deadline",
        FinishReason::Refused(Refusal::QueueFull(_)) => "queue_full",
        FinishReason::Refused(Refusal::QueueTokens(_)) => "queue_tokens",
        FinishReason::Refused(Refusal::Deadline(_)) => "missed_deadline",
        FinishReason::Refused(Refusal::Quarantined(_)) => "quarantined",
        FinishReason::Refused(Refusal::UnknownTenant) => "unknown_tenant",
        FinishReason::Refused(Refusal::TooLong) => "too_long",
        FinishReason::Refused(Refusal::Empty) => "empty",
    }
}
