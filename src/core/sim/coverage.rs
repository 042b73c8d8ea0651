//! How often the interesting things happened.

use crate::{Effect, FinishReason, Refusal};

#[derive(Clone, Debug, Default)]
pub(crate) struct Coverage {
    pub(crate) steps: u64,
    tokens: u64,
    preemptions: u64,
    prefix_hits: u64,
    pub(crate) collisions: u64,
    stopped: u64,
    cancelled: u64,
    pub(crate) cancelled_in_flight: u64,
    failed: u64,
    pub(crate) failed_steps: u64,
    pub(crate) bisections: u64,
    pub(crate) out_of_order: u64,
    pub(crate) stalls: u64,
    late: u64,
    moved: u64,
    pub(crate) refunds: u64,
    /// Starts in the place of others, and in blocks of others.
    pub(crate) places_claimed: u64,
    pub(crate) floors_claimed: u64,
    pub(crate) transfers: u64,
    pub(crate) failed_transfers: u64,
    pub(crate) lost_workers: u64,
    /// Steps that were planned ahead, and new blocks in them; slices of requests that had ended, or had failed, by then; steps
    /// behind one that failed, and those that were lost with their worker.
    pub(crate) steps_ahead: u64,
    pub(crate) blocks_ahead: u64,
    pub(crate) slices_over: u64,
    pub(crate) failed_over: u64,
    pub(crate) dropped_ahead: u64,
    pub(crate) lost_ahead: u64,
    /// Steps on a part, and steps of workers that are not alone on the device that have the whole of it.
    pub(crate) on_parts: u64,
    pub(crate) on_wholes: u64,
    /// By reason.
    refused: [u64; 7],
}

/// In the order of [`Coverage::refused`].
const REFUSALS: [&str; 7] =
    ["empty ones", "long ones", "unknown tenants", "full queues", "crowded queues", "missed deadlines", "quarantines"];

impl Coverage {
    fn counts(&mut self) -> Vec<(&'static str, &mut u64)> {
        let mut counts = vec![
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
            ("bisections", &mut self.bisections),
            ("steps out of order", &mut self.out_of_order),
            ("stalled decodes", &mut self.stalls),
            ("late requests", &mut self.late),
            ("moves", &mut self.moved),
            ("refunds", &mut self.refunds),
            ("places claimed", &mut self.places_claimed),
            ("floors claimed", &mut self.floors_claimed),
            ("transfers", &mut self.transfers),
            ("failed transfers", &mut self.failed_transfers),
            ("lost workers", &mut self.lost_workers),
            ("steps ahead", &mut self.steps_ahead),
            ("blocks of steps ahead", &mut self.blocks_ahead),
            ("slices ahead of their request's end", &mut self.slices_over),
            ("slices ahead of their request's failure", &mut self.failed_over),
            ("steps ahead of a failure", &mut self.dropped_ahead),
            ("steps ahead that were lost", &mut self.lost_ahead),
            ("steps on a part of their device", &mut self.on_parts),
            ("steps on the whole of a divided device", &mut self.on_wholes),
        ];
        counts.extend(REFUSALS.into_iter().zip(&mut self.refused));
        counts
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

    pub(crate) fn refused(&mut self, refusal: Option<Refusal>) {
        let at = match refusal {
            None => return,
            Some(Refusal::Empty) => 0,
            Some(Refusal::TooLong) => 1,
            Some(Refusal::UnknownTenant) => 2,
            Some(Refusal::QueueFull(_)) => 3,
            Some(Refusal::QueueTokens(_)) => 4,
            Some(Refusal::Deadline(_)) => 5,
            Some(Refusal::Quarantined(_)) => 6,
        };
        self.refused[at] += 1;
    }

    pub(crate) fn effect(&mut self, effect: &Effect) {
        match effect {
            Effect::Scheduled { cached_tokens, .. } => self.prefix_hits += u64::from(*cached_tokens > 0),
            Effect::Token { .. } => self.tokens += 1,
            Effect::Preempted { .. } => self.preemptions += 1,
            Effect::Moved { .. } => self.moved += 1,
            Effect::Transfer { .. } => {}
            Effect::Finish { reason, .. } => {
                self.stopped += u64::from(*reason == FinishReason::Stop);
                self.cancelled += u64::from(matches!(reason, FinishReason::Cancelled(_)));
                self.late += u64::from(*reason == FinishReason::Deadline);
                self.failed += u64::from(*reason == FinishReason::Error);
            }
        }
    }
}
