//! What writes the cache, and attention over it.

use kvern_kernels::ops::{self, Attention, QkNorm, RopeAndStore};
use kvern_kernels::reference::{self, Attend, Products};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, Element, HeadLayout, KvCache, KvShape, RopeTable, SequenceBatch, StepRows,
};

use super::matrices::Random;
use super::{ELEMENTS, Rig, close, layout, shuffled};

const LAYER: usize = 1;

/// A cache and some sequences' blocks in it, in no order. What no sequence holds is poison on the shim.
struct Paged {
    kv: KvCache,
    heads: HeadLayout,
    stride: usize,
    tables: Vec<u32>,
}

impl Paged {
    fn new(rig: &Rig, random: &mut Random, heads: HeadLayout, block_size: usize, contexts: &[usize]) -> Paged {
        let stride = contexts.iter().max().unwrap().div_ceil(block_size) + 1;
        let (blocks, HeadLayout { kv_heads, head_dim, .. }) = (contexts.len() * stride, heads);
        let shape = KvShape { layers: 2, blocks, block_size, kv_heads, head_dim, dtype: rig.kv_dtype() };
        let mut tables = shuffled(random, blocks);
        for (table, context) in tables.chunks_mut(stride).zip(contexts) {
            // Entries past the context are not valid ones, and not read.
            table[context.div_ceil(block_size)..].fill(u32::MAX);
        }
        Paged { kv: KvCache::new(&rig.device, shape).unwrap(), heads, stride, tables }
    }

    /// Where the first `context` tokens of a sequence are.
    fn slots(&self, sequence: usize, context: usize) -> impl Iterator<Item = u32> {
        let size = self.kv.shape().block_size;
        (0..context).map(move |at| self.tables[sequence * self.stride + at / size] * size as u32 + (at % size) as u32)
    }
}

fn row_len(heads: HeadLayout) -> usize {
    (heads.heads + 2 * heads.kv_heads) * heads.head_dim
}

/// K or V of one head, from fused rows: `[rows][head_dim]`.
fn head_values(fused: &[f32], row_len: usize, from: usize, head_dim: usize) -> Vec<f32> {
    fused.chunks(row_len).flat_map(|row| row[from..from + head_dim].to_vec()).collect()
}

/// One batch of attention, in each of some windows by one plan.
struct Case {
    heads: [usize; 3],
    block_size: usize,
    windows: &'static [Option<u32>],
    /// Tokens that are cached before, and queries.
    sequences: &'static [(usize, usize)],
}

const fn case(
    heads: [usize; 3],
    block_size: usize,
    windows: &'static [Option<u32>],
    sequences: &'static [(usize, usize)],
) -> Case {
    Case { heads, block_size, windows, sequences }
}

