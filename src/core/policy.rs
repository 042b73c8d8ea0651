//! The choices of the scheduler, as pure functions. Mechanics are elsewhere.
//!
//! Order: running requests before waiting ones, decodes before prefill, and among equals the oldest first. With the limit
//! on running requests this starves nobody:
//!
//! - at most `step_tokens_max` requests run, so every decode has its token in every step, and as a prefilling request is
//!   one of them, at least one token of each step is left for prefill;
//! - the oldest request of a worker is never preempted and is in each of its steps, so it ends after at most as many
//!   steps as it has tokens; then the next one is the oldest.

use crate::CoreConfig;

/// Most requests that run at once on a worker: each must be able to get a token in each step.
pub(crate) fn running_max(config: &CoreConfig) -> usize {
    config.running_max.min(config.step_tokens_max) as usize
}

/// Which of a worker's `num_running` requests, counted from the oldest, loses its blocks: the youngest, which has the least
/// to compute again and on which nobody younger waits.
pub(crate) fn victim(num_running: usize) -> usize {
    num_running - 1
}

/// Free blocks that an admission must leave: one for each request that runs already, so that none of them has to preempt
/// the newcomer within the next `block_size` steps. Nothing when nothing runs, so that the oldest can always start.
pub(crate) fn admission_headroom(num_running: usize) -> u32 {
    num_running as u32
}

/// How many of `remaining` tokens a request computes in a step that has `budget` tokens left.
pub(crate) fn chunk(remaining: u32, budget: u32) -> u32 {
    remaining.min(budget)
}
