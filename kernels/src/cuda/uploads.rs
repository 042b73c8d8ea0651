//! What the host brings to a device for each step: small arrays, one after another in pinned memory and in device memory
//! alike, so that a copy or two bring all of them.
//!
//! ```text
//!   pinned   ids ▓▓▓░ │ sampled rows ▓░ │ slices ▓▓░ │ pieces ▓▓▓░░░░░░░░░░░░ │ ...        tables ▓▓▓▓▓░░░░░
//!            └──────────────────── a copy ────────────────────┘                           └─ another ─┘
//!   device   ids ▓▓▓  │ ...
//! ```
//!
//! All copies are between two steps' work, and each takes a microsecond or two to begin, in which some 32 KiB could move (estimates,
//! not measured yet): what lies between two filled stretches is copied along where it is short. So an array holds what the host
//! put there last, at any time after.
//!
//! Owner: a worker's device. Filling waits for the last copies, which are done long before, unless the device is two steps behind.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvern_cuda_abi::Ptr;

use super::CudaDevice;
use super::driver::{Driver, Stream};
use super::memory::{DeviceMemory, Milestone, Pinned};
use crate::{KernelError, Result};

/// Bytes of a region that arrays share, and of the largest that does. The pieces of decode attention are the largest.
const SHARED_BYTES: usize = 512 << 10;
const SHARED_ARRAY_BYTES: usize = 256 << 10;
/// Most bytes between two stretches that go in one copy.
const GAP_BYTES: usize = 32 << 10;
/// Arrays begin at multiples of this, as allocations do.
const ALIGN: usize = 16;
/// Regions are copied by words of this type.
const WORD: usize = size_of::<u64>();

/// The arrays of one device, and what of them waits to be copied.
pub(crate) struct StepUploads {
    driver: Arc<dyn Driver>,
    /// `None` where all its arrays are gone.
    regions: Vec<Option<Region>>,
    written: Vec<Stretch>,
    copied: Milestone,
}

/// Pinned memory and as much of the device's.
struct Region {
    pinned: Pinned<u64>,
    device: DeviceMemory,
    /// Bytes from the start that arrays were given.
    taken: usize,
    arrays: usize,
}

/// Bytes of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stretch {
    region: usize,
    first: usize,
    end: usize,
}

impl StepUploads {
    /// Without arrays; `copied` is of all streams that copies go on.
    pub(crate) fn new(driver: &Arc<dyn Driver>, copied: Milestone) -> Self {
        StepUploads { driver: Arc::clone(driver), regions: Vec::new(), written: Vec::with_capacity(64), copied }
    }

    /// A place for an array of so many bytes, and where that is on the device.
    fn place(&mut self, what: &str, bytes: usize) -> Result<(Stretch, Ptr)> {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGN).unwrap_or(usize::MAX);
        let has_room = |region: &Option<Region>| {
            region.as_ref().is_some_and(|region| region.pinned.bytes() == SHARED_BYTES && region.left() >= bytes)
        };
        let shared = (bytes <= SHARED_ARRAY_BYTES).then(|| self.regions.iter().position(has_room)).flatten();
        let region = match shared {
            Some(region) => region,
            None if bytes <= SHARED_ARRAY_BYTES => self.add("inputs of steps", SHARED_BYTES)?,
            None => self.add(what, bytes)?,
        };
        let own = self.regions[region].as_mut().expect("it was found, or made");
        let first = own.taken;
        own.taken += bytes;
        own.arrays += 1;
        Ok((Stretch { region, first, end: first + bytes }, own.device.at(first)))
    }

    fn add(&mut self, what: &str, bytes: usize) -> Result<usize> {
        let device = DeviceMemory::new(&self.driver, what, bytes)?;
        let region = Region { pinned: Pinned::new(&self.driver, bytes / WORD)?, device, taken: 0, arrays: 0 };
        let at = self.regions.iter().position(Option::is_none).unwrap_or(self.regions.len());
        if at == self.regions.len() {
            self.regions.push(None);
        }
        self.regions[at] = Some(region);
        Ok(at)
    }

    fn give_back(&mut self, place: Stretch) {
        let Some(region) = &mut self.regions[place.region] else { return };
        region.arrays -= 1;
        if region.arrays == 0 {
            self.written.retain(|stretch| stretch.region != place.region);
            self.regions[place.region] = None;
        }
    }

    /// Puts copies of all that was filled since the last ones on a stream.
    pub(crate) fn bring(&mut self, stream: Stream) -> Result<()> {
        if self.written.is_empty() {
            return Ok(());
        }
        self.written.sort_unstable();
        let copies = self.written.chunk_by(|a, b| a.region == b.region && b.first <= a.end + GAP_BYTES);
        let done = copies.into_iter().try_for_each(|joined| {
            let Stretch { region, first, .. } = joined[0];
            let end = joined.iter().map(|stretch| stretch.end).max().unwrap_or(first);
            let Region { pinned, device, .. } = self.regions[region].as_ref().expect("what was filled is there");
            // SAFETY: the device's memory is as long; whoever fills arrays waits for the copies.
            unsafe { pinned.copy_to(stream, device.at(first), first / WORD, (end - first).div_ceil(WORD)) }
        });
        self.written.clear();
        // Also where a copy failed: others may be under way.
        self.copied.set(stream)?;
        done
    }
}

