//! What the core knows of one worker: what runs on it, the step that it is at, and what it suspects of failing.
//!
//! Owner: the engine. A worker is idle, at a step, at a step with one ahead of it, or lost.

use crate::ahead::Ahead;
use crate::cost::StepWork;
use crate::request::{Arrival, Request, RequestIndex};
use crate::tenants::TenantSlot;
use crate::{ClassId, DeviceShare, Micros, StepId, WorkerSpec};

/// One request's share of the step in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedSlice {
    pub(crate) index: RequestIndex,
    pub(crate) num_tokens: u32,
    pub(crate) sample: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) spec: WorkerSpec,
    pub(crate) is_alive: bool,
    /// The most urgent first, then the oldest; at most `running_max`.
    running: Vec<(ClassId, Arrival, RequestIndex)>,
    /// Requests whose blocks are on their way to this worker: they will run here.
    pub(crate) num_arriving: u32,
    /// The step in flight, which is reported next; `None` when the worker is idle.
    pub(crate) step: Option<StepId>,
    /// What of its device that step has or, when idle, the last one had.
    pub(crate) share: DeviceShare,
    /// The slices of the step in flight; empty when the worker is idle.
    pub(crate) planned: Vec<PlannedSlice>,
    pub(crate) ahead: Ahead,
    /// The step of the slices has failed while one was ahead of it: `step` is that one, and its slices are still in `ahead`.
    pub(crate) has_failed: bool,
    /// The work of the step in flight or, when idle, of the last one; its prediction, and when it was planned.
    pub(crate) work: StepWork,
    pub(crate) predicted_us: u64,
    /// The moving average of the last steps' predictions.
    pub(crate) mean_us: u64,
    /// What kept the last step's prefill small: the strictest objective or pace of its decodes, or a visitor's absence.
    pub(crate) limit_us: Option<u64>,
    pub(crate) planned_at: Micros,
    /// Last steps in a row in which the oldest prefill gave way to visitors.
    pub(crate) ways_given: u32,
    /// Prompt tokens of running requests that the last planned step did not take.
    pub(crate) backlog: u64,
    /// Parts of a failed step, each to be repeated alone, the next one last. While there are any, nothing else runs.
    pub(crate) suspects: Vec<Vec<PlannedSlice>>,
    /// A decode had no block in the last plan.
    pub(crate) is_stalled: bool,
    /// The engine's count of changes when no waiting request could start here.
    pub(crate) blocked_at: Option<u64>,
    /// Running requests by tenant; those beyond its end have none.
    places: Vec<u32>,
}

impl Worker {
    pub(crate) fn new(spec: WorkerSpec) -> Self {
        Worker {
            spec,
            is_alive: true,
            running: Vec::new(),
            num_arriving: 0,
            step: None,
            share: DeviceShare::Whole,
            planned: Vec::new(),
            ahead: Ahead::default(),
            has_failed: false,
            work: StepWork::default(),
            predicted_us: 0,
            mean_us: 0,
            limit_us: None,
            planned_at: Micros(0),
            ways_given: 0,
            backlog: 0,
            suspects: Vec::new(),
            is_stalled: false,
            blocked_at: None,
            places: Vec::new(),
        }
    }

    /// Whether a decode had no block when it was planned last.
    pub(crate) fn waits_for_block(&self) -> bool {
        self.is_alive && self.is_stalled && self.num_running() > 0
    }

    pub(crate) fn pool(&self) -> usize {
        usize::from(self.spec.pool.0)
    }

    pub(crate) fn num_running(&self) -> usize {
        self.running.len()
    }

    /// A step goes into flight.
    pub(crate) fn note_step(&mut self, work: StepWork, predicted_us: u64, now: Micros) {
        (self.work, self.predicted_us, self.planned_at) = (work, predicted_us, now);
        self.mean_us =
            if self.mean_us == 0 { predicted_us } else { self.mean_us - self.mean_us / 8 + predicted_us / 8 };
    }

    /// Running requests, and those on their way here.
    pub(crate) fn num_taken(&self) -> usize {
        self.running.len() + self.num_arriving as usize
    }

    /// The running request number `at`, in the list's order.
    pub(crate) fn running(&self, at: usize) -> RequestIndex {
        self.running[at].2
    }

    /// In the list's order.
    pub(crate) fn iter_running(&self) -> impl Iterator<Item = (ClassId, Arrival, RequestIndex)> + '_ {
        self.running.iter().copied()
    }

    /// Running requests of a tenant.
    pub(crate) fn places_of(&self, tenant: TenantSlot) -> u32 {
        self.places.get(tenant.0 as usize).copied().unwrap_or(0)
    }

    /// Whether any tenant has several places. O(tenants).
    pub(crate) fn is_crowded(&self) -> bool {
        self.places.iter().any(|places| *places >= 2)
    }

    /// Takes a request into the running list; the worker knows nothing of its blocks. O(1) for the youngest of the last class,
    /// else a move of what comes after.
    pub(crate) fn start(&mut self, index: RequestIndex, request: &mut Request) {
        request.num_told = 0;
        let key = (request.class, request.arrival);
        let at = self.running.partition_point(|(class, arrival, _)| (*class, *arrival) < key);
        self.running.insert(at, (request.class, request.arrival, index));
        let slot = request.tenant.0 as usize;
        self.places.resize(self.places.len().max(slot + 1), 0);
        self.places[slot] += 1;
    }

    /// Takes a request out of the running list. O(log running) and a move of what comes after.
    pub(crate) fn stop(&mut self, request: &Request) {
        let key = (request.class, request.arrival);
        let at = self.running.binary_search_by_key(&key, |(class, arrival, _)| (*class, *arrival));
        self.running.remove(at.expect("SCH-2: a running request is not in its worker's list"));
        self.places[request.tenant.0 as usize] -= 1;
    }

    /// Takes a request out of the groups of suspects.
    pub(crate) fn acquit(&mut self, index: RequestIndex) {
        for group in &mut self.suspects {
            group.retain(|slice| slice.index != index);
        }
        self.suspects.retain(|group| !group.is_empty());
    }
}
