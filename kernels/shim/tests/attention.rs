//! Decode attention, and what writes the cache, against the scalar references.
#![allow(clippy::unwrap_used)]

mod support;

use half::{bf16, f16};
use kvern_cuda_abi::{DecodeMerge, DecodeParams, DecodePlan, DecodeQuery, Ptr, RopeStoreParams, launch};
use kvern_cuda_shim::{Buffer, Launch};
use kvern_kernels::reference;
use support::paged::{Heads, Paged, pointers, tolerance};
use support::*;

struct RopeCase {
    heads: Heads,
    rows: usize,
    block_size: usize,
    rotary_dim: usize,
    norm: bool,
}

fn check_rope<T: Element>(case: &RopeCase, fault: u32) -> Result<(), String> {
    let RopeCase { heads: Heads { heads, kv_heads, dim }, rows, block_size, rotary_dim, norm } = *case;
    let mut random = Random(dim as u64);
    let (row_heads, half, blocks) = (heads + 2 * kv_heads, rotary_dim / 2, rows.div_ceil(block_size) + 1);
    let qkv = random.values::<T>(rows * row_heads * dim, 2.0);
    let weights = [random.values::<T>(dim, 1.5), random.values::<T>(dim, 1.5)];
    let turns: Vec<f32> = (0..100 * half).map(|_| random.unit() * 3.0).collect();
    let (cos, sin): (Vec<f32>, Vec<f32>) = turns.iter().map(|turn| (turn.cos(), turn.sin())).unzip();
    let positions: Vec<u32> = (0..rows).map(|_| random.below(100) as u32).collect();
    let slots: Vec<u32> = random.shuffled(blocks * block_size)[..rows].to_vec();
    let cache = blocks * kv_heads * block_size * dim;
    let eps = 1e-6;
    let make = || {
        let memory = (
            [Buffer::of(&qkv), Buffer::poisoned(cache), Buffer::poisoned(cache)],
            weights.each_ref().map(|weight| Buffer::of(weight)),
            [Buffer::of(&cos), Buffer::of(&sin)],
            [Buffer::of(&positions), Buffer::of(&slots)],
        );
        let ([qkv, k_cache, v_cache], [q_weight, k_weight]) = (pointers(&memory.0), pointers(&memory.1));
        let ([cos, sin], [positions, slots]) = (pointers(&memory.2), pointers(&memory.3));
        let weight = |weight| if norm { weight } else { Ptr::NULL };
        let params = RopeStoreParams {
            qkv,
            k_cache,
            v_cache,
            q_weight: weight(q_weight),
            k_weight: weight(k_weight),
            cos,
            sin,
            positions,
            slots,
            rows: rows as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            block_size: block_size as u32,
            rotary_dim: rotary_dim as u32,
            head_dim: dim as u32,
            eps,
            pad: 0,
        };
        (memory, params)
    };
    let kernel = format!("kvern_rope_store_{}", T::SUFFIX);
    let shape = Launch::new((rows * row_heads).div_ceil(launch::ROPE_WARPS), launch::ROPE_WARPS * 32).planted(fault);
    let [found, k, v] = run(&kernel, shape, make, |memory| memory.0.each_ref().map(bits))?;

    let poison = T::round(f32::NAN).widen().to_bits() | 0xffff_0000;
    let (mut written, tolerance) = ([vec![false; cache], vec![false; cache]], (T::EPSILON + 1e-6, 4e-6));
    for (task, head) in qkv.chunks(dim).enumerate() {
        let (row, index) = (task / row_heads, task % row_heads);
        let mut expected = widen(head);
        if index < heads + kv_heads {
            let weight = widen(&weights[usize::from(index >= heads)]);
            expected = if norm { reference::rms_norm(&expected, &weight, eps) } else { expected };
            let at = positions[row] as usize * half;
            reference::rope(&mut expected[..rotary_dim], &cos[at..at + half], &sin[at..at + half]);
        }
        let own = &found[task * dim..][..dim];
        if index < heads {
            compare("q", own, &expected, tolerance.0, tolerance.1)?;
            continue;
        }
        compare("k and v in the rows", own, &widen(head), 0.0, 0.0)?;
        let (kv_head, slot) = ((index - heads) % kv_heads, slots[row] as usize);
        let at = ((slot / block_size * kv_heads + kv_head) * block_size + slot % block_size) * dim;
        let is_v = index >= heads + kv_heads;
        let exact = if is_v { (0.0, 0.0) } else { tolerance };
        compare("the cache", &[&k, &v][usize::from(is_v)][at..at + dim], &expected, exact.0, exact.1)?;
        written[usize::from(is_v)][at..at + dim].fill(true);
    }
    for (values, written) in [k, v].iter().zip(&written) {
        let untouched = values.iter().zip(written).all(|(value, written)| *written || f32::from_bits(*value).is_nan());
        assert!(untouched, "a write to another slot (poison is {poison:x})");
    }
    Ok(())
}

#[test]
fn rope_and_the_cache_match() {
    let case = |heads, kv_heads, dim, rows, block_size, rotary_dim, norm| RopeCase {
        heads: Heads { heads, kv_heads, dim },
        rows,
        block_size,
        rotary_dim,
        norm,
    };
    let cases = [
        case(8, 2, 128, 5, 16, 128, true),
        case(4, 4, 64, 17, 16, 64, false),
        case(3, 1, 96, 4, 1, 96, true),
        case(2, 1, 256, 3, 32, 64, false),
        case(5, 5, 80, 2, 7, 20, true),
    ];
    for case in &cases {
        check_rope::<f32>(case, 0).unwrap();
        check_rope::<bf16>(case, 0).unwrap();
        check_rope::<f16>(case, 0).unwrap();
    }
}

