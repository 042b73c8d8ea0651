//! Decode steps whose sequences begin alike: the backend reads the common blocks once, and says what it says without.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use kvern_cuda_shim::device::{Options, ShimDriver};
use kvern_kernels::ops::{self, Attention, RopeAndStore};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, Device, Element, HeadLayout, KvCache, KvDType, KvShape, RopeTable, SequenceBatch,
    StepInputs, StepRows, Tensor,
};

const HEADS: HeadLayout = HeadLayout { heads: 4, kv_heads: 2, head_dim: 64 };
const BLOCK_SIZE: usize = 64;
const BLOCKS: usize = 40;
/// Blocks that the sequences of a group share: 512 tokens.
const SHARED: usize = 8;
/// Tokens of each sequence, and which group it is of; those of group 2 are too few to share.
const SEQUENCES: [(usize, usize); 7] = [(530, 0), (600, 1), (520, 1), (700, 2), (513, 1), (640, 1), (70, 3)];

/// Multiples of 1/8, which BF16 holds.
fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 37 + seed * 101 + at / 64 * 13) % 31) as f32 / 8.0 - 2.0).collect()
}

/// Block tables: shared blocks of group 1 first, then everybody's own.
fn tables() -> (Vec<u32>, usize) {
    let stride = SEQUENCES.iter().map(|(context, _)| context.div_ceil(BLOCK_SIZE)).max().unwrap();
    let mut next = SHARED as u32;
    let mut tables = Vec::new();
    for (context, group) in SEQUENCES {
        let blocks = context.div_ceil(BLOCK_SIZE);
        let shared = if group == 1 { SHARED } else { 0 };
        let mut table: Vec<u32> = (0..shared as u32).collect();
        while table.len() < blocks {
            table.push(next % BLOCKS as u32);
            next += 1;
        }
        table.resize(stride, u32::MAX);
        tables.extend(table);
    }
    (tables, stride)
}

/// Attention of one decode step over a cache that was written before, and whether the cascade kernel was launched for it.
fn attend(shared_prefix_bytes: u64) -> (Vec<f32>, bool) {
    let driver = ShimDriver::new(Options::default());
    let device = Device::gpu(Arc::clone(&driver) as _, Element::BF16).unwrap();
    let HeadLayout { kv_heads, head_dim, heads } = HEADS;
    let shape = KvShape { layers: 1, blocks: BLOCKS, block_size: BLOCK_SIZE, kv_heads, head_dim, dtype: KvDType::BF16 };
    let mut kv = KvCache::new(&device, shape).unwrap();
    let rope = RopeTable::new(&device, &[], 1.0, 1024).unwrap();
    let limits = AttentionLimits { shared_prefix_bytes, ..AttentionLimits::new(256, SEQUENCES.len(), 1024) };
    let mut plan = AttentionPlan::new(&device, HEADS, &limits).unwrap();
    let mut inputs = StepInputs::new(&device, 256, SEQUENCES.len()).unwrap();
    let columns = (heads + 2 * kv_heads) * head_dim;
    let mut run = |batch: &SequenceBatch<'_>, rows: &StepRows<'_>, qkv: &mut Tensor, out: Option<&mut Tensor>| {
        plan.update(&device, batch, &kv, None).unwrap();
        let indices = inputs.update(&device, rows, batch, &plan, None).unwrap();
        inputs.build(&device).unwrap();
        let (positions, slots) = (indices.positions, indices.slots);
        let store = RopeAndStore { heads: HEADS, norm: None, rope: &rope, positions, slots, layer: 0 };
        ops::rope_and_store(&device, &store, qkv, &mut kv).unwrap();
        if let Some(out) = out {
            let attention = Attention { heads: HEADS, layer: 0, scale: 0.125, window: None, plan: &plan };
            ops::attention(&device, &attention, qkv, &kv, out).unwrap();
        }
    };
    // Each block is written once, as a sequence of its own.
    for block in 0..BLOCKS {
        let mut qkv = Tensor::from_f32(&device, columns, &values(block, BLOCK_SIZE * columns)).unwrap();
        let table = [block as u32];
        let (rows, zeros) = ([0, BLOCK_SIZE as u32], [0; BLOCK_SIZE]);
        let batch = SequenceBatch {
            cu_seqlens_q: &rows,
            context_lens: &rows[1..],
            block_tables: &table,
            block_table_stride: 1,
        };
        let rows = StepRows { ids: &zeros, positions: &zeros, slots: &zeros, sample_rows: &[], last_sampled: &[] };
        run(&batch, &rows, &mut qkv, None);
        device.synchronize().unwrap();
    }
    let (tables, stride) = tables();
    let ends: Vec<u32> = (0..=SEQUENCES.len() as u32).collect();
    let contexts = SEQUENCES.map(|(context, _)| context as u32);
    let batch = SequenceBatch {
        cu_seqlens_q: &ends,
        context_lens: &contexts,
        block_tables: &tables,
        block_table_stride: stride,
    };
    let mut qkv = Tensor::from_f32(&device, columns, &values(999, SEQUENCES.len() * columns)).unwrap();
    let mut out = Tensor::zeros(&device, SEQUENCES.len(), heads * head_dim).unwrap();
    let zeros = [0; SEQUENCES.len()];
    let rows = StepRows { ids: &zeros, positions: &zeros, slots: &zeros, sample_rows: &[], last_sampled: &[] };
    run(&batch, &rows, &mut qkv, Some(&mut out));
    let found = out.read(&device).unwrap();
    assert_eq!(driver.refusals(), Vec::<String>::new());
    (found, driver.log().iter().any(|line| line.contains("kvern_cascade")))
}

#[test]
fn common_blocks_are_read_once() {
    let (alone, cascade) = attend(u64::MAX);
    assert!(!cascade);
    let (shared, cascade) = attend(1);
    assert!(cascade, "group 1 shares 512 tokens");
    // Weights of the softmax are rounded to BF16 in another grouping, and the result once: values are up to 2.
    let worst = alone.iter().zip(&shared).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 0.03, "largest difference {worst}");
    let row = HEADS.heads * HEADS.head_dim;
    for (at, (_, group)) in SEQUENCES.iter().enumerate().filter(|(_, (_, group))| *group != 1) {
        let rows = at * row..(at + 1) * row;
        assert_eq!(alone[rows.clone()], shared[rows], "sequence {at} of group {group} shares nothing");
    }
}

#[test]
fn little_that_is_saved_is_not_worth_it() {
    // Four sequences share 512 tokens of 512 bytes.
    let saved = 3 * 512 * 512;
    assert!(attend(saved).1);
    assert!(!attend(saved + 1).1);
}
