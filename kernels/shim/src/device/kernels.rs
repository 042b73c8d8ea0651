//! Kernels that were asked for, and what a launch of one may look like.

use std::sync::Arc;

use kvern_kernels::cuda::driver::{Kernel, LaunchShape, Layout};

use super::GRID_ROWS_MAX;
use super::work::KernelLaunch;
use crate::KernelLimits;

struct Known {
    name: Arc<str>,
    limits: KernelLimits,
    /// Dynamic shared memory that launches may ask for.
    shared_bytes: u32,
}

/// By handle.
#[derive(Default)]
pub(super) struct Kernels(Vec<Known>);

impl Kernels {
    pub(super) fn is_loaded(&self, name: &str) -> bool {
        self.0.iter().any(|known| *known.name == *name)
    }

    /// # Errors
    /// In words, if there is no such kernel, or no block has as much shared memory.
    pub(super) fn load(&mut self, name: &str, shared_bytes: u32, most: u32) -> Result<Kernel, String> {
        let limits = crate::limits(name).ok_or_else(|| format!("expected the name of a kernel, found {name:?}"))?;
        if shared_bytes > most {
            return Err(format!("{name}: expected at most {most} bytes of shared memory, found {shared_bytes}"));
        }
        let known = self.0.iter().position(|known| *known.name == *name).unwrap_or_else(|| {
            self.0.push(Known { name: name.into(), limits, shared_bytes });
            self.0.len() - 1
        });
        self.0[known].shared_bytes = self.0[known].shared_bytes.max(shared_bytes);
        Ok(Kernel(known as u32))
    }

    fn known(&self, kernel: Kernel) -> Result<&Known, String> {
        let known = self.0.get(kernel.0 as usize);
        known.ok_or_else(|| format!("expected one of {} kernels, found {}", self.0.len(), kernel.0))
    }

    /// # Errors
    /// In words, if the kernel does not take such blocks.
    pub(super) fn check_block(&self, kernel: Kernel, threads: u32, shared_bytes: u32) -> Result<(), String> {
        let Known { name, limits, shared_bytes: shared_max } = self.known(kernel)?;
        let threads_max = limits.threads_max;
        if threads == 0 || !threads.is_multiple_of(32) || threads > threads_max {
            return Err(format!("{name}: expected whole warps of 1 to {threads_max} threads, found {threads}"));
        }
        if shared_bytes > *shared_max {
            return Err(format!("{name}: expected at most {shared_max} bytes of shared memory, found {shared_bytes}"));
        }
        Ok(())
    }

    /// # Errors
    /// In words, if the kernel does not take such a launch.
    pub(super) fn launch(
        &self,
        kernel: Kernel,
        shape: LaunchShape,
        params: &[u8],
        layout: &'static Layout,
    ) -> Result<KernelLaunch, String> {
        self.check_block(kernel, shape.threads, shape.shared_bytes)?;
        let Known { name, limits, .. } = self.known(kernel)?;
        let [x, y] = shape.grid;
        if x == 0 || y == 0 || y > GRID_ROWS_MAX {
            return Err(format!("{name}: expected a grid of 1x1 to 2^31x{GRID_ROWS_MAX}, found {x}x{y}"));
        }
        let (expected, found) = (limits.params_bytes, params.len());
        if layout.name != limits.params_name || layout.bytes != expected || found != expected {
            let KernelLimits { params_name, .. } = limits;
            let layout = layout.name;
            return Err(format!("{name}: expected {expected} bytes of {params_name}, found {found} of {layout}"));
        }
        Ok(KernelLaunch { kernel: Arc::clone(name), shape, params: params.into(), layout })
    }
}
