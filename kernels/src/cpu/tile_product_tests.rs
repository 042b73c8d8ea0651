//! Products by tile registers, emulated, against the specification: what the AMX level computes, on machines without it.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use half::bf16;

use crate::cpu::CpuDevice;
use crate::cpu::amx::emulated::devices;
use crate::cpu::amx::{TileUnit, TileUnits};
use crate::device::Backend;
use crate::reference::Products;
use crate::{CpuIsa, CpuOptions, Device, Format, MatrixView, Precision, RowOrder, Tensor, Weight, ops, reference};

const FORMATS: [Format; 10] = [
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q8_0,
    Format::Q2_K,
    Format::Q3_K,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
];

/// Bytes that are finite weights in every format: no f16 among them has all bits of its exponent set.
fn bytes(format: Format, elements: usize) -> Vec<u8> {
    let count = elements / format.block_elements() * format.block_bytes();
    let mut state = 1u32;
    (0..count)
        .map(|_| {
            // Numerical Recipes' generator; its high bits are good enough.
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8 & 0xbb
        })
        .collect()
}

/// More records than are open at once, rows in whole and in broken tiles, out features in a broken panel.
#[test]
fn tiles_give_the_bits_of_the_specification() {
    let device = devices().remove(0);
    for format in FORMATS {
        for [rows, cols, out_cols] in [[5, 256, 16], [16, 512, 20], [37, 1280, 33]] {
            let stored = bytes(format, cols * out_cols);
            let view =
                MatrixView { name: "test", format, rows: out_cols, cols, bytes: &stored, row_order: RowOrder::Natural };
            let weight = Weight::pack(&device, &[view], Precision::AsStored).unwrap();
            let x: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 16.0).collect();
            let bias: Vec<f32> = (0..out_cols).map(|i| i as f32).collect();
            let tensor = |cols, values: &[f32]| Tensor::from_f32(&device, cols, values).unwrap();
            let mut out = tensor(out_cols, &vec![f32::NAN; rows * out_cols]);
            ops::matmul(&device, &tensor(cols, &x), &weight, Some(&tensor(out_cols, &bias)), &mut out).unwrap();
            for (i, &found) in out.host().iter().enumerate() {
                let (row, col) = (i / out_cols, i % out_cols);
                let stored = &stored[col * stored.len() / out_cols..][..stored.len() / out_cols];
                let expected = reference::dot_quantized(&x[row * cols..][..cols], format, stored) + bias[col];
                assert_eq!(found.to_bits(), expected.to_bits(), "{format:?} {rows} x {cols}: row {row}, feature {col}");
            }
        }
    }
}

/// Rows for vectors, in whole and in broken tiles; in features in whole blocks and not, odd ones too; out features in an odd
/// number of panels and in a broken one. A row has the same bits whatever the number of rows, as its reference has.
#[test]
fn bf16_tiles_give_the_bits_of_the_specification() {
    let shapes = [[576, 83], [1536, 20], [1, 16], [7, 1], [33, 50], [577, 18], [64, 32]];
    for device in devices() {
        for [cols, out_cols] in shapes {
            // High exponents and low ones, of either sign; no more than that, as subnormal numbers are the vectors' affair.
            let value = |i: usize| ((i * 7919 % 2003) as f32 - 1001.0) * 2.0f32.powi((i % 23) as i32 - 15);
            let values: Vec<f32> = (0..cols * out_cols).map(|i| bf16::from_f32(value(3 * i)).to_f32()).collect();
            let stored: Vec<u8> = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
            let format = Format::BF16;
            let view =
                MatrixView { name: "test", format, rows: out_cols, cols, bytes: &stored, row_order: RowOrder::Natural };
            let weight = Weight::pack(&device, &[view], Precision::AsStored).unwrap();
            let tensor = |cols, values: &[f32]| Tensor::from_f32(&device, cols, values).unwrap();
            let (x, bias): (Vec<f32>, Vec<f32>) =
                ((0..70 * cols).map(value).collect(), (0..out_cols).map(value).collect());
            let expected: Vec<f32> = x
                .chunks(cols)
                .flat_map(|x| values.chunks(cols).map(|w| reference::dot_bf16_tiles(x, w, 32)))
                .zip(bias.iter().cycle())
                .map(|(dot, bias)| dot + bias)
                .collect();
            for rows in [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 70] {
                let mut out = tensor(out_cols, &vec![f32::NAN; rows * out_cols]);
                let x = tensor(cols, &x[..rows * cols]);
                ops::matmul(&device, &x, &weight, Some(&tensor(out_cols, &bias)), &mut out).unwrap();
                for (i, (found, expected)) in out.host().iter().zip(&expected).enumerate() {
                    let (row, col) = (i / out_cols, i % out_cols);
                    let what = format!("{} {rows} x {cols}: row {row}, feature {col}", device.describe());
                    assert_eq!(found.to_bits(), expected.to_bits(), "{what}: {found}, expected {expected}");
                }
            }
        }
    }
}

