//! In the steady state no op allocates: a counting allocator watches the second run of a step.

#![allow(clippy::unwrap_used)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvern_kernels::ops::{self, Attention, RopeAndStore};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, CpuOptions, Device, Format, HeadLayout, KvCache, KvDType, KvShape, Precision,
    RopeTable, SequenceBatch, Tensor, Weight,
};
use support::{Random, view};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_step_allocates_nothing() {
    const TOKENS: usize = 24;
    let device = Device::cpu(CpuOptions { threads: Some(3), isa: None }).unwrap();
    let heads = HeadLayout { heads: 4, kv_heads: 2, head_dim: 32 };
    let (hidden, row_len) = (128, 8 * 32);
    let mut random = Random(1);
    let mut weight = |format, rows, cols| {
        let bytes = random.weights(format, rows * cols);
        Weight::pack(&device, &[view(format, rows, cols, &bytes)], Precision::AsStored).unwrap()
    };
    let (qkv_weight, up_weight) = (weight(Format::Q4_1, row_len, hidden), weight(Format::BF16, 2 * 96, hidden));
    let zeros = |rows, cols| Tensor::zeros(&device, rows, cols).unwrap();
    let (mut x, mut residual, norm) = (zeros(TOKENS, hidden), zeros(TOKENS, hidden), zeros(1, hidden));
    let (mut qkv, mut attended) = (zeros(TOKENS, row_len), zeros(TOKENS, hidden));
    let (mut up, mut gated, mut last) = (zeros(TOKENS, 192), zeros(TOKENS, 96), zeros(2, hidden));
    let shape = KvShape { layers: 1, blocks: 64, block_size: 16, kv_heads: 2, head_dim: 32, dtype: KvDType::BF16 };
    let mut kv = KvCache::new(&device, shape).unwrap();
    let rope = RopeTable::new(&device, &[1.0; 16], 1.0, 1024).unwrap();
    let mut plan = AttentionPlan::new(&device, heads, &AttentionLimits::new(TOKENS, 2, 512)).unwrap();
    let tables: Vec<u32> = (0..64).collect();
    let batch = SequenceBatch {
        cu_seqlens_q: &[0, 23, 24],
        context_lens: &[23, 512],
        block_tables: &tables,
        block_table_stride: 32,
    };
    let ids = [3; TOKENS];
    let positions: Vec<u32> = (0..23).chain([511]).collect();
    let slots: Vec<u32> = (0..23).chain([1023]).collect();
    let mut step = || {
        ops::embed(&device, &up_weight, &ids, &mut residual).unwrap();
        ops::rms_norm(&device, &residual, &norm, 1e-5, &mut x).unwrap();
        ops::matmul(&device, &x, &qkv_weight, None, &mut qkv).unwrap();
        let args = RopeAndStore {
            heads,
            norm: None,
            rope: &rope,
            positions: (&positions).into(),
            slots: (&slots).into(),
            layer: 0,
        };
        ops::rope_and_store(&device, &args, &mut qkv, &mut kv).unwrap();
        plan.update(&device, &batch, &kv, None).unwrap();
        let args = Attention { heads, layer: 0, scale: 0.1, window: None, plan: &plan };
        ops::attention(&device, &args, &qkv, &kv, &mut attended).unwrap();
        ops::add_rms_norm(&device, &mut residual, &attended, &norm, 1e-5, &mut x).unwrap();
        ops::matmul(&device, &x, &up_weight, None, &mut up).unwrap();
        ops::silu_mul(&device, &up, &mut gated).unwrap();
        ops::gather_rows(&device, &x, &[22, 23], &mut last).unwrap();
        device.parallel_for(8, &|_| ());
    };
    step();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    step();
    step();
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "allocations in two steps");
    assert!(before > 0, "the allocator counts");
}
