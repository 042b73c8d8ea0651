//! A token bucket in integers, with the time as a parameter.
//!
//! Owner: an [`Account`](super::Account), under its lock. O(1), exact: what is missing is counted in units of which one token
//! is 60,000,000,000, so that each nanosecond refills as many units as the limit is tokens per minute. The bucket holds a
//! minute's tokens. An amount above that is taken when the bucket is full, and the rest is owed: nothing is impossible, and
//! over time no more passes than the limit allows.

use std::time::Duration;

/// Units of one token: nanoseconds of a minute.
const UNITS: u128 = 60_000_000_000;

/// Now, by two clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Moment {
    /// Since some fixed moment, never backwards.
    pub uptime: Duration,
    /// Since 1970, as the machine believes.
    pub unix: Duration,
}

/// What a limit leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub limit: u64,
    pub remaining: u64,
    /// Until all of `limit` remains, if nothing more is taken.
    pub reset: Duration,
}

#[derive(Clone, Debug)]
pub(super) struct Bucket {
    /// Tokens per minute, at least 1, and most that the bucket holds.
    limit: u64,
    /// Units missing from a full bucket at `at`; more than it holds when some are owed.
    missing: u128,
    at: Duration,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(limit: u64) -> Self {
        Bucket { limit: limit.max(1), missing: 0, at: Duration::ZERO }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// What is missing stays missing, but no more than a new bucket of this size holds, or what was owed before takes to refill.
    pub(super) fn set_limit(&mut self, limit: u64) {
        let limit = limit.max(1);
        let refilled_in = self.missing.div_ceil(self.limit.into());
        self.limit = limit;
        self.missing = self.missing.min(self.capacity().max(refilled_in * u128::from(limit)));
    }

    /// Until `amount` can be taken; zero if it can be now.
    pub(super) fn wait(&mut self, amount: u64, now: Duration) -> Duration {
        self.refill(now);
        let needed = u128::from(amount.min(self.limit)) * UNITS;
        self.time_of((self.missing + needed).saturating_sub(self.capacity()))
    }

    /// Takes `amount`, whether or not it is there.
    pub(super) fn take(&mut self, amount: u64, now: Duration) {
        self.refill(now);
        self.missing += u128::from(amount) * UNITS;
    }

    /// Puts back what was taken and not used. Needs no time: refilling and giving back commute.
    pub(super) fn give_back(&mut self, amount: u64) {
        self.missing = self.missing.saturating_sub(u128::from(amount) * UNITS);
    }

    pub(super) fn window(&mut self, now: Duration) -> Window {
        self.refill(now);
        let left = self.capacity().saturating_sub(self.missing) / UNITS;
        Window { limit: self.limit, remaining: left as u64, reset: self.time_of(self.missing) }
    }

    fn capacity(&self) -> u128 {
        u128::from(self.limit) * UNITS
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos();
        self.missing = self.missing.saturating_sub(passed.saturating_mul(self.limit.into()));
        self.at = self.at.max(now);
    }

    /// How long so many units take to refill.
    fn time_of(&self, units: u128) -> Duration {
        Duration::from_nanos(u64::try_from(units.div_ceil(self.limit.into())).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn a_minute_of_requests() {
        let mut bucket = Bucket::new(60);
        // (at, taken, wait before it, remaining after it, until full)
        let steps = [
            (0, 1, 0, 59, 1_000),
            (0, 59, 0, 0, 60_000),
            (0, 1, 1_000, 0, 60_000),
            (400, 1, 600, 0, 59_600),
            (1_000, 1, 0, 0, 60_000),
            (31_500, 0, 0, 30, 29_500),
            (31_500, 31, 500, 30, 29_500),
            (600_000, 60, 0, 0, 60_000),
            // A clock that stands still or runs backwards gives nothing.
            (599_000, 1, 1_000, 0, 60_000),
        ];
        for (at, amount, wait, remaining, reset) in steps {
            assert_eq!(bucket.wait(amount, MS(at)), MS(wait), "at {at} ms for {amount}");
            if wait == 0 {
                bucket.take(amount, MS(at));
            }
            let expected = Window { limit: 60, remaining, reset: MS(reset) };
            assert_eq!(bucket.window(MS(at)), expected, "after {amount} at {at} ms");
        }
    }

    #[test]
    fn more_than_the_limit_is_owed_and_what_was_not_used_comes_back() {
        let mut bucket = Bucket::new(600);
        assert_eq!(bucket.wait(6_000, MS(0)), MS(0));
        bucket.take(6_000, MS(0));
        assert_eq!(bucket.window(MS(0)), Window { limit: 600, remaining: 0, reset: MS(600_000) });
        assert_eq!(bucket.wait(6_000, MS(0)), MS(600_000), "only a full bucket takes more than it holds");
        assert_eq!(bucket.wait(1, MS(0)), MS(540_100));
        bucket.give_back(5_700);
        assert_eq!(bucket.window(MS(0)).remaining, 300);
        bucket.give_back(u64::MAX);
        assert_eq!(bucket.window(MS(0)), Window { limit: 600, remaining: 600, reset: MS(0) });
    }

    #[test]
    fn a_new_limit_keeps_what_is_missing() {
        let mut bucket = Bucket::new(100);
        bucket.take(90, MS(0));
        bucket.set_limit(1_000);
        assert_eq!(bucket.window(MS(0)).remaining, 910);
        bucket.set_limit(10);
        assert_eq!(bucket.window(MS(0)), Window { limit: 10, remaining: 0, reset: MS(60_000) });
    }

    #[test]
    fn a_new_limit_forgives_no_debt() {
        let mut bucket = Bucket::new(100);
        bucket.take(6_000, MS(0));
        bucket.set_limit(100);
        assert_eq!(bucket.window(MS(0)).reset, MS(3_600_000));
        bucket.set_limit(1_000);
        assert_eq!(bucket.window(MS(0)).reset, MS(360_000));
        // No longer than before: a lower limit does not make what was taken under the higher one dearer.
        bucket.set_limit(10);
        assert_eq!(bucket.window(MS(0)).reset, MS(360_000));
    }

    proptest! {
        /// The wait that is told is exact: at its end the amount is there, a nanosecond before it is not.
        #[test]
        fn waits_are_exact(limit in 1_u64..1_000_000_000_000, used in any::<u32>(), amount in 1_u64..1 << 40, at in any::<u32>()) {
            let now = Duration::from_nanos(at.into());
            let mut bucket = Bucket::new(limit);
            bucket.take(used.into(), now);
            let wait = bucket.wait(amount, now);
            if wait > Duration::ZERO {
                let early = bucket.clone().wait(amount, now + wait - Duration::from_nanos(1));
                prop_assert!(early > Duration::ZERO);
            }
            prop_assert_eq!(bucket.wait(amount, now + wait), Duration::ZERO);
        }

        /// Whatever is asked, no more than the limit's tokens and a bucket full pass.
        #[test]
        fn no_more_than_the_limit_passes(limit in 1_u64..1000, asks in prop::collection::vec((1_u64..200, 0_u64..5_000), 1..200)) {
            let mut bucket = Bucket::new(limit);
            let (mut now, mut passed) = (0, 0);
            for (amount, pause) in asks {
                now += pause;
                let amount = amount.min(limit);
                if bucket.wait(amount, MS(now)).is_zero() {
                    bucket.take(amount, MS(now));
                    passed += amount;
                }
            }
            prop_assert!(u128::from(passed) * 60_000 <= u128::from(limit) * u128::from(now + 60_000));
        }
    }
}
