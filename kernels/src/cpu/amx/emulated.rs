//! Tile registers in plain Rust, as Intel's manual describes them, so that tests run the kernels of the AMX level anywhere.

use std::sync::Arc;

use super::super::CpuDevice;
use super::super::simd::best_isa;
use super::{TILE_ROW_BYTES, TILE_ROWS, TileShapes, TileUnit, TileUnits, Tiles};
use crate::device::Backend;
use crate::{CpuIsa, CpuOptions, Device};

pub(in crate::cpu) type Emulated = Faulty<NO_FAULT>;

/// Faults that a unit may have in products of bf16.
pub(in crate::cpu) const NO_FAULT: u8 = 0;
/// Products are rounded before they are added.
pub(in crate::cpu) const ROUNDS_TWICE: u8 = 1;
/// Subnormal numbers are not taken as zero.
pub(in crate::cpu) const KEEPS_SUBNORMALS: u8 = 2;
/// Even and odd elements are added up together.
pub(in crate::cpu) const ONE_CHAIN: u8 = 3;

pub(in crate::cpu) struct Faulty<const FAULT: u8> {
    shapes: TileShapes,
    registers: [[[u8; TILE_ROW_BYTES]; TILE_ROWS]; 8],
}

impl<const FAULT: u8> Faulty<FAULT> {
    /// Rows of `A`, steps of `k` (rows of `B`) and results per row of a product; what the processor would refuse is a panic.
    fn product_shape(&self, c: usize, a: usize, b: usize) -> (usize, usize, usize) {
        let [c, a, b] = [c, a, b].map(|register| self.shapes.0[register]);
        assert_eq!((c.0, c.1, a.1 / 4), (a.0, b.1, b.0), "shapes of a product");
        (usize::from(a.0), usize::from(b.0), usize::from(c.1) / 4)
    }

    fn word(&self, register: usize, row: usize, at: usize) -> [u8; 4] {
        self.registers[register][row][4 * at..][..4].try_into().expect("four bytes")
    }
}

impl<const FAULT: u8> Tiles for Faulty<FAULT> {
    fn configure(shapes: &TileShapes) -> Self {
        Faulty { shapes: *shapes, registers: [[[0; TILE_ROW_BYTES]; TILE_ROWS]; 8] }
    }

    fn zero<const T: usize>(&mut self) {
        self.registers[T] = [[0; TILE_ROW_BYTES]; TILE_ROWS];
    }

    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        self.zero::<T>();
        let (rows, bytes) = self.shapes.0[T];
        for (row, to) in self.registers[T].iter_mut().take(usize::from(rows)).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { from.add(row * stride).copy_to_nonoverlapping(to.as_mut_ptr(), usize::from(bytes)) };
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        let (rows, bytes) = self.shapes.0[T];
        for (row, from) in self.registers[T].iter().take(usize::from(rows)).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(row * stride).copy_from_nonoverlapping(from.as_ptr(), usize::from(bytes)) };
        }
    }

    fn dot_i8<const C: usize, const A: usize, const B: usize>(&mut self) {
        let (rows, steps, results) = self.product_shape(C, A, B);
        for row in 0..rows {
            for result in 0..results {
                let sum = (0..steps).fold(i32::from_le_bytes(self.word(C, row, result)), |sum, step| {
                    let pairs = self.word(A, row, step).into_iter().zip(self.word(B, step, result));
                    pairs.fold(sum, |sum, (a, b)| {
                        sum.wrapping_add(i32::from(a.cast_signed()) * i32::from(b.cast_signed()))
                    })
                });
                self.registers[C][row][4 * result..][..4].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }

    fn dot_bf16<const C: usize, const A: usize, const B: usize>(&mut self) {
        let (rows, steps, results) = self.product_shape(C, A, B);
        for row in 0..rows {
            for result in 0..results {
                let mut sums = [0.0f32; 2];
                for step in 0..steps {
                    let (a, b) = (self.word(A, row, step), self.word(B, step, result));
                    for odd in 0..2 {
                        let value = |word: [u8; 4]| f32::from_le_bytes([0, 0, word[2 * odd], word[2 * odd + 1]]);
                        let sum = &mut sums[if FAULT == ONE_CHAIN { 0 } else { odd }];
                        *sum = match FAULT {
                            ROUNDS_TWICE => flushed(flushed(flushed(value(a)) * flushed(value(b))) + *sum),
                            KEEPS_SUBNORMALS => value(a).mul_add(value(b), *sum),
                            _ => flushed(flushed(value(a)).mul_add(flushed(value(b)), *sum)),
                        };
                    }
                }
                let c = f32::from_le_bytes(self.word(C, row, result));
                let sum = flushed(flushed(c) + flushed(sums[0] + sums[1]));
                self.registers[C][row][4 * result..][..4].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }
}

/// Zero in place of a subnormal.
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0.0f32.copysign(value) } else { value }
}

/// Devices with these registers beside the vectors of each level that the machine has.
pub(in crate::cpu) fn devices() -> Vec<Device> {
    let levels = [(CpuIsa::Scalar, true), (CpuIsa::Avx2, true), (CpuIsa::Avx512, true), (CpuIsa::Avx512, false)];
    let device = |(level, bf16)| {
        let mut cpu =
            CpuDevice::new(CpuOptions { threads: Some(2), isa: Some(level) }, bf16).expect("a level of this machine");
        cpu.tiles = TileUnits::of(TileUnit::Emulated, cpu.isa);
        assert_eq!(cpu.tiles.bf16, TileUnit::Emulated, "the emulation passes the probe");
        Device { backend: Backend::Cpu(Arc::new(cpu)) }
    };
    levels.into_iter().filter(|&(level, _)| level <= best_isa()).map(device).collect()
}
