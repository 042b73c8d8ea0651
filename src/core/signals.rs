//! What autoscaling reads: a snapshot in whole numbers, and what a short history of snapshots foretells.
//!
//! O(workers + classes + tenants) a snapshot; nothing is kept in the engine for it.

use crate::cost::StepWork;
use crate::{Engine, Micros, Probe, TenantId};

/// Most classes that a configuration has.
pub const CLASSES_MAX: usize = 8;

/// All of it.
const FULL: u64 = 1000;

/// The state of the whole core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Signals {
    pub at: Micros,
    /// Prompt tokens that wait, less those that were cached on arrival.
    pub queued_tokens: u64,
    /// What computing them takes, on all workers that take prompts.
    pub queued_prefill: Micros,
    /// Predicted time to the first token of a short request of tenant 0 in the last class, submitted now.
    pub predicted_ttft: Micros,
    /// Blocks that no request holds and nobody finds, that lookups find, that requests hold, and, of these, that a transfer
    /// reads or writes. The first three sum to `blocks_total`.
    pub blocks_free: u32,
    pub blocks_cached: u32,
    pub blocks_live: u32,
    pub blocks_pinned: u32,
    pub blocks_total: u32,
    /// Requests that wait, by class.
    pub waiting: [u32; CLASSES_MAX],
    pub running: u32,
    /// Thousandths: queued tokens of `queue_tokens_max`, or queued requests of `waiting_max`, whichever is more.
    pub queue_pressure: u32,
    /// Thousandths: live blocks of all blocks.
    pub kv_pressure: u32,
    /// Thousandths: the predicted time of the decodes alone of the slowest worker's step, of the strictest objective for the
    /// inter-token latency; 0 without one.
    pub itl_pressure: u32,
    /// The largest of the three, at most 1000.
    pub saturation: u32,
}

/// One tenant's part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenantSignals {
    pub tenant: TenantId,
    pub waiting: u32,
    /// Requests with blocks.
    pub running: u32,
    /// Over all pools: blocks that its requests hold, and those that only lookups find.
    pub blocks_live: u32,
    pub blocks_cached: u32,
    /// Tokens charged since start: prompt tokens to compute, and output; and of these, prompt tokens that were given back,
    /// because their requests ended before they were computed. Both only grow.
    pub tokens_charged: u64,
    pub tokens_refunded: u64,
}

impl Engine {
    /// The state of the whole core now.
    #[must_use]
    pub fn signals(&self) -> Signals {
        let queued = self.waiting.total_load();
        let class = crate::ClassId(self.config.classes.len() as u8 - 1);
        let probe = Probe { class, uncached_tokens: 1, ..Probe::default() };
        let mut signals = Signals {
            at: self.now,
            queued_tokens: queued.tokens,
            queued_prefill: Micros(if queued.tokens > 0 { self.prefill_us(queued) } else { 0 }),
            predicted_ttft: self.predict_ttft(&probe),
            running: (self.requests.len() - self.waiting.len()) as u32,
            ..Signals::default()
        };
        for (at, waiting) in signals.waiting.iter_mut().enumerate().take(self.config.classes.len()) {
            *waiting = self.waiting.load(crate::ClassId(at as u8)).requests as u32;
        }
        for pool in &self.pools {
            let cached: u32 = self.tenants.iter().map(|(slot, _)| pool.num_cached_of(slot)).sum();
            signals.blocks_total += pool.num_blocks();
            signals.blocks_live += pool.num_live();
            signals.blocks_cached += cached;
            signals.blocks_free += pool.num_free() - cached;
        }
        let moving = self.transfers.values().map(|index| &self.requests[*index]);
        signals.blocks_pinned = moving.map(|request| (request.table.len() + request.arriving.table.len()) as u32).sum();
        let by_tokens = part(queued.tokens, self.config.queue_tokens_max);
        signals.queue_pressure = by_tokens.max(part(queued.requests, u64::from(self.config.waiting_max)));
        signals.kv_pressure = part(u64::from(signals.blocks_live), u64::from(signals.blocks_total));
        signals.itl_pressure = self.itl_pressure();
        let most = signals.queue_pressure.max(signals.kv_pressure).max(signals.itl_pressure);
        signals.saturation = most.min(FULL as u32);
        signals
    }

