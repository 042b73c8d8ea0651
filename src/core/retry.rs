//! How far what refused requests were told is from what proves right, learned while running.
//!
//! The model of `admission.rs` knows the queue, but not who else will come: under a lasting load those who come meanwhile
//! take the room that a refused request was told of. So a few refused requests are kept as shadows, and asked for again when others
//! come, as the state that they meet is the one that counts, but not before a tenth of what they were told has passed: the first
//! time that one would be taken is what was right. The factor between the two is followed by its median, since such times
//! scatter widely. Where nobody came in between, nothing is learned.
//!
//! Owner: the engine. O(1), beside one prediction for each time that a shadow is asked for.

use crate::queue::Load;
use crate::tenants::TenantSlot;
use crate::{ClassId, Micros};

/// Shadows at a time.
const SEATS: usize = 4;
/// The part of what was told after which a shadow is asked for again.
const RESOLUTION: u64 = 10;
/// A shadow is given up when this many times what it was told has passed.
const PATIENCE: u64 = 4;
/// Factors are in units of this; what a shadow shows moves the factor by a part of itself.
const ONE: u64 = 256;
const MOVES: u64 = 6;
const FACTORS: (u64, u64) = (ONE / 4, 8 * ONE);

/// What decides whether a request would be too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) class: ClassId,
    pub(crate) tenant: TenantSlot,
    /// Its prompt, without what was cached.
    pub(crate) own: Load,
    pub(crate) max_new_tokens: u32,
    /// From its submission to its deadline.
    pub(crate) timeout_us: u64,
}

#[derive(Clone, Copy, Debug)]
struct Shadow {
    wish: Wish,
    since: Micros,
    /// What the model said, and what the request was told.
    model_us: u64,
    told_us: u64,
    asked_us: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Retries {
    shadows: [Option<Shadow>; SEATS],
    factor: u64,
}

impl Default for Retries {
    fn default() -> Self {
        Retries { shadows: [None; SEATS], factor: ONE }
    }
}

impl Retries {
    /// What to tell a request that is refused now and that the model sees taken after `model_us`.
    pub(crate) fn tell(&mut self, wish: Wish, now: Micros, model_us: u64) -> u64 {
        let told_us = (model_us.saturating_mul(self.factor) / ONE).max(1);
        if let Some(seat) = self.shadows.iter_mut().find(|seat| seat.is_none()) {
            *seat = Some(Shadow { wish, since: now, model_us, told_us, asked_us: 0 });
        }
        told_us
    }

    /// The next shadow from seat number `from` on that it is time to ask for again, and its seat.
    pub(crate) fn due(&self, from: usize, now: Micros) -> Option<(usize, Wish)> {
        let is_due = |shadow: &Shadow| {
            let after_us = now.0.saturating_sub(shadow.since.0);
            after_us >= shadow.asked_us + (shadow.told_us / RESOLUTION).max(1)
        };
        let due = |seat: usize| Some((seat, self.shadows[seat].filter(is_due)?.wish));
        (from..SEATS).find_map(due)
    }

    /// The shadow of a seat has been asked for.
    pub(crate) fn note(&mut self, seat: usize, now: Micros, is_taken: bool) {
        let Some(shadow) = &mut self.shadows[seat] else { return };
        let after_us = now.0.saturating_sub(shadow.since.0);
        if after_us - shadow.asked_us > shadow.told_us / 2 {
            self.shadows[seat] = None;
            return;
        }
        if !is_taken && after_us < shadow.told_us.saturating_mul(PATIENCE) {
            shadow.asked_us = after_us;
            return;
        }
        // Somewhere between the last two times.
        let right_us = u64::midpoint(shadow.asked_us, after_us);
        let expected_us = shadow.model_us.saturating_mul(self.factor) / ONE;
        let step = self.factor / MOVES;
        self.factor = if right_us > expected_us { self.factor + step } else { self.factor - step };
        self.factor = self.factor.clamp(FACTORS.0, FACTORS.1);
        self.shadows[seat] = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WISH: Wish = Wish {
        class: ClassId(0),
        tenant: TenantSlot::FIRST,
        own: Load { requests: 1, tokens: 10, context: 55 },
        max_new_tokens: 8,
        timeout_us: 1_000_000,
    };

    /// Refusals one after the other, each of which is right after `right(number)` times what the model says.
    fn told_at_last(right: impl Fn(u64) -> u64) -> u64 {
        let mut retries = Retries::default();
        let (mut now, mut told) = (0, 0);
        for number in 0..200 {
            let since = now;
            told = retries.tell(WISH, Micros(now), 1_000);
            loop {
                now += 50;
                if retries.due(0, Micros(now)).is_none() {
                    continue;
                }
                let is_taken = now - since >= right(number) * 1_000;
                retries.note(0, Micros(now), is_taken);
                if retries.shadows[0].is_none() {
                    break;
                }
            }
        }
        told
    }

    #[test]
    fn learns_what_proves_right() {
        for (right, least, most) in [(1, 700, 1_300), (3, 2_400, 3_700), (6, 4_800, 7_300)] {
            let told = told_at_last(|_| right);
            assert!((least..=most).contains(&told), "{told} us told, {right}000 right");
        }
        // Half of them at once, the others much later: the median is between.
        let told = told_at_last(|number| if number % 3 == 0 { 30 } else { 3 });
        assert!((2_000..=4_500).contains(&told), "{told} us told, 3000 right as a median");
        // Never taken: bounded.
        assert_eq!(told_at_last(|_| u64::MAX / 10_000), 8_000);
    }

    #[test]
    fn shadows_are_few_and_not_asked_for_too_often() {
        let mut retries = Retries::default();
        assert_eq!(retries.due(0, Micros(5)), None);
        assert_eq!(retries.tell(WISH, Micros(0), 1_000), 1_000);
        let other = Wish { max_new_tokens: 9, ..WISH };
        for _ in 0..2 * SEATS {
            retries.tell(other, Micros(10), 2_000);
        }
        assert_eq!(retries.due(0, Micros(99)), None);
        assert_eq!(retries.due(0, Micros(100)), Some((0, WISH)));
        retries.note(0, Micros(100), false);
        assert_eq!(retries.due(0, Micros(199)), None);
        assert_eq!(retries.due(0, Micros(200)), Some((0, WISH)));
        assert_eq!(retries.due(1, Micros(209)), None);
        assert_eq!(retries.due(1, Micros(210)), Some((1, other)));
        assert_eq!(retries.due(SEATS - 1, Micros(210)), Some((SEATS - 1, other)));
        // Nobody came for long: when it would have been taken is not known.
        let factor = retries.factor;
        retries.note(1, Micros(5_000), true);
        assert_eq!((retries.due(1, Micros(5_000)).map(|(seat, _)| seat), retries.factor), (Some(2), factor));
    }
}
