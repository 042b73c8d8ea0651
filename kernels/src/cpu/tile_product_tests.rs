//! Products by tile registers, emulated, against the specification: what the AMX level computes, on machines without it.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use crate::cpu::CpuDevice;
use crate::cpu::amx::TileUnit;
use crate::device::Backend;
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

fn emulated() -> Device {
    let mut cpu = CpuDevice::new(CpuOptions { threads: Some(2), isa: Some(CpuIsa::Scalar) }).unwrap();
    cpu.tile_unit = TileUnit::Emulated;
    Device { backend: Backend::Cpu(Arc::new(cpu)) }
}

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
    let device = emulated();
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