struct DecodeCase {
    heads: Heads,
    block_size: usize,
    contexts: &'static [usize],
    window: Option<u32>,
    workers: u32,
}

fn check_decode<T: Element>(case: &DecodeCase, fault: u32) -> Result<(), String> {
    let DecodeCase { heads, block_size, contexts, window, workers } = *case;
    let mut random = Random(heads.dim as u64 + contexts.len() as u64);
    let paged = Paged::<T>::new(&mut random, heads, block_size, contexts);
    let rows = contexts.len();
    let qkv = random.values::<T>(rows * paged.row_len(), 2.0);
    let scale = 1.0 / (heads.dim as f32).sqrt();
    let query =
        |(row, &context): (usize, &usize)| DecodeQuery { row: row as u32, table: row as u32, context: context as u32 };
    let queries: Vec<DecodeQuery> = contexts.iter().enumerate().map(query).collect();
    let mut plan = DecodePlan::default();
    plan.update(&queries, window, workers);
    // As in a captured graph, which has entries to spare: a row of nothing would be NaN.
    plan.merges.extend([DecodeMerge { row: 0, first: 0, count: 0 }; 3]);

    let out_len = rows * heads.heads * heads.dim;
    let partials = plan.partials as usize * heads.heads;
    let make = || {
        let (caches, tables) = paged.buffers();
        let memory = (
            caches,
            [Buffer::of(&qkv), Buffer::poisoned(out_len)],
            [tables, Buffer::of(&plan.starts)],
            Buffer::of(&plan.items),
            Buffer::of(&plan.merges),
            [Buffer::<f32>::poisoned(2 * partials), Buffer::poisoned(partials * heads.dim)],
        );
        let ([k_cache, v_cache], [qkv, out]) = (pointers(&memory.0), pointers(&memory.1));
        let ([block_tables, starts], [sums, values]) = (pointers(&memory.2), pointers(&memory.5));
        let params = DecodeParams {
            qkv,
            k_cache,
            v_cache,
            out,
            items: memory.3.ptr(),
            starts,
            merges: memory.4.ptr(),
            block_tables,
            sums,
            values,
            heads: heads.heads as u32,
            kv_heads: heads.kv_heads as u32,
            block_size: block_size as u32,
            table_stride: paged.stride as u32,
            qkv_stride: paged.row_len() as u32,
            scale_log2: scale * std::f32::consts::LOG2_E,
        };
        (memory, params)
    };
    let group = heads.heads / heads.kv_heads;
    let name = format!("{}_d{}", T::SUFFIX, heads.dim);
    let shape = Launch::new(workers as usize, launch::DECODE_THREADS)
        .rows(heads.kv_heads * launch::decode_head_tiles(group))
        .shared(launch::decode_shared_bytes(heads.dim))
        .planted(fault);
    // The merge reads what the pieces left, so both are one run.
    let merge_shape = Launch::new(plan.merges.len(), heads.dim).rows(heads.heads);
    let (pieces, merge) = (format!("kvern_decode_{name}"), format!("kvern_decode_merge_{name}"));
    let found = run_all(&[(&pieces, shape), (&merge, merge_shape)], make, |memory| bits(&memory.1[1]))?;
    let (relative, absolute) = tolerance::<T>();
    for (task, found) in found.chunks(heads.dim).enumerate() {
        let (row, head) = (task / heads.heads, task % heads.heads);
        let q = &qkv[row * paged.row_len() + head * heads.dim..][..heads.dim];
        let expected = paged.expected(q, row, contexts[row] - 1, head, scale, window);
        compare(&format!("{name} row {row} head {head}"), found, &expected, relative, absolute)?;
    }
    Ok(())
}

const fn decode_case(
    heads: [usize; 3],
    block_size: usize,
    contexts: &'static [usize],
    window: Option<u32>,
    workers: u32,
) -> DecodeCase {
    let [heads, kv_heads, dim] = heads;
    DecodeCase { heads: Heads { heads, kv_heads, dim }, block_size, contexts, window, workers }
}

#[test]
fn decode_matches() {
    const CASES: [DecodeCase; 7] = [
        decode_case([8, 2, 128], 16, &[1, 300, 17, 16, 700], None, 3),
        decode_case([9, 3, 64], 16, &[1, 2, 15, 33, 257, 64], None, 5),
        decode_case([4, 1, 96], 32, &[90, 513], None, 2),
        decode_case([2, 2, 256], 16, &[40, 261], None, 2),
        decode_case([20, 1, 64], 8, &[100, 5], None, 2),
        decode_case([4, 2, 64], 1, &[37, 290], None, 4),
        decode_case([4, 4, 128], 16, &[600, 50, 300], Some(70), 2),
    ];
    for case in &CASES {
        check_decode::<bf16>(case, 0).unwrap();
        check_decode::<f16>(case, 0).unwrap();
    }
    for (fault, message) in [(TABLE_OFF_BY_ONE, "found NaN"), (WRONG_SCALE, "expected"), (MISSING_WAIT, "found NaN")] {
        caught(check_decode::<f16>(&CASES[0], fault), message);
    }
}
