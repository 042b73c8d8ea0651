//! Launches of decode steps, captured once for each of a ladder of batch sizes, and for each share of the device that a
//! step may have: a step is then one launch for the host.

use super::CudaDevice;
use super::driver::Graph;
use super::places::SHARES;
use crate::Result;
use kvern_cuda_abi::Ptr;

/// Batch sizes that are captured, up to the most sequences of a step, which is one too. Steps between two of them compute rows
/// that nobody reads: at most a third of them, where products are bound by the weights' reads anyway.
const LADDER: [usize; 16] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768];

/// Captured steps over one workspace and one cache.
pub(crate) struct DeviceGraphs {
    rungs: Vec<Rung>,
    /// Steps are captured where they were not; else they run as they are.
    pub(crate) capturing: bool,
    /// K of the first layer of the cache that the captured launches name.
    cache: Ptr,
}

struct Rung {
    rows: usize,
    /// By share: what was captured stays on the multiprocessors that it was captured for.
    graphs: [Option<Graph>; SHARES.len()],
}

impl DeviceGraphs {
    /// For steps of at most `sequences_max` rows.
    pub(crate) fn new(sequences_max: usize) -> Self {
        let below = LADDER.into_iter().take_while(|&rows| rows < sequences_max);
        let rungs = below.chain([sequences_max]).map(|rows| Rung { rows, graphs: [None; SHARES.len()] }).collect();
        DeviceGraphs { rungs, capturing: false, cache: Ptr::NULL }
    }

    /// The batch sizes, rising.
    pub(crate) fn ladder(&self) -> Vec<usize> {
        self.rungs.iter().map(|rung| rung.rows).collect()
    }

    /// The rung for a decode step of `rows` rows over this cache, with the share of the device that work has now.
    pub(crate) fn rung(&self, gpu: &CudaDevice, rows: usize, cache: Ptr) -> Option<usize> {
        let rung = self.rungs.iter().find(|rung| rung.rows >= rows)?;
        (self.capturing || (rung.graphs[gpu.share()].is_some() && self.cache == cache)).then_some(rung.rows)
    }

    /// Replays the rung of exactly `rows` rows, or captures `work` as it.
    pub(crate) fn run(
        &mut self,
        gpu: &CudaDevice,
        rows: usize,
        cache: Ptr,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(rung) = self.rungs.iter_mut().find(|rung| rung.rows == rows) else { return work() };
        // Not within the capture, and before what is replayed.
        gpu.bring_inputs()?;
        let own = &mut rung.graphs[gpu.share()];
        let graph = match *own {
            Some(graph) => graph,
            None => {
                gpu.driver.begin_capture(gpu.stream())?;
                let done = work();
                let graph = gpu.driver.end_capture(gpu.stream());
                done?;
                self.cache = cache;
                *own.insert(graph?)
            }
        };
        // SAFETY: the graph was captured over this workspace and, as `rung` said, this cache, which live on.
        unsafe { gpu.driver.launch_graph(graph, gpu.stream()) }
    }
}
