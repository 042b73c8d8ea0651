//! What devices do with their time, by worker; docs/metrics.md says what counts as what.

use super::registry::Maker;
use kvern_core::WorkerId;
use prometheus::{Counter, IntCounter};
use std::time::Duration;

/// Of one worker.
struct WorkerCounters {
    busy: Counter,
    idle: Counter,
    steps_ahead: IntCounter,
}

/// By worker.
pub(super) struct DeviceCounters(Vec<WorkerCounters>);

impl DeviceCounters {
    /// `workers` are their names, in the core's order.
    pub(super) fn new(maker: &Maker<'_>, workers: &[&str]) -> Self {
        let busy = maker.own_seconds_by_worker(
            "device_busy_seconds",
            "Time that a worker's device was at steps, by its own clock.",
            workers,
        );
        let idle = maker.own_seconds_by_worker(
            "device_idle_seconds",
            "Time that a worker's device waited for a step although there was one to run.",
            workers,
        );
        let ahead = maker.own_counts_by_worker(
            "steps_ahead",
            "Steps that were planned before the one before them had ended.",
            workers,
        );
        let counters = busy.into_iter().zip(idle).zip(ahead);
        DeviceCounters(counters.map(|((busy, idle), steps_ahead)| WorkerCounters { busy, idle, steps_ahead }).collect())
    }

    pub(super) fn add_time(&self, worker: WorkerId, busy: Duration, idle: Duration) {
        let counters = &self.0[usize::from(worker.0)];
        counters.busy.inc_by(busy.as_secs_f64());
        counters.idle.inc_by(idle.as_secs_f64());
    }

    pub(super) fn add_ahead(&self, worker: WorkerId) {
        self.0[usize::from(worker.0)].steps_ahead.inc();
    }
}
