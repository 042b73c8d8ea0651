//! What autoscaling and clients are told of the load: the core's signals now, their recent history, and what it foretells.
//!
//! Owner: the engine thread. Signals are taken at most ten times a second, and kept once a second for a minute, so their cost
//! does not depend on the speed of the steps.

use kvern_core::{Engine as Core, Micros, Signals, TenantSignals, desired_replicas, time_to_saturation};

/// Between two looks at the core.
const REFRESH: Micros = Micros(100_000);
/// Between two entries of the history.
const SAMPLE: Micros = Micros(1_000_000);
/// Entries of the history: what a forecast looks back to.
const SAMPLES_MAX: usize = 60;
/// Replicas in thousandths: this one is a whole.
const ONE_REPLICA: u32 = 1000;

/// What is told.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    pub signals: Signals,
    /// `None`: it does not grow.
    pub time_to_saturation: Option<Micros>,
    /// Replicas in thousandths that the load of this one would take.
    pub desired_replicas: u32,
    pub tenants: Vec<TenantSignals>,
}

pub(super) struct Observer {
    /// Thousandths of saturation that replicas should have.
    target: u32,
    history: Vec<Signals>,
    outlook: Outlook,
    refreshed_at: Option<Micros>,
}

impl Observer {
    /// `target`: the saturation that replicas should have, in thousandths.
    pub(super) fn new(target: u32) -> Self {
        Observer {
            target,
            history: Vec::with_capacity(SAMPLES_MAX),
            outlook: Outlook { desired_replicas: ONE_REPLICA, ..Outlook::default() },
            refreshed_at: None,
        }
    }

    /// The outlook, if it was taken anew.
    pub(super) fn refresh(&mut self, core: &Core, now: Micros) -> Option<&Outlook> {
        if self.refreshed_at.is_some_and(|last| now.0 < last.0 + REFRESH.0) {
            return None;
        }
        self.refreshed_at = Some(now);
        let signals = Signals { at: now, ..core.signals() };
        if self.history.last().is_none_or(|last| now.0 >= last.at.0 + SAMPLE.0) {
            if self.history.len() == SAMPLES_MAX {
                self.history.remove(0);
            }
            self.history.push(signals);
        }
        let outlook = &mut self.outlook;
        outlook.signals = signals;
        outlook.time_to_saturation = time_to_saturation(&self.history);
        outlook.desired_replicas = desired_replicas(&self.history, ONE_REPLICA, self.target);
        core.tenant_signals(&mut outlook.tenants);
        Some(outlook)
    }
}
