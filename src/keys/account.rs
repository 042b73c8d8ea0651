//! What one key has used of its limits.
//!
//! Owner: shared by the requests of a key and the table that names it; it stays while the key stays, whatever else a reload
//! changes. All counters are behind one lock that is held for a few additions. A request takes a [`Permit`] when it comes
//! and a [`Charge`] when its tokens are known; both settle themselves when they are dropped, however the request ends.

use super::bucket::{Bucket, Moment, Window};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A day, in which a budget of tokens is spent; days are of UTC.
const DAY: Duration = Duration::from_secs(86_400);
/// Nobody knows when an answer ends.
const RETRY_CONCURRENT: Duration = Duration::from_secs(1);

/// What a key may use; `None` is no limit, numbers are at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    pub requests_per_minute: Option<u64>,
    /// Prompt and answer.
    pub tokens_per_minute: Option<u64>,
    /// Requests that are being answered.
    pub concurrent_requests: Option<u32>,
    pub tokens_per_day: Option<u64>,
}

/// A limit that a request met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("the key's limit of {limit} requests per minute is reached")]
    Requests { limit: u64, retry_in: Duration },
    #[error("the key's limit of {limit} tokens per minute is reached: this request may take {asked}")]
    Tokens { limit: u64, asked: u64, retry_in: Duration },
    #[error("the key's limit of {limit} requests at once is reached")]
    Concurrent { limit: u32, retry_in: Duration },
    /// A request that is larger than the whole budget is never taken.
    #[error("the key's budget of {limit} tokens a day has {left} left: this request may take {asked}")]
    Day { limit: u64, left: u64, asked: u64, retry_in: Option<Duration> },
}

impl Denied {
    /// When the same request may be taken, rounded up to milliseconds, in which clients are told.
    #[must_use]
    pub fn retry_in(self) -> Option<Duration> {
        let exact = match self {
            Denied::Requests { retry_in, .. }
            | Denied::Tokens { retry_in, .. }
            | Denied::Concurrent { retry_in, .. } => Some(retry_in),
            Denied::Day { retry_in, .. } => retry_in,
        };
        exact.map(|wait| Duration::from_millis(u64::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)))
    }
}

/// What a key has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Standing {
    pub requests: Option<Window>,
    /// Of the minute and the day, the one with less left.
    pub tokens: Option<Window>,
}

/// The counters of one key.
#[derive(Debug)]
pub struct Account {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    day: Option<DayBudget>,
    concurrent_max: Option<u32>,
    running: u32,
}

#[derive(Clone, Debug)]
struct DayBudget {
    limit: u64,
    /// Days since 1970.
    day: u64,
    used: u64,
}

