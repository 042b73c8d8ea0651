//! The engine's end of its workers: what each must be told with its next step, and whether it is there at all.
//!
//! Owner: the engine thread. A worker that is idle has its plan here, to be filled again; one that is at a step has it there.

use crate::worker::{SequenceChange, StepCommand};
use kvern_core::{RequestId, Sampled, StepPlan, WorkerId};
use std::sync::mpsc::SyncSender;

/// What changed for a worker, and for which one.
pub(super) type Change = (WorkerId, SequenceChange);

struct Link {
    commands: SyncSender<StepCommand>,
    /// `None` while the worker has it, and once it is lost.
    plan: Option<StepPlan>,
    changes: Vec<SequenceChange>,
    sampled: Vec<(RequestId, Sampled)>,
    is_lost: bool,
}

/// All workers, by number.
pub(super) struct Links(Vec<Link>);

impl Links {
    /// Each sender leads to an idle worker.
    pub(super) fn new(workers: Vec<SyncSender<StepCommand>>) -> Self {
        let link = |commands| Link {
            commands,
            plan: Some(StepPlan::empty()),
            changes: Vec::new(),
            sampled: Vec::new(),
            is_lost: false,
        };
        Links(workers.into_iter().map(link).collect())
    }

    fn link(&mut self, worker: WorkerId) -> &mut Link {
        &mut self.0[usize::from(worker.0)]
    }

    /// Numbers of all workers, lost ones included.
    pub(super) fn ids(&self) -> impl Iterator<Item = WorkerId> + use<> {
        (0..self.0.len() as u8).map(WorkerId)
    }

    pub(super) fn is_lost(&self, worker: WorkerId) -> bool {
        self.0[usize::from(worker.0)].is_lost
    }

    /// No worker is left.
    pub(super) fn are_all_lost(&self) -> bool {
        self.0.iter().all(|link| link.is_lost)
    }

    /// Whether any worker is at a step.
    pub(super) fn is_any_busy(&self) -> bool {
        self.0.iter().any(|link| link.plan.is_none() && !link.is_lost)
    }

    /// Nothing more comes from this worker, and nothing more is sent.
    pub(super) fn lose(&mut self, worker: WorkerId) {
        let link = self.link(worker);
        link.is_lost = true;
        link.plan = None;
        link.changes.clear();
    }

    /// Keeps a change for the worker's next step.
    pub(super) fn tell(&mut self, (worker, change): Change) {
        let link = self.link(worker);
        if !link.is_lost {
            link.changes.push(change);
        }
    }

    /// The plan of an idle worker, to be filled, and then [started](Self::start) or [kept](Self::keep).
    pub(super) fn idle_plan(&mut self, worker: WorkerId) -> Option<StepPlan> {
        self.link(worker).plan.take()
    }

    /// Nothing was planned.
    pub(super) fn keep(&mut self, worker: WorkerId, plan: StepPlan) {
        self.link(worker).plan = Some(plan);
    }

    /// Sends a planned step.
    pub(super) fn start(&mut self, worker: WorkerId, plan: StepPlan) {
        let link = self.link(worker);
        let changes = std::mem::take(&mut link.changes);
        let command = StepCommand { plan, changes, sampled: std::mem::take(&mut link.sampled) };
        if link.commands.try_send(command).is_err() {
            // Its thread says so in the inbox, too; until then there is no plan to fill.
            tracing::error!(worker = worker.0, "a worker is gone");
        }
    }

    /// Takes back what a step was made of; `sampled` is empty.
    pub(super) fn finish(&mut self, worker: WorkerId, parts: Parts) {
        let link = self.link(worker);
        let Parts { plan, mut changes, sampled } = parts;
        link.plan = Some(plan);
        link.sampled = sampled;
        // What was told meanwhile comes after nothing: the step emptied its list.
        changes.append(&mut link.changes);
        link.changes = changes;
    }
}

/// The vectors of a step, to be used again.
pub(super) struct Parts {
    pub(super) plan: StepPlan,
    pub(super) changes: Vec<SequenceChange>,
    pub(super) sampled: Vec<(RequestId, Sampled)>,
}