/// Queries are the last rows of each sequence. At position 0 nothing turns, so that the cache holds exactly what rows
/// had.
fn check(rig: &Rig, case: &Case) {
    let heads = layout(case.heads);
    let (row_len, head_dim) = (row_len(heads), heads.head_dim);
    let mut random = Random((head_dim * 100 + case.block_size) as u64);
    let contexts: Vec<usize> = case.sequences.iter().map(|(cached, queries)| cached + queries).collect();
    let mut paged = Paged::new(rig, &mut random, heads, case.block_size, &contexts);
    let fused: Vec<Vec<f32>> = contexts.iter().map(|context| rig.values(&mut random, context * row_len, 2.0)).collect();
    let slots: Vec<u32> = contexts.iter().enumerate().flat_map(|(at, &context)| paged.slots(at, context)).collect();
    let rope = RopeTable::new(&rig.device, &[1.0], 1.0, 1).unwrap();
    let mut rows = rig.tensor(row_len, &fused.concat());
    let zeros = vec![0; slots.len()];
    rig.with_indices(
        &StepRows { ids: &zeros, positions: &zeros, slots: &slots, sample_rows: &[0], last_sampled: &[] },
        |at| {
            let (positions, slots) = (at.positions, at.slots);
            let args = RopeAndStore { heads, norm: None, rope: &rope, positions, slots, layer: LAYER };
            ops::rope_and_store(&rig.device, &args, &mut rows, &mut paged.kv).unwrap();
        },
    );

    let mut sums = vec![0];
    let mut queries = Vec::new();
    for (fused, (cached, count)) in fused.iter().zip(case.sequences) {
        queries.extend_from_slice(&fused[cached * row_len..]);
        sums.push(sums.last().unwrap() + *count as u32);
    }
    let context_lens: Vec<u32> = contexts.iter().map(|&context| context as u32).collect();
    let batch = SequenceBatch {
        cu_seqlens_q: &sums,
        context_lens: &context_lens,
        block_tables: &paged.tables,
        block_table_stride: paged.stride,
    };
    let rows = queries.len() / row_len;
    let limits = AttentionLimits {
        tokens_max: rows,
        sequences_max: contexts.len(),
        context_max: *contexts.iter().max().unwrap(),
        windows: case.windows,
        ..AttentionLimits::new(1, 1, 1)
    };
    let mut plan = AttentionPlan::new(&rig.device, heads, &limits).unwrap();
    plan.update(&rig.device, &batch, &paged.kv, None).unwrap();
    let queries = rig.tensor(row_len, &queries);
    let scale = 1.0 / (head_dim as f32).sqrt();
    for &window in case.windows {
        let mut out = rig.poisoned(rows + 1, heads.heads * head_dim);
        let args = Attention { heads, layer: LAYER, scale, window, plan: &plan };
        ops::attention(&rig.device, &args, &queries, &paged.kv, &mut out).unwrap();
        compare(rig, case, window, &fused, &rig.read(&out));
        out.set_rows(rows + 1);
        assert!(rig.read(&out)[rows * heads.heads * head_dim..].iter().all(|value| value.is_nan()), "a row more");
    }
}

/// Kernels round each weight of the softmax to the type of K and V (half a unit of the weight, and so of a mean of
/// values up to 2) and the result once; the rest is the order of f32 sums, 1e-5 of values up to 2.
fn compare(rig: &Rig, case: &Case, window: Option<u32>, fused: &[Vec<f32>], found: &[f32]) {
    let heads = layout(case.heads);
    let (row_len, head_dim) = (row_len(heads), heads.head_dim);
    let [_, k_start, v_start] = reference::fused_heads(heads);
    let mut found = found.chunks_exact(head_dim);
    for (sequence, (fused, &(cached, queries))) in fused.iter().zip(case.sequences).enumerate() {
        let values = |from: usize| -> Vec<Vec<f32>> {
            (0..heads.kv_heads).map(|head| head_values(fused, row_len, from + head * head_dim, head_dim)).collect()
        };
        let (k, v) = (values(k_start), values(v_start));
        for (position, head) in (cached..cached + queries).flat_map(|at| (0..heads.heads).map(move |head| (at, head))) {
            let (q, kv_head) =
                (&fused[position * row_len + head * head_dim..][..head_dim], head * heads.kv_heads / heads.heads);
            let scale = 1.0 / (head_dim as f32).sqrt();
            let (k, v, products) = (&k[kv_head], &v[kv_head], Products::F32);
            let expected = reference::attention(&Attend { q, k, v, scale, position, window, products });
            let block_size = case.block_size;
            let what = format!(
                "{} {heads:?}, blocks of {block_size}, window {window:?}: sequence {sequence} at {position}, head {head}",
                rig.element
            );
            close(&what, found.next().unwrap(), &expected, rig.epsilon(), 2.0 * rig.epsilon() + 2e-5);
        }
    }
    assert!(found.next().is_none());
}

const ALL: &[Option<u32>] = &[None];

