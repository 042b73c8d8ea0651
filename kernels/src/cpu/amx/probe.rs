//! Whether tile registers add products of bf16 up as [`blocked`](super::super::blocked) does.
//!
//! Intel's manual gives the order of the sums. That each step is rounded once, and what becomes of subnormal numbers, can be
//! seen in results alone: a device compares some of them before it relies on them.

use std::marker::PhantomData;

use super::super::blocked::{BLOCK, add_block, finish};
use super::super::pair::Pair;
use super::super::simd::{Isa, Kernel, LANES, Simd, dispatch};
use super::{A0, B0, C0, TILE_ROW_BYTES, TILE_ROWS, TileShapes, Tiles};

/// Cells of a product: a whole block and a part of one.
const CELLS: usize = BLOCK + 5;
/// Products of each kind of values.
const ROUNDS: usize = 8;

/// What the factors of a product are like.
#[derive(Clone, Copy)]
enum Values {
    Ordinary,
    /// Products and sums on both sides of the smallest normal number.
    Tiny,
    /// Products beyond the largest number, whose sums are within.
    Huge,
    /// Some factors are subnormal.
    Subnormal,
}

/// Compares products of the registers with those of vectors at this level, bit for bit.
pub(super) fn agrees<T: Tiles>(isa: Isa) -> bool {
    let mut agrees = true;
    dispatch(isa, Probe::<T> { agrees: &mut agrees, registers: PhantomData });
    agrees
}

struct Probe<'a, T> {
    agrees: &'a mut bool,
    registers: PhantomData<T>,
}

impl<T: Tiles> Kernel for Probe<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut random = Random(1);
        for values in [Values::Ordinary, Values::Tiny, Values::Huge, Values::Subnormal] {
            for round in 0..ROUNDS {
                let rows = if round % 2 == 0 { TILE_ROWS } else { 1 + round };
                let product = Product::random(&mut random, values);
                *self.agrees &= product.by_tiles::<T>(rows)[..rows]
                    .iter()
                    .zip(&product.by_vectors(s))
                    .all(|(tiles, vectors)| same(s, tiles, vectors));
            }
        }
    }
}

/// Whether the finished sums have the same bits, or are both NaN.
#[inline(always)]
fn same<S: Simd>(s: S, tiles: &[f32; LANES], vectors: &[f32; LANES]) -> bool {
    let (mut found, mut expected) = ([0.0f32; LANES], [0.0f32; LANES]);
    s.store(&mut found, finish(s, s.load(tiles)));
    s.store(&mut expected, finish(s, s.load(vectors)));
    found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

/// `a` times `b`, as the registers take them.
struct Product {
    a: [[Pair; CELLS]; TILE_ROWS],
    b: [[Pair; LANES]; CELLS],
}

type Results = [[f32; LANES]; TILE_ROWS];

impl Product {
    fn random(random: &mut Random, values: Values) -> Self {
        let mut product = Product { a: [[Pair::default(); CELLS]; TILE_ROWS], b: [[Pair::default(); LANES]; CELLS] };
        for row in &mut product.a {
            for (cell, to) in row.iter_mut().enumerate() {
                *to = random.pair(values, cell, false);
            }
        }
        for (cell, row) in product.b.iter_mut().enumerate() {
            for to in row {
                *to = random.pair(values, cell, true);
            }
        }
        product
    }

    /// The first `rows` rows of results.
    fn by_tiles<T: Tiles>(&self, rows: usize) -> Results {
        let mut results = [[0.0f32; LANES]; TILE_ROWS];
        for first in (0..CELLS).step_by(BLOCK) {
            let cells = BLOCK.min(CELLS - first);
            let mut registers = T::configure(&TileShapes::product(rows, cells * size_of::<Pair>()));
            // SAFETY: `rows` rows of `a` have `cells` cells from `first` on, and so many rows of `b` have 16 lanes; results
            // are at least `rows` rows of 16.
            unsafe {
                registers.load::<C0>(results.as_ptr().cast(), TILE_ROW_BYTES);
                registers.load::<A0>(self.a[0][first..].as_ptr().cast(), CELLS * size_of::<Pair>());
                registers.load::<B0>(self.b[first..].as_ptr().cast(), TILE_ROW_BYTES);
                registers.dot_bf16::<C0, A0, B0>();
                registers.store::<C0>(results.as_mut_ptr().cast(), TILE_ROW_BYTES);
            }
        }
        results
    }

    #[inline(always)]
    fn by_vectors<S: Simd>(&self, s: S) -> Results {
        let mut results = [[0.0f32; LANES]; TILE_ROWS];
        for (row, to) in self.a.iter().zip(&mut results) {
            let mut sums = [[s.splat(0.0)]];
            for (cells, lanes) in row.chunks(BLOCK).zip(self.b.chunks(BLOCK)) {
                add_block::<S, 1, 1>(s, [cells], [lanes.as_flattened()], LANES, &mut sums);
            }
            s.store(to, sums[0][0]);
        }
        results
    }
}

/// Numerical Recipes' generator; its high bits are good enough.
struct Random(u32);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    /// A number of magnitude `2^exponent` up to twice that.
    fn around(&mut self, exponent: i32) -> f32 {
        let sign = if self.bits() & 1 == 0 { 1.0 } else { -1.0 };
        sign * (1.0 + (self.bits() & 127) as f32 / 128.0) * 2.0f32.powi(exponent)
    }

    fn pair(&mut self, values: Values, cell: usize, of_b: bool) -> Pair {
        let mut value = || match values {
            Values::Ordinary => {
                let exponent = self.bits() as i32 % 16 - 8;
                self.around(exponent)
            }
            Values::Tiny => {
                let exponent = self.bits() as i32 % 5 - 65;
                self.around(exponent)
            }
            // The first products are negative, the second ones positive, and both may be beyond.
            Values::Huge if cell < 2 => {
                self.around(63 + i32::from(of_b)).abs() * if of_b || cell == 1 { 1.0 } else { -1.0 }
            }
            Values::Huge => self.around(0),
            Values::Subnormal if of_b => self.around(100),
            Values::Subnormal => {
                let bits = self.bits();
                // Of bf16 the lowest 7 bits are the mantissa of a subnormal number.
                if bits & 1 == 0 { f32::from_bits((bits & 127) << 16) } else { self.around(-100) }
            }
        };
        let even = value();
        Pair::new(even, value())
    }
}

#[cfg(test)]
mod tests {
    use super::super::emulated::{Emulated, Faulty, KEEPS_SUBNORMALS, ONE_CHAIN, ROUNDS_TWICE};
    use super::*;
    use crate::CpuIsa;
    use crate::cpu::simd::best_isa;

    /// The emulation agrees with the vectors of every level; a unit that differs in anything that the order says does not.
    #[test]
    fn differences_are_found() {
        for level in [CpuIsa::Scalar, CpuIsa::Avx2, CpuIsa::Avx512].into_iter().filter(|&level| level <= best_isa()) {
            for bf16 in [false, true] {
                let isa = Isa::new(level, bf16);
                assert!(agrees::<Emulated>(isa), "{level:?}");
                assert!(!agrees::<Faulty<ROUNDS_TWICE>>(isa), "{level:?}: products rounded before they are added");
                assert!(!agrees::<Faulty<KEEPS_SUBNORMALS>>(isa), "{level:?}: subnormal numbers kept");
                assert!(!agrees::<Faulty<ONE_CHAIN>>(isa), "{level:?}: one chain over all elements");
            }
        }
    }
}
