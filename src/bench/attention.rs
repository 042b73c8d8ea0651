//! Attention alone: the last query of each of some sequences, or all queries of one, in all layers, over K and V that
//! are in the cache.

use super::runner::Sequence;
use crate::config::Workload;
use kvern_kernels::{AttentionLimits, AttentionPlan, Device, KernelError, KvCache, SequenceBatch, Tensor, ops};
use kvern_models::{ModelConfig, StepLimits};

/// What it takes beside the cache.
pub(super) struct AttentionAlone {
    plan: AttentionPlan,
    qkv: Tensor,
    out: Tensor,
    layers: Vec<Option<u32>>,
    heads: kvern_kernels::HeadLayout,
}

impl AttentionAlone {
    /// For batches within `limits`, whose tokens are queries.
    pub(super) fn new(device: &Device, model: &ModelConfig, limits: StepLimits) -> Result<Self, KernelError> {
        let (heads, layers) = (model.heads, (0..model.layers).map(|layer| model.window(layer)).collect::<Vec<_>>());
        let mut windows = layers.clone();
        windows.sort_unstable();
        windows.dedup();
        let StepLimits { tokens_max: rows, sequences_max, context_max } = limits;
        let cols = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        // Any numbers do that are not alike.
        let queries: Vec<f32> = (0..rows * cols).map(|at| (at * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let room = AttentionLimits::new(rows, sequences_max, context_max);
        Ok(AttentionAlone {
            plan: AttentionPlan::new(device, heads, &AttentionLimits { windows: &windows, ..room })?,
            qkv: Tensor::from_f32(device, cols, &queries)?,
            out: Tensor::zeros(device, rows, heads.heads * heads.head_dim)?,
            layers,
            heads,
        })
    }

    /// Plans what `workload` says.
    pub(super) fn update(
        &mut self,
        device: &Device,
        sequences: &[Sequence],
        workload: Workload,
        kv: &KvCache,
    ) -> Result<(), KernelError> {
        let contexts: Vec<u32> = (0..workload.streams()).map(|sequence| workload.context(sequence)).collect();
        let rows = workload.attention_rows();
        let stride = sequences[..contexts.len()].iter().map(|sequence| sequence.blocks.len()).max().unwrap_or(0);
        let mut block_tables = vec![0; contexts.len() * stride];
        for (row, sequence) in block_tables.chunks_exact_mut(stride.max(1)).zip(sequences) {
            row.iter_mut().zip(&sequence.blocks).for_each(|(entry, block)| *entry = block.0);
        }
        // Sequences have as many queries each.
        let queries = rows / workload.streams();
        let cu_seqlens_q: Vec<u32> = (0..=workload.streams()).map(|sequence| sequence * queries).collect();
        let batch = SequenceBatch {
            cu_seqlens_q: &cu_seqlens_q,
            context_lens: &contexts,
            block_tables: &block_tables,
            block_table_stride: stride,
        };
        self.plan.update(device, &batch, kv, None)?;
        self.qkv.set_rows(rows as usize);
        self.out.set_rows(rows as usize);
        Ok(())
    }

    /// All layers once, of what was planned.
    pub(super) fn run(&mut self, device: &Device, kv: &KvCache) -> Result<(), KernelError> {
        let AttentionAlone { plan, qkv, out, layers, heads } = self;
        let scale = (heads.head_dim as f32).sqrt().recip();
        for (layer, &window) in layers.iter().enumerate() {
            let args = ops::Attention { heads: *heads, layer, scale, window, plan };
            ops::attention(device, &args, qkv, kv, out)?;
        }
        Ok(())
    }
}
