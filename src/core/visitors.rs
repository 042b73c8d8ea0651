//! Tenants that come and go: a step must not be long when one of them comes back.
//!
//! A tenant is a visitor while all its uncomputed prompts fit into one step; one that has more is busy. Fair order alone does
//! not help a visitor: its prompt waits for the whole step in flight, and then shares the next with a busy tenant's. So a busy
//! tenant's prefill gives way in three places (`scheduler.rs`):
//!
//! - a visitor's prompt goes before a busy tenant's that runs already, also where its tenant has had more, by a step at most;
//! - a step that takes a visitor's prompt takes no busy tenant's behind it, but for one token of the oldest prefill;
//! - while a visitor is away that was here lately, a step with a busy tenant's prefill is short compared with the visitor's
//!   own prompt, yet long enough that most of it is prefill.
//!
//! Many visitors, one after the other, would leave a busy tenant a token a step. So after [`WAYS_MAX`] steps in a row in which the
//! oldest prefill gave way, it has what a step holds, once.
//!
//! When all tenants are busy, or there is one, steps are as long as ever. Owner: the engine. Complexity: O(visitors
//! remembered), a constant.

use crate::Micros;
use crate::tenants::TenantSlot;

/// Visitors that are remembered: the last ones.
const SEATS: usize = 8;
/// How long after its last start a visitor is expected back.
const AWAY: Micros = Micros(10_000_000);
/// A step beside an absent visitor takes at most this part of the time of the visitor's last prompt ..
const PART: (u64, u64) = (2, 5);
/// .. but may take this many times as long as its decodes alone.
const STRETCH: u64 = 4;

/// Steps in a row in which the oldest prefill of a worker gives way.
pub(crate) const WAYS_MAX: u32 = 4;

/// When a visitor last started a prompt, and what that took by itself.
#[derive(Clone, Copy, Debug)]
struct Visit {
    tenant: TenantSlot,
    at: Micros,
    prompt_us: u64,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Visitors {
    seats: [Option<Visit>; SEATS],
}

impl Visitors {
    /// A visitor's prompt, of this predicted time, is in a step. It takes its own seat, an empty one, or the one whose visitor
    /// was away longest.
    pub(crate) fn note(&mut self, tenant: TenantSlot, at: Micros, prompt_us: u64) {
        let own = self.seats.iter().position(|seat| seat.is_some_and(|visit| visit.tenant == tenant));
        let oldest = || (0..SEATS).min_by_key(|&seat| self.seats[seat].map(|visit| visit.at));
        let seat = own.or_else(oldest).expect("there are seats");
        self.seats[seat] = Some(Visit { tenant, at, prompt_us });
    }

    /// Longest time of a step with prefill of `busy`, whose decodes alone take `decodes_us`; nothing where no other tenant is
    /// expected. `is_away` says who has no prompt here.
    pub(crate) fn step_us(
        &self,
        busy: TenantSlot,
        now: Micros,
        decodes_us: u64,
        is_away: impl Fn(TenantSlot) -> bool,
    ) -> Option<u64> {
        let is_expected = |visit: &&Visit| {
            visit.tenant != busy && now.0.saturating_sub(visit.at.0) <= AWAY.0 && is_away(visit.tenant)
        };
        let shortest = self.seats.iter().flatten().filter(is_expected).map(|visit| visit.prompt_us).min()?;
        Some((shortest.saturating_mul(PART.0) / PART.1).max(decodes_us.saturating_mul(STRETCH)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: TenantSlot = TenantSlot(100);

    #[test]
    fn the_shortest_prompt_of_those_away_counts() {
        let mut visitors = Visitors::default();
        let step_us = |visitors: &Visitors, now| visitors.step_us(BUSY, Micros(now), 10, |_| true);
        assert_eq!(step_us(&visitors, 0), None);
        visitors.note(TenantSlot(1), Micros(0), 1_000);
        visitors.note(TenantSlot(2), Micros(5), 500);
        visitors.note(BUSY, Micros(5), 100);
        assert_eq!(step_us(&visitors, 6), Some(200));
        assert_eq!(step_us(&visitors, AWAY.0 + 5), Some(200));
        assert_eq!(step_us(&visitors, AWAY.0 + 6), None);
        assert_eq!(visitors.step_us(BUSY, Micros(6), 10, |tenant| tenant == TenantSlot(1)), Some(400));
        assert_eq!(visitors.step_us(BUSY, Micros(6), 300, |_| true), Some(1_200));
        visitors.note(TenantSlot(2), Micros(7), 2_000);
        assert_eq!(step_us(&visitors, 8), Some(400));
    }

    #[test]
    fn the_last_ones_are_remembered() {
        let mut visitors = Visitors::default();
        for tenant in 0..SEATS as u32 + 3 {
            visitors.note(TenantSlot(tenant), Micros(u64::from(tenant)), 100);
        }
        let is_known = |tenant| visitors.step_us(BUSY, Micros(20), 0, |other| other == TenantSlot(tenant)).is_some();
        let known: Vec<u32> = (0..20).filter(|tenant| is_known(*tenant)).collect();
        assert_eq!(known, (3..SEATS as u32 + 3).collect::<Vec<_>>());
    }
}
