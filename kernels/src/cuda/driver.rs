//! What the backend asks of a GPU and its driver: the boundary behind which the real driver lies, and the shim that runs
//! kernels on the host and rejects wrong orders of work.
//!
//! Work of one stream runs in its order; between streams, and between a stream and the host, events order it. Nothing here
//! waits for the device but [`Driver::synchronize`], and nothing allocates after start.

use std::fmt;
use std::num::NonZeroU32;
use std::ptr::NonNull;
use std::time::Duration;

pub use kvern_cuda_abi::{Layout, Ptr, TensorMap};

use crate::{KernelError, Result};

/// A handle that the driver gave out; its number says nothing to others.
macro_rules! handles {
    ($($(#[$attribute:meta])* $name:ident)*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub u32);
    )*};
}

handles! {
    /// A queue of work.
    Stream
    /// A place in a stream's work that others can wait for.
    Event
    /// A kernel, ready to be launched.
    Kernel
    /// Captured work, to be launched as one.
    Graph
}

/// Which of two streams' work goes first where both have some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamPriority {
    Normal,
    High,
}

/// A part of a device's multiprocessors; see [`Driver::divide`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The driver's number of it.
    pub number: u32,
    pub multiprocessors: u32,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceProperties {
    /// As its maker calls it.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// CUDA version of the driver, major and minor.
    pub driver_version: (u32, u32),
    pub multiprocessors: usize,
    /// Shared memory of a multiprocessor, and the most that one block may ask for.
    pub shared_bytes: usize,
    pub block_shared_bytes: usize,
    /// Memory of the device, in use or not.
    pub memory_bytes: usize,
}

impl DeviceProperties {
    /// # Errors
    /// A part of so many multiprocessors would be none, or leave none for others.
    pub fn check_division(&self, multiprocessors: u32) -> Result<()> {
        if (1..self.multiprocessors).contains(&(multiprocessors as usize)) {
            return Ok(());
        }
        let (all, name) = (self.multiprocessors, &self.name);
        let text = format!("expected 1 to {} of the {all} multiprocessors of {name}", all.saturating_sub(1));
        Err(KernelError::Unsupported(format!("{text}, found {multiprocessors}")))
    }
}

/// Types of elements on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    F16,
    BF16,
}

impl Element {
    /// Bytes of one.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::BF16 => 2,
        }
    }

    /// Elements as they lie in memory, widened.
    pub(crate) fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let words = bytes.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
        match self {
            Element::F32 => bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect(),
            Element::F16 => words.map(|word| half::f16::from_bits(word).to_f32()).collect(),
            Element::BF16 => words.map(|word| half::bf16::from_bits(word).to_f32()).collect(),
        }
    }

    /// As kernels' names end.
    #[must_use]
    pub const fn suffix(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::BF16 => "bf16",
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.suffix())
    }
}

/// Blocks, threads per block, and bytes of dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchShape {
    pub grid: [u32; 2],
    pub threads: u32,
    pub shared_bytes: u32,
    /// It may begin while the launch before it on its stream ends, where the device can do that: the kernel waits for
    /// that itself before it touches memory that kernels write.
    pub early: bool,
}

/// A product of matrices: `out[m][n] = sum over k of x[m][k] w[n][k] (+ bias[n])`, accumulated in f32. All row-major; `x` and
/// `w` are dense, and rows of `out` lie `out_stride` elements apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gemm {
    /// Of x, w and bias.
    pub element: Element,
    /// Of out: `element`, or F32 for logits.
    pub out_element: Element,
    pub x: Ptr,
    pub w: Ptr,
    /// `[n]`, or null.
    pub bias: Ptr,
    pub out: Ptr,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub out_stride: usize,
    /// How many multiprocessors it has, where its stream is on a part of the device; 0 elsewhere.
    pub multiprocessors: u32,
    /// Scratch that this product alone uses while it runs.
    pub workspace: Ptr,
    pub workspace_bytes: usize,
}

/// A matrix in device memory, from which kernels copy boxes into shared memory: dense rows of `columns` elements of 2 bytes. A row of a
/// box is a row of the swizzle, `2 * box_columns` bytes: 64 or 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoxedMatrix {
    /// F16 or BF16.
    pub element: Element,
    /// A multiple of 16.
    pub memory: Ptr,
    pub rows: usize,
    /// A multiple of 8.
    pub columns: usize,
    /// At most 256.
    pub box_rows: usize,
    /// 32 or 64.
    pub box_columns: usize,
}

impl BoxedMatrix {
    /// Its bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.rows * self.columns * self.element.bytes()
    }

    /// # Errors
    /// [`Shape`](crate::KernelError::Shape) where it is not as its fields say, or larger than coordinates are.
    pub fn check(&self) -> Result<()> {
        const ROWS_MAX: usize = i32::MAX as usize;
        let is_right = self.element.bytes() == 2
            && self.memory.0.is_multiple_of(16)
            && (1..=ROWS_MAX).contains(&self.rows)
            && self.columns.is_multiple_of(8)
            && (self.box_columns..=ROWS_MAX).contains(&self.columns)
            && (1..=256).contains(&self.box_rows)
            && matches!(self.box_columns, 32 | 64);
        if is_right {
            return Ok(());
        }
        let expected = format!("up to {ROWS_MAX} rows of 16-bit elements, in boxes of 32 or 64 by up to 256");
        Err(crate::KernelError::shape("tensor map", expected, format!("{self:?}")))
    }
}

