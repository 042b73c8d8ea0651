//! Operations: what they touch, and how they run on the host.

use std::sync::Arc;

use kvern_kernels::cuda::driver::{Gemm, LaunchShape, Layout};

use super::access::{Access, Extent, Kind, Place};
use super::fields::Launched;
use super::gemm;
use super::memory::Memory;
use crate::{Launch, launch_raw};

/// A launch that has been checked.
pub(super) struct KernelLaunch {
    pub(super) kernel: Arc<str>,
    pub(super) shape: LaunchShape,
    pub(super) params: Box<[u8]>,
    pub(super) layout: &'static Layout,
}

pub(super) enum Work {
    Launch(KernelLaunch),
    Gemm(Gemm),
    Copy { to: u64, from: u64, bytes: usize },
    Graph(Vec<Operation>),
}

/// Work, and what it touches.
pub(super) struct Operation {
    /// For messages.
    pub(super) what: Arc<str>,
    pub(super) work: Work,
    pub(super) accesses: Vec<Access>,
}

impl Operation {
    pub(super) fn launch(launch: KernelLaunch) -> Result<Operation, String> {
        let accesses = launch.launched().accesses()?;
        let early = if launch.shape.early { " early" } else { "" };
        Ok(Operation { what: format!("{}{early}", launch.kernel).into(), work: Work::Launch(launch), accesses })
    }

    pub(super) fn gemm(gemm: &Gemm) -> Result<Operation, String> {
        let Gemm { m, n, k, element, .. } = gemm;
        let what = format!("gemm {m}x{n}x{k} {element}").into();
        Ok(Operation { what, work: Work::Gemm(*gemm), accesses: gemm::accesses(gemm)? })
    }

    /// From pinned memory to the device, or back.
    pub(super) fn copy(to_device: bool, to: u64, from: u64, bytes: usize) -> Operation {
        let (name, places) = match to_device {
            true => ("copy_to_device", [Place::Pinned, Place::Device]),
            false => ("copy_to_host", [Place::Device, Place::Pinned]),
        };
        let access = |name, at, kind, place| Access { name, at, extent: Extent::Bytes(bytes as u64), kind, place };
        let accesses = vec![access("from", from, Kind::Read, places[0]), access("to", to, Kind::Write, places[1])];
        Operation { what: format!("{name} {bytes} bytes").into(), work: Work::Copy { to, from, bytes }, accesses }
    }

    pub(super) fn graph(number: usize, operations: Vec<Operation>) -> Operation {
        let accesses = operations.iter().flat_map(|operation| operation.accesses.iter().copied()).collect();
        Operation { what: format!("graph g{number}").into(), work: Work::Graph(operations), accesses }
    }

    /// How many operations it is.
    pub(super) fn parts(&self) -> usize {
        if let Work::Graph(operations) = &self.work { operations.len() } else { 1 }
    }

    /// Tests its accesses, of a graph by operation.
    ///
    /// # Errors
    /// The test's, in a graph with the operation's name before it.
    pub(super) fn check(&self, test: &dyn Fn(&[Access]) -> Result<(), String>) -> Result<(), String> {
        match &self.work {
            Work::Graph(operations) => operations.iter().try_for_each(|operation| {
                operation.check(test).map_err(|problem| format!("{}: {problem}", operation.what))
            }),
            _ => test(&self.accesses),
        }
    }

    /// # Errors
    /// What went wrong, in words.
    pub(super) fn run(&self, memory: &Memory, reverse: &mut dyn FnMut() -> bool) -> Result<(), String> {
        match &self.work {
            Work::Launch(launch) => launch.run(memory, reverse()),
            // SAFETY: the sizes were checked against the allocations, which are not freed while this is to come, and no
            // other work runs.
            Work::Gemm(gemm) => unsafe {
                gemm::run(gemm);
                Ok(())
            },
            // SAFETY: as above; pinned and device memory do not overlap.
            Work::Copy { to, from, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
                Ok(())
            },
            Work::Graph(operations) => operations.iter().try_for_each(|operation| operation.run(memory, reverse)),
        }
    }
}

impl KernelLaunch {
    fn launched(&self) -> Launched<'_> {
        Launched { kernel: &self.kernel, grid: self.shape.grid, params: &self.params, layout: self.layout }
    }

    fn run(&self, memory: &Memory, reverse: bool) -> Result<(), String> {
        if let Some((list, count)) = self.launched().pools() {
            let named = |problem| format!("{}: {problem}", self.kernel);
            memory.find(list, count * 8, Place::Device).map_err(named)?;
            for index in 0..count {
                // SAFETY: the list was checked against its allocation.
                let pool = unsafe { ((list + index * 8) as *const u64).read() };
                memory.find(pool, 1, Place::Device).map_err(named)?;
            }
        }
        let LaunchShape { grid, threads, shared_bytes, early } = self.shape;
        let shape = Launch { grid: [grid[0], grid[1], 1], shared_bytes, ..Launch::new(1, threads as usize) };
        let shape = if early { shape.early() } else { shape };
        let shape = if reverse { shape.reverse() } else { shape };
        // SAFETY: pointers were checked to lie in buffers that are alive; how far the kernel goes beyond what was
        // checked, the caller of the driver's launch promises, and guard pages stop what is close.
        unsafe { launch_raw(&self.kernel, &shape, &self.params) }
    }
}
