//! What came of a simulation.

use super::histogram::Histogram;
use crate::config::Objectives;
use kvern_core::{FinishReason, Micros, Refusal, Usage};
use std::time::Duration;

/// Names of the reasons to refuse, in the order of [`Figures::refused`].
pub(super) const REFUSALS: [&str; 7] =
    ["empty", "too long", "unknown tenant", "queue full", "queue tokens", "deadline", "quarantined"];

#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub objectives: Objectives,
    pub submitted: u64,
    /// Ended by themselves.
    pub served: u64,
    /// Served within the objectives.
    pub good: u64,
    /// By reason.
    pub refused: [u64; 7],
    /// Stopped at their deadline.
    pub late: u64,
    /// Ended otherwise, as none should.
    pub failed: u64,
    /// Of all requests; of those that started; of all that were served or stopped.
    pub prompt_tokens: u64,
    pub computed_tokens: u64,
    pub output_tokens: u64,
    /// Looked up in the prefix cache and found there.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
    pub steps: u64,
    /// Of the served ones, and between all tokens of a request.
    pub ttft: Histogram,
    pub itl: Histogram,
    /// Of each tenant that came: its weight, and the tokens that were computed for it.
    pub tenants: Vec<(u32, u64)>,
    /// From the first arrival to the last end.
    pub simulated: Micros,
    pub took: Duration,
    /// Rows of the trace that came too late in it.
    pub out_of_order: u64,
}

/// A request's own times.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    pub(super) arrived: Micros,
    /// Of the first and the last token.
    pub(super) first: Micros,
    pub(super) last: Micros,
}

impl Figures {
    /// A request ends.
    pub(super) fn finish(&mut self, reason: FinishReason, usage: &Usage, times: Times, tenant: usize) {
        let at = match reason {
            FinishReason::Refused(refusal) => match refusal {
                Refusal::Empty => 0,
                Refusal::TooLong => 1,
                Refusal::UnknownTenant => 2,
                Refusal::QueueFull(_) => 3,
                Refusal::QueueTokens(_) => 4,
                Refusal::Deadline(_) => 5,
                Refusal::Quarantined(_) => 6,
            },
            _ => REFUSALS.len(),
        };
        if let Some(refused) = self.refused.get_mut(at) {
            *refused += 1;
            return;
        }
        let computed = u64::from(usage.prompt_tokens - usage.cached_tokens - usage.uncomputed_tokens);
        self.computed_tokens += computed;
        self.output_tokens += u64::from(usage.completion_tokens);
        self.tenants[tenant].1 += computed + u64::from(usage.completion_tokens);
        match reason {
            FinishReason::Stop | FinishReason::Length => self.serve(usage, times),
            FinishReason::Deadline => self.late += 1,
            _ => self.failed += 1,
        }
    }

    fn serve(&mut self, usage: &Usage, times: Times) {
        self.served += 1;
        let ttft = times.first.0 - times.arrived.0;
        self.ttft.add(Micros(ttft));
        let is_within = |time: f64, limit: Option<Duration>| limit.is_none_or(|limit| time <= limit.as_micros() as f64);
        let gaps = usage.completion_tokens.saturating_sub(1).max(1);
        let itl = (times.last.0 - times.first.0) as f64 / f64::from(gaps);
        let is_good = is_within(ttft as f64, self.objectives.ttft) && is_within(itl, self.objectives.itl);
        self.good += u64::from(is_good);
    }

    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.refused.iter().sum::<u64>() + self.late + self.failed
    }

    /// So many a simulated second.
    #[must_use]
    pub fn per_second(&self, count: u64) -> f64 {
        ratio(count as f64 * 1e6, self.simulated.0 as f64)
    }

    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        ratio(self.prefix_hits as f64, self.prefix_queries as f64)
    }

    /// Jain's index (Jain, Chiu and Hawe, 1984) over the tenants' tokens for each unit of weight: 1 when all have the same, 1/n
    /// when one has everything.
    #[must_use]
    pub fn fairness(&self) -> f64 {
        let shares = || self.tenants.iter().map(|(weight, tokens)| *tokens as f64 / f64::from((*weight).max(1)));
        let (sum, squares) = (shares().sum::<f64>(), shares().map(|share| share * share).sum::<f64>());
        if squares == 0.0 { 1.0 } else { sum * sum / (self.tenants.len() as f64 * squares) }
    }
}

/// 0 of nothing.
pub(super) fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}
