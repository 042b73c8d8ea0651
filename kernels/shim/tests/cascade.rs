//! Decode attention over shared prefixes, against the scalar reference.
#![allow(clippy::unwrap_used)]

mod support;

use half::{bf16, f16};
use kvern_cuda_abi::{
    CascadeParams, DecodeParams, DecodePlan, DecodeQuery, KernelParams, SharedPrefix, launch as shapes,
};
use kvern_cuda_shim::{Buffer, Launch, launch};
use support::paged::{Heads, Paged};
use support::*;

struct Case {
    heads: Heads,
    block_size: usize,
    contexts: &'static [usize],
    prefixes: &'static [SharedPrefix],
}

const fn shared(first: u32, count: u32, len: u32) -> SharedPrefix {
    SharedPrefix { first, count, len }
}

/// The three kernels of a step, on the same partial results.
fn check<T: Element>(case: &Case, fault: u32) -> Result<(), String> {
    let Case { heads, block_size, contexts, prefixes } = *case;
    let mut random = Random(heads.dim as u64);
    let mut paged = Paged::<T>::new(&mut random, heads, block_size, contexts);
    for prefix in prefixes {
        // Whole blocks are shared.
        assert!((prefix.len as usize).is_multiple_of(block_size));
        let (first, blocks) = (prefix.first as usize, prefix.len as usize / block_size);
        for other in first + 1..first + prefix.count as usize {
            let own = first * paged.stride;
            paged.tables.copy_within(own..own + blocks, other * paged.stride);
        }
    }
    let rows = contexts.len();
    let qkv = random.values::<T>(rows * paged.row_len(), 2.0);
    let scale = 1.0 / (heads.dim as f32).sqrt();
    let query =
        |(row, &context): (usize, &usize)| DecodeQuery { row: row as u32, table: row as u32, context: context as u32 };
    let queries: Vec<DecodeQuery> = contexts.iter().enumerate().map(query).collect();
    let (group, workers) = (heads.heads / heads.kv_heads, 2);
    let mut plan = DecodePlan::default();
    plan.update_shared(&queries, prefixes, (shapes::cascade_rows(heads.dim) / group) as u32, workers);

    let ([k_cache, v_cache], tables) = paged.buffers();
    let partials = plan.partials as usize * heads.heads;
    let (qkv_buffer, out) = (Buffer::of(&qkv), Buffer::<T>::poisoned(rows * heads.heads * heads.dim));
    let (sums, values) = (Buffer::<f32>::poisoned(2 * partials), Buffer::<f32>::poisoned(partials * heads.dim));
    let lists = (Buffer::of(&plan.items), Buffer::of(&plan.starts), Buffer::of(&plan.merges));
    let shared = (Buffer::of(&plan.cascade_tiles), Buffer::of(&plan.cascade_rows));
    let narrow = |size: usize| size as u32;
    let [all_heads, kv_heads, block_size, table_stride, qkv_stride] =
        [heads.heads, heads.kv_heads, block_size, paged.stride, paged.row_len()].map(narrow);
    let scale_log2 = scale * std::f32::consts::LOG2_E;
    let cascade = CascadeParams {
        qkv: qkv_buffer.ptr(),
        k_cache: k_cache.ptr(),
        v_cache: v_cache.ptr(),
        tiles: shared.0.ptr(),
        rows: shared.1.ptr(),
        block_tables: tables.ptr(),
        sums: sums.ptr(),
        values: values.ptr(),
        heads: all_heads,
        kv_heads,
        block_size,
        table_stride,
        qkv_stride,
        scale_log2,
    };
    let decode = DecodeParams {
        qkv: qkv_buffer.ptr(),
        k_cache: k_cache.ptr(),
        v_cache: v_cache.ptr(),
        out: out.ptr(),
        items: lists.0.ptr(),
        starts: lists.1.ptr(),
        merges: lists.2.ptr(),
        block_tables: tables.ptr(),
        sums: sums.ptr(),
        values: values.ptr(),
        heads: all_heads,
        kv_heads,
        block_size,
        table_stride,
        qkv_stride,
        scale_log2,
    };
    let name = format!("{}_d{}", T::SUFFIX, heads.dim);
    let tiles = Launch::new(plan.cascade_tiles.len(), shapes::PREFILL_THREADS).rows(heads.kv_heads);
    let pieces = Launch::new(workers as usize, shapes::DECODE_THREADS)
        .rows(heads.kv_heads * shapes::decode_head_tiles(group))
        .shared(shapes::decode_shared_bytes(heads.dim));
    let merges = Launch::new(plan.merges.len(), heads.dim).rows(heads.heads);
    go("cascade", &name, tiles.shared(shapes::cascade_shared_bytes(heads.dim)).planted(fault), &cascade)?;
    go("decode", &name, pieces, &decode)?;
    go("decode_merge", &name, merges, &decode)?;

    let found = bits(&out);
    for (task, found) in found.chunks(heads.dim).enumerate() {
        let (row, head) = (task / heads.heads, task % heads.heads);
        let q = &qkv[row * paged.row_len() + head * heads.dim..][..heads.dim];
        let expected = paged.expected(q, row, contexts[row] - 1, head, scale, None);
        // As for decode without prefixes: weights and result are rounded to T once each.
        let absolute = 2.0 * T::EPSILON + 2e-5;
        compare(&format!("{name} row {row} head {head}"), found, &expected, T::EPSILON, absolute)?;
    }
    Ok(())
}

/// One launch, in reverse order of threads.
fn go<P: KernelParams>(kernel: &str, name: &str, shape: Launch, params: &P) -> Result<(), String> {
    // SAFETY: the parameters point to buffers of the caller's, which are alive.
    unsafe { launch(&format!("kvern_{kernel}_{name}"), &shape.reverse(), params) }
}

#[test]
fn shared_prefixes_match() {
    const CASES: [Case; 4] = [
        Case {
            heads: Heads { heads: 8, kv_heads: 2, dim: 128 },
            block_size: 16,
            contexts: &[50, 600, 545, 561, 20],
            prefixes: &[shared(1, 3, 544)],
        },
        Case {
            heads: Heads { heads: 6, kv_heads: 2, dim: 64 },
            block_size: 16,
            contexts: &[17, 40, 33, 300, 260, 9],
            prefixes: &[shared(0, 3, 16), shared(3, 2, 256)],
        },
        Case {
            heads: Heads { heads: 48, kv_heads: 1, dim: 96 },
            block_size: 8,
            contexts: &[70, 65, 80],
            prefixes: &[shared(0, 3, 64)],
        },
        Case {
            heads: Heads { heads: 2, kv_heads: 1, dim: 256 },
            block_size: 16,
            contexts: &[33, 50],
            prefixes: &[shared(0, 2, 32)],
        },
    ];
    for case in &CASES {
        check::<bf16>(case, 0).unwrap();
        check::<f16>(case, 0).unwrap();
    }
    caught(check::<f16>(&CASES[1], TABLE_OFF_BY_ONE), "expected");
    caught(check::<f16>(&CASES[1], MISSING_WAIT), "found NaN");
}
