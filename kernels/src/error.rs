//! The one error type of this package.

use std::fmt::Display;

use thiserror::Error;

/// Why an op, or the making of something that ops work on, was refused. Nothing was computed then.
#[derive(Debug, Error)]
pub enum KernelError {
    /// Shapes, sizes or indices that do not fit together.
    #[error("{op}: expected {expected}, found {found}")]
    Shape { op: &'static str, expected: String, found: String },
    /// CUDA was asked of a binary without it.
    #[error("this binary was built without CUDA")]
    BuiltWithoutCuda,
    /// Memory of a GPU that is not there.
    #[error("expected {asked} bytes of device memory for {what}, found {free} free")]
    OutOfMemory { what: String, asked: usize, free: usize },
    /// A call of the driver, or the launch of a kernel, failed; the device goes on.
    #[error("{call}: {status}")]
    Driver { call: String, status: String },
    /// The device is of no use to this process any more: no later call can succeed.
    /// What ended it may be older than the call that found it out: work on a device goes on by itself.
    #[error("the GPU is lost, as {call} found: {status}")]
    DeviceLost { call: String, status: String },
    /// The machine cannot do what was asked.
    #[error("{0}")]
    Unsupported(String),
}

/// The result of an op.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

impl KernelError {
    /// The same error of a call that was part of `what`.
    pub(crate) fn within(self, what: impl Display) -> Self {
        match self {
            KernelError::Driver { call, status } => KernelError::Driver { call: format!("{call} in {what}"), status },
            KernelError::DeviceLost { call, status } => {
                KernelError::DeviceLost { call: format!("{call} in {what}"), status }
            }
            other => other,
        }
    }

    pub(crate) fn shape(op: &'static str, expected: impl Display, found: impl Display) -> Self {
        KernelError::Shape { op, expected: expected.to_string(), found: found.to_string() }
    }
}
