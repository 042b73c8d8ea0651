//! Attention with emulated tile registers, and with the vectors beside them, against the specification; in the other order
//! too, as scratch is full of NaN here.

#![allow(clippy::unwrap_used)]

use half::bf16;

use super::super::super::amx::emulated::devices;
use super::super::Worker;
use crate::cpu::pair::Pair;
use crate::ops::{self, Attention, RopeAndStore};
use crate::reference::{self, Attend, Products};
use crate::{
    AttentionLimits, AttentionPlan, CpuIsa, CpuOptions, Device, HeadLayout, KvCache, KvDType, KvShape, RopeTable,
    SequenceBatch, Tensor,
};

/// One sequence: its shape, and the window.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: HeadLayout,
    block_size: usize,
    window: Option<u32>,
    context: usize,
}

impl Case {
    fn rows(self) -> Vec<f32> {
        let mut state = 7u64;
        (0..self.context * self.heads.row_len())
            .map(|_| {
                // Knuth's MMIX generator.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1 << 22) as f32 - 2.0
            })
            .collect()
    }

    /// What the specification gives for all rows.
    fn expected(self, rows: &[f32], products: Products) -> Vec<f32> {
        let HeadLayout { heads, kv_heads, head_dim } = self.heads;
        let [_, k_start, v_start] = reference::fused_heads(self.heads);
        let stored = |start: usize, head: usize| -> Vec<f32> {
            let values = rows.chunks(self.heads.row_len()).flat_map(|row| &row[start + head * head_dim..][..head_dim]);
            values.map(|&value| bf16::from_f32(value).to_f32()).collect()
        };
        let kv: Vec<_> = (0..kv_heads).map(|head| (stored(k_start, head), stored(v_start, head))).collect();
        let attend = |(position, row): (usize, &[f32])| -> Vec<f32> {
            let head = |head: usize| {
                let (k, v) = &kv[head / (heads / kv_heads)];
                let (q, window) = (&row[head * head_dim..][..head_dim], self.window);
                reference::attention(&Attend { q, k, v, scale: 0.2, position, window, products })
            };
            (0..heads).flat_map(head).collect()
        };
        rows.chunks(self.heads.row_len()).enumerate().flat_map(attend).collect()
    }

    /// What the ops give where each call ends at one of `ends`. Cached slots that are not yet written hold NaN, or where
    /// `finite`, numbers.
    fn found(self, device: &Device, rows: &[f32], ends: &[usize], finite: bool) -> Vec<f32> {
        let Case { heads, block_size, window, context } = self;
        let (row_len, blocks) = (heads.row_len(), context.div_ceil(block_size));
        let HeadLayout { kv_heads, head_dim, .. } = heads;
        let shape = KvShape { layers: 1, blocks, block_size, kv_heads, head_dim, dtype: KvDType::BF16 };
        let mut kv = KvCache::new(device, shape).unwrap();
        // An angle of zero at every position leaves rows as they are.
        let rope = RopeTable::new(device, &[0.0], 1.0, context).unwrap();
        let store = |rows: &[f32], slots: &[u32], kv: &mut KvCache| {
            let mut rows = Tensor::from_f32(device, row_len, rows).unwrap();
            let positions = vec![0; slots.len()];
            let args = RopeAndStore {
                heads,
                norm: None,
                rope: &rope,
                positions: (&positions).into(),
                slots: slots.into(),
                layer: 0,
            };
            ops::rope_and_store(device, &args, &mut rows, kv).unwrap();
            rows
        };
        let slots = blocks * block_size;
        let rest = if finite { 1e3 } else { f32::NAN };
        store(&vec![rest; slots * row_len], &(0..slots as u32).collect::<Vec<_>>(), &mut kv);
        let tables: Vec<u32> = (0..blocks as u32).rev().collect();
        let slot = |at: usize| tables[at / block_size] * block_size as u32 + (at % block_size) as u32;
        let mut plan = AttentionPlan::new(device, heads, &AttentionLimits::new(context, 1, context)).unwrap();
        poison(&mut plan, heads);
        let (mut all, mut begin) = (Vec::new(), 0);
        for &end in ends {
            let slots: Vec<u32> = (begin..end).map(slot).collect();
            let qkv = store(&rows[begin * row_len..end * row_len], &slots, &mut kv);
            let batch = SequenceBatch {
                cu_seqlens_q: &[0, (end - begin) as u32],
                context_lens: &[end as u32],
                block_tables: &tables,
                block_table_stride: blocks,
            };
            plan.update(device, &batch, &kv, None).unwrap();
            let cols = heads.heads * head_dim;
            let mut out = Tensor::from_f32(device, cols, &vec![f32::NAN; (end - begin) * cols]).unwrap();
            let args = Attention { heads, layer: 0, scale: 0.2, window, plan: &plan };
            ops::attention(device, &args, &qkv, &kv, &mut out).unwrap();
            all.extend_from_slice(out.host());
            begin = end;
        }
        all
    }
}

