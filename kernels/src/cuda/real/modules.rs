//! The kernels in this binary, loaded when the device is opened, and found by their names.
//!
//! The driver loads code lazily, at a kernel's first launch if it may; [`Modules::find`] has it loaded then and there,
//! because a capture must not load anything.

use std::collections::HashMap;
use std::ffi::{CString, c_int};
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUfunction_attribute as Attribute, CUresult};

use super::context::Context;
use super::table::{Raw, Table};
use crate::cuda::driver::{LaunchShape, Layout};
use crate::{KernelError, Result};

/// Most kernels that are found; there are some 100 in all.
const KERNELS_MAX: usize = 1024;

/// Shared memory, static and dynamic, that a block has without being asked for.
const UNASKED_SHARED_BYTES: u32 = 48 * 1024;

/// Compute capability on which launches can begin early: that of the one image whose kernels wait for the launches
/// before them. Later devices get what the driver makes of the PTX for compute_80, in which they do not wait.
const EARLY_CAPABILITY: (u32, u32) = (9, 0);

/// Gives bytes an alignment, which `include_bytes!` does not.
#[repr(C, align(64))]
struct Aligned<T>(T);

/// Names of source files and what they were compiled to, by `build.rs`.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// A kernel that can be launched.
struct Entry {
    name: String,
    kernel: Raw<sys::CUkern_st>,
    /// Bytes of its parameter struct.
    param_bytes: usize,
}

impl Entry {
    /// As launches take it: a kernel's handle stands for its function in the context of the launch's stream.
    fn function(&self) -> sys::CUfunction {
        self.kernel.0.cast()
    }
}

/// What is known of a kernel's name.
struct Named {
    number: u32,
    /// Dynamic shared memory that launches may ask for.
    shared_bytes: u32,
}

/// All kernels. They belong to no context, so that they can be launched on the streams of every part of the device.
pub(super) struct Modules {
    loaded: Vec<Raw<sys::CUlib_st>>,
    kernels: Table<Entry>,
    by_name: Mutex<HashMap<String, Named>>,
    /// The device can begin a launch before the one before it has ended.
    can_begin_early: bool,
}

impl Modules {
    /// Loads all kernels of this binary, for a device of this compute capability.
    pub(super) fn load(context: &Context, capability: (u32, u32)) -> Result<Self> {
        if FATBINS.is_empty() {
            let text = "expected CUDA kernels in this binary, found none: it was built without `make cuda`";
            return Err(KernelError::Unsupported(text.into()));
        }
        let mut modules = Modules {
            loaded: Vec::with_capacity(FATBINS.len()),
            kernels: Table::new("kernels", KERNELS_MAX),
            by_name: Mutex::new(HashMap::new()),
            can_begin_early: capability == EARLY_CAPABILITY,
        };
        for (name, bytes) in FATBINS {
            let (mut library, code) = (std::ptr::null_mut(), bytes.as_ptr().cast());
            let (jit, options, values) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: the bytes are a fatbin, whose header says how long it is; there are no options of either kind.
            let status = unsafe { sys::cuLibraryLoadData(&raw mut library, code, jit, values, 0, options, values, 0) };
            context.check(format_args!("cuLibraryLoadData of {name}"), status)?;
            modules.loaded.push(Raw(library));
        }
        Ok(modules)
    }

    /// The kernel of a name, loaded and ready for launches with so much dynamic shared memory.
    pub(super) fn find(&self, context: &Context, name: &str, shared_bytes: u32) -> Result<u32> {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        let known = match by_name.get_mut(name) {
            Some(known) => known,
            None => {
                let known = self.open(context, name)?;
                by_name.entry(name.to_owned()).or_insert(known)
            }
        };
        if shared_bytes > known.shared_bytes {
            let kernel = self.kernels.get(known.number).kernel.0;
            let value = c_int::try_from(shared_bytes).unwrap_or(c_int::MAX);
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the kernel is of a library that is loaded as long as this lives.
            let status = unsafe { sys::cuKernelSetAttribute(attribute, value, kernel, context.device()) };
            context.check(format_args!("{shared_bytes} bytes of shared memory for {name}"), status)?;
            known.shared_bytes = shared_bytes;
        }
        Ok(known.number)
    }

    /// Finds a kernel for the first time.
    fn open(&self, context: &Context, name: &str) -> Result<Named> {
        let kernel = self.kernel(context, name)?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the kernel is of a library that is loaded as long as this lives; the pointer is to a local of the
        // type that is written. Here and below.
        let status = unsafe { sys::cuKernelGetFunction(&raw mut function, kernel) };
        context.check(format_args!("cuKernelGetFunction of {name}"), status)?;
        // SAFETY: the function is the kernel's in the current context, whose code all parts of the device share.
        context.check(format_args!("cuFuncLoad of {name}"), unsafe { sys::cuFuncLoad(function) })?;
        let (mut offset, mut param_bytes) = (0, 0);
        // SAFETY: as above.
        let status = unsafe { sys::cuKernelGetParamInfo(kernel, 0, &raw mut offset, &raw mut param_bytes) };
        context.check(format_args!("cuKernelGetParamInfo of {name}"), status)?;
        let mut static_bytes: c_int = 0;
        let (attribute, device) = (Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, context.device());
        // SAFETY: as above.
        let status = unsafe { sys::cuKernelGetAttribute(&raw mut static_bytes, attribute, kernel, device) };
        context.check(format_args!("cuKernelGetAttribute of {name}"), status)?;
        let entry = || Ok(Entry { name: name.to_owned(), kernel: Raw(kernel), param_bytes });
        let shared_bytes = UNASKED_SHARED_BYTES.saturating_sub(static_bytes.unsigned_abs());
        Ok(Named { number: self.kernels.add(entry)?, shared_bytes })
    }