/// What the kernels on matrix units take; the f32 one takes it too.
const CASES: [Case; 9] = [
    // Decode alone, whole and in pieces.
    case([8, 2, 128], 16, ALL, &[(0, 1), (299, 1), (16, 1), (15, 1), (699, 1)]),
    case([4, 1, 96], 32, ALL, &[(89, 1), (512, 1)]),
    case([8, 1, 256], 16, ALL, &[(39, 1), (260, 1)]),
    // Prefill alone, whole and in chunks.
    case([3, 1, 64], 8, ALL, &[(0, 1), (100, 50), (0, 16), (0, 70)]),
    case([2, 2, 256], 32, ALL, &[(20, 30), (0, 3)]),
    // Both, in two windows and in none; a sequence without queries.
    case(
        [9, 3, 64],
        16,
        &[None, Some(40), Some(300)],
        &[(1, 1), (0, 33), (69, 1), (20, 0), (13, 7), (349, 1), (300, 2)],
    ),
    case([4, 4, 128], 8, &[Some(1), Some(70)], &[(280, 1), (50, 20), (0, 1)]),
    case([4, 1, 96], 16, &[None, Some(33)], &[(10, 40), (290, 1), (0, 5)]),
    case([8, 1, 64], 32, ALL, &[(31, 1), (32, 1), (33, 1), (31, 33)]),
];

#[test]
fn attention_of_matrix_units() {
    for element in [Element::BF16, Element::F16] {
        let rig = Rig::new(element);
        CASES.iter().for_each(|case| check(&rig, case));
    }
}

#[test]
fn attention_of_sm_90a() {
    for element in [Element::BF16, Element::F16] {
        let Some(rig) = Rig::hopper(element) else { return };
        CASES.iter().for_each(|case| check(&rig, case));
        let log = rig.shim.as_ref().map_or_else(Vec::new, |shim| shim.log());
        let launches = |name: &str| log.iter().filter(|line| line.contains(name)).count();
        assert!(
            rig.shim.is_none() || launches("prefill_hopper_") > 5 && launches("kvern_prefill_bf16") == 0,
            "{log:?}"
        );
    }
}

#[test]
fn attention_in_f32() {
    let small = [
        case([1, 1, 4], 5, ALL, &[(150, 1), (0, 9)]),
        case([5, 1, 34], 1, &[Some(3), None], &[(20, 7), (0, 1), (33, 1)]),
        case([2, 2, 80], 32, ALL, &[(69, 1), (0, 33)]),
        case([6, 2, 16], 7, &[Some(20)], &[(50, 9), (129, 1)]),
    ];
    let rig = Rig::new(Element::F32);
    small.iter().chain(&CASES[..3]).chain(&CASES[5..6]).for_each(|case| check(&rig, case));
}

/// Contexts beyond 4096 are cut into longer pieces.
#[test]
fn attention_over_long_contexts() {
    let long = case([2, 1, 64], 16, &[None, Some(600)], &[(4999, 1), (4095, 1), (4096, 1), (300, 1), (4200, 3)]);
    check(&Rig::new(Element::BF16), &long);
}

/// Rotation, norms per head, and the cache's values, through positions that turn.
struct RopeCase {
    heads: [usize; 3],
    block_size: usize,
    rows: usize,
    rotary_dim: usize,
    norm: bool,
}

/// Tensors of the weights of norms per head.
fn norm_weights(rig: &Rig, random: &mut Random, head_dim: usize) -> [Vec<f32>; 2] {
    [(); 2].map(|()| rig.values(random, head_dim, 1.5))
}