/// Scratch as a former call may have left it, at worst.
fn poison(plan: &mut AttentionPlan, heads: HeadLayout) {
    let queries = (48 / heads.group()).max(1) * heads.group();
    for worker in &mut plan.scratch.bf16 {
        let Worker { q, copied, tile, split, total } = worker.get_mut().unwrap();
        let nan = Pair::new(f32::NAN, f32::NAN);
        q.fill(nan);
        copied.poison(heads.head_dim);
        tile.scores.fill(f32::NAN);
        tile.weights.fill(nan);
        tile.rows.fill(nan);
        for state in [split, total] {
            state.outs(0, queries).fill(f32::NAN);
            (0..queries).for_each(|query| state.set(query, f32::NAN, f32::NAN));
        }
    }
    plan.scratch.partials.get_mut().unwrap().fill(f32::NAN);
}

/// Whole prompts, chunks that end within and at blocks and splits, and rows alone: each has the bits of the specification.
#[test]
fn attention_gives_the_bits_of_the_specification() {
    let heads = |heads, kv_heads, head_dim| HeadLayout { heads, kv_heads, head_dim };
    let cases = [
        (heads(9, 3, 64), 16, None, 300),
        (heads(9, 3, 64), 16, Some(37), 290),
        (heads(4, 4, 64), 32, Some(1), 40),
        (heads(4, 1, 16), 16, None, 83),
        (heads(9, 1, 80), 16, None, 70),
        (heads(2, 2, 80), 32, Some(260), 290),
        (heads(3, 1, 128), 16, Some(50), 129),
        (heads(4, 1, 128), 48, None, 65),
        // Read from a copy: blocks that are no whole vectors, of odd sizes too, and heads that are none.
        (heads(4, 1, 64), 7, Some(20), 60),
        (heads(9, 1, 80), 5, None, 40),
        (heads(3, 1, 33), 16, Some(9), 50),
        (heads(4, 2, 20), 8, None, 50),
    ];
    let devices = devices();
    for (heads, block_size, window, context) in cases {
        let case = Case { heads, block_size, window, context };
        let rows = case.rows();
        let expected = case.expected(&rows, Products::Bf16Tiles);
        let mut chunks: Vec<usize> = [1, 4, 9, 16, 33, 47, 100, 255, 257, 258, 289].to_vec();
        chunks.retain(|&end| end < context);
        chunks.push(context);
        let alone: Vec<usize> = [context - 6].into_iter().chain(context - 5..=context).collect();
        for device in &devices {
            for (ends, finite) in [(&[context][..], false), (&[context], true), (&chunks, false), (&alone, true)] {
                let found = case.found(device, &rows, ends, finite);
                let cols = heads.heads * heads.head_dim;
                assert_eq!(found.len(), expected.len());
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let (row, what) = (i / cols, format!("{} {case:?} calls {ends:?}", device.describe()));
                    assert_eq!(found.to_bits(), expected.to_bits(), "{what}: row {row}: {found}, expected {expected}");
                }
            }
        }
    }
}

/// K and V that are NaN or infinite show in the rows that see them, and in no other row of the same call.
#[test]
fn what_a_row_does_not_see_does_not_show() {
    let heads = HeadLayout { heads: 4, kv_heads: 1, head_dim: 64 };
    let case = Case { heads, block_size: 16, window: Some(20), context: 70 };
    let (bad, row_len, cols) = (37, heads.row_len(), 4 * 64);
    let mut rows = case.rows();
    let clean = case.expected(&rows, Products::Bf16Tiles);
    rows[bad * row_len + cols..(bad + 1) * row_len - 64].fill(f32::NAN);
    rows[(bad + 1) * row_len - 64..(bad + 1) * row_len].fill(f32::INFINITY);
    for device in devices() {
        let found = case.found(&device, &rows, &[70], true);
        for (row, (found, clean)) in found.chunks(cols).zip(clean.chunks(cols)).enumerate() {
            if (bad..bad + 20).contains(&row) {
                assert!(found.iter().all(|value| value.is_nan()), "row {row}: a NaN is lost");
            } else {
                assert_eq!(found, clean, "row {row}");
            }
        }
    }
}

/// Without tile registers, at every level that the machine has: nothing of what scratch holds shows.
#[test]
fn attention_reads_no_scratch_that_it_did_not_write() {
    let levels = [CpuIsa::Scalar, CpuIsa::Avx2, CpuIsa::Avx512, CpuIsa::Amx];
    let options = levels.map(|isa| CpuOptions { threads: Some(2), isa: Some(isa) });
    let devices: Vec<Device> = options
        .iter()
        .flat_map(|&options| [Device::cpu(options), Device::cpu_without_bf16(options)])
        .filter_map(Result::ok)
        .collect();
    for (heads, kv_heads, head_dim, block_size, window) in
        [(2, 2, 80, 32, None), (2, 1, 80, 16, Some(260)), (9, 3, 64, 16, None), (5, 1, 33, 7, Some(30))]
    {
        let heads = HeadLayout { heads, kv_heads, head_dim };
        let case = Case { heads, block_size, window, context: 301 };
        let rows = case.rows();
        for device in &devices {
            let expected = case.expected(&rows, device.bf16_products().unwrap());
            for ends in [&[301][..], &[1, 34, 104, 105, 125, 299, 301]] {
                let found = case.found(device, &rows, ends, false);
                let same = found.iter().zip(&expected).all(|(found, expected)| found.to_bits() == expected.to_bits());
                assert!(same && found.len() == expected.len(), "{} {case:?} calls {ends:?}", device.describe());
            }
        }
    }
}
