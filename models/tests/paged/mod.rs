//! Runs a model on slices of sequences through a paged cache, as an engine would.

#![allow(clippy::unwrap_used)]

use kvern_kernels::{CpuIsa, CpuOptions, KvCache, Tensor};
use kvern_models::{ForwardBatch, Model};

pub(crate) const BLOCK_SIZE: usize = 16;

/// The device's options: the best level of the machine, or the one that `KVERN_CPU_ISA` forces, as it does the server's.
pub(crate) fn cpu_options() -> CpuOptions {
    let isa = std::env::var("KVERN_CPU_ISA").ok().map(|isa| match isa.as_str() {
        "scalar" => CpuIsa::Scalar,
        "avx2" => CpuIsa::Avx2,
        "avx512" => CpuIsa::Avx512,
        "amx" => CpuIsa::Amx,
        _ => panic!("KVERN_CPU_ISA: expected scalar, avx2, avx512 or amx, found {isa:?}"),
    });
    CpuOptions { isa, ..CpuOptions::default() }
}

/// The tokens `start..start + tokens.len()` of a sequence whose earlier ones are in the cache.
#[derive(Clone, Copy)]
pub(crate) struct Slice<'a> {
    pub(crate) start: usize,
    pub(crate) tokens: &'a [u32],
    /// Block ids, at least enough for the slice's end.
    pub(crate) table: &'a [u32],
}

/// `count` distinct block ids of `0..blocks`, in an order that depends on `seed`.
pub(crate) fn scattered(seed: u64, count: usize, blocks: usize) -> Vec<u32> {
    assert!(count <= blocks, "{count} blocks of {blocks}");
    let mut ids: Vec<u32> = (0..blocks as u32).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    for i in 0..count {
        // Knuth's MMIX generator; its high bits are good enough to shuffle with.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ids.swap(i, i + (state >> 33) as usize % (blocks - i));
    }
    ids.truncate(count);
    ids
}

/// Blocks that `tokens` tokens take.
pub(crate) fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// Runs one step over `slices` and returns the logits of `sample_rows` of the batch, `[S, vocab]`.
pub(crate) fn step<'m>(
    model: &'m mut dyn Model,
    kv: &mut KvCache,
    slices: &[Slice<'_>],
    sample_rows: &[u32],
) -> &'m Tensor {
    let stride = slices.iter().map(|slice| slice.table.len()).max().unwrap();
    let (mut ids, mut positions, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cu_seqlens_q, mut context_lens, mut tables) = (vec![0], Vec::new(), Vec::new());
    for slice in slices {
        for (i, &id) in slice.tokens.iter().enumerate() {
            let position = slice.start + i;
            ids.push(id);
            positions.push(position as u32);
            slots.push(slice.table[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
        }
        cu_seqlens_q.push(ids.len() as u32);
        context_lens.push((slice.start + slice.tokens.len()) as u32);
        tables.extend(slice.table);
        // Entries past the context are not read; an id out of range would show if one were.
        tables.resize(context_lens.len() * stride, u32::MAX);
    }
    let batch = ForwardBatch {
        input_ids: &ids,
        positions: &positions,
        slot_mapping: &slots,
        cu_seqlens_q: &cu_seqlens_q,
        context_lens: &context_lens,
        block_tables: &tables,
        block_table_stride: stride,
        sample_rows,
        last_sampled: &[],
    };
    model.forward(&batch, kv).unwrap()
}
