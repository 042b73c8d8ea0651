//! A GPU that only counts: what is built on it allocates nothing and runs nothing, and is then known to the byte. So the memory
//! of a model is accounted by the very code that takes it, before any is taken.

use std::alloc::{Layout as MemoryLayout, alloc_zeroed, dealloc};
use std::num::NonZeroU32;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::driver::{
    BoxedMatrix, DeviceProperties, Driver, Event, Gemm, Graph, Kernel, LaunchShape, Layout, Part, Ptr, Stream,
    StreamPriority, TensorMap,
};
use crate::{KernelError, Result};

/// Addresses and sizes of allocations are multiples of this, as the driver's are.
const ALLOCATION_BYTES: usize = 512;

/// What was allocated on a device that only counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allocations {
    /// Bytes by purpose, in the order of their first allocation.
    pub purposes: Vec<(String, usize)>,
}

impl Allocations {
    /// Bytes of all.
    #[must_use]
    pub fn total(&self) -> usize {
        self.purposes.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Counts allocations by purpose; never gives any back, as nothing is while a server starts.
pub(crate) struct CountingDriver {
    properties: DeviceProperties,
    purposes: Mutex<Vec<(String, usize)>>,
    next_address: AtomicU64,
    handles: AtomicU32,
}

impl CountingDriver {
    /// As if it were `like`.
    pub(crate) fn new(like: DeviceProperties) -> Self {
        CountingDriver {
            properties: like,
            purposes: Mutex::new(Vec::new()),
            next_address: AtomicU64::new(1 << 40),
            handles: AtomicU32::new(0),
        }
    }

    pub(crate) fn allocations(&self) -> Allocations {
        Allocations { purposes: self.purposes.lock().unwrap_or_else(PoisonError::into_inner).clone() }
    }

    fn handle(&self) -> u32 {
        self.handles.fetch_add(1, Ordering::Relaxed)
    }
}

/// A plain layout for memory that stands in for pinned memory.
fn host_layout(bytes: usize) -> Result<MemoryLayout> {
    MemoryLayout::from_size_align(bytes.max(1), 64)
        .map_err(|_| KernelError::Unsupported(format!("cannot pin {bytes} bytes")))
}

impl Driver for CountingDriver {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn counts_only(&self) -> bool {
        true
    }

    fn count(&self, purpose: &str, bytes: usize) {
        let bytes = bytes.next_multiple_of(ALLOCATION_BYTES);
        let mut purposes = self.purposes.lock().unwrap_or_else(PoisonError::into_inner);
        match purposes.iter_mut().find(|(known, _)| known == purpose) {
            Some((_, sum)) => *sum += bytes,
            None => purposes.push((purpose.to_owned(), bytes)),
        }
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(self.properties.memory_bytes)
    }

    fn allocate(&self, bytes: usize) -> Result<Ptr> {
        let bytes = bytes.next_multiple_of(ALLOCATION_BYTES) as u64;
        Ok(Ptr(self.next_address.fetch_add(bytes, Ordering::Relaxed)))
    }

    unsafe fn free(&self, _: Ptr) {}

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        // SAFETY: the layout is not empty. Pages that nobody touches cost nothing.
        let memory = unsafe { alloc_zeroed(host_layout(bytes)?) };
        NonNull::new(memory).ok_or_else(|| KernelError::Unsupported(format!("cannot pin {bytes} bytes")))
    }

    unsafe fn free_pinned(&self, memory: NonNull<u8>, bytes: usize) {
        if let Ok(layout) = host_layout(bytes) {
            // SAFETY: it was allocated with this layout.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
    }

    fn divide(&self, multiprocessors: u32) -> Result<[Part; 2]> {
        self.properties.check_division(multiprocessors)?;
        let all = u32::try_from(self.properties.multiprocessors).expect("a part of them is a u32");
        Ok([multiprocessors, all - multiprocessors]
            .map(|multiprocessors| Part { number: self.handle(), multiprocessors }))
    }

    fn stream(&self, _: StreamPriority, _: Option<Part>) -> Result<Stream> {
        Ok(Stream(self.handle()))
    }

    fn event(&self, _: Stream) -> Result<Event> {
        Ok(Event(self.handle()))
    }

    fn timer(&self, _: Stream) -> Result<Event> {
        Ok(Event(self.handle()))
    }

    fn kernel(&self, _: &str, _: u32) -> Result<Kernel> {
        Ok(Kernel(self.handle()))
    }

    fn blocks_per_multiprocessor(&self, _: Kernel, _: u32, _: u32) -> Result<NonZeroU32> {
        // More blocks make a plan's list of them longer, by bytes.
        Ok(NonZeroU32::MIN)
    }

    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        matrix.check().map(|()| TensorMap { words: [0; 16] })
    }

    fn record(&self, _: Event, _: Stream) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: Stream, _: Event) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self, _: Event) -> Result<()> {
        Ok(())
    }

    fn elapsed(&self, _: Event, _: Event) -> Result<Duration> {
        Ok(Duration::ZERO)
    }

    unsafe fn copy_to_device(&self, _: Stream, _: Ptr, _: NonNull<u8>, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn copy_to_host(&self, _: Stream, _: NonNull<u8>, _: Ptr, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, _: Stream, _: Kernel, _: LaunchShape, _: &[u8], _: &'static Layout) -> Result<()> {
        Ok(())
    }

    unsafe fn gemm(&self, _: Stream, _: &Gemm) -> Result<()> {
        Ok(())
    }

    fn begin_capture(&self, _: Stream) -> Result<()> {
        Ok(())
    }

    fn end_capture(&self, _: Stream) -> Result<Graph> {
        Ok(Graph(self.handle()))
    }

    unsafe fn launch_graph(&self, _: Graph, _: Stream) -> Result<()> {
        Ok(())
    }
}
