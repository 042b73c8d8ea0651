//! Matrix products, attention and the thread pool on the shapes of a 135M model: `cargo bench -p kvern-kernels`.
//!
//! Counters are multiply-adds for products, bytes for what is bound by memory, so that results compare with the machine's
//! limits.

#![allow(clippy::unwrap_used)]

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use kvern_kernels::ops::{self, Attention};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, CpuOptions, Device, Format, HeadLayout, KvCache, KvDType, KvShape, MatrixView,
    Precision, RowOrder, SequenceBatch, Tensor, Weight,
};

fn main() {
    divan::main();
}

fn device() -> Device {
    Device::cpu(CpuOptions::default()).unwrap()
}

/// A weight whose bytes are small numbers in every format; their values do not matter to the time.
fn weight(device: &Device, format: Format, rows: usize, cols: usize) -> Weight {
    let bytes: Vec<u8> =
        (0..rows * cols / format.block_elements() * format.block_bytes()).map(|i| (i % 59) as u8).collect();
    let view = MatrixView { name: "bench", format, rows, cols, bytes: &bytes, row_order: RowOrder::Natural };
    Weight::pack(device, &[view], Precision::AsStored).unwrap()
}

/// Out features, in features: attention's output, the MLP's two products, the head.
const SHAPES: [(usize, usize); 4] = [(576, 576), (3072, 576), (576, 1536), (49152, 576)];
const ROWS: [usize; 4] = [1, 8, 16, 512];
/// Outputs above which a case is left out: 512 rows of logits never happen.
const OUTPUTS_MAX: usize = 2 << 20;

fn matmul(bencher: Bencher<'_, '_>, format: Format, rows: usize) {
    let device = device();
    let shapes = SHAPES.iter().filter(|(out_cols, _)| out_cols * rows <= OUTPUTS_MAX);
    let mut cases: Vec<(Tensor, Weight, Tensor)> = shapes
        .map(|&(out_cols, cols)| {
            let x = Tensor::from_f32(&device, cols, &vec![0.5; rows * cols]).unwrap();
            (x, weight(&device, format, out_cols, cols), Tensor::zeros(&device, rows, out_cols).unwrap())
        })
        .collect();
    let products: usize = cases.iter().map(|(_, weight, _)| rows * weight.rows() * weight.cols()).sum();
    let bytes: usize = cases.iter().map(|(_, weight, _)| weight.bytes()).sum();
    bencher.counter(ItemsCount::new(products)).counter(BytesCount::new(bytes)).bench_local(|| {
        for (x, weight, out) in &mut cases {
            ops::matmul(&device, x, weight, None, out).unwrap();
        }
    });
}

#[divan::bench(args = ROWS)]
fn matmul_q4_1(bencher: Bencher<'_, '_>, rows: usize) {
    matmul(bencher, Format::Q4_1, rows);
}

#[divan::bench(args = ROWS)]
fn matmul_q8_0(bencher: Bencher<'_, '_>, rows: usize) {
    matmul(bencher, Format::Q8_0, rows);
}

#[divan::bench(args = ROWS)]
fn matmul_bf16(bencher: Bencher<'_, '_>, rows: usize) {
    matmul(bencher, Format::BF16, rows);
}

#[divan::bench(args = ROWS)]
fn matmul_f32(bencher: Bencher<'_, '_>, rows: usize) {
    matmul(bencher, Format::F32, rows);
}

/// One layer of one sequence: context, query rows. Bytes are those of K and V.
#[divan::bench(args = [(128, 1), (4096, 1), (512, 512)])]
fn attention(bencher: Bencher<'_, '_>, (context, rows): (usize, usize)) {
    let device = device();
    let heads = HeadLayout { heads: 9, kv_heads: 3, head_dim: 64 };
    let blocks = context / 16;
    let shape = KvShape { layers: 1, blocks, block_size: 16, kv_heads: 3, head_dim: 64, dtype: KvDType::BF16 };
    let kv = KvCache::new(&device, shape).unwrap();
    let tables: Vec<u32> = (0..blocks as u32).collect();
    let mut plan = AttentionPlan::new(&device, heads, &AttentionLimits::new(rows, 1, context)).unwrap();
    let batch = SequenceBatch {
        cu_seqlens_q: &[0, rows as u32],
        context_lens: &[context as u32],
        block_tables: &tables,
        block_table_stride: blocks,
    };
    plan.update(&device, &batch, &kv, None).unwrap();
    let qkv = Tensor::from_f32(&device, 15 * 64, &vec![0.5; rows * 15 * 64]).unwrap();
    let mut out = Tensor::zeros(&device, rows, 9 * 64).unwrap();
    bencher.counter(BytesCount::new(shape.block_bytes() * blocks)).bench_local(|| {
        let args = Attention { heads, layer: 0, scale: 0.125, window: None, plan: &plan };
        ops::attention(&device, &args, &qkv, &kv, &mut out).unwrap();
    });
}

/// Fork and join of a job of nothing.
#[divan::bench]
fn fork_join(bencher: Bencher<'_, '_>) {
    let device = device();
    bencher.bench_local(|| {
        device.parallel_for(8, &|task| {
            black_box(task);
        })
    });
}
