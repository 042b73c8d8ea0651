//! Memory of a device, pinned memory of the host, and what moves between them.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use kvern_cuda_abi::Ptr;

use super::driver::{Driver, Event, HostAccess, Stream};
use crate::{KernelError, Result};

/// Device memory, given back when dropped.
pub(crate) struct DeviceMemory {
    driver: Arc<dyn Driver>,
    ptr: Ptr,
    bytes: usize,
}

impl DeviceMemory {
    /// With any content. `what` names it in the error where there is not enough.
    pub(crate) fn new(driver: &Arc<dyn Driver>, what: &str, bytes: usize) -> Result<Self> {
        // Whole vectors, so that a kernel may read the last one as a whole; and never nothing, which has no address.
        let bytes = bytes.max(1).checked_next_multiple_of(16).unwrap_or(usize::MAX);
        let ptr = driver.allocate(bytes).map_err(|error| match error {
            KernelError::OutOfMemory { asked, free, .. } => {
                KernelError::OutOfMemory { what: what.to_owned(), asked, free }
            }
            error => error,
        })?;
        driver.count(what, bytes);
        Ok(DeviceMemory { driver: Arc::clone(driver), ptr, bytes })
    }

    pub(crate) fn ptr(&self) -> Ptr {
        self.ptr
    }

    /// `bytes` further.
    pub(crate) fn at(&self, bytes: usize) -> Ptr {
        assert!(bytes <= self.bytes, "an address within {} bytes, not {bytes}", self.bytes);
        Ptr(self.ptr.0 + bytes as u64)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: whoever holds the memory puts no work that uses it on a stream any more; the driver waits for what is there.
        unsafe { self.driver.free(self.ptr) };
    }
}

/// `len` values in pinned memory of the host.
pub(crate) struct Pinned<T: Copy> {
    driver: Arc<dyn Driver>,
    start: NonNull<u8>,
    len: usize,
    values: PhantomData<T>,
}

// SAFETY: the memory is this value's own, and is used through `&self` for reading and `&mut self` for writing.
unsafe impl<T: Copy + Send> Send for Pinned<T> {}
// SAFETY: as above.
unsafe impl<T: Copy + Sync> Sync for Pinned<T> {}

impl<T: Copy> Pinned<T> {
    /// Zeros, which are values of every `T` that is used: numbers and structs of numbers.
    pub(crate) fn new(driver: &Arc<dyn Driver>, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize);
        let bytes = bytes.ok_or_else(|| KernelError::Unsupported(format!("cannot pin {len} values")))?;
        let start = driver.allocate_pinned(bytes.max(1))?;
        Ok(Pinned { driver: Arc::clone(driver), start, len, values: PhantomData })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The values, where no copy to them is under way.
    pub(crate) fn read(&self) -> Result<&[T]> {
        self.driver.host_access(self.start, self.bytes(), HostAccess::Read)?;
        // SAFETY: `len` values, which were zeros at first.
        Ok(unsafe { std::slice::from_raw_parts(self.start.cast().as_ptr(), self.len) })
    }

    /// Some of the values, where no copy from or to them is under way.
    pub(crate) fn write(&mut self, range: Range<usize>) -> Result<&mut [T]> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} pinned values", self.len);
        // SAFETY: within the memory, as was just checked.
        let start = unsafe { self.start.add(range.start * size_of::<T>()) };
        self.driver.host_access(start, range.len() * size_of::<T>(), HostAccess::Write)?;
        // SAFETY: as in `read`, and `&mut self` makes it exclusive.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), range.len()) })
    }

    /// Puts a copy of `len` values, from the `first` on, to `to` on a stream.
    ///
    /// # Safety
    /// There is room at `to`, and nothing is written here until the copy is known to be done.
    pub(crate) unsafe fn copy_to(&self, stream: Stream, to: Ptr, first: usize, len: usize) -> Result<()> {
        assert!(first + len <= self.len, "{len} of {} pinned values after {first}", self.len);
        // SAFETY: the source is as long; the rest is the caller's promise.
        unsafe {
            let from = self.start.add(first * size_of::<T>());
            self.driver.copy_to_device(stream, to, from, len * size_of::<T>())
        }
    }

    /// Puts a copy of `len` values at `from` to the values from the `first` on, on a stream.
    ///
    /// # Safety
    /// There are as many at `from`, and nothing is used here until the copy is known to be done.
    pub(crate) unsafe fn copy_from(&mut self, stream: Stream, from: Ptr, first: usize, len: usize) -> Result<()> {
        assert!(first + len <= self.len, "{len} of {} pinned values after {first}", self.len);
        // SAFETY: the target is as long; the rest is the caller's promise.
        unsafe {
            let to = self.start.add(first * size_of::<T>());
            self.driver.copy_to_host(stream, to, from, len * size_of::<T>())
        }
    }
}

impl<T: Copy> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: as of device memory.
        unsafe { self.driver.free_pinned(self.start, self.bytes().max(1)) };
    }
}

/// A place in the work of a worker up to which the host, and streams, can wait.
pub(crate) struct Milestone {
    driver: Arc<dyn Driver>,
    /// For each of the worker's streams: an event belongs to what its stream is on.
    events: Vec<(Stream, Event)>,
    /// Which was set last.
    at: usize,
    passed: bool,
}

impl Milestone {
    /// In one of these streams.
    pub(crate) fn new(driver: &Arc<dyn Driver>, streams: impl IntoIterator<Item = Stream>) -> Result<Self> {
        Milestone::with(driver, streams, |stream| driver.event(stream))
    }

    fn with(
        driver: &Arc<dyn Driver>,
        streams: impl IntoIterator<Item = Stream>,
        event: impl Fn(Stream) -> Result<Event>,
    ) -> Result<Self> {
        let events = streams.into_iter().map(|stream| Ok((stream, event(stream)?))).collect::<Result<_>>()?;
        Ok(Milestone { events, driver: Arc::clone(driver), at: 0, passed: true })
    }

    /// As [`new`](Self::new); it also keeps when the device passed it.
    pub(crate) fn timed(driver: &Arc<dyn Driver>, streams: impl IntoIterator<Item = Stream>) -> Result<Self> {
        Milestone::with(driver, streams, |stream| driver.timer(stream))
    }

    /// How long after `earlier` the device passed it; `None` where they are in different streams of the worker. Both
    /// are timed, and the device has passed them.
    pub(crate) fn since(&self, earlier: &Milestone) -> Result<Option<Duration>> {
        let ((from, began), (to, ended)) = (earlier.events[earlier.at], self.events[self.at]);
        (from == to).then(|| self.driver.elapsed(began, ended)).transpose()
    }

    /// Work put on `stream` from now on begins when the device has passed it.
    pub(crate) fn hold(&self, stream: Stream) -> Result<()> {
        self.driver.wait(stream, self.events[self.at].1)
    }

    /// Is now at the end of what is on the stream, one of its own.
    pub(crate) fn set(&mut self, stream: Stream) -> Result<()> {
        let known = self.events.iter().position(|(own, _)| *own == stream);
        self.at = known.expect("a milestone is made for all streams of whoever sets it");
        self.passed = false;
        self.driver.record(self.events[self.at].1, stream)
    }

    /// Waits until the device has passed it.
    pub(crate) fn wait(&mut self) -> Result<()> {
        if !self.passed {
            self.driver.synchronize(self.events[self.at].1)?;
            self.passed = true;
        }
        Ok(())
    }
}
