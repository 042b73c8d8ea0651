//! Norms, gates and rows that move, against the scalar references.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use half::{bf16, f16};
use kvern_cuda_abi::{
    BlockCopyParams, GateParams, GatherParams, LAYOUTS, NONE, Ptr, RmsNormParams, SequenceSlice, StepInputsParams,
};
use kvern_cuda_shim::{Buffer, Launch, cpp_layout, kernels, launch};
use kvern_kernels::reference;
use support::*;

#[test]
fn parameter_structs_are_laid_out_alike() {
    let rust: Vec<(String, usize, usize)> = LAYOUTS
        .iter()
        .flat_map(|layout| {
            let fields = layout.fields.iter().map(|&(name, offset, bytes)| (format!(".{name}"), offset, bytes));
            std::iter::once((layout.name.to_owned(), 0, layout.bytes)).chain(fields)
        })
        .collect();
    assert_eq!(rust, cpp_layout());
    for layout in LAYOUTS {
        let fields: usize = layout.fields.iter().map(|(_, _, bytes)| bytes).sum();
        assert_eq!(fields, layout.bytes, "{} has padding", layout.name);
    }
}

/// The table of resources, which is of what nvcc compiled, and the shim name the same kernels.
#[test]
fn both_compilers_have_the_same_kernels() {
    let table = include_str!("../../cuda/resources.txt");
    let rows = table.lines().filter(|line| !line.starts_with('#'));
    let compiled: BTreeSet<&str> = rows.filter_map(|row| row.split_whitespace().next()).collect();
    let shim = kernels();
    assert_eq!(compiled, shim.iter().map(String::as_str).collect());
}

fn check_norm<T: Element>(rows: usize, columns: usize, threads: usize, fused: bool, fault: u32) -> Result<(), String> {
    let mut random = Random(rows as u64 * 1000 + columns as u64);
    let (x, residual) = (random.values::<T>(rows * columns, 2.0), random.values::<T>(rows * columns, 1.0));
    let weight = random.values::<T>(columns, 1.5);
    let eps = 1e-5;
    let kernel = format!("kvern_{}rms_norm_{}", if fused { "add_" } else { "" }, T::SUFFIX);
    let make = || {
        let held = [&x, &residual].map(|values| Buffer::of(values));
        let (weight, out) = (Buffer::of(&weight), Buffer::<T>::poisoned(rows * columns));
        let params = RmsNormParams {
            x: held[0].ptr(),
            residual: if fused { held[1].ptr() } else { Ptr::NULL },
            weight: weight.ptr(),
            out: out.ptr(),
            rows: rows as u32,
            columns: columns as u32,
            eps,
            pad: 0,
        };
        ((held, weight, out), params)
    };
    let read = |(held, _, out): &([Buffer<T>; 2], Buffer<T>, Buffer<T>)| (bits(&held[1]), bits(out));
    let (summed, normed) = run(&kernel, Launch::new(rows, threads).planted(fault), make, read)?;

    let sum = |(x, residual): (&T, &T)| if fused { T::round(x.widen() + residual.widen()) } else { *x };
    let expected: Vec<T> = x.iter().zip(&residual).map(sum).collect();
    if fused {
        // One addition and one rounding: no room for a difference.
        compare("the residual", &summed, &widen(&expected), 0.0, 0.0)?;
    }
    let weight = widen(&weight);
    let expected: Vec<f32> =
        expected.chunks(columns).flat_map(|row| reference::rms_norm(&widen(row), &weight, eps)).collect();
    // The result is rounded once to T; the f32 sum of squares may be added in another order, which is far below 1e-5.
    compare(&kernel, &normed, &expected, T::EPSILON + 1e-5, T::TINY)
}

fn check_norms<T: Element>() {
    for (rows, columns, threads) in
        [(3, 4096, 256), (1, 64, 32), (2, 576, 128), (5, 37, 64), (2, 8, 32), (1, 5120, 1024)]
    {
        for fused in [false, true] {
            check_norm::<T>(rows, columns, threads, fused, 0).unwrap();
        }
    }
}

#[test]
fn norms_match() {
    check_norms::<f32>();
    check_norms::<bf16>();
    check_norms::<f16>();
    caught(check_norm::<bf16>(2, 576, 128, false, MISSING_BARRIER), "the order of threads shows");
    caught(check_norm::<bf16>(2, 576, 128, false, DIVERGED_BARRIER), "a deadlock");
}

