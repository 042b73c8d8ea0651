//! A step's inputs on a device: the host brings ids and what each sequence's rows are; positions, slots, and ids that only the
//! device knows yet, are made there.

use std::sync::Arc;

use kvern_cuda_abi::{NONE, Ptr, SequenceSlice, StepInputsParams};

use super::attention::DevicePlan;
use super::memory::DeviceMemory;
use super::uploads::StepArray;
use super::{CudaDevice, shape};
use crate::attention_plan::sequences;
use crate::step_inputs::{Indices, StepIndices, StepRows};
use crate::{KernelError, Result, SequenceBatch};

/// Threads that go over the rows of one sequence.
const THREADS: usize = 128;

/// Arrays of fixed place, made anew for each step.
pub(crate) struct DeviceInputs {
    ids: StepArray<u32>,
    sample_rows: StepArray<u32>,
    slices: StepArray<SequenceSlice>,
    positions: DeviceMemory,
    slots: DeviceMemory,
    sampled_tokens: Arc<DeviceMemory>,
    new_slices: Vec<SequenceSlice>,
    /// Of the cache and the tables of the step.
    block_tables: Ptr,
    block_size: u32,
}

impl DeviceInputs {
    pub(crate) fn new(gpu: &CudaDevice, tokens_max: usize, sequences_max: usize) -> Result<Self> {
        const WHAT: &str = "a step's inputs";
        let memory = |len: usize| DeviceMemory::new(&gpu.driver, WHAT, len * size_of::<u32>());
        Ok(DeviceInputs {
            ids: StepArray::new(gpu, WHAT, tokens_max)?,
            sample_rows: StepArray::new(gpu, WHAT, sequences_max)?,
            slices: StepArray::new(gpu, WHAT, sequences_max)?,
            positions: memory(tokens_max)?,
            slots: memory(tokens_max)?,
            sampled_tokens: Arc::new(memory(sequences_max)?),
            new_slices: Vec::with_capacity(sequences_max),
            block_tables: Ptr::NULL,
            block_size: 1,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        let arrays = self.ids.bytes() + self.sample_rows.bytes() + self.slices.bytes();
        let made = [&self.positions, &self.slots, &*self.sampled_tokens];
        arrays + made.map(DeviceMemory::bytes).iter().sum::<usize>()
    }

    pub(crate) fn sampled_tokens(&self) -> Arc<DeviceMemory> {
        Arc::clone(&self.sampled_tokens)
    }

    pub(crate) fn update<'a>(
        &mut self,
        rows: &StepRows<'_>,
        batch: &SequenceBatch<'_>,
        plan: &DevicePlan,
        padded: Option<usize>,
    ) -> Result<StepIndices<'a>> {
        const OP: &str = "step inputs";
        let StepRows { ids, sample_rows, last_sampled, .. } = *rows;
        let (live, planned) = (ids.len(), batch.cu_seqlens_q.last().copied().unwrap_or(0) as usize);
        if live != planned || padded.is_some_and(|padded| padded < live) {
            let found = format!("{live} ids, {padded:?} padded");
            return Err(KernelError::shape(OP, format!("{planned} ids, as planned"), found));
        }
        self.lay_out(batch, last_sampled, plan, padded);
        let (count, sampled) = (padded.unwrap_or(live), padded.unwrap_or(sample_rows.len()));
        let entry = |values: &[u32], row: usize| values.get(row).copied().unwrap_or(0);
        self.ids.fill((0..count).map(|row| entry(ids, row)))?;
        self.sample_rows.fill((0..sampled).map(|row| entry(sample_rows, row)))?;
        self.slices.fill(self.new_slices.iter().copied())?;
        (self.block_tables, self.block_size) = (plan.tables(), plan.block_size() as u32);
        Ok(StepIndices {
            ids: Indices::device(self.ids.ptr(), count),
            positions: Indices::device(self.positions.ptr(), count),
            slots: Indices::device(self.slots.ptr(), count),
            sample_rows: Indices::device(self.sample_rows.ptr(), sampled),
        })
    }

    /// What each sequence's rows are; padding is a row each at the start of a table that is the cache's spare block.
    fn lay_out(&mut self, batch: &SequenceBatch<'_>, last_sampled: &[u32], plan: &DevicePlan, padded: Option<usize>) {
        self.new_slices.clear();
        self.new_slices.extend(sequences(batch).zip(plan.table_starts()).map(|(sequence, &table)| SequenceSlice {
            row: sequence.first_row as u32,
            rows: sequence.queries as u32,
            start: (sequence.context - sequence.queries) as u32,
            table,
            sampled: last_sampled.get(sequence.index).copied().unwrap_or(NONE),
        }));
        let live = self.new_slices.len();
        let spare = plan.spare_table();
        self.new_slices.extend((live..padded.unwrap_or(live)).map(|row| SequenceSlice {
            row: row as u32,
            rows: 1,
            start: 0,
            table: spare,
            sampled: NONE,
        }));
    }

    pub(crate) fn build(&self, gpu: &CudaDevice) -> Result<()> {
        let sequences = self.slices.len();
        if sequences == 0 {
            return Ok(());
        }
        let params = StepInputsParams {
            slices: self.slices.ptr(),
            block_tables: self.block_tables,
            last_sampled: self.sampled_tokens.ptr(),
            ids: self.ids.ptr(),
            positions: self.positions.ptr(),
            slots: self.slots.ptr(),
            sequences: sequences as u32,
            table_stride: 1,
            block_size: self.block_size,
            pad: 0,
        };
        // SAFETY: slices are of rows that there is room for, and of tables that the plan has brought.
        unsafe { gpu.launch(gpu.kernels.step_inputs, shape([sequences, 1], THREADS), &params) }
    }
}
