//! The choices of the scheduler, as pure functions. Mechanics are elsewhere; the order of the waiting is `queue.rs`.
//!
//! Order within a step: decodes before prefill; prefill by class, then by the tenant's fair-share counter, then by age,
//! running and waiting requests alike. What a running prefill was itself charged does not count against it, so that it goes on
//! as it was when it started, and a flood's later prompts do not pass a long one. With the limit on running requests this
//! starves nobody:
//!
//! - at most `step_tokens_max` requests run, so every decode has its token in every step, and as a prefilling request is
//!   one of them, at least one token of each step is left for prefill;
//! - the oldest prefill of a worker has a part of each of its steps;
//! - of the requests in a pool the one of the best [`Standing`], class and age is never preempted, and every preemption makes
//!   room for a token that is then made.

use crate::request::Arrival;
use crate::{ClassId, CoreConfig, DeviceShare, Role};

/// Most requests that run at once on a worker: each must be able to get a token in each step.
pub(crate) fn running_max(config: &CoreConfig) -> usize {
    config.running_max.min(config.step_tokens_max) as usize
}

/// How a tenant's live blocks of a pool compare with its floor and its share: the best is the last to lose blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    BelowFloor,
    WithinShare,
    AboveShare,
}

/// `share` is at least `floor`.
pub(crate) fn standing(live: u32, floor: u32, share: u32) -> Standing {
    if live > share {
        Standing::AboveShare
    } else if live > floor {
        Standing::WithinShare
    } else {
        Standing::BelowFloor
    }
}

/// The request of the greatest rank loses its blocks first: of a tenant above its share, of the least urgent class, the
/// youngest, which has the least to compute again.
pub(crate) type VictimRank = (Standing, ClassId, Arrival);

/// Whether a tenant with these places and this weight has at least as many for its weight as another.
pub(crate) fn crowds_as(other: (u32, u32), own: (u32, u32)) -> bool {
    let part = |(places, _): (u32, u32), (_, weight): (u32, u32)| u64::from(places) * u64::from(weight);
    part(own, other) >= part(other, own)
}

/// Longest mean time between a request's tokens with which it ends before its deadline: an eighth of the time is kept for what
/// was not foreseen.
pub(crate) fn pace_us(until_deadline_us: u64, tokens_left: u64) -> u64 {
    (until_deadline_us - until_deadline_us / 8) / tokens_left.max(1)
}

/// Free blocks that an admission must leave: one for each request of the pool that runs already, so that none of them has to
/// preempt the newcomer within the next `block_size` steps. Nothing when nothing runs, so that one can always start.
pub(crate) fn admission_headroom(num_running: usize) -> u32 {
    num_running as u32
}

/// What a worker does at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Duty {
    /// Most uncached tokens of a waiting request that it takes.
    pub(crate) admits_max: u32,
    /// Whether a decode worker takes over what it has computed.
    pub(crate) hands_off: bool,
}

/// A prompt runs beside the decodes, on a prefill worker, unless it is so short that it rides along. Where one kind of
/// worker is missing, the other does its work.
pub(crate) fn duty(role: Role, has_prefill: bool, has_decode: bool, ride_along_tokens_max: u32) -> Duty {
    match role {
        Role::Decode if has_prefill => Duty { admits_max: ride_along_tokens_max, hands_off: false },
        Role::Prefill => Duty { admits_max: u32::MAX, hands_off: has_decode },
        Role::Mixed | Role::Decode => Duty { admits_max: u32::MAX, hands_off: false },
    }
}

/// How much of its device a worker's next step has, where the workers of a device have a part each: the whole while
/// none of the others has requests running or a step in flight, else the worker's part.
///
/// A step keeps what it was planned with. So a step on the whole may run beside another worker's, but of any two that
/// do the one that was planned later is on its part: nobody waits for the device to be divided, and who goes on alone
/// has all of it from its next plan on.
pub(crate) fn share(has_parts: bool, are_others_at_work: bool) -> DeviceShare {
    if has_parts && are_others_at_work { DeviceShare::Part } else { DeviceShare::Whole }
}

/// Whether the cost model learns from a step. Where workers have parts it is measured on those, and stays a model of
/// steps beside others: what it predicts decides on admission and on prompts beside decodes, when others are at work.
/// Only who has nobody left to be beside learns from steps on the whole.
pub(crate) fn teaches(has_parts: bool, share: DeviceShare, has_others: bool) -> bool {
    !has_parts || share == DeviceShare::Part || !has_others
}

/// How many of `remaining` tokens a request computes in a step that has `budget` tokens left.
pub(crate) fn chunk(remaining: u32, budget: u32) -> u32 {
    remaining.min(budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_the_whole_device_unless_others_are_at_work() {
        let cases = [
            ((false, false), DeviceShare::Whole),
            ((false, true), DeviceShare::Whole),
            ((true, false), DeviceShare::Whole),
            ((true, true), DeviceShare::Part),
        ];
        for ((has_parts, others), expected) in cases {
            assert_eq!(share(has_parts, others), expected, "parts {has_parts}, others at work {others}");
        }
    }

    #[test]
    fn the_cost_model_is_of_steps_beside_others() {
        for share in [DeviceShare::Whole, DeviceShare::Part] {
            assert!(teaches(false, share, true) && teaches(false, share, false), "undivided: {share:?}");
            assert!(teaches(true, share, false), "nobody else: {share:?}");
            assert_eq!(teaches(true, share, true), share == DeviceShare::Part);
        }
    }
}
