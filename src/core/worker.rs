//! What the core knows of one worker: its KV pool, what runs on it, and the step that it is at.
//!
//! Owner: the engine. A worker is idle or at exactly one step.

use crate::kv::KvPool;
use crate::request::{Arrival, Request, RequestIndex};
use crate::{StepId, WorkerSpec};

/// One request's share of the step in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlannedSlice {
    pub(crate) index: RequestIndex,
    pub(crate) num_tokens: u32,
    pub(crate) sample: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) pool: KvPool,
    /// Oldest first; at most `running_max`.
    running: Vec<(Arrival, RequestIndex)>,
    /// The step in flight; `None` when the worker is idle.
    pub(crate) step: Option<StepId>,
    /// The slices of the step in flight; empty when the worker is idle.
    pub(crate) planned: Vec<PlannedSlice>,
    /// Blocks that the running requests would hold if all ran to their limit: what a step's block tables may need.
    pub(crate) table_blocks_max: usize,
}

impl Worker {
    pub(crate) fn new(spec: &WorkerSpec, block_size: u32) -> Self {
        Worker {
            pool: KvPool::new(spec.num_blocks, block_size),
            running: Vec::new(),
            step: None,
            planned: Vec::new(),
            table_blocks_max: 0,
        }
    }

    pub(crate) fn num_running(&self) -> usize {
        self.running.len()
    }

    /// The running request number `at`, from the oldest.
    pub(crate) fn running(&self, at: usize) -> RequestIndex {
        self.running[at].1
    }

    /// Oldest first.
    pub(crate) fn iter_running(&self) -> impl Iterator<Item = (Arrival, RequestIndex)> + '_ {
        self.running.iter().copied()
    }

    /// Takes a request into the running list. O(running) only for one that is older than others there.
    pub(crate) fn start(&mut self, index: RequestIndex, request: &Request, block_size: u32) {
        let at = self.running.partition_point(|(arrival, _)| *arrival < request.arrival);
        self.running.insert(at, (request.arrival, index));
        self.table_blocks_max += request.computed_max().div_ceil(block_size) as usize;
    }

    /// Takes a request out of the running list. O(log running) and a move of what is younger.
    pub(crate) fn stop(&mut self, request: &Request, block_size: u32) {
        let at = self.running.binary_search_by_key(&request.arrival, |(arrival, _)| *arrival);
        self.running.remove(at.expect("SCH-2: a running request is not in its worker's list"));
        self.table_blocks_max -= request.computed_max().div_ceil(block_size) as usize;
    }
}
