//! A planned step as flat arrays for the model. One `BatchBuffers` is refilled step after step.

use kvern_core::StepPlan;
use kvern_models::{ForwardBatch, StepLimits};

/// Owner of the arrays behind a [`ForwardBatch`].
#[derive(Debug)]
pub(crate) struct BatchBuffers {
    block_size: u32,
    positions: Vec<u32>,
    slot_mapping: Vec<u32>,
    cu_seqlens_q: Vec<u32>,
    context_lens: Vec<u32>,
    block_tables: Vec<u32>,
    block_table_stride: usize,
    sample_rows: Vec<u32>,
}

impl BatchBuffers {
    #[must_use]
    pub(crate) fn new(limits: StepLimits, block_size: u32) -> Self {
        let stride = limits.context_max.div_ceil(block_size as usize);
        BatchBuffers {
            block_size,
            positions: Vec::with_capacity(limits.tokens_max),
            slot_mapping: Vec::with_capacity(limits.tokens_max),
            cu_seqlens_q: Vec::with_capacity(limits.sequences_max + 1),
            context_lens: Vec::with_capacity(limits.sequences_max),
            block_tables: Vec::with_capacity(limits.sequences_max * stride),
            block_table_stride: 0,
            sample_rows: Vec::with_capacity(limits.sequences_max),
        }
    }

    /// Lays out `plan`. Block tables are padded with block 0 to the longest of the step; padding is never read.
    pub(crate) fn fill<'a>(&'a mut self, plan: &'a StepPlan) -> ForwardBatch<'a> {
        self.positions.clear();
        self.slot_mapping.clear();
        self.cu_seqlens_q.clear();
        self.context_lens.clear();
        self.block_tables.clear();
        self.sample_rows.clear();
        self.block_table_stride = plan.slices.iter().map(|s| s.block_table.len()).max().unwrap_or(0);
        self.cu_seqlens_q.push(0);
        for slice in &plan.slices {
            let table = plan.slice_block_table(slice);
            let end = slice.start + slice.tokens.len() as u32;
            for position in slice.start..end {
                let block = table[(position / self.block_size) as usize].0;
                self.positions.push(position);
                self.slot_mapping.push(block * self.block_size + position % self.block_size);
            }
            let rows = self.positions.len() as u32;
            self.cu_seqlens_q.push(rows);
            self.context_lens.push(end);
            let row_start = self.block_tables.len();
            self.block_tables.extend(table.iter().map(|b| b.0));
            self.block_tables.resize(row_start + self.block_table_stride, 0);
            if slice.sample {
                self.sample_rows.push(rows - 1);
            }
        }
        ForwardBatch {
            input_ids: &plan.tokens,
            positions: &self.positions,
            slot_mapping: &self.slot_mapping,
            cu_seqlens_q: &self.cu_seqlens_q,
            context_lens: &self.context_lens,
            block_tables: &self.block_tables,
            block_table_stride: self.block_table_stride,
            sample_rows: &self.sample_rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvern_core::{BlockId, RequestId, SeqSlice, StepId, WorkerId};

    #[test]
    fn lays_out_a_decode_and_a_chunk() {
        let plan = StepPlan {
            step: StepId(3),
            worker: WorkerId(0),
            slices: vec![
                SeqSlice { request: RequestId(1), start: 5, tokens: 0..1, block_table: 0..2, sample: true },
                SeqSlice { request: RequestId(2), start: 2, tokens: 1..4, block_table: 2..4, sample: false },
            ],
            tokens: vec![50, 12, 13, 14],
            block_tables: [7, 3, 4, 9].map(BlockId).to_vec(),
        };
        let limits = StepLimits { tokens_max: 8, sequences_max: 4, context_max: 16 };
        let mut buffers = BatchBuffers::new(limits, 4);
        let batch = buffers.fill(&plan);
        assert_eq!(batch.positions, [5, 2, 3, 4]);
        assert_eq!(batch.slot_mapping, [3 * 4 + 1, 4 * 4 + 2, 4 * 4 + 3, 9 * 4]);
        assert_eq!(batch.cu_seqlens_q, [0, 1, 4]);
        assert_eq!(batch.context_lens, [6, 5]);
        assert_eq!(batch.block_tables, [7, 3, 4, 9]);
        assert_eq!((batch.block_table_stride, batch.sample_rows), (2, &[0u32][..]));
    }
}
