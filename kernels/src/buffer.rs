//! Zeroed memory that the operating system hands out page by page, aligned for every vector load.
//!
//! Huge pages decide how fast weights stream: with 4 KiB pages, misses of the TLB cost more than the reads.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::{ptr, slice};

use crate::{KernelError, Result};

/// Elements for which any bit pattern, zeros above all, is a value.
///
/// # Safety
/// The type is plain data without padding, and every bit pattern is valid.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: integers and floats are plain data.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// Above this size the kernel is asked for huge pages: streaming through weights then misses the TLB far less often.
const HUGE_PAGE_BYTES: usize = 2 << 20;
/// What an [`Arena`] maps at a time.
const CHUNK_BYTES: usize = 32 << 20;
/// Buffers in a chunk begin at multiples of this: whole cache lines, in pairs as they are prefetched.
const CHUNK_ALIGN: usize = 128;

/// Anonymous memory of the operating system, zeros at first.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping only keeps memory alive; it is used through the buffers that own parts of it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `bytes` of zeros, or `None` where the system refuses.
    fn new(bytes: usize) -> Option<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE_BYTES {
            // SAFETY: the range was mapped just above; the advice changes no contents, and its failure is harmless.
            unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        }
        Some(Mapping { start: NonNull::new(start.cast())?, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` with these bytes, and the last buffer in it is gone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// An owned, aligned slice, of zeros at first. Pages are touched lazily, so a large KV cache costs memory only as it fills.
pub(crate) struct Buffer<T: Plain> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory; none for an empty buffer.
    _mapping: Option<Arc<Mapping>>,
}

// SAFETY: the buffer owns its memory, and its elements are `Send` and `Sync`.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Plain> Sync for Buffer<T> {}

/// Bytes of `len` elements, if that many can be addressed.
fn bytes_of<T>(len: usize) -> Result<usize> {
    len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize).ok_or_else(|| refused::<T>(len))
}

fn refused<T>(len: usize) -> KernelError {
    KernelError::Unsupported(format!("cannot allocate {len} elements of {} bytes", size_of::<T>()))
}

impl<T: Plain> Buffer<T> {
    /// `len` zeros in a mapping of their own. A size that overflows or that the system refuses is
    /// [`KernelError::Unsupported`].
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let bytes = bytes_of::<T>(len)?;
        if bytes == 0 {
            return Ok(Buffer { start: NonNull::dangling(), len, _mapping: None });
        }
        let mapping = Mapping::new(bytes).ok_or_else(|| refused::<T>(len))?;
        Ok(Buffer { start: mapping.start.cast(), len, _mapping: Some(Arc::new(mapping)) })
    }

    /// A second owner of the same memory.
    ///
    /// # Safety
    /// The elements of either are used through raw pointers only, and never at the same time unless for reading.
    pub(crate) unsafe fn alias(&self) -> Self {
        Buffer { start: self.start, len: self.len, _mapping: self._mapping.clone() }
    }

    /// The first element, without a reference to any.
    pub(crate) fn start(&self) -> *mut T {
        self.start.as_ptr()
    }

    /// Elements, without a reference to any.
    pub(crate) fn count(&self) -> usize {
        self.len
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

/// Places buffers side by side in large mappings, so that matrices too small for a huge page of their own share one.
///
/// A chunk is given back when its last buffer is dropped; space within it is not reused, as weights live together.
#[derive(Default)]
pub(crate) struct Arena {
    /// The chunk being filled, and how far.
    chunk: Option<(Arc<Mapping>, usize)>,
}

impl Arena {
    /// As [`Buffer::zeros`].
    pub(crate) fn zeros<T: Plain>(&mut self, len: usize) -> Result<Buffer<T>> {
        let bytes = bytes_of::<T>(len)?;
        if bytes == 0 || bytes > CHUNK_BYTES / 4 || align_of::<T>() > CHUNK_ALIGN {
            return Buffer::zeros(len);
        }
        let (mapping, used) = match self.chunk.take() {
            Some((mapping, used)) if used + bytes <= CHUNK_BYTES => (mapping, used),
            _ => (Arc::new(Mapping::new(CHUNK_BYTES).ok_or_else(|| refused::<T>(len))?), 0),
        };
        self.chunk = Some((Arc::clone(&mapping), (used + bytes).next_multiple_of(CHUNK_ALIGN)));
        // SAFETY: `used + bytes` is within the chunk, and no other buffer has this part of it.
        let start = unsafe { mapping.start.add(used) }.cast();
        Ok(Buffer { start, len, _mapping: Some(mapping) })
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is valid for `len` elements, or dangling with zero bytes; zeros are values of `T`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
