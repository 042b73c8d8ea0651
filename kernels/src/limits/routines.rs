//! The loops behind the limits: chains of one instruction, enough of them to hide its latency, in registers only.
//!
//! The table is searched from the top, so the best instruction set of a limit comes first.

use super::Limit;
#[cfg(target_arch = "x86_64")]
use crate::cpu::amx::hardware;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::hint::black_box;

/// A loop that reads memory.
pub(super) struct Reader {
    pub(super) is_available: fn() -> bool,
    /// Sum of all elements; their number is a multiple of [`STREAMS`] vectors.
    ///
    /// # Safety
    /// As for [`Routine::run`].
    pub(super) run: unsafe fn(&[f32]) -> f32,
}

/// A loop that runs at a limit of products.
pub(super) struct Routine {
    pub(super) limit: Limit,
    pub(super) is_available: fn() -> bool,
    /// Operations of one call.
    pub(super) operations: usize,
    /// # Safety
    /// The machine has the instructions: `is_available` said so.
    pub(super) run: unsafe fn(),
}

/// Independent sums of a loop: latency times throughput of every processor so far, and they fit 16 registers.
const CHAINS: usize = 12;
/// Turns of a loop in one call.
const TURNS: usize = 4096;
/// Lanes of the portable loop.
const LANES: usize = 8;

/// Places that a reader reads at in turns; hardware prefetches several streams faster than one.
const STREAMS: usize = 4;

/// As [`ROUTINES`], for [`Limit::Read`].
pub(super) const READERS: &[Reader] = &[
    #[cfg(target_arch = "x86_64")]
    Reader { is_available: || is_x86_feature_detected!("avx512f"), run: read_avx512 },
    #[cfg(target_arch = "x86_64")]
    Reader { is_available: || is_x86_feature_detected!("avx2"), run: read_avx2 },
    Reader { is_available: || true, run: read_portable },
];

pub(super) const ROUTINES: &[Routine] = &[
    #[cfg(target_arch = "x86_64")]
    Routine {
        limit: Limit::FmaF32,
        is_available: || is_x86_feature_detected!("avx512f"),
        operations: 2 * 16 * CHAINS * TURNS,
        run: fma_avx512,
    },
    #[cfg(target_arch = "x86_64")]
    Routine {
        limit: Limit::FmaF32,
        is_available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
        operations: 2 * 8 * CHAINS * TURNS,
        run: fma_avx2,
    },
    Routine {
        limit: Limit::FmaF32,
        is_available: || true,
        operations: 2 * LANES * CHAINS * TURNS,
        run: multiply_add_portable,
    },
    #[cfg(target_arch = "x86_64")]
    Routine {
        limit: Limit::DotI8,
        is_available: || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni"),
        operations: 2 * 64 * CHAINS * TURNS,
        run: dot_i8_avx512,
    },
    #[cfg(target_arch = "x86_64")]
    Routine {
        limit: Limit::DotBf16,
        is_available: || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"),
        operations: 2 * 32 * CHAINS * TURNS,
        run: dot_bf16_avx512,
    },
    #[cfg(target_arch = "x86_64")]
    Routine {
        limit: Limit::TileI8,
        is_available: hardware::available,
        operations: 2 * 16 * 16 * 64 * hardware::PRODUCTS_PER_TURN * TURNS,
        run: tile_i8,
    },
    #[cfg(target_arch = "x86_64")]
    Routine {
        limit: Limit::TileBf16,
        is_available: hardware::available,
        operations: 2 * 16 * 16 * 32 * hardware::PRODUCTS_PER_TURN * TURNS,
        run: tile_bf16,
    },
];

fn read_portable(part: &[f32]) -> f32 {
    let mut sums = [[0.0; LANES]; STREAMS];
    let quarter = part.len() / STREAMS;
    for at in (0..quarter).step_by(LANES) {
        for (stream, sum) in sums.iter_mut().enumerate() {
            let values = &part[stream * quarter + at..][..LANES];
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
    }
    sums.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(part: &[f32]) -> f32 {
    let mut sums = [_mm256_setzero_ps(); STREAMS];
    let quarter = part.len() / STREAMS;
    for at in (0..quarter).step_by(8) {
        for (stream, sum) in sums.iter_mut().enumerate() {
            let values = &part[stream * quarter + at..][..8];
            // SAFETY: eight elements are there, as the slice just taken says.
            *sum = _mm256_add_ps(*sum, unsafe { _mm256_loadu_ps(values.as_ptr()) });
        }
    }
    let mut lanes = [[0.0; 8]; STREAMS];
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        // SAFETY: the array holds the eight elements of a vector.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    }
    lanes.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_avx512(part: &[f32]) -> f32 {
    let mut sums = [_mm512_setzero_ps(); STREAMS];
    let quarter = part.len() / STREAMS;
    for at in (0..quarter).step_by(16) {
        for (stream, sum) in sums.iter_mut().enumerate() {
            let values = &part[stream * quarter + at..][..16];
            // SAFETY: sixteen elements are there, as the slice just taken says.
            *sum = _mm512_add_ps(*sum, unsafe { _mm512_loadu_ps(values.as_ptr()) });
        }
    }
    sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
}

fn multiply_add_portable() {
    // Opaque to the compiler, and halved towards 0.5 each turn: neither folded away nor ever subnormal.
    let (factor, term) = black_box((0.5f32, 0.25f32));
    let mut sums = black_box([[0.0f32; LANES]; CHAINS]);
    for _ in 0..TURNS {
        for sum in sums.iter_mut().flatten() {
            *sum = *sum * factor + term;
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2() {
    let (factor, term) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
    let mut sums = black_box([_mm256_setzero_ps(); CHAINS]);
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, term);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512() {
    let (factor, term) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
    let mut sums = black_box([_mm512_setzero_ps(); CHAINS]);
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, term);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_i8_avx512() {
    let (codes, x) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
    let mut sums = black_box([_mm512_setzero_si512(); CHAINS]);
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, codes, x);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_bf16_avx512() {
    let pairs = |value| {
        let lanes = _mm512_set1_ps(black_box(value));
        _mm512_cvtne2ps_pbh(lanes, lanes)
    };
    let (a, b) = (pairs(0.5), pairs(1.5));
    let mut sums = black_box([_mm512_setzero_ps(); CHAINS]);
    for _ in 0..TURNS {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

/// # Safety
/// The machine has AMX and lets the process use it.
#[cfg(target_arch = "x86_64")]
unsafe fn tile_i8() {
    // SAFETY: the caller's promise.
    unsafe { hardware::products::<false>(TURNS) }
}

/// # Safety
/// As for [`tile_i8`].
#[cfg(target_arch = "x86_64")]
unsafe fn tile_bf16() {
    // SAFETY: the caller's promise.
    unsafe { hardware::products::<true>(TURNS) }
}