fn check_rope(rig: &Rig, case: &RopeCase) {
    let RopeCase { heads, block_size, rows, rotary_dim, norm } = *case;
    let heads = layout(heads);
    let (row_len, head_dim, eps) = (row_len(heads), heads.head_dim, 1e-6);
    let what = format!("{} {heads:?}, blocks of {block_size}, {rotary_dim} turn, norm {norm}", rig.element);
    let mut random = Random(head_dim as u64);
    let mut paged = Paged::new(rig, &mut random, heads, block_size, &[rows]);
    let weights = norm_weights(rig, &mut random, head_dim);
    let [q_weight, k_weight] = weights.each_ref().map(|weight| rig.tensor(head_dim, weight));
    let inv_freq: Vec<f32> = (0..rotary_dim / 2).map(|i| 0.7f32.powi(i as i32)).collect();
    let rope = RopeTable::new(&rig.device, &inv_freq, 1.25, rows).unwrap();
    let fused = rig.values(&mut random, rows * row_len, 2.0);
    let (positions, slots): (Vec<u32>, Vec<u32>) = ((0..rows as u32).collect(), paged.slots(0, rows).collect());
    let mut qkv = rig.tensor(row_len, &fused);
    rig.with_indices(
        &StepRows { ids: &positions, positions: &positions, slots: &slots, sample_rows: &[0], last_sampled: &[] },
        |at| {
            let norm = norm.then_some(QkNorm { q: &q_weight, k: &k_weight, eps });
            let (positions, slots) = (at.positions, at.slots);
            let args = RopeAndStore { heads, norm, rope: &rope, positions, slots, layer: LAYER };
            ops::rope_and_store(&rig.device, &args, &mut qkv, &mut paged.kv).unwrap();
        },
    );

    let mut expected = fused;
    for (position, row) in expected.chunks_mut(row_len).enumerate() {
        let angles = inv_freq.iter().map(|frequency| f64::from(position as f32 * frequency));
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(|angle| (angle.sin() as f32 * 1.25, angle.cos() as f32 * 1.25)).unzip();
        for (head, values) in row.chunks_mut(head_dim).enumerate().take(heads.heads + heads.kv_heads) {
            if norm {
                values.copy_from_slice(&reference::rms_norm(values, &weights[usize::from(head >= heads.heads)], eps));
            }
            reference::rope(&mut values[..rotary_dim], &cos, &sin);
        }
    }
    let found = rig.read(&qkv);
    for (found, expected) in found.chunks(row_len).zip(expected.chunks(row_len)) {
        // Some roundings of f32, of terms up to 4, before the one to the device's type.
        let q = ..heads.heads * head_dim;
        close(&format!("{what}: q"), &found[q], &expected[q], rig.epsilon() + 1e-6, 4e-6);
    }
    check_stored(rig, &paged, &what, &found, &expected);
}

/// The cache's V by attention in a window of one position, bit for bit; its K by what all positions give.
fn check_stored(rig: &Rig, paged: &Paged, what: &str, found: &[f32], expected: &[f32]) {
    let (heads, rows) = (paged.heads, found.len() / row_len(paged.heads));
    let (row_len, head_dim, scale) = (row_len(heads), heads.head_dim, 1.0 / (heads.head_dim as f32).sqrt());
    let [_, k_start, v_start] = reference::fused_heads(heads);
    let windows = [None, Some(1)];
    let limits = AttentionLimits { windows: &windows, ..AttentionLimits::new(rows, 1, rows) };
    let mut plan = AttentionPlan::new(&rig.device, heads, &limits).unwrap();
    let batch = SequenceBatch {
        cu_seqlens_q: &[0, rows as u32],
        context_lens: &[rows as u32],
        block_tables: &paged.tables,
        block_table_stride: paged.stride,
    };
    plan.update(&rig.device, &batch, &paged.kv, None).unwrap();
    let queries = rig.tensor(row_len, found);
    let [all, own] = windows.map(|window| {
        let mut out = rig.poisoned(rows, heads.heads * head_dim);
        let args = Attention { heads, layer: LAYER, scale, window, plan: &plan };
        ops::attention(&rig.device, &args, &queries, &paged.kv, &mut out).unwrap();
        rig.read(&out)
    });
    for (at, (all, own)) in all.chunks(head_dim).zip(own.chunks(head_dim)).enumerate() {
        let (position, head) = (at / heads.heads, at % heads.heads);
        let kv_head = head * heads.kv_heads / heads.heads;
        let values = |from: usize| head_values(expected, row_len, from + kv_head * head_dim, head_dim);
        let (k, v) = (rig.rounded(values(k_start)), values(v_start));
        assert_eq!(own, &v[position * head_dim..][..head_dim], "{what}: v of row {position}, head {head}");
        let q = &found[position * row_len + head * head_dim..][..head_dim];
        let attend = Attend { q, k: &k, v: &v, scale, position, window: None, products: Products::F32 };
        // A value of K may be rounded the other way. That moves a score by `moved` at most, and so weights by e^(2
        // moved).
        let moves =
            |k: &[f32]| -> f32 { q.iter().zip(k).map(|(q, k)| q.abs() * (2.0 * rig.epsilon() * k.abs() + 4e-6)).sum() };
        let moved = k.chunks(head_dim).take(position + 1).map(moves).fold(0.0, f32::max) * scale;
        let tolerance = 2.0 * (2.0 * moved).exp_m1() + 2.0 * rig.epsilon() + 2e-5;
        let what = format!("{what}: k, seen by row {position}, head {head}");
        close(&what, all, &reference::attention(&attend), rig.epsilon(), tolerance);
    }
}

