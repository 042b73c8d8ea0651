//! A forward pass allocates nothing: its workspace is allocated at load.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvern_kernels::{CpuOptions, Device, KvCache, KvDType, Precision};
use kvern_models::{ForwardBatch, LoadFormat, LoadOptions, ModelFiles, StepLimits, load};

/// The system's allocator, counted.
struct Counted;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's, with the caller's own arguments; `realloc` and `alloc_zeroed` fall back on
// these two.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller upholds `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds `dealloc`'s contract, and `block` came from `System.alloc`.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

#[test]
fn forward_allocates_nothing() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    for (file, precision) in
        [("llama.gguf", Precision::F32), ("llama.gguf", Precision::BF16), ("qwen3.gguf", Precision::AsStored)]
    {
        let device = Device::cpu(CpuOptions::default()).unwrap();
        // A thread's start allocates, and on a busy machine it may come late: all have to be there first.
        let all = Barrier::new(device.threads());
        device.parallel_for(device.threads(), &|_| {
            all.wait();
        });
        let limits = StepLimits { tokens_max: 32, sequences_max: 4, context_max: 64 };
        let files = ModelFiles::open(&golden.join(file)).unwrap();
        let mut loaded =
            load(&device, &files, &LoadOptions { precision, format: LoadFormat::Files, limits }, &mut |_| {}).unwrap();
        let mut kv = KvCache::new(&device, loaded.kv_shape(8, 16, KvDType::BF16)).unwrap();

        let positions: Vec<u32> = (0..20).collect();
        let prompt = ForwardBatch {
            input_ids: &positions,
            positions: &positions,
            slot_mapping: &positions,
            cu_seqlens_q: &[0, 20],
            context_lens: &[20],
            block_tables: &[0, 1],
            block_table_stride: 2,
            sample_rows: &[19],
            last_sampled: &[],
        };
        let decode = ForwardBatch {
            input_ids: &[1, 2],
            positions: &[20, 0],
            slot_mapping: &[20, 64],
            cu_seqlens_q: &[0, 1, 2],
            context_lens: &[21, 1],
            block_tables: &[0, 1, 4, 0],
            block_table_stride: 2,
            sample_rows: &[0, 1],
            last_sampled: &[],
        };
        for (name, batch) in [("prompt", &prompt), ("decode", &decode)] {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let rows = loaded.model.forward(batch, &mut kv).unwrap().rows();
            let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
            assert_eq!(rows, batch.sample_rows.len());
            assert_eq!(made, 0, "allocations of the {name} step of {file} in {precision:?}");
        }
    }
}
