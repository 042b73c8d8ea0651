//! Steps that are put on a device as one. Only a GPU gains by it; elsewhere a step is run as it comes.

use crate::cuda::graphs::DeviceGraphs;
use crate::device::Backend;
use crate::{Device, KvCache, Result, SequenceBatch};

/// The captured decode steps of one model, workspace and cache.
pub struct StepGraphs(Option<DeviceGraphs>);

impl StepGraphs {
    /// For decode steps of up to `sequences_max` sequences.
    #[must_use]
    pub fn new(device: &Device, sequences_max: usize) -> Self {
        StepGraphs(match &device.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(_) => Some(DeviceGraphs::new(sequences_max)),
        })
    }

    /// Batch sizes to run a decode step of each between [`begin_capture`](Self::begin_capture) and
    /// [`end_capture`](Self::end_capture), with each share of the device; none where there is nothing to gain.
    #[must_use]
    pub fn ladder(&self) -> Vec<usize> {
        self.0.as_ref().map_or_else(Vec::new, DeviceGraphs::ladder)
    }

    /// Decode steps are captured from now on.
    pub fn begin_capture(&mut self) {
        self.0.iter_mut().for_each(|graphs| graphs.capturing = true);
    }

    /// Decode steps are replayed from now on, where they were captured.
    pub fn end_capture(&mut self) {
        self.0.iter_mut().for_each(|graphs| graphs.capturing = false);
    }

    /// Rows that the step shall be laid out for: that of its captured likeness, or its own (`None`).
    #[must_use]
    pub fn padded_rows(&self, device: &Device, batch: &SequenceBatch<'_>, kv: &KvCache) -> Option<usize> {
        let (Some(graphs), Backend::Cuda(gpu)) = (&self.0, &device.backend) else { return None };
        let sequences = batch.context_lens.len();
        let decode = batch.cu_seqlens_q.iter().enumerate().all(|(row, &first)| first as usize == row);
        if !decode || sequences == 0 {
            return None;
        }
        graphs.rung(gpu, sequences, kv.on_device().ok()?.layer(0).0)
    }

    /// Runs `work`, the launches of a step laid out for `padded` rows, or what was captured of it.
    pub fn run(
        &mut self,
        device: &Device,
        padded: Option<usize>,
        kv: &mut KvCache,
        work: impl FnOnce(&mut KvCache) -> Result<()>,
    ) -> Result<()> {
        match (&mut self.0, &device.backend, padded) {
            (Some(graphs), Backend::Cuda(gpu), Some(rows)) => {
                let cache = kv.on_device()?.layer(0).0;
                let done = graphs.run(gpu, rows, cache, || work(kv));
                done.map_err(|error| error.within(format_args!("a graph of {rows} rows")))
            }
            _ => work(kv),
        }
    }
}
