//! The CUDA driver's place in a build without the feature `cuda`: there is none to open.

use std::sync::Arc;

use crate::cuda::driver::Driver;
use crate::{KernelError, Result};

/// Opens a GPU by its number.
///
/// # Errors
/// Always: this binary was built without CUDA.
pub(crate) fn open(_ordinal: usize) -> Result<Arc<dyn Driver>> {
    Err(KernelError::BuiltWithoutCuda)
}
