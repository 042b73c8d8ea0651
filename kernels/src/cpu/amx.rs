//! Tile registers: the matrix unit of Intel AMX, and a plain-Rust emulation of it for tests.
//!
//! Eight registers, `tmm0` to `tmm7`, hold up to 16 rows of 64 bytes. A product reads `A`, rows of activations, and `B`, four
//! bytes (or two bf16) of each of 16 out features per row, and adds to `C`, 16 rows of 16 results:
//!
//! ```text
//! A [rows][k]          i8, or bf16
//! B [k / 4][16][4]     i8; for bf16 [k / 2][16][2]
//! C [rows][16]         i32, exact; for bf16 f32, see `dot_bf16`
//! ```
//!
//! `B` is the layout of panels and of K and V pages as they are. Products of bytes are exact, so that each call chooses
//! between registers and vectors by speed; those of bf16 are rounded, and a device either has their order or not
//! ([`TileUnits`]). Encodings are those of Intel's manual (volume 2, AMX).

#[cfg(test)]
pub(super) mod emulated;
#[cfg(target_arch = "x86_64")]
pub(crate) mod hardware;
mod probe;

use super::simd::Isa;

/// Rows of a tile register.
pub(super) const TILE_ROWS: usize = 16;
/// Bytes of a row of a tile register.
pub(super) const TILE_ROW_BYTES: usize = 64;

/// Registers of products: results, rows of activations, weights.
pub(super) const C0: usize = 0;
pub(super) const C1: usize = 1;
pub(super) const C2: usize = 2;
pub(super) const C3: usize = 3;
pub(super) const A0: usize = 4;
pub(super) const A1: usize = 5;
pub(super) const B0: usize = 6;
pub(super) const B1: usize = 7;

/// The shape of each register: rows, bytes per row.
#[derive(Clone, Copy)]
pub(super) struct TileShapes(pub(super) [(u8, u8); 8]);

impl TileShapes {
    /// For products over `k_bytes` (at most 64) of `rows` (at most 16) rows: registers 0 to 3 are results, 4 and 5 `A`, 6 and
    /// 7 `B`.
    pub(super) const fn product(rows: usize, k_bytes: usize) -> Self {
        Self::products([rows; 4], [(rows, k_bytes); 2])
    }

    /// With a number of rows of its own for each register of results, and rows and bytes of the sum for `A0` and `A1`. `B0`
    /// is read with `A0`'s bytes, `B1` with those of `A1`.
    pub(super) const fn products(c: [usize; 4], a: [(usize, usize); 2]) -> Self {
        const fn shape(rows: usize, bytes: usize) -> (u8, u8) {
            assert!(0 < rows && rows <= TILE_ROWS, "rows of a register");
            assert!(0 < bytes && bytes <= TILE_ROW_BYTES && bytes.is_multiple_of(4), "whole words of a register's row");
            (rows as u8, bytes as u8)
        }
        TileShapes([
            shape(c[0], TILE_ROW_BYTES),
            shape(c[1], TILE_ROW_BYTES),
            shape(c[2], TILE_ROW_BYTES),
            shape(c[3], TILE_ROW_BYTES),
            shape(a[0].0, a[0].1),
            shape(a[1].0, a[1].1),
            shape(a[0].1 / 4, TILE_ROW_BYTES),
            shape(a[1].1 / 4, TILE_ROW_BYTES),
        ])
    }
}

/// A thread's tile registers, configured: they are released when it is dropped.
pub(super) trait Tiles: Sized {
    /// Shapes the registers and zeros them.
    fn configure(shapes: &TileShapes) -> Self;

    /// `T = 0`.
    fn zero<const T: usize>(&mut self);

    /// Reads the rows of `T`, `stride` bytes apart.
    ///
    /// # Safety
    /// Each row's bytes, as configured, are readable.
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);

    /// Writes the rows of `T`, `stride` bytes apart.
    ///
    /// # Safety
    /// Each row's bytes, as configured, are writable, and nobody else uses them.
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);

    /// `C += A x B` over signed bytes, exact in i32.
    fn dot_i8<const C: usize, const A: usize, const B: usize>(&mut self);

    /// `C += A x B` over bf16, in f32 with subnormals flushed: per result, products of even elements and products of odd ones
    /// are each added up in the order of `B`'s rows, from zero; then the two are added, and the sum is added to `C`.
    fn dot_bf16<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// The tile registers of a device's products, chosen when it is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileUnits {
    /// For quantized weights: vectors give the same bits.
    pub(super) int8: TileUnit,
    /// For bf16. With any, bf16 products of all numbers of rows have the order of [`blocked`](super::blocked), else that of
    /// `vdpbf16ps`.
    pub(super) bf16: TileUnit,
}

impl TileUnits {
    /// What a unit can do whose device runs at this level.
    pub(super) fn of(unit: TileUnit, isa: Isa) -> Self {
        let agrees = match unit {
            TileUnit::None => false,
            #[cfg(target_arch = "x86_64")]
            TileUnit::Hardware => probe::agrees::<hardware::Hardware>(isa),
            #[cfg(test)]
            TileUnit::Emulated => probe::agrees::<emulated::Emulated>(isa),
        };
        Self::proven(unit, agrees)
    }

    /// A unit whose products of bf16 have, or do not have, the bits of vectors.
    pub(super) fn proven(unit: TileUnit, agrees: bool) -> Self {
        TileUnits { int8: unit, bf16: if agrees { unit } else { TileUnit::None } }
    }
}

/// Which tile registers products use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TileUnit {
    None,
    #[cfg(target_arch = "x86_64")]
    Hardware,
    #[cfg(test)]
    Emulated,
}

/// Evaluates `$body` with the registers of `$unit`, in these shapes, as `$registers`; without any, `$none`.
macro_rules! with_tiles {
    ($unit:expr, $shapes:expr, |$registers:ident| $body:expr, $none:expr) => {{
        use $crate::cpu::amx::{self, Tiles as _};
        match $unit {
            amx::TileUnit::None => $none,
            #[cfg(target_arch = "x86_64")]
            amx::TileUnit::Hardware => {
                let $registers = amx::hardware::Hardware::configure($shapes);
                $body
            }
            #[cfg(test)]
            amx::TileUnit::Emulated => {
                let $registers = amx::emulated::Emulated::configure($shapes);
                $body
            }
        }
    }};
}
pub(super) use with_tiles;
