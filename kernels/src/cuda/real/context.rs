//! The driver's library, what a device is, and its primary context, in which everything of this process lies.

use std::ffi::{CStr, c_char, c_int};
use std::fmt::Display;

use cudarc::driver::sys::{self, CUdevice, CUdevice_attribute as Attribute, CUresult};
use kvern_cuda_abi::launch;

use super::status::{Health, explain};
use super::table::Raw;
use crate::cuda::driver::DeviceProperties;
use crate::{KernelError, Result};

/// CUDA version that the kernels are compiled by, and that the driver has to know.
const CUDA_MIN: (u32, u32) = (13, 0);

/// Compute capability that the kernels are compiled for.
const CAPABILITY_MIN: (u32, u32) = (8, 0);

/// Loads the driver and initializes it; to be called before anything else, any number of times.
fn initialize() -> Result<()> {
    // SAFETY: loading a library runs its initializers; this one is the system's GPU driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(KernelError::Unsupported("expected an NVIDIA driver (libcuda.so.1), found none".into()));
    }
    // SAFETY: no preconditions.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_SUCCESS => {}
        CUresult::CUDA_ERROR_NO_DEVICE => return Err(no_gpu()),
        status => return Err(failed("cuInit", status)),
    }
    let found = driver_version()?;
    if found < CUDA_MIN {
        let ((major, minor), (found_major, found_minor)) = (CUDA_MIN, found);
        return Err(KernelError::Unsupported(format!(
            "expected an NVIDIA driver for CUDA {major}.{minor} or later, found one for {found_major}.{found_minor}"
        )));
    }
    Ok(())
}

fn no_gpu() -> KernelError {
    KernelError::Unsupported("expected an NVIDIA GPU, found the driver without one".into())
}

fn failed(call: &str, status: CUresult) -> KernelError {
    KernelError::Driver { call: call.into(), status: explain(status) }
}

/// The result of a call outside of any context.
fn check(call: &str, status: CUresult) -> Result<()> {
    if status == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(call, status)) }
}

/// CUDA version of the driver, major and minor.
fn driver_version() -> Result<(u32, u32)> {
    let mut version: c_int = 0;
    // SAFETY: the pointer is to a local of the type that is written.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// How many GPUs there are, at least one; after [`initialize`].
fn count() -> Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: as in `driver_version`.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    usize::try_from(count).ok().filter(|count| *count > 0).ok_or_else(no_gpu)
}

/// The device of a number.
fn device(ordinal: usize) -> Result<CUdevice> {
    let count = count()?;
    if ordinal >= count {
        return Err(KernelError::Unsupported(format!("expected a GPU below {count}, found cuda:{ordinal}")));
    }
    let mut device: CUdevice = 0;
    let number = c_int::try_from(ordinal).expect("below a count that is such a number");
    // SAFETY: as in `driver_version`.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&raw mut device, number) })?;
    Ok(device)
}

fn attribute(device: CUdevice, attribute: Attribute) -> Result<u32> {
    let mut value: c_int = 0;
    // SAFETY: as in `driver_version`; the device is one that the driver named.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) })?;
    Ok(value.unsigned_abs())
}

fn name(device: CUdevice) -> Result<String> {
    let mut bytes = [0_u8; 256];
    let length = c_int::try_from(bytes.len()).expect("256 is such a number");
    let status =
        // SAFETY: the buffer is as long as said, and the driver ends what it writes with a zero.
        unsafe { sys::cuDeviceGetName(bytes.as_mut_ptr().cast::<c_char>(), length, device) };
    check("cuDeviceGetName", status)?;
    let text = CStr::from_bytes_until_nul(&bytes).map(CStr::to_string_lossy);
    Ok(text.map_or_else(|_| "a GPU without a name".into(), |text| text.into_owned()))
}

fn properties(device: CUdevice) -> Result<DeviceProperties> {
    let bytes = |of| attribute(device, of).map(|value| value as usize);
    let mut memory_bytes = 0;
    // SAFETY: as in `attribute`.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device) })?;
    Ok(DeviceProperties {
        name: name(device)?,
        compute_capability: (
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        driver_version: driver_version()?,
        multiprocessors: bytes(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
        block_shared_bytes: bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_bytes,
    })
}

/// The primary context of a device, kept while this lives, and what is known of the device's health.
pub(super) struct Context {
    device: CUdevice,
    raw: Raw<sys::CUctx_st>,
    health: Health,
}

impl Context {
    /// Retains the context of a device and makes it the calling thread's.
    pub(super) fn open(ordinal: usize) -> Result<(Self, DeviceProperties)> {
        initialize()?;
        let device = device(ordinal)?;
        let properties = properties(device)?;
        let (found, name) = (properties.compute_capability, &properties.name);
        if found < CAPABILITY_MIN {
            let ((major, minor), (found_major, found_minor)) = (CAPABILITY_MIN, found);
            return Err(KernelError::Unsupported(format!(
                "expected compute capability {major}.{minor} or later, found {found_major}.{found_minor} of {name}"
            )));
        }
        let (needed, found) = (launch::BLOCK_SHARED_BYTES_MIN, properties.block_shared_bytes);
        if found < needed {
            return Err(KernelError::Unsupported(format!(
                "expected {needed} bytes of shared memory for a block, as attention takes them, found {found} of {name}"
            )));
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the device is one that the driver named; the pointer is to a local of the type that is written.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) })?;
        let context = Context { device, raw: Raw(raw), health: Health::new(explain) };
        context.enter()?;
        Ok((context, properties))
    }

    pub(super) fn device(&self) -> CUdevice {
        self.device
    }

    /// Makes this the calling thread's context, as every call needs it; some ten nanoseconds where it is that already.
    ///
    /// # Errors
    /// The device is lost, or it is now.
    pub(super) fn enter(&self) -> Result<()> {
        self.health.ready()?;
        // SAFETY: the context is retained as long as this lives.
        self.check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw.0) })
    }

    /// The result of a call in this context.
    pub(super) fn check(&self, call: impl Display, status: CUresult) -> Result<()> {
        self.health.check(call, status)
    }

    /// Bytes of memory that are free, of all processes. It also finds a device that is lost.
    pub(super) fn free_bytes(&self) -> Result<usize> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to locals of the types that are written.
        self.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok(free)
    }

    /// Waits for all work of the device and leaves this context the thread's, so that what lies in it can be destroyed.
    /// A device that is lost answers with errors, which change nothing any more.
    pub(super) fn settle(&self) {
        // SAFETY: as in `enter`.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.raw.0);
            let _ = sys::cuCtxSynchronize();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`, and what lay in it was destroyed before.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
