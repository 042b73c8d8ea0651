//! The two verbs of the core.

use crate::{CoreConfig, Effect, Input, StepPlan, Timed, WorkerId};

pub struct Engine {}

/// What metrics read; a copy, taken after `apply` or `plan`. O(1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub running: u32,
    pub waiting: u32,
    pub blocks_total: u32,
    /// Blocks referenced by a request. `blocks_live / blocks_total` is the KV usage.
    pub blocks_live: u32,
    /// Totals since start, in tokens, as vLLM counts them: looked up in, and found in, the prefix cache.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
}

impl Engine {
    #[must_use]
    pub fn new(_config: CoreConfig) -> Self {
        todo!()
    }

    /// Takes one input; what follows from it is appended to `effects`.
    pub fn apply(&mut self, _input: Timed<Input>, _effects: &mut Vec<Effect>) {
        todo!()
    }

    /// Fills `plan` with the next step of an idle worker; `false` when the worker is busy or has nothing to run.
    pub fn plan(&mut self, _worker: WorkerId, _plan: &mut StepPlan, _effects: &mut Vec<Effect>) -> bool {
        todo!()
    }

    #[must_use]
    pub fn stats(&self) -> Stats {
        todo!()
    }

    /// No request is known: nothing waits, runs or is in flight.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        todo!()
    }
}
