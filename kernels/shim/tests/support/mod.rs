//! What the tests of kernels share: element types, data, launches in both orders of threads, comparison.
// Each test program uses a part of it.
#![allow(dead_code)]

pub(crate) mod paged;
pub(crate) mod sampling;

use half::{bf16, f16};
use kvern_cuda_abi::KernelParams;
use kvern_cuda_shim::{Buffer, Launch, launch};

/// The numbers of `kernels/cuda/kernel.h`.
pub(crate) const MISSING_BARRIER: u32 = 1;
pub(crate) const TABLE_OFF_BY_ONE: u32 = 2;
pub(crate) const WRONG_SCALE: u32 = 3;
pub(crate) const UNWRITTEN_TAIL: u32 = 4;
pub(crate) const MISSING_WAIT: u32 = 5;
pub(crate) const READ_PAST_END: u32 = 6;
pub(crate) const DIVERGED_BARRIER: u32 = 7;
pub(crate) const EARLY_RELEASE: u32 = 8;
pub(crate) const WRONG_PARITY: u32 = 9;
pub(crate) const WRONG_OFFSET: u32 = 10;
pub(crate) const MISSING_FENCE: u32 = 11;
pub(crate) const WRONG_BYTES: u32 = 12;
pub(crate) const UNFENCED_PRODUCTS: u32 = 13;
pub(crate) const EARLY_WEIGHTS: u32 = 14;

/// An element type of the kernels.
pub(crate) trait Element: Copy + PartialEq + std::fmt::Debug + 'static {
    const SUFFIX: &'static str;
    /// Largest relative error of rounding a value to the type: half of a unit in the last place.
    const EPSILON: f32;
    /// Largest error of rounding near zero, where numbers lose digits: half of the smallest one. Below f32's for bf16 and f32.
    const TINY: f32;
    fn round(value: f32) -> Self;
    fn widen(self) -> f32;
}

impl Element for f32 {
    const SUFFIX: &'static str = "f32";
    const EPSILON: f32 = 1.0 / 16_777_216.0;
    const TINY: f32 = 0.0;
    fn round(value: f32) -> f32 {
        value
    }
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const SUFFIX: &'static str = "bf16";
    const EPSILON: f32 = 1.0 / 256.0;
    const TINY: f32 = 0.0;
    fn round(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f16 {
    const SUFFIX: &'static str = "f16";
    const EPSILON: f32 = 1.0 / 2048.0;
    const TINY: f32 = 1.0 / 33_554_432.0;
    fn round(value: f32) -> f16 {
        f16::from_f32(value)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Numbers from a seed (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// Uniform in [-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn values<T: Element>(&mut self, len: usize, scale: f32) -> Vec<T> {
        (0..len).map(|_| T::round(self.unit() * scale)).collect()
    }

    /// The numbers below `len` in some order.
    pub(crate) fn shuffled(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

pub(crate) fn widen<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| value.widen()).collect()
}

/// Runs a kernel in one order of threads. `make` sets out the memory anew; what comes back of it is `read`.
fn run_once<M, P: KernelParams, R>(
    kernel: &str,
    shape: &Launch,
    make: impl Fn() -> (M, P),
    read: impl Fn(&M) -> R,
) -> Result<R, String> {
    let (memory, params) = make();
    // SAFETY: `make` gives parameters that point to the buffers of `memory`, which is alive; guards are larger than any planted
    // fault's distance.
    unsafe { launch(kernel, shape, &params) }?;
    Ok(read(&memory))
}

/// Runs a kernel in both orders of threads, the second time as one that has begun early; the results must be the same,
/// bit for bit.
pub(crate) fn run<M, P: KernelParams, R: PartialEq>(
    kernel: &str,
    shape: Launch,
    make: impl Fn() -> (M, P),
    read: impl Fn(&M) -> R,
) -> Result<R, String> {
    let forward = run_once(kernel, &shape, &make, &read)?;
    let reverse = run_once(kernel, &shape.reverse().early(), &make, &read)?;
    if forward == reverse { Ok(forward) } else { Err(format!("{kernel}: the order of threads shows")) }
}

/// Bits, so that poison equals poison.
pub(crate) fn bits<T: Element>(buffer: &Buffer<T>) -> Vec<u32> {
    buffer.values().iter().map(|value| value.widen().to_bits()).collect()
}

/// The first value that is further from the expected one than `relative` of it plus `absolute`; a NaN is further.
pub(crate) fn compare(what: &str, found: &[u32], expected: &[f32], relative: f32, absolute: f32) -> Result<(), String> {
    assert_eq!(found.len(), expected.len(), "{what}: sizes");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let found = f32::from_bits(*found);
        let within = (found - expected).abs() <= relative * expected.abs() + absolute;
        if !within {
            return Err(format!("{what}: expected {expected} at {i}, found {found}"));
        }
    }
    Ok(())
}

/// A planted fault must be noticed, by the means that are there for it.
pub(crate) fn caught(result: Result<(), String>, message: &str) {
    match result {
        Ok(()) => panic!("a planted fault was not noticed, expected {message:?}"),
        Err(found) => assert!(found.contains(message), "expected {message:?}, found {found:?}"),
    }
}

/// Runs kernels with the same parameters, one after the other, in both orders of threads.
pub(crate) fn run_all<M, P: KernelParams, R: PartialEq>(
    launches: &[(&str, Launch)],
    make: impl Fn() -> (M, P),
    read: impl Fn(&M) -> R,
) -> Result<R, String> {
    let run = |reverse: bool| {
        let (memory, params) = make();
        for &(kernel, shape) in launches {
            let shape = if reverse { shape.reverse().early() } else { shape };
            // SAFETY: as in `run_once`.
            unsafe { launch(kernel, &shape, &params) }?;
        }
        Ok(read(&memory))
    };
    let (forward, reverse): (Result<R, String>, _) = (run(false), run(true));
    let (forward, reverse) = (forward?, reverse?);
    if forward == reverse { Ok(forward) } else { Err(format!("{}: the order of threads shows", launches[0].0)) }
}