impl Region {
    fn left(&self) -> usize {
        self.pinned.bytes() - self.taken
    }
}

/// An array that the host fills for each step and kernels read, always at the same address: captured launches hold it. It is
/// on the device when the next launch runs; a kernel may change it for the rest of its step.
pub(crate) struct StepArray<T: Copy> {
    uploads: Arc<Mutex<StepUploads>>,
    place: Stretch,
    ptr: Ptr,
    capacity: usize,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Copy> StepArray<T> {
    pub(crate) fn new(gpu: &CudaDevice, what: &str, capacity: usize) -> Result<Self> {
        const { assert!(align_of::<T>() <= WORD) };
        let uploads = Arc::clone(&gpu.uploads);
        let (place, ptr) = lock(&uploads).place(what, capacity.saturating_mul(size_of::<T>()))?;
        Ok(StepArray { uploads, place, ptr, capacity, len: 0, values: PhantomData })
    }

    /// Values of the last fill.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn ptr(&self) -> Ptr {
        self.ptr
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn bytes(&self) -> usize {
        self.place.end - self.place.first
    }

    /// Takes `values`. More than there is room for is an error.
    pub(crate) fn fill(&mut self, values: impl ExactSizeIterator<Item = T>) -> Result<()> {
        let len = values.len();
        if len > self.capacity {
            let expected = format!("at most {} entries", self.capacity);
            return Err(KernelError::shape("step array", expected, len));
        }
        self.len = len;
        if len == 0 {
            return Ok(());
        }
        let (Stretch { region, first, .. }, bytes) = (self.place, len * size_of::<T>());
        let mut uploads = lock(&self.uploads);
        uploads.copied.wait()?;
        let own = uploads.regions[region].as_mut().expect("a region stays while it has arrays");
        let words = own.pinned.write(first / WORD..(first + bytes).div_ceil(WORD))?;
        let to = words.as_mut_ptr().cast::<T>();
        // SAFETY: the words hold `len` values of a type that is aligned as they are, at most.
        values.take(len).enumerate().for_each(|(at, value)| unsafe { to.add(at).write(value) });
        uploads.written.push(Stretch { region, first, end: first + bytes });
        Ok(())
    }
}

impl<T: Copy> Drop for StepArray<T> {
    fn drop(&mut self) {
        lock(&self.uploads).give_back(self.place);
    }
}

/// What a panic leaves half done is an array of a step that failed.
pub(crate) fn lock(uploads: &Mutex<StepUploads>) -> MutexGuard<'_, StepUploads> {
    uploads.lock().unwrap_or_else(PoisonError::into_inner)
}
