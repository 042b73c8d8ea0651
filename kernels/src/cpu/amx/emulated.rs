//! Tile registers in plain Rust, as Intel's manual describes them, so that tests run the kernels of the AMX level anywhere.

use super::{TILE_ROW_BYTES, TILE_ROWS, TileShapes, Tiles};

pub(in crate::cpu) struct Emulated {
    shapes: TileShapes,
    registers: [[[u8; TILE_ROW_BYTES]; TILE_ROWS]; 8],
}

impl Emulated {
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

impl Tiles for Emulated {
    fn configure(shapes: &TileShapes) -> Self {
        Emulated { shapes: *shapes, registers: [[[0; TILE_ROW_BYTES]; TILE_ROWS]; 8] }
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
                    for (odd, sum) in sums.iter_mut().enumerate() {
                        let value = |word: [u8; 4]| f32::from_le_bytes([0, 0, word[2 * odd], word[2 * odd + 1]]);
                        *sum = flushed(flushed(value(a)).mul_add(flushed(value(b)), *sum));
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