impl Account {
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let account = Account { state: Mutex::default() };
        account.set_limits(limits);
        account
    }

    /// New limits for what was already used.
    pub fn set_limits(&self, limits: &Limits) {
        let mut state = self.lock();
        state.requests = rebucketed(state.requests.take(), limits.requests_per_minute);
        state.tokens = rebucketed(state.tokens.take(), limits.tokens_per_minute);
        state.concurrent_max = limits.concurrent_requests;
        state.day = limits.tokens_per_day.map(|limit| match state.day.take() {
            Some(day) => DayBudget { limit, ..day },
            None => DayBudget { limit, day: 0, used: 0 },
        });
    }

    /// Lets a request in, which holds the permit until its answer has ended.
    ///
    /// # Errors
    /// Too many run, or too many came lately; then nothing is counted.
    pub fn enter(self: &Arc<Self>, now: Moment) -> Result<Permit, Denied> {
        let mut state = self.lock();
        if let Some(limit) = state.concurrent_max.filter(|&limit| state.running >= limit) {
            return Err(Denied::Concurrent { limit, retry_in: RETRY_CONCURRENT });
        }
        if let Some(bucket) = &mut state.requests {
            let retry_in = bucket.wait(1, now.uptime);
            if !retry_in.is_zero() {
                return Err(Denied::Requests { limit: bucket.limit(), retry_in });
            }
            bucket.take(1, now.uptime);
        }
        state.running += 1;
        Ok(Permit(Arc::clone(self)))
    }

    /// Reserves the most tokens that a request may take.
    ///
    /// # Errors
    /// The minute or the day has not as many left; then nothing is counted.
    pub fn reserve(self: &Arc<Self>, tokens: u64, now: Moment) -> Result<Charge, Denied> {
        let mut state = self.lock();
        let state = &mut *state;
        if let Some(budget) = &mut state.day {
            budget.check(tokens, now)?;
        }
        if let Some(bucket) = &mut state.tokens {
            let retry_in = bucket.wait(tokens, now.uptime);
            if !retry_in.is_zero() {
                return Err(Denied::Tokens { limit: bucket.limit(), asked: tokens, retry_in });
            }
            bucket.take(tokens, now.uptime);
        }
        if let Some(budget) = &mut state.day {
            budget.used = budget.used.saturating_add(tokens);
        }
        let (from_minute, day) = (state.tokens.is_some(), state.day.is_some().then(|| day_of(now)));
        Ok(Charge { account: Arc::clone(self), reserved: tokens, used: 0, from_minute, day })
    }

    #[must_use]
    pub fn standing(&self, now: Moment) -> Standing {
        let mut state = self.lock();
        let state = &mut *state;
        let day = state.day.as_mut().map(|budget| budget.window(now));
        let minute = state.tokens.as_mut().map(|bucket| bucket.window(now.uptime));
        Standing {
            requests: state.requests.as_mut().map(|bucket| bucket.window(now.uptime)),
            tokens: minute.into_iter().chain(day).min_by_key(|window| window.remaining),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The counters are whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rebucketed(bucket: Option<Bucket>, limit: Option<u64>) -> Option<Bucket> {
    limit.map(|limit| match bucket {
        Some(mut bucket) => {
            bucket.set_limit(limit);
            bucket
        }
        None => Bucket::new(limit),
    })
}

fn day_of(now: Moment) -> u64 {
    now.unix.as_secs() / DAY.as_secs()
}

impl DayBudget {
    fn left(&mut self, now: Moment) -> u64 {
        let today = day_of(now);
        if self.day != today {
            (self.day, self.used) = (today, 0);
        }
        self.limit.saturating_sub(self.used)
    }

    fn check(&mut self, asked: u64, now: Moment) -> Result<(), Denied> {
        let (left, limit) = (self.left(now), self.limit);
        if asked <= left {
            return Ok(());
        }
        let retry_in = (asked <= limit).then(|| until_tomorrow(now));
        Err(Denied::Day { limit, left, asked, retry_in })
    }

    fn window(&mut self, now: Moment) -> Window {
        let remaining = self.left(now);
        Window { limit: self.limit, remaining, reset: until_tomorrow(now) }
    }
}

fn until_tomorrow(now: Moment) -> Duration {
    Duration::from_secs((day_of(now) + 1) * DAY.as_secs()).saturating_sub(now.unix)
}

/// A request that is being answered.
#[derive(Debug)]
pub struct Permit(Arc<Account>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

/// Tokens that a request may take. Those that it did not use go back when this is dropped.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    reserved: u64,
    used: u64,
    /// Whether there was a limit per minute, and the day of the budget if there was one: what a later one holds is not ours.
    from_minute: bool,
    day: Option<u64>,
}

impl Charge {
    /// The request is over and took so many tokens.
    pub fn settle(mut self, used: u64) {
        self.used = used;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let unused = self.reserved.saturating_sub(self.used);
        let mut state = self.account.lock();
        if let Some(bucket) = state.tokens.as_mut().filter(|_| self.from_minute) {
            bucket.give_back(unused);
        }
        // What was reserved yesterday is not part of today's budget.
        if let Some(budget) = state.day.as_mut().filter(|budget| Some(budget.day) == self.day) {
            budget.used = budget.used.saturating_sub(unused);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many milliseconds after noon of some day.
    fn at(ms: u64) -> Moment {
        let uptime = Duration::from_millis(ms);
        Moment { uptime, unix: DAY * 20_000 + DAY / 2 + uptime }
    }

    fn account(limits: Limits) -> Arc<Account> {
        Arc::new(Account::new(&limits))
    }

    #[test]
    fn a_key_without_limits_has_none() {
        let account = account(Limits::default());
        let permits: Vec<_> = (0..1000).map(|_| account.enter(at(0)).expect("no limit")).collect();
        let charge = account.reserve(u64::MAX, at(0)).expect("no limit");
        assert_eq!(account.standing(at(0)), Standing::default());
        drop((permits, charge));
    }

    #[test]
    fn permits_come_back_when_they_are_dropped() {
        let account = account(Limits { concurrent_requests: Some(2), ..Limits::default() });
        let (first, _second) = (account.enter(at(0)).expect("free"), account.enter(at(0)).expect("free"));
        let denied = account.enter(at(0)).expect_err("two run");
        assert_eq!(denied, Denied::Concurrent { limit: 2, retry_in: RETRY_CONCURRENT });
        drop(first);
        let _third = account.enter(at(0)).expect("one has ended");
        assert!(account.enter(at(0)).is_err());
    }

    #[test]
    fn a_request_that_is_refused_for_one_limit_is_not_counted_by_another() {
        let limits = Limits { requests_per_minute: Some(1), concurrent_requests: Some(1), ..Limits::default() };
        let account = account(limits);
        let permit = account.enter(at(0)).expect("the first one");
        assert!(matches!(account.enter(at(60_000)), Err(Denied::Concurrent { .. })));
        drop(permit);
        let denied = account.enter(at(30_000)).expect_err("half a minute");
        assert_eq!(denied, Denied::Requests { limit: 1, retry_in: Duration::from_secs(30) });
        assert!(account.enter(at(60_000)).is_ok(), "the refused ones took no place");
    }

    #[test]
    fn tokens_are_reserved_and_settled() {
        let limits = Limits { tokens_per_minute: Some(600), tokens_per_day: Some(2_000), ..Limits::default() };
        let account = account(limits);
        let left = |ms| account.standing(at(ms)).tokens.expect("a limit").remaining;
        let charge = account.reserve(500, at(0)).expect("600 are there");
        assert_eq!(left(0), 100);
        let denied = account.reserve(200, at(0)).expect_err("only 100 are");
        assert_eq!(denied, Denied::Tokens { limit: 600, asked: 200, retry_in: Duration::from_secs(10) });
        charge.settle(40);
        assert_eq!(left(0), 560);
        drop(account.reserve(560, at(0)).expect("560 are there"));
        assert_eq!(left(0), 560, "a request that was never taken costs nothing");
        // 40 of the day are used; the minute has 600 again after 4 s.
        account.reserve(600, at(4_000)).expect("the minute is full").settle(600);
        account.reserve(600, at(64_000)).expect("the minute is full").settle(600);
        account.reserve(600, at(124_000)).expect("the minute is full").settle(600);
        assert_eq!(
            account.standing(at(184_000)).tokens.map(|window| (window.limit, window.remaining)),
            Some((2_000, 160))
        );
        let noon_to_midnight = DAY / 2 - Duration::from_secs(184);
        let day = |asked, retry_in| Denied::Day { limit: 2_000, left: 160, asked, retry_in };
        assert_eq!(account.reserve(161, at(184_000)).expect_err("160"), day(161, Some(noon_to_midnight)));
        assert_eq!(account.reserve(2_001, at(184_000)).expect_err("never"), day(2_001, None));
        assert_eq!(left(184_000), 160, "refusals take nothing");
    }

    #[test]
    fn a_day_ends_at_midnight_and_what_runs_over_it_is_of_the_day_before() {
        let account = account(Limits { tokens_per_day: Some(100), ..Limits::default() });
        let midnight = u64::try_from((DAY / 2).as_millis()).expect("small");
        let over = account.reserve(60, at(midnight - 1)).expect("100 are there");
        assert!(account.reserve(60, at(midnight - 1)).is_err());
        let today = account.reserve(60, at(midnight)).expect("a new day");
        over.settle(0);
        assert_eq!(account.standing(at(midnight)).tokens.map(|window| window.remaining), Some(40));
        today.settle(10);
        let window = account.standing(at(midnight + 1_000)).tokens.expect("a budget");
        assert_eq!((window.remaining, window.reset), (90, DAY - Duration::from_secs(1)));
    }

    #[test]
    fn new_limits_keep_the_counts() {
        let limits = |requests, day| Limits { requests_per_minute: requests, tokens_per_day: day, ..Limits::default() };
        let account = account(limits(Some(10), Some(100)));
        let _permit = account.enter(at(0)).expect("ten are there");
        account.reserve(30, at(0)).expect("100 are there").settle(30);
        account.set_limits(&limits(Some(20), Some(50)));
        let standing = account.standing(at(0));
        assert_eq!(standing.requests.map(|window| window.remaining), Some(19));
        assert_eq!(standing.tokens.map(|window| window.remaining), Some(20));
        account.set_limits(&limits(None, None));
        assert_eq!(account.standing(at(0)), Standing::default());
    }

    #[test]
    fn waits_are_told_in_whole_milliseconds_that_suffice() {
        let account = account(Limits { requests_per_minute: Some(7), ..Limits::default() });
        let _permits: Vec<_> = (0..7).map(|_| account.enter(at(0)).expect("seven")).collect();
        let wait = account.enter(at(0)).expect_err("no eighth").retry_in().expect("a wait");
        assert_eq!(wait, Duration::from_millis(8_572));
        assert!(account.enter(at(8_571)).is_err());
        assert!(account.enter(at(8_572)).is_ok());
    }
}
