//! What the machine allows: rates that bound every op of the CPU backend, measured on the device's own threads.
//!
//! A figure of a benchmark is worth little without the limit beside it, taken in the same run: clocks, neighbours and
//! memory differ from hour to hour. Nothing here serves an op; `kvern bench --limits` reports it.
//!
//! ```text
//! limits.rs          the limits, and one timed round of each
//! limits/routines.rs the loops, one row per limit and instruction set; a further instruction set is a further row
//! ```

mod routines;

use std::hint::black_box;
use std::time::Instant;

use crate::buffer::Buffer;
use crate::device::Backend;
use crate::{Device, KernelError, Result};
use routines::{READERS, ROUTINES, Routine};

/// Something that a machine can do only so often a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Bytes read from memory, from start to end of a buffer that no cache holds.
    Read,
    /// Operations of f32 vector products with f32 sums; a multiplication and an addition are two.
    FmaF32,
    /// Operations of u8 x i8 vector dot products with i32 sums.
    DotI8,
    /// Operations of bf16 vector dot products with f32 sums.
    DotBf16,
    /// Operations of i8 products of tile registers with i32 sums.
    TileI8,
    /// Operations of bf16 products of tile registers with f32 sums.
    TileBf16,
}

impl Limit {
    /// For tables and records: `read`, `fma f32`, `dot i8`, `dot bf16`, `tile i8`, `tile bf16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Limit::Read => "read",
            Limit::FmaF32 => "fma f32",
            Limit::DotI8 => "dot i8",
            Limit::DotBf16 => "dot bf16",
            Limit::TileI8 => "tile i8",
            Limit::TileBf16 => "tile bf16",
        }
    }

    /// What is counted per second.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Limit::Read => "bytes",
            _ => "operations",
        }
    }
}

/// Elements of the buffer that is read: 512 MiB, several times the last-level cache of most machines.
const READ_LEN: usize = 128 << 20;
/// Elements per task: 4 MiB, whole huge pages.
const READ_TASK_LEN: usize = 1 << 20;
/// Passes over the buffer in a round; a tenth of a second at 20 GB/s.
const READ_PASSES: usize = 4;
/// Calls of a routine per thread in a round; some tens of milliseconds.
const CALLS_PER_THREAD: usize = 512;

/// Measures limits on one device.
pub struct Gauge {
    device: Device,
    memory: Buffer<f32>,
}

impl Gauge {
    /// Allocates and fills 512 MiB, to be read.
    ///
    /// # Errors
    /// [`Unsupported`](KernelError::Unsupported) for a device that is not the CPU, and where the memory is refused.
    pub fn new(device: &Device) -> Result<Gauge> {
        let Backend::Cpu(_) = &device.backend else {
            return Err(KernelError::Unsupported(
                "limits are measured of a CPU only; scripts/gpu/roofline.py has those of a GPU".into(),
            ));
        };
        let mut memory = Buffer::zeros(READ_LEN)?;
        // Untouched pages are all one page, which caches hold.
        memory.fill(1.0);
        Ok(Gauge { device: device.clone(), memory })
    }

    /// The limits that this machine has.
    #[must_use]
    pub fn limits(&self) -> Vec<Limit> {
        let all = [Limit::Read, Limit::FmaF32, Limit::DotI8, Limit::DotBf16, Limit::TileI8, Limit::TileBf16];
        all.into_iter().filter(|&limit| limit == Limit::Read || routine_of(limit).is_some()).collect()
    }

    /// One round: [`Limit::unit`]s per second over all threads of the device, whatever instruction set it is held to;
    /// `None` where the machine lacks the instructions.
    #[must_use]
    pub fn round(&self, limit: Limit) -> Option<f64> {
        match limit {
            Limit::Read => Some(self.read()),
            _ => routine_of(limit).map(|routine| self.compute(routine)),
        }
    }

    fn read(&self) -> f64 {
        let tasks = READ_LEN / READ_TASK_LEN;
        let reader = READERS.iter().find(|reader| (reader.is_available)()).expect("the last one runs anywhere");
        let started = Instant::now();
        for _ in 0..READ_PASSES {
            self.device.parallel_for(tasks, &|task| {
                // SAFETY: the machine has the reader's instructions.
                black_box(unsafe { (reader.run)(&self.memory[task * READ_TASK_LEN..][..READ_TASK_LEN]) });
            });
        }
        (READ_PASSES * self.memory.bytes()) as f64 / started.elapsed().as_secs_f64()
    }

    fn compute(&self, routine: &Routine) -> f64 {
        // Short tasks: a thread that wakes up late or loses its core leaves little for the others to wait for.
        let tasks = CALLS_PER_THREAD * self.device.threads();
        let started = Instant::now();
        self.device.parallel_for(tasks, &|_| {
            // SAFETY: `routine_of` gives only routines whose instructions the machine has.
            unsafe { (routine.run)() };
        });
        tasks as f64 * routine.operations as f64 / started.elapsed().as_secs_f64()
    }
}

/// The best routine for a limit that the machine can run.
fn routine_of(limit: Limit) -> Option<&'static Routine> {
    ROUTINES.iter().find(|routine| routine.limit == limit && (routine.is_available)())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::CpuOptions;

    #[test]
    fn every_limit_that_is_listed_is_measured() {
        let device = Device::cpu(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        let gauge = Gauge::new(&device).unwrap();
        let limits = gauge.limits();
        assert_eq!(limits[..2], [Limit::Read, Limit::FmaF32]);
        for limit in limits {
            let rate = gauge.round(limit).unwrap();
            // Any machine reads and multiplies faster than a hundred million a second, and none a quadrillion times.
            assert!((1e8..1e15).contains(&rate), "{}: {rate}", limit.name());
        }
    }

    #[test]
    fn every_reader_reads_every_element() {
        let part: Vec<f32> = (0..1024).map(|i| (i % 64) as f32).collect();
        let readers: Vec<_> = READERS.iter().filter(|reader| (reader.is_available)()).collect();
        assert!(!readers.is_empty());
        for reader in readers {
            // SAFETY: the machine has the reader's instructions.
            let sum = unsafe { (reader.run)(&part) };
            // Whole numbers below 2^24 add up exactly in any order.
            assert_eq!(sum, part.iter().sum::<f32>());
        }
    }

    #[test]
    fn bytes_are_not_slower_than_floats() {
        let device = Device::cpu(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
        let gauge = Gauge::new(&device).unwrap();
        let best = |limit| (0..5).filter_map(|_| gauge.round(limit)).reduce(f64::max);
        let float = best(Limit::FmaF32).unwrap();
        assert!(best(Limit::DotI8).is_none_or(|rate| rate > float), "not above {float}");
    }
}