/// x / (1 + e^-2u), in f64.
fn gelu_mul(gate: f32, up: f32) -> f32 {
    let x = f64::from(gate);
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    (0.5 * x * (1.0 + u.tanh()) * f64::from(up)) as f32
}

/// A launch that begins early and does not wait is caught at its first access, and one that touches nothing at its end.
#[test]
fn launches_that_begin_early_wait() {
    const MISSING_TURN: u32 = 15;
    let x = Buffer::of(&[1.0f32; 64]);
    let out = Buffer::<f32>::poisoned(32);
    let params = GateParams { x: x.ptr(), out: out.ptr(), rows: 1, columns: 32 };
    let gate = |shape: Launch, rows: u32| {
        // SAFETY: the buffers live and are as large as the shape says.
        unsafe { launch("kvern_silu_mul_f32", &shape, &GateParams { rows, ..params }) }
    };
    let shape = Launch::new(1, 32);
    gate(shape.early(), 1).unwrap();
    gate(shape.planted(MISSING_TURN), 1).unwrap();
    caught(gate(shape.early().planted(MISSING_TURN), 1), "expected a wait for the launches before");
    caught(gate(shape.early().planted(MISSING_TURN), 0), "found no wait");
}

fn check_gate<T: Element>(rows: usize, columns: usize, blocks: usize, gelu: bool, fault: u32) -> Result<(), String> {
    let x = Random(columns as u64).values::<T>(rows * columns * 2, 8.0);
    let kernel = format!("kvern_{}_mul_{}", if gelu { "gelu" } else { "silu" }, T::SUFFIX);
    let make = || {
        let (x, out) = (Buffer::of(&x), Buffer::<T>::poisoned(rows * columns));
        let params = GateParams { x: x.ptr(), out: out.ptr(), rows: rows as u32, columns: columns as u32 };
        ((x, out), params)
    };
    let found = run(&kernel, Launch::new(blocks, 64).planted(fault), make, |(_, out)| bits(out))?;
    let act = |(gate, up): (&T, &T)| {
        let (gate, up) = (gate.widen(), up.widen());
        if gelu { gelu_mul(gate, up) } else { reference::silu_mul(gate, up) }
    };
    let expected: Vec<f32> =
        x.chunks(2 * columns).flat_map(|row| row[..columns].iter().zip(&row[columns..]).map(act)).collect();
    // One rounding to T. e^x of f32 is good to some units in the last place; where the sum 1 + tanh cancels (large negative
    // gates) the reference's own tanh loses digits, of products below 1e-6.
    compare(&kernel, &found, &expected, T::EPSILON + 4e-6, T::TINY + 1e-7)
}

fn check_gates<T: Element>() {
    for (rows, columns, blocks) in [(3, 256, 2), (1, 8, 1), (4, 37, 3), (2, 1536, 7)] {
        for gelu in [false, true] {
            check_gate::<T>(rows, columns, blocks, gelu, 0).unwrap();
        }
    }
}

#[test]
fn gates_match() {
    check_gates::<f32>();
    check_gates::<bf16>();
    check_gates::<f16>();
    caught(check_gate::<bf16>(3, 256, 2, false, UNWRITTEN_TAIL), "found NaN");
}

fn check_gather<T: Element>(rows: usize, columns: usize, fault: u32) -> Result<(), String> {
    let mut random = Random(columns as u64);
    let table_rows = 50;
    let table = random.values::<T>(table_rows * columns, 1.0);
    let ids: Vec<u32> = (0..rows).map(|_| random.below(table_rows) as u32).collect();
    let kernel = format!("kvern_gather_{}", T::SUFFIX);
    let make = || {
        let (table, ids, out) = (Buffer::of(&table), Buffer::of(&ids), Buffer::<T>::poisoned(rows * columns));
        let params = GatherParams {
            table: table.ptr(),
            ids: ids.ptr(),
            out: out.ptr(),
            rows: rows as u32,
            columns: columns as u32,
            table_rows: table_rows as u32,
            pad: 0,
        };
        ((table, ids, out), params)
    };
    let found = run(&kernel, Launch::new(rows, 64).planted(fault), make, |(_, _, out)| bits(out))?;
    let expected: Vec<f32> = ids.iter().flat_map(|&id| widen(&table[id as usize * columns..][..columns])).collect();
    compare(&kernel, &found, &expected, 0.0, 0.0)
}