    /// The kernel of a name in whichever library has it.
    fn kernel(&self, context: &Context, name: &str) -> Result<sys::CUkernel> {
        let unknown = || KernelError::Unsupported(format!("expected a CUDA kernel of this binary, found {name:?}"));
        let c_name = CString::new(name).map_err(|_| unknown())?;
        for library in &self.loaded {
            let mut kernel = std::ptr::null_mut();
            // SAFETY: the library is loaded as long as this lives, and the name ends with a zero.
            match unsafe { sys::cuLibraryGetKernel(&raw mut kernel, library.0, c_name.as_ptr()) } {
                CUresult::CUDA_ERROR_NOT_FOUND => {}
                status => {
                    context.check(format_args!("cuLibraryGetKernel of {name}"), status)?;
                    return Ok(kernel);
                }
            }
        }
        Err(unknown())
    }

    /// Blocks of a kernel that a multiprocessor holds at once.
    pub(super) fn blocks(&self, context: &Context, kernel: u32, threads: u32, shared_bytes: u32) -> Result<NonZeroU32> {
        let entry = self.kernels.get(kernel);
        let mut blocks: c_int = 0;
        let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
        let (function, shared) = (entry.function(), shared_bytes as usize);
        // SAFETY: the kernel is of a loaded library; the pointer is to a local of the type that is written.
        let status =
            unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&raw mut blocks, function, threads, shared) };
        context.check(format_args!("cuOccupancyMaxActiveBlocksPerMultiprocessor of {}", entry.name), status)?;
        u32::try_from(blocks).ok().and_then(NonZeroU32::new).ok_or_else(|| {
            KernelError::Unsupported(format!(
                "expected room on a multiprocessor for a block of {} with {threads} threads and {shared_bytes} bytes \
                 of shared memory, found none",
                entry.name
            ))
        })
    }

    /// Puts a launch on a stream.
    ///
    /// # Safety
    /// As [`Driver::launch`](crate::cuda::driver::Driver::launch).
    pub(super) unsafe fn launch(
        &self,
        context: &Context,
        stream: sys::CUstream,
        (kernel, shape): (u32, LaunchShape),
        (params, layout): (&[u8], &Layout),
    ) -> Result<()> {
        let entry = self.kernels.get(kernel);
        // The driver would read past the end of what is too short.
        if params.len() != layout.bytes || params.len() != entry.param_bytes {
            let expected = format!("{} bytes of parameters for {}", entry.param_bytes, entry.name);
            let found = format!("{} for {} of {}", params.len(), layout.name, layout.bytes);
            return Err(KernelError::shape("launch", expected, found));
        }
        let LaunchShape { grid: [x, y], threads, shared_bytes, early } = shape;
        // SAFETY: the kernel is of a loaded library, takes one parameter, and that is as long as it takes it to be; the
        // rest is the caller's.
        let status = unsafe {
            if early && self.can_begin_early {
                launch_early(entry.function(), stream, shape, params)
            } else {
                launch_in_turn(entry.function(), stream, shape, params)
            }
        };
        context.check(
            format_args!("launch of {} [{x} x {y} blocks of {threads}, {shared_bytes} bytes]", entry.name),
            status,
        )
    }
}

/// A launch that begins when all that is on the stream is done.
///
/// # Safety
/// The function takes one parameter, as long as `params`; else as of [`Modules::launch`].
unsafe fn launch_in_turn(
    function: sys::CUfunction,
    stream: sys::CUstream,
    shape: LaunchShape,
    params: &[u8],
) -> CUresult {
    // One parameter: the struct. The driver copies it before it returns.
    let mut arguments = [params.as_ptr().cast_mut().cast()];
    let LaunchShape { grid: [x, y], threads, shared_bytes, .. } = shape;
    let (parameters, extra) = (arguments.as_mut_ptr(), std::ptr::null_mut());
    // SAFETY: the caller's; the arguments live until the call returns.
    unsafe { sys::cuLaunchKernel(function, x, y, 1, threads, 1, 1, shared_bytes, stream, parameters, extra) }
}

/// A launch that may begin as soon as the kernel before it on the stream allows it, and then waits for that kernel
/// itself. In a capture this becomes an edge of that kind between the two.
///
/// # Safety
/// As of [`launch_in_turn`].
unsafe fn launch_early(
    function: sys::CUfunction,
    stream: sys::CUstream,
    shape: LaunchShape,
    params: &[u8],
) -> CUresult {
    let mut arguments = [params.as_ptr().cast_mut().cast()];
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let LaunchShape { grid: [x, y], threads, shared_bytes, .. } = shape;
    let config = sys::CUlaunchConfig {
        gridDimX: x,
        gridDimY: y,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared_bytes,
        hStream: stream,
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    // SAFETY: the caller's; configuration, attribute and arguments live until the call returns.
    unsafe { sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) }
}

impl Drop for Modules {
    fn drop(&mut self) {
        for library in self.loaded.drain(..) {
            // SAFETY: loaded once by `load`; nothing runs any more.
            let _ = unsafe { sys::cuLibraryUnload(library.0) };
        }
    }
}
