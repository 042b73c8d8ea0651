//! Runs the CUDA kernels on the host, one thread of the device after another, for tests on machines without a GPU.
//!
//! [`launch`] runs a kernel by name. Memory comes from [`Buffer`], which lies between pages that may not be touched: a read or
//! write outside ends the launch with an error. Other errors are deadlocks, writes outside of what shared memory a block
//! declared, misaligned vectors, and warps whose lanes meet in different operations. Shared memory and the destinations of
//! asynchronous copies that nobody waited for hold NaN. Races and the memory model do not show; a launch in the
//! [reverse](Launch::reverse) order of threads shows many of them by another result.
//!
//! [`device`] is a whole device of it, for tests of the backend.

mod buffer;
pub mod device;

use std::ffi::{CStr, CString, c_char, c_int};

pub use buffer::Buffer;
use kvern_cuda_abi::{KernelParams, TensorMap};
use kvern_kernels::cuda::driver::BoxedMatrix;

/// The shape of a launch, and what tests may change about it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Launch {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    reverse: u32,
    planted: u32,
    early: u32,
}

impl Launch {
    /// `blocks` blocks of `threads` threads.
    #[must_use]
    pub fn new(blocks: usize, threads: usize) -> Launch {
        let narrow = |size: usize| u32::try_from(size).expect("a launch's size fits 32 bits");
        let (grid, block) = ([narrow(blocks), 1, 1], [narrow(threads), 1, 1]);
        Launch { grid, block, shared_bytes: 0, reverse: 0, planted: 0, early: 0 }
    }

    /// With a second dimension of the grid.
    #[must_use]
    pub fn rows(mut self, y: usize) -> Launch {
        self.grid[1] = u32::try_from(y).expect("a launch's size fits 32 bits");
        self
    }

    #[must_use]
    pub fn shared(mut self, bytes: usize) -> Launch {
        self.shared_bytes = u32::try_from(bytes).expect("a block's shared memory fits 32 bits");
        self
    }

    /// Blocks and threads take their turns from the last to the first.
    #[must_use]
    pub fn reverse(mut self) -> Launch {
        self.reverse = 1;
        self
    }

    /// As if it had begun while the launch before it ended: threads have to wait for that before they touch memory.
    #[must_use]
    pub fn early(mut self) -> Launch {
        self.early = 1;
        self
    }

    /// With a fault of `kernel.h`'s list.
    #[must_use]
    pub fn planted(mut self, fault: u32) -> Launch {
        self.planted = fault;
        self
    }
}

/// What a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelLimits {
    /// Its parameter struct.
    pub params_name: &'static str,
    pub params_bytes: usize,
    /// Threads per block.
    pub threads_max: u32,
}

/// Begins each map.
const MAP_MAGIC: u64 = 0x6b76_6572_6e6d_6170;

#[repr(C)]
struct RawLimits {
    params_name: *const c_char,
    params_bytes: usize,
    threads_max: u32,
}

#[repr(C)]
struct RawField {
    name: *const c_char,
    offset: usize,
    bytes: usize,
}

// SAFETY: these are the declarations of `kernels/cuda/shim/shim.cpp` and of the table that `build.rs` writes.
unsafe extern "C" {
    fn kvern_shim_launch(
        name: *const c_char,
        launch: *const Launch,
        params: *const u8,
        params_bytes: usize,
        message: *mut c_char,
        message_bytes: usize,
    ) -> c_int;
    fn kvern_shim_kernel(index: usize) -> *const c_char;
    fn kvern_shim_limits(name: *const c_char, limits: *mut RawLimits) -> c_int;
    static kvern_shim_fields: [RawField; 0];
}