#[test]
fn gathers_match() {
    for (rows, columns) in [(5, 2048), (1, 8), (7, 37), (3, 576)] {
        check_gather::<f32>(rows, columns, 0).unwrap();
        check_gather::<bf16>(rows, columns, 0).unwrap();
        check_gather::<f16>(rows, columns, 0).unwrap();
    }
    caught(check_gather::<f32>(2, 576, READ_PAST_END), "an access outside of any buffer");
}

#[test]
fn blocks_are_copied_in_every_pool() {
    const BLOCKS: usize = 9;
    const WORDS: usize = 520;
    let pairs: [u32; 6] = [3, 0, 7, 8, 1, 4];
    let pools: Vec<Vec<u32>> =
        (0..5).map(|pool| (0..BLOCKS * WORDS).map(|i| (pool << 20 | i) as u32).collect()).collect();
    let make = || {
        let held: Vec<Buffer<u32>> = pools.iter().map(|pool| Buffer::of(pool)).collect();
        let addresses = Buffer::of(&held.iter().map(|pool| pool.ptr().0).collect::<Vec<u64>>());
        let pairs = Buffer::of(&pairs);
        let params = BlockCopyParams {
            pools: addresses.ptr(),
            pairs: pairs.ptr(),
            block_bytes: WORDS as u64 * 4,
            pair_count: 3,
            pool_count: 5,
        };
        ((held, addresses, pairs), params)
    };
    let read = |(held, _, _): &(Vec<Buffer<u32>>, Buffer<u64>, Buffer<u32>)| -> Vec<Vec<u32>> {
        held.iter().map(Buffer::values).collect()
    };
    let found = run("kvern_block_copy", Launch::new(3, 96).rows(5), make, read).unwrap();
    let mut expected = pools;
    for pool in &mut expected {
        for pair in pairs.chunks(2) {
            pool.copy_within(pair[0] as usize * WORDS..(pair[0] as usize + 1) * WORDS, pair[1] as usize * WORDS);
        }
    }
    assert_eq!(found, expected);
}

#[test]
fn step_inputs_are_built() {
    const STRIDE: usize = 40;
    let block_size = 16;
    let tables = Random(1).shuffled(3 * STRIDE);
    let slice = |row, rows, start, table, sampled| SequenceSlice { row, rows, start, table, sampled };
    let slices =
        [slice(0, 1, 77, 2, 1), slice(1, 300, 15, 0, NONE), slice(301, 1, 0, 1, NONE), slice(302, 1, 639, 1, 0)];
    let last_sampled = [11u32, 22];
    let rows = 303;
    let ids: Vec<u32> = (1000..1000 + rows as u32).collect();
    let make = || {
        let inputs = (Buffer::of(&slices), Buffer::of(&tables), Buffer::of(&last_sampled));
        let outputs = [Buffer::of(&ids), Buffer::poisoned(rows), Buffer::poisoned(rows)];
        let params = StepInputsParams {
            slices: inputs.0.ptr(),
            block_tables: inputs.1.ptr(),
            last_sampled: inputs.2.ptr(),
            ids: outputs[0].ptr(),
            positions: outputs[1].ptr(),
            slots: outputs[2].ptr(),
            sequences: slices.len() as u32,
            table_stride: STRIDE as u32,
            block_size,
            pad: 0,
        };
        ((inputs, outputs), params)
    };
    let found = run("kvern_step_inputs", Launch::new(slices.len(), 128), make, |(_, outputs)| {
        outputs.each_ref().map(Buffer::values)
    });
    let [found_ids, positions, slots] = found.unwrap();
    for slice in &slices {
        for at in 0..slice.rows {
            let (row, position) = ((slice.row + at) as usize, slice.start + at);
            let block = tables[slice.table as usize * STRIDE + (position / block_size) as usize];
            assert_eq!((positions[row], slots[row]), (position, block * block_size + position % block_size));
            let sampled = last_sampled.get(slice.sampled as usize);
            assert_eq!(found_ids[row], *sampled.unwrap_or(&ids[row]));
        }
    }
}
