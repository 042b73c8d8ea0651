//! Zeroed memory that the operating system hands out page by page, aligned for every vector load.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
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
unsafe impl Plain for f32 {}

/// Above this size the kernel is asked for huge pages: streaming through weights then misses the TLB far less often.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// An owned, page-aligned slice of zeros at first. Pages are touched lazily, so a large KV cache costs memory only as it fills.
pub(crate) struct Buffer<T: Plain> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the buffer owns its memory, and its elements are `Send` and `Sync`.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeros. A size that overflows or that the system refuses is [`KernelError::Unsupported`].
    pub(crate) fn zeros(len: usize) -> Result<Self> {
        let refused =
            || KernelError::Unsupported(format!("cannot allocate {len} elements of {} bytes", size_of::<T>()));
        let bytes =
            len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize).ok_or_else(refused)?;
        if bytes == 0 {
            return Ok(Buffer { start: NonNull::dangling(), len });
        }
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(refused());
        }
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE_BYTES {
            // SAFETY: the range was mapped just above; the advice changes no contents, and its failure is harmless.
            unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        }
        Ok(Buffer { start: NonNull::new(start.cast()).expect("mmap never returns null without MAP_FIXED"), len })
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
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

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.bytes() > 0 {
            // SAFETY: the range was mapped by `zeros` with these bytes and is unmapped once.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes()) };
        }
    }
}
