//! Rotary position embeddings, tabulated.

use std::num::NonZeroUsize;

use kvern_cuda_abi::Ptr;

use crate::buffer::Buffer;
use crate::cuda::driver::Element;
use crate::cuda::memory::DeviceMemory;
use crate::cuda::weights::upload;
use crate::device::Backend;
use crate::{Device, KernelError, Result};

/// cos and sin of every position, `[positions, rotary_dim / 2]`, F32.
pub struct RopeTable {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    /// The same on a GPU.
    device: Option<[DeviceMemory; 2]>,
    positions: usize,
    half: usize,
}

impl RopeTable {
    /// `inv_freq[i]` in radians per position, `rotary_dim = 2 * inv_freq.len()`; cos and sin are multiplied by `scale`
    /// (1 except for yarn and longrope). Angles are computed as transformers does: the f32 product of position and
    /// frequency.
    pub fn new(device: &Device, inv_freq: &[f32], scale: f32, positions: usize) -> Result<RopeTable> {
        let half = inv_freq.len();
        let elements = positions
            .checked_mul(half)
            .ok_or_else(|| KernelError::shape("rope table", "a size in range", format!("{positions} x {half}")))?;
        let (mut cos, mut sin) = (Buffer::zeros(elements)?, Buffer::zeros(elements)?);
        // Nobody reads what is only counted.
        let counts_only = matches!(&device.backend, Backend::Cuda(gpu) if gpu.driver.counts_only());
        if half > 0 && !counts_only {
            let rows = positions.div_ceil(threads_for(elements));
            let chunks = cos.chunks_mut(rows.max(1) * half).zip(sin.chunks_mut(rows.max(1) * half)).enumerate();
            std::thread::scope(|scope| {
                for (at, (cos, sin)) in chunks {
                    scope.spawn(move || fill(inv_freq, scale, at * rows, cos, sin));
                }
            });
        }
        let Backend::Cuda(gpu) = &device.backend else {
            return Ok(RopeTable { cos, sin, device: None, positions, half });
        };
        let upload = |values: &Buffer<f32>| upload(gpu, "the rope table", values, Element::F32);
        let device = Some([upload(&cos)?, upload(&sin)?]);
        Ok(RopeTable { cos: Buffer::zeros(0)?, sin: Buffer::zeros(0)?, device, positions, half })
    }

    /// Where cos and sin are on a GPU.
    pub(crate) fn on_device(&self) -> Result<(Ptr, Ptr)> {
        match &self.device {
            Some([cos, sin]) => Ok((cos.ptr(), sin.ptr())),
            None => Err(KernelError::shape("rope_and_store", "a rope table on the GPU", "one on the host")),
        }
    }

    /// Bytes held on a GPU.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.device.as_ref().map_or(0, |tables| tables.iter().map(DeviceMemory::bytes).sum())
    }

    /// Positions tabulated.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Values of a head that turn.
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// cos and sin at `position`, `[rotary_dim / 2]` each.
    pub(crate) fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Threads that fill a table of so many values: a million sines take some 30 ms of one.
fn threads_for(elements: usize) -> usize {
    const ELEMENTS_MIN: usize = 1 << 18;
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (elements / ELEMENTS_MIN).clamp(1, cores)
}

/// cos and sin of the positions from `first` on.
fn fill(inv_freq: &[f32], scale: f32, first: usize, cos: &mut [f32], sin: &mut [f32]) {
    let half = inv_freq.len();
    for (at, (cos, sin)) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).enumerate() {
        for (i, &frequency) in inv_freq.iter().enumerate() {
            // Rounded once from f64, so that the table does not depend on the system's f32 functions.
            let (s, c) = f64::from((first + at) as f32 * frequency).sin_cos();
            (cos[i], sin[i]) = (c as f32 * scale, s as f32 * scale);
        }
    }
}