/// Runs a kernel to its end.
///
/// # Errors
/// What went wrong, in words: no such kernel, a shape that it does not take, or one of the module's errors.
///
/// # Safety
/// Every pointer in `params` is to a [`Buffer`] that lives on, is not borrowed, and is as large as the kernel takes it to be; an access
/// that is off by more than a guard's pages is undefined.
pub unsafe fn launch<P: KernelParams>(kernel: &str, launch: &Launch, params: &P) -> Result<(), String> {
    // SAFETY: a struct of parameters is plain data without padding.
    let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) };
    // SAFETY: as the caller promises.
    unsafe { launch_raw(kernel, launch, bytes) }
}

/// As [`launch`], of the bytes of a parameter struct.
///
/// # Errors
/// As [`launch`].
///
/// # Safety
/// As [`launch`].
pub unsafe fn launch_raw(kernel: &str, launch: &Launch, params: &[u8]) -> Result<(), String> {
    let name = CString::new(kernel).map_err(|error| error.to_string())?;
    let mut message = [0u8; 640];
    // SAFETY: the message and the parameters are as long as said, and what these point to is as the caller promises.
    let failed = unsafe {
        kvern_shim_launch(
            name.as_ptr(),
            launch,
            params.as_ptr(),
            params.len(),
            message.as_mut_ptr().cast(),
            message.len(),
        )
    };
    if failed == 0 {
        return Ok(());
    }
    let text = CStr::from_bytes_until_nul(&message).map_err(|error| error.to_string())?;
    Err(text.to_string_lossy().into_owned())
}

/// A map of a matrix that kernels of this library copy boxes by.
///
/// # Panics
/// If the matrix is none for which there are maps.
#[must_use]
pub fn tensor_map(matrix: &BoxedMatrix) -> TensorMap {
    matrix.check().expect("a matrix that boxes can be copied of");
    let BoxedMatrix { element, memory, rows, columns, box_rows, box_columns } = *matrix;
    let bytes = element.bytes();
    let mut words = [0; 16];
    // In the order of `BoxMap` of `kernels/cuda/shim/hopper.cpp`.
    words[0] = MAP_MAGIC;
    words[1] = memory.0;
    let sizes = [bytes, columns, rows, columns * bytes, box_columns, box_rows, box_columns * bytes];
    words[2..].iter_mut().zip(sizes).for_each(|(word, size)| *word = size as u64);
    TensorMap { words }
}

/// What a kernel takes, if there is one of this name.
#[must_use]
pub fn limits(kernel: &str) -> Option<KernelLimits> {
    let name = CString::new(kernel).ok()?;
    let mut raw = RawLimits { params_name: std::ptr::null(), params_bytes: 0, threads_max: 0 };
    // SAFETY: both live as long as the call.
    if unsafe { kvern_shim_limits(name.as_ptr(), &raw mut raw) } != 0 {
        return None;
    }
    // SAFETY: a struct's name is a constant of the shim's.
    let params_name: &'static CStr = unsafe { CStr::from_ptr(raw.params_name) };
    let params_name = params_name.to_str().expect("a name of C++ is ASCII");
    Some(KernelLimits { params_name, params_bytes: raw.params_bytes, threads_max: raw.threads_max })
}

/// The names of all kernels.
#[must_use]
pub fn kernels() -> Vec<String> {
    let mut names: Vec<String> = (0..)
        // SAFETY: any index may be asked for; past the last one the answer is null.
        .map(|index| unsafe { kvern_shim_kernel(index) })
        .take_while(|name| !name.is_null())
        // SAFETY: a name is a constant of the shim's.
        .map(|name| unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What C++ makes of `params.h`: each struct's name and size, and each field's `.name`, offset and size.
#[must_use]
pub fn cpp_layout() -> Vec<(String, usize, usize)> {
    let mut fields = Vec::new();
    // SAFETY: the table ends with a null name.
    unsafe {
        let mut at = std::ptr::addr_of!(kvern_shim_fields).cast::<RawField>();
        while !(*at).name.is_null() {
            fields.push((CStr::from_ptr((*at).name).to_string_lossy().into_owned(), (*at).offset, (*at).bytes));
            at = at.add(1);
        }
    }
    fields
}