/// The sum of two blocks is a negative subnormal number, which counts as zero: a zero of tile registers would be negative.
#[test]
fn no_result_is_minus_zero() {
    let (cols, smallest) = (64, f32::MIN_POSITIVE.sqrt());
    let mut x = vec![0.0; cols];
    (x[3], x[40]) = (-1.5 * smallest, smallest);
    let stored: Vec<u8> = (0..cols).flat_map(|_| bf16::from_f32(smallest).to_le_bytes()).collect();
    let view =
        MatrixView { name: "test", format: Format::BF16, rows: 1, cols, bytes: &stored, row_order: RowOrder::Natural };
    for device in devices() {
        let weight = Weight::pack(&device, &[view], Precision::AsStored).unwrap();
        for rows in [1, 20] {
            let mut out = Tensor::from_f32(&device, 1, &vec![f32::NAN; rows]).unwrap();
            ops::matmul(&device, &Tensor::from_f32(&device, cols, &x.repeat(rows)).unwrap(), &weight, None, &mut out)
                .unwrap();
            assert!(out.host().iter().all(|value| value.to_bits() == 0), "{}: {:?}", device.describe(), out.host());
        }
    }
}

/// A device whose tile registers fail the comparison multiplies bf16 as one without them, whatever the number of rows, and
/// says so.
#[test]
fn registers_that_differ_are_not_used() {
    let options = CpuOptions { threads: Some(1), isa: Some(CpuIsa::Scalar) };
    let mut cpu = CpuDevice::new(options, true).unwrap();
    cpu.tiles = TileUnits::proven(TileUnit::Emulated, false);
    assert_eq!((cpu.tiles.int8, cpu.tiles.bf16), (TileUnit::Emulated, TileUnit::None));
    let device = Device { backend: Backend::Cpu(Arc::new(cpu)) };
    assert_eq!(device.bf16_products(), Some(Products::Bf16Pairs));
    let cols = 100;
    let value = |i: usize| (i * 37 % 101) as f32 / 64.0 - 0.8;
    let stored: Vec<u8> = (0..cols).flat_map(|i| bf16::from_f32(value(3 * i)).to_le_bytes()).collect();
    let weights: Vec<f32> = (0..cols).map(|i| bf16::from_f32(value(3 * i)).to_f32()).collect();
    let view =
        MatrixView { name: "test", format: Format::BF16, rows: 1, cols, bytes: &stored, row_order: RowOrder::Natural };
    let weight = Weight::pack(&device, &[view], Precision::AsStored).unwrap();
    let x: Vec<f32> = (0..20 * cols).map(value).collect();
    for rows in [1, 20] {
        let mut out = Tensor::from_f32(&device, 1, &vec![f32::NAN; rows]).unwrap();
        ops::matmul(&device, &Tensor::from_f32(&device, cols, &x[..rows * cols]).unwrap(), &weight, None, &mut out)
            .unwrap();
        let expected: Vec<f32> = x.chunks(cols).take(rows).map(|x| reference::dot_bf16(x, &weights)).collect();
        assert_eq!(out.host(), expected);
    }

    let mut cpu = CpuDevice::new(options, true).unwrap();
    cpu.isa.level = CpuIsa::Amx;
    assert_eq!(cpu.describe(), "cpu (amx without bf16 tiles, 1 thread)");
    cpu.tiles = TileUnits::proven(TileUnit::Emulated, true);
    assert_eq!(cpu.describe(), "cpu (amx, 1 thread)");
}
