//! In the place of the real driver, in a build without it.

use std::sync::Arc;

use crate::cuda::driver::Driver;
use crate::{KernelError, Result};

/// GPUs of this machine.
pub(crate) fn device_count() -> Result<usize> {
    Err(KernelError::BuiltWithoutCuda)
}

/// The driver of GPU number `ordinal`.
pub(crate) fn open(_ordinal: usize) -> Result<Arc<dyn Driver>> {
    Err(KernelError::BuiltWithoutCuda)
}
