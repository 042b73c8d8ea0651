//! What the driver's statuses mean: which of them end the device for this process, and what is said of the others.
//!
//! A kernel that went wrong shows at whatever call comes next, so every status goes through here, and the first one
//! that ends the device is what every later call answers with.

use std::fmt::Display;
use std::sync::OnceLock;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::CUresult;

use crate::{KernelError, Result};

/// Whether the device, or this process's part of it, is gone: by CUDA's word every later call gives the same status.
/// An unknown error is among them, because nobody can say then that the device goes on.
pub(super) fn ends_the_device(status: CUresult) -> bool {
    matches!(
        status,
        CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_CONTAINED
            | CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUresult::CUDA_ERROR_SYSTEM_NOT_READY
            | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
            | CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | CUresult::CUDA_ERROR_EXTERNAL_DEVICE
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

/// The status by CUDA's name for it, and CUDA's sentence on it.
pub(super) fn explain(status: CUresult) -> String {
    match DriverError(status).error_string() {
        Ok(text) => format!("{status:?} ({})", text.to_string_lossy()),
        Err(_) => format!("{status:?}"),
    }
}

/// Whether the device can still be used, and what ended it.
pub(super) struct Health {
    explain: fn(CUresult) -> String,
    /// Call and status that ended the device.
    lost: OnceLock<(String, String)>,
}

impl Health {
    pub(super) fn new(explain: fn(CUresult) -> String) -> Self {
        Health { explain, lost: OnceLock::new() }
    }

    /// # Errors
    /// The device is lost: what the first call that noticed it said.
    pub(super) fn ready(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some((call, status)) => Err(KernelError::DeviceLost { call: call.clone(), status: status.clone() }),
        }
    }

    /// The result of `call`, which is only written out if it failed.
    pub(super) fn check(&self, call: impl Display, status: CUresult) -> Result<()> {
        if status == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        let (call, text) = (call.to_string(), (self.explain)(status));
        if ends_the_device(status) {
            self.lost.get_or_init(|| (call, text));
            return self.ready();
        }
        Err(KernelError::Driver { call, status: text })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn named(status: CUresult) -> String {
        format!("{status:?}")
    }

    #[test]
    fn statuses_that_end_the_device_are_told_from_those_that_do_not() {
        let cases = [
            (CUresult::CUDA_SUCCESS, false),
            (CUresult::CUDA_ERROR_INVALID_VALUE, false),
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, false),
            (CUresult::CUDA_ERROR_NOT_FOUND, false),
            (CUresult::CUDA_ERROR_NOT_READY, false),
            (CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, false),
            (CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, false),
            (CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, true),
            (CUresult::CUDA_ERROR_LAUNCH_FAILED, true),
            (CUresult::CUDA_ERROR_LAUNCH_TIMEOUT, true),
            (CUresult::CUDA_ERROR_ASSERT, true),
            (CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR, true),
            (CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION, true),
            (CUresult::CUDA_ERROR_MISALIGNED_ADDRESS, true),
            (CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE, true),
            (CUresult::CUDA_ERROR_INVALID_PC, true),
            (CUresult::CUDA_ERROR_ECC_UNCORRECTABLE, true),
            (CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED, true),
            (CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE, true),
            (CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, true),
            (CUresult::CUDA_ERROR_UNKNOWN, true),
        ];
        for (status, expected) in cases {
            assert_eq!(ends_the_device(status), expected, "{status:?}");
        }
    }

    #[test]
    fn the_first_loss_is_what_later_calls_say() {
        let health = Health::new(named);
        assert!(health.check("cuOne", CUresult::CUDA_SUCCESS).is_ok());
        let error = health.check("cuTwo", CUresult::CUDA_ERROR_INVALID_VALUE).unwrap_err();
        assert!(matches!(error, KernelError::Driver { .. }), "{error}");
        assert_eq!(error.to_string(), "cuTwo: CUDA_ERROR_INVALID_VALUE");
        assert!(health.ready().is_ok());

        let said = "the GPU is lost, as cuThree found: CUDA_ERROR_ILLEGAL_ADDRESS";
        let error = health.check("cuThree", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS).unwrap_err();
        assert_eq!(error.to_string(), said);
        let error = health.check("cuFour", CUresult::CUDA_ERROR_LAUNCH_FAILED).unwrap_err();
        assert_eq!(error.to_string(), said);
        assert_eq!(health.ready().unwrap_err().to_string(), said);
    }
}