/// A GPU. All calls may come from any thread; those on one stream come from one thread at a time.
///
/// Every call checks the driver's status. An error that leaves the device unusable is [`DeviceLost`](crate::KernelError::DeviceLost); errors of
/// work that runs later show at a later call, by the latest at [`synchronize`](Self::synchronize).
pub trait Driver: Send + Sync {
    fn properties(&self) -> &DeviceProperties;

    /// Bytes of device memory that are free now, of all processes.
    fn free_bytes(&self) -> Result<usize>;

    /// Device memory, at least 16-byte aligned, with any content. No more than is there is [`OutOfMemory`](crate::KernelError::OutOfMemory).
    fn allocate(&self, bytes: usize) -> Result<Ptr>;

    /// # Safety
    /// The memory came from [`allocate`](Self::allocate), and no work that uses it is still to come or under way.
    unsafe fn free(&self, memory: Ptr);

    /// Host memory that copies can run from and to, page-locked, zeroed.
    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>>;

    /// # Safety
    /// As [`free`](Self::free).
    unsafe fn free_pinned(&self, memory: NonNull<u8>, bytes: usize);

    /// Divides the multiprocessors in two: so many, rounded up as the device needs it, and the others. A device that
    /// cannot do that is an error.
    fn divide(&self, multiprocessors: u32) -> Result<[Part; 2]>;

    /// A stream on a part of the device, or on all of it.
    fn stream(&self, priority: StreamPriority, part: Option<Part>) -> Result<Stream>;

    /// An event to be recorded on this stream, or on others of its part.
    fn event(&self, stream: Stream) -> Result<Event>;

    /// As [`event`](Self::event); it also keeps when the device passed it, for [`elapsed`](Self::elapsed).
    fn timer(&self, stream: Stream) -> Result<Event>;

    /// A kernel by its name, for launches with up to `shared_bytes` of dynamic shared memory.
    fn kernel(&self, name: &str, shared_bytes: u32) -> Result<Kernel>;

    /// Blocks of this kernel that a multiprocessor holds at once, for a launch of such blocks.
    fn blocks_per_multiprocessor(&self, kernel: Kernel, threads: u32, shared_bytes: u32) -> Result<NonZeroU32>;

    /// What kernels copy boxes of this matrix by. It says where the memory is, which must be there as long as it is used.
    ///
    /// # Errors
    /// As of [`BoxedMatrix::check`], or a device that has no such copies.
    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap>;

    /// Marks what has been put on `stream` so far.
    fn record(&self, event: Event, stream: Stream) -> Result<()>;

    /// Work put on `stream` from now on begins after what `event` marked last.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;

    /// Waits, without spinning, until what `event` marked last is done.
    fn synchronize(&self, event: Event) -> Result<()>;

    /// How long after `from` the device passed `to`, to about half a microsecond; both are [timers](Self::timer) on the
    /// same part of the device, and nothing where `to` was first. Waits for nothing.
    ///
    /// # Errors
    /// One of them was never recorded, or the device has not passed what it marked last.
    fn elapsed(&self, from: Event, to: Event) -> Result<Duration>;

    /// # Safety
    /// Both stretches are as long as said; `from` is pinned, and nobody writes it until the copy is done.
    unsafe fn copy_to_device(&self, stream: Stream, to: Ptr, from: NonNull<u8>, bytes: usize) -> Result<()>;

    /// # Safety
    /// Both stretches are as long as said; `to` is pinned, and nobody uses it until the copy is done.
    unsafe fn copy_to_host(&self, stream: Stream, to: NonNull<u8>, from: Ptr, bytes: usize) -> Result<()>;

    /// `params` are the bytes of the kernel's parameter struct; they are copied. `layout` describes it.
    ///
    /// # Safety
    /// Shape and parameters are what the kernel takes, and the memory they name is as large as it takes it to be.
    unsafe fn launch(
        &self,
        stream: Stream,
        kernel: Kernel,
        shape: LaunchShape,
        params: &[u8],
        layout: &'static Layout,
    ) -> Result<()>;

    /// # Safety
    /// The memory named is as large as the sizes say.
    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<()>;

    /// From now on what is put on `stream` is recorded and does not run. Nothing may be allocated or waited for by the host.
    fn begin_capture(&self, stream: Stream) -> Result<()>;

    /// Ends the capture also where it fails.
    fn end_capture(&self, stream: Stream) -> Result<Graph>;

    /// # Safety
    /// As of the launches in it; the memory that they use is still there.
    unsafe fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()>;

    /// Whether nothing is allocated and nothing runs: there is nothing to read and convert weights for then.
    fn counts_only(&self) -> bool {
        false
    }

    /// Called with the purpose of each allocation, for an account.
    fn count(&self, purpose: &str, bytes: usize) {
        let _ = (purpose, bytes);
    }

    /// Called before the host reads or writes pinned memory; a driver that checks refuses what a copy under way still uses.
    ///
    /// # Errors
    /// None of the real driver, which does not know.
    fn host_access(&self, memory: NonNull<u8>, bytes: usize, access: HostAccess) -> Result<()> {
        let _ = (memory, bytes, access);
        Ok(())
    }
}

/// What the host does to pinned memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAccess {
    Read,
    Write,
}
