//! The engine's end of its workers: what each must be told with its next step, and whether it is there at all.
//!
//! Owner: the engine thread. A worker that is idle has its plan here, to be filled again; one that is at a step has it there.
//! Where steps are planned ahead there are two plans for each worker, and it may have both. It takes them in order, and with
//! each what was to be told since the one before: it forgets a request when it begins a step that does not have it, perhaps before
//! the last one that has it has ended.

use crate::worker::{SequenceChange, StepCommand};
use kvern_core::{RequestId, Sampled, StepPlan, WorkerId};
use std::sync::mpsc::SyncSender;

/// What changed for a worker, and for which one.
pub(super) type Change = (WorkerId, SequenceChange);

struct Link {
    commands: SyncSender<StepCommand>,
    /// Those that the worker does not have; none once it is lost.
    plans: Vec<StepPlan>,
    /// Steps that the worker has.
    num_started: usize,
    /// Nobody has asked for a step ahead of the one that the worker is at.
    is_unasked: bool,
    /// Since its last step the worker was asked for while there was nothing for it to do.
    has_rested: bool,
    changes: Vec<SequenceChange>,
    /// Empty, to be used again.
    spare_changes: Vec<Vec<SequenceChange>>,
    spare_sampled: Vec<Vec<(RequestId, Sampled)>>,
    is_lost: bool,
}

/// All workers, by number.
pub(super) struct Links(Vec<Link>);

impl Links {
    /// Each sender leads to an idle worker that takes this many steps at once: 1, or 2 with a step ahead.
    pub(super) fn new(workers: Vec<SyncSender<StepCommand>>, steps_max: usize) -> Self {
        let link = |commands| Link {
            commands,
            plans: vec![StepPlan::empty(); steps_max],
            num_started: 0,
            is_unasked: false,
            has_rested: true,
            changes: Vec::new(),
            spare_changes: Vec::with_capacity(steps_max),
            spare_sampled: Vec::with_capacity(steps_max),
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
        self.0.iter().any(|link| link.num_started > 0 && !link.is_lost)
    }

    /// Nothing more comes from this worker, and nothing more is sent.
    pub(super) fn lose(&mut self, worker: WorkerId) {
        let link = self.link(worker);
        link.is_lost = true;
        link.plans.clear();
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
        let link = self.link(worker);
        if link.num_started == 0 { link.plans.pop() } else { None }
    }

    /// The plan for a step ahead of the one that the worker is at, once for each of those; then as an idle worker's.
    pub(super) fn plan_ahead(&mut self, worker: WorkerId) -> Option<StepPlan> {
        let link = self.link(worker);
        let is_due = link.num_started == 1 && std::mem::take(&mut link.is_unasked);
        if is_due { link.plans.pop() } else { None }
    }

    /// Nothing was planned.
    pub(super) fn keep(&mut self, worker: WorkerId, plan: StepPlan) {
        let link = self.link(worker);
        link.has_rested |= link.num_started == 0;
        link.plans.push(plan);
    }

    /// Sends a planned step.
    pub(super) fn start(&mut self, worker: WorkerId, plan: StepPlan) {
        let link = self.link(worker);
        link.num_started += 1;
        link.is_unasked = true;
        let changes = std::mem::replace(&mut link.changes, link.spare_changes.pop().unwrap_or_default());
        let sampled = link.spare_sampled.pop().unwrap_or_default();
        let follows = !std::mem::take(&mut link.has_rested);
        let command = StepCommand { plan, changes, sampled, follows };
        if link.commands.try_send(command).is_err() {
            // Its thread says so in the inbox, too; until then there is no plan to fill.
            tracing::error!(worker = worker.0, "a worker is gone");
        }
    }

    /// Takes back what a step was made of; `changes` and `sampled` are empty.
    pub(super) fn finish(&mut self, worker: WorkerId, parts: Parts) {
        let link = self.link(worker);
        let Parts { plan, changes, sampled } = parts;
        link.num_started -= 1;
        link.is_unasked = true;
        link.plans.push(plan);
        link.spare_changes.push(changes);
        link.spare_sampled.push(sampled);
    }
}

/// The vectors of a step, to be used again.
pub(super) struct Parts {
    pub(super) plan: StepPlan,
    pub(super) changes: Vec<SequenceChange>,
    pub(super) sampled: Vec<(RequestId, Sampled)>,
}
