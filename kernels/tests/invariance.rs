//! A row's result depends on nothing but its own inputs: not on the other rows of a call, the threads, the level, the plan.
//! Everything here is compared bit for bit.

#![allow(clippy::unwrap_used)]

mod support;

use kvern_kernels::ops::{self, Attention, RopeAndStore};
use kvern_kernels::reference::Products;
use kvern_kernels::{
    AttentionLimits, AttentionPlan, Device, Format, HeadLayout, KvCache, KvDType, KvShape, Precision, RopeTable,
    SequenceBatch, Tensor, Weight,
};
use support::{Random, assert_bits, devices, poisoned, view};

/// The results of the first device of each order of bf16 products.
#[derive(Default)]
struct Firsts(Vec<(Option<Products>, Vec<f32>)>);

impl Firsts {
    /// What a device must give that gives `found`.
    fn expected(&mut self, device: &Device, found: &[f32]) -> &[f32] {
        let products = device.bf16_products();
        let at = self.0.iter().position(|(first, _)| *first == products).unwrap_or(self.0.len());
        if at == self.0.len() {
            self.0.push((products, found.to_vec()));
        }
        &self.0[at].1
    }
}

/// Rows in one call, row by row, and on every device.
#[test]
fn matmul_rows_are_independent() {
    let (cols, out_cols, rows) = (576, 83, 29);
    for format in [Format::Q4_1, Format::Q8_0, Format::Q5_1, Format::BF16, Format::F16, Format::F32] {
        let mut random = Random(11);
        let bytes = random.weights(format, cols * out_cols);
        let x = random.floats(rows * cols);
        let mut first = Firsts::default();
        for device in devices() {
            let weight = Weight::pack(&device, &[view(format, out_cols, cols, &bytes)], Precision::AsStored).unwrap();
            let mut whole = poisoned(&device, rows, out_cols);
            ops::matmul(&device, &Tensor::from_f32(&device, cols, &x).unwrap(), &weight, None, &mut whole).unwrap();
            let expected = first.expected(&device, whole.host());
            assert_bits(whole.host(), expected, &format!("{} {format:?}", device.describe()));
            for (x, expected) in x.chunks(cols).zip(expected.chunks(out_cols)) {
                let mut alone = poisoned(&device, 1, out_cols);
                ops::matmul(&device, &Tensor::from_f32(&device, cols, x).unwrap(), &weight, None, &mut alone).unwrap();
                assert_bits(alone.host(), expected, &format!("{} {format:?} alone", device.describe()));
            }
        }
    }
}

const HEADS: HeadLayout = HeadLayout { heads: 6, kv_heads: 2, head_dim: 64 };
const ROW: usize = (6 + 2 * 2) * 64;
const BLOCK: usize = 16;

/// One sequence alone in its cache, computed in chunks that end at `ends`: the outputs of all its rows.
fn in_chunks(device: &Device, rows: &[f32], ends: &[usize], neighbours: usize, window: Option<u32>) -> Vec<f32> {
    let context = rows.len() / ROW;
    let stride = context.div_ceil(BLOCK);
    let blocks = stride * (neighbours + 1);
    let shape = KvShape { layers: 1, blocks, block_size: BLOCK, kv_heads: 2, head_dim: 64, dtype: KvDType::BF16 };
    let mut kv = KvCache::new(device, shape).unwrap();
    let rope = RopeTable::new(device, &[1.0, 0.1, 0.01], 1.0, context).unwrap();
    // The sequence comes last in the batch, after neighbours that repeat it with their own blocks.
    let tables: Vec<u32> = (0..blocks as u32).rev().collect();
    let mut plan = AttentionPlan::new(
        device,
        HEADS,
        &AttentionLimits::new(rows.len() / ROW * (neighbours + 1), neighbours + 1, context),
    )
    .unwrap();
    let mut all = Vec::new();
    let mut begin = 0;
    for &end in ends {
        let count = end - begin;
        let batch = neighbours + 1;
        let chunk = rows[begin * ROW..end * ROW].repeat(batch);
        let mut qkv = Tensor::from_f32(device, ROW, &chunk).unwrap();
        let positions: Vec<u32> = (begin as u32..end as u32).collect::<Vec<_>>().repeat(batch);
        let slots: Vec<u32> = (0..batch * count)
            .map(|row| {
                let (sequence, position) = (row / count, begin + row % count);
                tables[sequence * stride + position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32
            })
            .collect();
        let args = RopeAndStore {
            heads: HEADS,
            norm: None,
            rope: &rope,
            positions: (&positions).into(),
            slots: (&slots).into(),
            layer: 0,
        };
        ops::rope_and_store(device, &args, &mut qkv, &mut kv).unwrap();
        let sums: Vec<u32> = (0..=batch).map(|sequence| (sequence * count) as u32).collect();
        let batch = SequenceBatch {
            cu_seqlens_q: &sums,
            context_lens: &vec![end as u32; batch],
            block_tables: &tables,
            block_table_stride: stride,
        };
        plan.update(device, &batch, &kv, None).unwrap();
        let mut out = poisoned(device, qkv.rows(), 6 * 64);
        ops::attention(
            device,
            &Attention { heads: HEADS, layer: 0, scale: 0.125, window, plan: &plan },
            &qkv,
            &kv,
            &mut out,
        )
        .unwrap();
        all.extend_from_slice(&out.host()[neighbours * count * 6 * 64..]);
        begin = end;
    }
    all
}

/// A token whose K and V are NaN and infinite shows in the rows that see it, and in no earlier row of the same call.
#[test]
fn attention_reads_nothing_that_a_row_does_not_see() {
    let (context, bad) = (45, 42);
    let mut rows = Random(4).floats(context * ROW);
    let clean: Vec<_> = devices().iter().map(|device| in_chunks(device, &rows, &[context], 0, None)).collect();
    rows[bad * ROW + 6 * 64..(bad + 1) * ROW].fill(f32::NAN);
    rows[(bad + 1) * ROW - 2 * 64..(bad + 1) * ROW].fill(f32::INFINITY);
    for (device, clean) in devices().into_iter().zip(clean) {
        let found = in_chunks(&device, &rows, &[context], 0, None);
        let (before, after) = found.split_at(bad * 6 * 64);
        assert_bits(before, &clean[..before.len()], &device.describe());
        assert!(after.iter().all(|value| value.is_nan()), "{}: a NaN is lost", device.describe());
    }
}

/// Prefill at once, in chunks, token by token at the end, beside other sequences: the same bits.
#[test]
fn attention_does_not_see_chunks_or_neighbours() {
    let context = 330;
    let rows = Random(2).floats(context * ROW);
    for window in [None, Some(150)] {
        let mut first = Firsts::default();
        for device in devices() {
            let whole = in_chunks(&device, &rows, &[context], 0, window);
            let expected = first.expected(&device, &whole);
            assert_bits(&whole, expected, &device.describe());
            let decode: Vec<usize> = (320..=context).collect();
            for (ends, neighbours) in
                [(vec![1, 2, 31, 32, 257, 329, context], 0), (decode.clone(), 0), (decode, 4), (vec![200, context], 1)]
            {
                let found = in_chunks(&device, &rows, &ends, neighbours, window);
                let what = format!("{} chunks {ends:?} beside {neighbours}, window {window:?}", device.describe());
                assert_bits(&found, expected, &what);
            }
        }
    }
}
