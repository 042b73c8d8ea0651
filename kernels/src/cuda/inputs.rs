//! A step's ids, positions, slots and sampled rows on a device.

use super::CudaDevice;
use super::memory::{Milestone, StepArray};
use crate::step_inputs::{Indices, StepIndices, StepRows};
use crate::{KernelError, Result};

/// Arrays of fixed place, filled for each step.
pub(crate) struct DeviceInputs {
    ids: StepArray<u32>,
    positions: StepArray<u32>,
    slots: StepArray<u32>,
    sample_rows: StepArray<u32>,
    copied: Milestone,
}

impl DeviceInputs {
    pub(crate) fn new(gpu: &CudaDevice, tokens_max: usize, sequences_max: usize) -> Result<Self> {
        let array = |len| StepArray::new(&gpu.driver, "a step's inputs", len);
        Ok(DeviceInputs {
            ids: array(tokens_max)?,
            positions: array(tokens_max)?,
            slots: array(tokens_max)?,
            sample_rows: array(sequences_max)?,
            copied: Milestone::new(&gpu.driver)?,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        [&self.ids, &self.positions, &self.slots, &self.sample_rows].map(StepArray::bytes).iter().sum()
    }

    pub(crate) fn update<'a>(
        &mut self,
        gpu: &CudaDevice,
        rows: &StepRows<'_>,
        padded: Option<usize>,
        scratch_slot: u32,
    ) -> Result<StepIndices<'a>> {
        let StepRows { ids, positions, slots, sample_rows } = *rows;
        let live = ids.len();
        if positions.len() != live || slots.len() != live || padded.is_some_and(|padded| padded < live) {
            let found = format!("{live}, {} and {}, {padded:?} padded", positions.len(), slots.len());
            return Err(KernelError::shape("step inputs", "as many ids as positions and slots", found));
        }
        let (count, sampled) = (padded.unwrap_or(live), padded.unwrap_or(sample_rows.len()));
        self.copied.wait()?;
        let Self { ids: to_ids, positions: to_positions, slots: to_slots, sample_rows: to_sampled, copied } = self;
        for (array, values, count, pad) in [
            (to_ids, ids, count, 0),
            (to_positions, positions, count, 0),
            (to_slots, slots, count, scratch_slot),
            (to_sampled, sample_rows, sampled, 0),
        ] {
            let value = |row: usize| values.get(row).copied().unwrap_or(pad);
            // SAFETY: the last copies are done, as `copied` says, and the arrays are this stream's own.
            unsafe { array.fill(gpu.stream, (0..count).map(value))? };
        }
        copied.set(gpu.stream)?;
        let indices = |array: &StepArray<u32>| Indices::device(array.ptr(), array.len());
        Ok(StepIndices {
            ids: indices(&self.ids),
            positions: indices(&self.positions),
            slots: indices(&self.slots),
            sample_rows: indices(&self.sample_rows),
        })
    }
}