#[test]
fn rope_and_the_cache() {
    let case = |heads, block_size, rows, rotary_dim, norm| RopeCase { heads, block_size, rows, rotary_dim, norm };
    let cases = [
        case([8, 2, 128], 16, 37, 128, true),
        case([4, 4, 64], 8, 17, 64, false),
        case([3, 1, 96], 16, 20, 24, true),
        case([2, 1, 256], 32, 9, 64, false),
    ];
    for element in ELEMENTS {
        let rig = Rig::new(element);
        cases.iter().for_each(|case| check_rope(&rig, case));
    }
    let rig = Rig::new(Element::F32);
    for case in [case([5, 5, 20], 7, 11, 8, true), case([2, 1, 2], 3, 8, 2, false), case([1, 1, 34], 16, 5, 0, true)] {
        check_rope(&rig, &case);
    }
}

/// A row alone has the bits that it has in a batch, whoever else is in it.
#[test]
fn a_rows_bits_do_not_depend_on_the_batch() {
    let (heads, contexts) = (layout([6, 2, 64]), [700, 3, 256, 41]);
    let row_len = row_len(heads);
    for element in ELEMENTS {
        let rig = Rig::new(element);
        let mut random = Random(8);
        let mut paged = Paged::new(&rig, &mut random, heads, 16, &contexts);
        let rows: usize = contexts.iter().sum();
        let fused = rig.values(&mut random, rows * row_len, 2.0);
        let slots: Vec<u32> = (0..contexts.len()).flat_map(|at| paged.slots(at, contexts[at])).collect();
        let rope = RopeTable::new(&rig.device, &[], 1.0, 1).unwrap();
        let (mut qkv, zeros) = (rig.tensor(row_len, &fused), vec![0; rows]);
        let step = StepRows { ids: &zeros, positions: &zeros, slots: &slots, sample_rows: &[0], last_sampled: &[] };
        rig.with_indices(&step, |at| {
            let (positions, slots) = (at.positions, at.slots);
            let args = RopeAndStore { heads, norm: None, rope: &rope, positions, slots, layer: LAYER };
            ops::rope_and_store(&rig.device, &args, &mut qkv, &mut paged.kv).unwrap();
        });

        let mut plan = AttentionPlan::new(&rig.device, heads, &AttentionLimits::new(4, 4, 700)).unwrap();
        let queries = &fused[..4 * row_len];
        let mut attend = |which: std::ops::Range<usize>| {
            let sums: Vec<u32> = (0..=which.len() as u32).collect();
            let batch = SequenceBatch {
                cu_seqlens_q: &sums,
                context_lens: &contexts.map(|context| context as u32)[which.clone()],
                block_tables: &paged.tables[which.start * paged.stride..which.end * paged.stride],
                block_table_stride: paged.stride,
            };
            plan.update(&rig.device, &batch, &paged.kv, None).unwrap();
            let queries = rig.tensor(row_len, &queries[which.start * row_len..which.end * row_len]);
            let mut out = rig.poisoned(which.len(), 6 * 64);
            let args = Attention { heads, layer: LAYER, scale: 0.125, window: None, plan: &plan };
            ops::attention(&rig.device, &args, &queries, &paged.kv, &mut out).unwrap();
            rig.read(&out)
        };
        let all = attend(0..4);
        assert!(all.iter().all(|value| value.is_finite()));
        for row in 0..4 {
            assert_eq!(attend(row..row + 1), all[row * 6 * 64..(row + 1) * 6 * 64], "{element} row {row}");
        }
    }
}
