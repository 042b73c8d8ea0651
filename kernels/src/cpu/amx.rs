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
//! `B` is the layout of panels and of K and V pages as they are. Encodings are those of Intel's manual (volume 2, AMX).

#[cfg(test)]
pub(super) mod emulated;
#[cfg(target_arch = "x86_64")]
pub(crate) mod hardware;

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
        assert!(0 < rows && rows <= TILE_ROWS, "rows of a register");
        assert!(
            0 < k_bytes && k_bytes <= TILE_ROW_BYTES && k_bytes.is_multiple_of(4),
            "whole words of a register's row"
        );
        let c = (rows as u8, TILE_ROW_BYTES as u8);
        let (a, b) = ((rows as u8, k_bytes as u8), ((k_bytes / 4) as u8, TILE_ROW_BYTES as u8));
        TileShapes([c, c, c, c, a, a, b, b])
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

/// Which tile registers a device's products use.
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
