//! The unit itself.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

use super::{A0, A1, B0, B1, C0, C1, C2, C3, TILE_ROW_BYTES, TILE_ROWS, TileShapes, Tiles};

/// Whether this machine has AMX with int8 and bf16, and the system lets this process use it. Asks the system for the
/// permission, which holds for all threads from then on.
pub(crate) fn available() -> bool {
    has_amx() && request_permission()
}

/// CPUID leaf 7: AMX-BF16, AMX-TILE and AMX-INT8 are bits 22, 24 and 25 of EDX.
fn has_amx() -> bool {
    const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED
}

#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    /// `arch_prctl`'s request for a part of the extended state that is not given to all (Linux 5.16 and later).
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    /// The state that holds the tile registers.
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// The registers of this thread.
///
/// Only a device whose level is AMX makes one, and it has asked [`available`]; this is what makes the safe methods safe.
pub(in crate::cpu) struct Hardware(());

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

// Tile registers are named by numbers in the text of the instructions; nothing but these blocks uses them, so that none is
// declared as changed.
impl Tiles for Hardware {
    #[inline(always)]
    fn configure(shapes: &TileShapes) -> Self {
        let mut configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (register, &(rows, row_bytes)) in shapes.0.iter().enumerate() {
            configuration.rows[register] = rows;
            configuration.row_bytes[register] = u16::from(row_bytes);
        }
        // SAFETY: the machine has AMX and the process may use it; the operand is a valid configuration of palette 1, as
        // `TileShapes` keeps rows and bytes within it.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly, preserves_flags))
        };
        Hardware(())
    }

    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        // SAFETY: the registers are configured.
        unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem, preserves_flags)) };
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the registers are configured; the caller's promise.
        unsafe {
            asm!("tileloadd tmm{t}, [{from} + {stride}]", t = const T, from = in(reg) from, stride = in(reg) stride,
                options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the registers are configured; the caller's promise.
        unsafe {
            asm!("tilestored [{to} + {stride}], tmm{t}", t = const T, to = in(reg) to, stride = in(reg) stride,
                options(nostack, preserves_flags));
        }
    }

    #[inline(always)]
    fn dot_i8<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the registers are configured.
        unsafe {
            asm!("tdpbssd tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, nomem, preserves_flags));
        }
    }

    #[inline(always)]
    fn dot_bf16<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the registers are configured.
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, nomem, preserves_flags));
        }
    }
}

impl Drop for Hardware {
    /// Tile registers in use make every switch between threads save 8 KiB more.
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: releasing the registers is always allowed where they may be used.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Products of whole registers in one turn of [`products`].
pub(crate) const PRODUCTS_PER_TURN: usize = 4;

/// Products of whole registers, over bf16 or i8, that do not wait for each other: what the unit can do at most.
///
/// # Safety
/// [`available`] said that the process may use the registers.
pub(crate) unsafe fn products<const BF16: bool>(turns: usize) {
    let mut registers = Hardware::configure(&TileShapes::product(TILE_ROWS, TILE_ROW_BYTES));
    for _ in 0..turns {
        if BF16 {
            registers.dot_bf16::<C0, A0, B0>();
            registers.dot_bf16::<C1, A0, B1>();
            registers.dot_bf16::<C2, A1, B0>();
            registers.dot_bf16::<C3, A1, B1>();
        } else {
            registers.dot_i8::<C0, A0, B0>();
            registers.dot_i8::<C1, A0, B1>();
            registers.dot_i8::<C2, A1, B0>();
            registers.dot_i8::<C3, A1, B1>();
        }
    }
}
