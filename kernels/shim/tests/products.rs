//! Products of few rows, dequantization and random weights, against the scalar references.
#![allow(clippy::unwrap_used)]

mod support;

use half::{bf16, f16};
use kvern_cuda_abi::{DequantizeParams, FillParams, GemvParams, Ptr, launch};
use kvern_cuda_shim::{Buffer, Launch};
use kvern_kernels::{Format, dequantize};
use support::*;

const FORMATS: [(Format, &str); 5] = [
    (Format::Q4_0, "q4_0"),
    (Format::Q4_1, "q4_1"),
    (Format::Q8_0, "q8_0"),
    (Format::Q4_K, "q4_k"),
    (Format::Q6_K, "q6_k"),
];

/// Blocks of random bits, whose f16 fields are small positive numbers.
fn random_blocks(random: &mut Random, format: Format, elements: usize) -> Vec<u8> {
    let (blocks, bytes) = (elements / format.block_elements(), format.block_bytes());
    let mut stored: Vec<u8> = (0..blocks * bytes).map(|_| random.bits() as u8).collect();
    let halves: &[usize] = match format {
        Format::Q4_1 | Format::Q4_K => &[0, 2],
        Format::Q6_K => &[208],
        _ => &[0],
    };
    for block in stored.chunks_mut(bytes) {
        for &at in halves {
            let value = f16::from_f32((random.unit() + 1.5) * 0.01);
            block[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    stored
}

fn widened(format: Format, stored: &[u8], elements: usize) -> Vec<f32> {
    let mut values = vec![0.0; elements];
    dequantize(format, stored, &mut values).unwrap();
    values
}

struct GemvCase {
    rows: usize,
    rows_max: usize,
    inner: usize,
    outputs: usize,
    /// Elements of the output's rows that belong to others.
    gap: usize,
    bias: bool,
}

const fn gemv_case(rows: usize, rows_max: usize, inner: usize, outputs: usize, bias: bool) -> GemvCase {
    GemvCase { rows, rows_max, inner, outputs, gap: 0, bias }
}

/// Into a part of a wider output.
const fn with_gap(gap: usize, case: GemvCase) -> GemvCase {
    GemvCase { gap, ..case }
}

/// `stored` are the weights as the kernel reads them, `w` what they mean.
fn check_gemv<T: Element, W: Copy>(
    kernel: &str,
    case: &GemvCase,
    stored: &[W],
    w: &[f32],
    fault: u32,
) -> Result<(), String> {
    check_gemv_out::<T, W, T>(kernel, case, stored, w, fault)?;
    check_gemv_out::<T, W, f32>(kernel, case, stored, w, fault)
}

/// With results of `Out`: T, or f32.
fn check_gemv_out<T: Element, W: Copy, Out: Element>(
    kernel: &str,
    case: &GemvCase,
    stored: &[W],
    w: &[f32],
    fault: u32,
) -> Result<(), String> {
    let out_f32 = Out::SUFFIX == "f32";
    let GemvCase { rows, inner, outputs, gap, bias, .. } = *case;
    let stride = outputs + gap;
    let mut random = Random(inner as u64);
    let (x, added) = (random.values::<T>(rows * inner, 1.0), random.values::<T>(outputs, 4.0));
    let make = || {
        let memory = (Buffer::of(stored), [Buffer::of(&x), Buffer::of(&added)], Buffer::<Out>::poisoned(rows * stride));
        let params = GemvParams {
            x: memory.1[0].ptr(),
            w: memory.0.ptr(),
            bias: if bias { memory.1[1].ptr() } else { Ptr::NULL },
            out: memory.2.ptr(),
            rows: rows as u32,
            inner: inner as u32,
            outputs: outputs as u32,
            out_stride: stride as u32,
            out_f32: u32::from(out_f32),
            prefetch: 1,
        };
        (memory, params)
    };
    let blocks = outputs.div_ceil(launch::GEMV_OUTPUTS);
    let shape = Launch::new(blocks, launch::GEMV_THREADS).planted(fault);
    let found = run(kernel, shape, make, |memory| bits(&memory.2))?;
    for (at, found) in found.iter().enumerate() {
        let (row, output) = (at / stride, at % stride);
        if output >= outputs {
            let untouched = f32::from_bits(*found).is_nan();
            assert!(untouched, "{kernel}: expected nothing past {outputs} outputs, found a value at {output}");
            continue;
        }
        let bias = if bias { f64::from(added[output].widen()) } else { 0.0 };
        let product = |(x, w): (&T, &f32)| f64::from(x.widen()) * f64::from(*w);
        let terms = x[row * inner..][..inner].iter().zip(&w[output * inner..][..inner]).map(product);
        let (sum, size) = terms.fold((bias, bias.abs()), |(sum, size), term| (sum + term, size + term.abs()));
        // Sums of f32 at most 64 additions deep, each off by 2^-24 of what was added so far; then one rounding to the result.
        let tolerance = (size * 64.0 / 16_777_216.0) as f32 + Out::TINY;
        compare(&format!("{kernel} {at}"), &[*found], &[sum as f32], Out::EPSILON, tolerance)?;
    }
    Ok(())
}

const DENSE: [GemvCase; 6] = [
    gemv_case(1, 1, 2048, 7, false),
    gemv_case(2, 2, 576, 9, true),
    gemv_case(3, 4, 1032, 4, false),
    gemv_case(8, 8, 4096, 5, true),
    gemv_case(5, 8, 8, 1, true),
    with_gap(11, gemv_case(3, 4, 264, 6, true)),
];

fn check_dense<T: Element>() {
    for case in &DENSE {
        let w = Random(5).values::<T>(case.inner * case.outputs, 1.0);
        let kernel = format!("kvern_gemv_{}_r{}", T::SUFFIX, case.rows_max);
        check_gemv::<T, T>(&kernel, case, &w, &widen(&w), 0).unwrap();
    }
}

#[test]
fn dense_products_match() {
    check_dense::<f32>();
    check_dense::<bf16>();
    check_dense::<f16>();
    let w = Random(5).values::<bf16>(DENSE[1].inner * DENSE[1].outputs, 1.0);
    let planted = check_gemv::<bf16, bf16>("kvern_gemv_bf16_r2", &DENSE[1], &w, &widen(&w), MISSING_BARRIER);
    caught(planted, "found NaN");
}

fn check_quantized<T: Element>() {
    let cases =
        [gemv_case(1, 1, 512, 6, false), with_gap(3, gemv_case(3, 4, 1280, 5, true)), gemv_case(8, 8, 768, 4, false)];
    for ((format, name), case) in FORMATS.iter().flat_map(|format| cases.iter().map(move |case| (format, case))) {
        let elements = case.inner * case.outputs;
        let stored = random_blocks(&mut Random(11), *format, elements);
        let kernel = format!("kvern_gemv_{name}_{}_r{}", T::SUFFIX, case.rows_max);
        check_gemv::<T, u8>(&kernel, case, &stored, &widened(*format, &stored, elements), 0).unwrap();
    }
}

#[test]
fn quantized_products_match() {
    check_quantized::<f32>();
    check_quantized::<bf16>();
    check_quantized::<f16>();
}

/// A row's bits are the same alone and among others.
#[test]
fn products_do_not_depend_on_the_batch() {
    let (inner, outputs) = (1032, 5);
    let mut random = Random(3);
    let (x, w) = (random.values::<bf16>(8 * inner, 1.0), random.values::<bf16>(inner * outputs, 1.0));
    let product = |rows: usize, rows_max: usize| {
        let make = || {
            let memory = [Buffer::of(&x[..rows * inner]), Buffer::of(&w), Buffer::poisoned(rows * outputs)];
            let [x, w, out] = memory.each_ref().map(Buffer::ptr);
            let (rows, inner, outputs) = (rows as u32, inner as u32, outputs as u32);
            let out_stride = outputs;
            (
                memory,
                GemvParams { x, w, bias: Ptr::NULL, out, rows, inner, outputs, out_stride, out_f32: 0, prefetch: 0 },
            )
        };
        let shape = Launch::new(outputs.div_ceil(launch::GEMV_OUTPUTS), launch::GEMV_THREADS);
        run(&format!("kvern_gemv_bf16_r{rows_max}"), shape, make, |memory| bits(&memory[2])).unwrap()
    };
    let all = product(8, 8);
    for (rows, rows_max) in [(1, 1), (2, 2), (3, 4), (5, 8)] {
        assert_eq!(product(rows, rows_max), all[..rows * outputs]);
    }
}

fn check_dequantize<T: Element>() {
    let elements = 2560;
    for (format, name) in FORMATS {
        let stored = random_blocks(&mut Random(2), format, elements);
        let kernel = format!("kvern_dequantize_{name}_{}", T::SUFFIX);
        let make = || {
            let memory = (Buffer::of(&stored), Buffer::<T>::poisoned(elements));
            let params = DequantizeParams { blocks: memory.0.ptr(), out: memory.1.ptr(), elements: elements as u64 };
            (memory, params)
        };
        let found = run(&kernel, Launch::new(3, 64), make, |memory| bits(&memory.1)).unwrap();
        let expected: Vec<T> = widened(format, &stored, elements).into_iter().map(T::round).collect();
        compare(&kernel, &found, &widen(&expected), 0.0, 0.0).unwrap();
    }
}

#[test]
fn dequantized_values_are_exact() {
    check_dequantize::<f32>();
    check_dequantize::<bf16>();
    check_dequantize::<f16>();
}

fn check_fill<T: Element>() {
    let fill = |blocks: usize, elements: usize| {
        let make = || {
            let out = Buffer::<T>::poisoned(elements);
            let params = FillParams { out: out.ptr(), elements: elements as u64, seed: 9, limit: 0.5, pad: 0 };
            (out, params)
        };
        run(&format!("kvern_fill_{}", T::SUFFIX), Launch::new(blocks, 64), make, bits).unwrap()
    };
    let many = fill(3, 1000);
    assert_eq!(fill(1, 77), many[..77]);
    let values: Vec<f32> = many.into_iter().map(f32::from_bits).collect();
    // Rounding may reach the upper bound.
    assert!(values.iter().all(|value| (-0.5..=0.5).contains(value)));
    // Of 1000 uniform values in this range the mean is off by 0.5 / sqrt(3 x 1000) in one standard deviation; four are allowed.
    assert!(values.iter().sum::<f32>().abs() / 1000.0 < 0.037);
    let mut distinct: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
    distinct.sort_unstable();
    distinct.dedup();
    // bf16 has some 2,000 numbers in the range, most of them close to zero.
    assert!(distinct.len() > if T::SUFFIX == "bf16" { 300 } else { 800 }, "{} distinct values", distinct.len());
}

#[test]
fn random_weights_depend_on_seed_and_index_alone() {
    check_fill::<f32>();
    check_fill::<bf16>();
    check_fill::<f16>();
}