    fn itl_pressure(&self) -> u32 {
        let Some(itl) = self.config.classes.iter().filter_map(|class| class.itl).min() else { return 0 };
        let busy = self.workers.iter().filter(|worker| worker.is_alive && worker.num_running() > 0);
        let decodes = busy.map(|worker| StepWork { prefill_tokens: 0, prefill_context: 0, ..worker.work });
        let slowest =
            decodes.filter(|work| work.decode_sequences > 0).map(|work| self.estimator.predict_us(&work)).max();
        part(slowest.unwrap_or(0), itl.0)
    }

    /// Each tenant's part now, in the order in which they were first named.
    pub fn tenant_signals(&self, out: &mut Vec<TenantSignals>) {
        out.clear();
        out.extend(self.tenants.iter().map(|(slot, tenant)| TenantSignals {
            tenant: tenant.spec.tenant,
            waiting: tenant.waiting,
            running: tenant.requests - tenant.waiting,
            blocks_live: self.pools.iter().map(|pool| pool.num_live_of(slot)).sum(),
            blocks_cached: self.pools.iter().map(|pool| pool.num_cached_of(slot)).sum(),
            tokens_charged: tenant.charged,
            tokens_refunded: tenant.refunded,
        }));
    }
}

/// Thousandths of a whole; more than a thousand where it is exceeded.
fn part(of: u64, whole: u64) -> u32 {
    u32::try_from(u128::from(of) * u128::from(FULL) / u128::from(whole.max(1))).unwrap_or(u32::MAX)
}

/// When the saturation reaches 1000 if it goes on as from the first to the last snapshot: 0 when it is there, nothing when it
/// does not grow.
#[must_use]
pub fn time_to_saturation(history: &[Signals]) -> Option<Micros> {
    let (first, last) = (history.first()?, history.last()?);
    let left = FULL.saturating_sub(u64::from(last.saturation));
    if left == 0 {
        return Some(Micros(0));
    }
    let grown = u64::from(last.saturation.saturating_sub(first.saturation));
    let time = last.at.0.saturating_sub(first.at.0);
    (grown > 0 && time > 0).then(|| Micros((u128::from(left) * u128::from(time) / u128::from(grown)) as u64))
}

/// Replicas that bring the mean saturation of the history to `target` (thousandths, at least 1), from `replicas` that share the
/// load evenly: what the present number would need, rounded up, at least 1 and at most twice as many at once. Within a tenth
/// of the target nothing changes.
#[must_use]
pub fn desired_replicas(history: &[Signals], replicas: u32, target: u32) -> u32 {
    let sum: u64 = history.iter().map(|signals| u64::from(signals.saturation)).sum();
    let Some(mean) = sum.checked_div(history.len() as u64) else { return replicas.max(1) };
    let target = u64::from(target.max(1));
    if mean.abs_diff(target) * 10 <= target {
        return replicas.max(1);
    }
    let needed = (u64::from(replicas) * mean).div_ceil(target);
    u32::try_from(needed).unwrap_or(u32::MAX).clamp(1, replicas.saturating_mul(2).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(points: &[(u64, u32)]) -> Vec<Signals> {
        points
            .iter()
            .map(|(at, saturation)| Signals { at: Micros(*at), saturation: *saturation, ..Signals::default() })
            .collect()
    }

    #[test]
    fn foretells_when_it_is_full() {
        let check = |points: &[(u64, u32)], expected: Option<u64>| {
            assert_eq!(time_to_saturation(&history(points)), expected.map(Micros), "{points:?}");
        };
        check(&[], None);
        check(&[(5, 400)], None);
        check(&[(0, 400), (100, 300), (200, 500)], Some(1_000));
        check(&[(0, 500), (100, 500)], None);
        check(&[(0, 600), (100, 500)], None);
        check(&[(0, 0), (100, 1000)], Some(0));
    }

    #[test]
    fn wants_as_many_as_the_load_needs() {
        let check = |points: &[(u64, u32)], replicas, expected| {
            assert_eq!(desired_replicas(&history(points), replicas, 700), expected, "{points:?} on {replicas}");
        };
        check(&[], 3, 3);
        check(&[(0, 700), (1, 740)], 3, 3);
        check(&[(0, 1000)], 3, 5);
        check(&[(0, 1000)], 1, 2);
        check(&[(0, 100)], 4, 1);
        check(&[(0, 0)], 4, 1);
        check(&[(0, 500), (1, 300)], 4, 3);
    }
}
