//! Memory as a kernel sees it: 16-byte aligned, its end at a page that may not be touched.

use kvern_cuda_abi::Ptr;

/// Pages that may not be touched, before and after.
const GUARD_BYTES: usize = 1 << 20;
const PAGE_BYTES: usize = 4096;
const ALIGN: usize = 16;
/// Fills what no value was written to: a NaN of every float type.
const POISON: u8 = 0xff;

/// `len` values of plain data. The up to 15 bytes between the end and the next page are poison that must stay so.
pub struct Buffer<T: Copy> {
    mapping: *mut u8,
    mapped: usize,
    start: *mut T,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    /// Poison. `T` is a number or a struct of numbers, for which any bits are a value.
    #[must_use]
    pub fn poisoned(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        let held = bytes.next_multiple_of(ALIGN).next_multiple_of(PAGE_BYTES);
        let mapped = held + 2 * GUARD_BYTES;
        // SAFETY: a new private mapping, whose middle is then made accessible.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let mapping = libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0);
            assert!(mapping != libc::MAP_FAILED, "memory for {bytes} bytes");
            let middle = mapping.cast::<u8>().add(GUARD_BYTES);
            if held > 0 {
                let done = libc::mprotect(middle.cast(), held, libc::PROT_READ | libc::PROT_WRITE);
                assert!(done == 0, "access to {held} bytes of one's own");
                middle.write_bytes(POISON, held);
            }
            mapping.cast::<u8>()
        };
        // SAFETY: the aligned end lies within the mapping.
        let start = unsafe { mapping.add(GUARD_BYTES + held - bytes.next_multiple_of(ALIGN)) }.cast();
        Buffer { mapping, mapped, start, len }
    }

    /// A copy of `values`.
    #[must_use]
    pub fn of(values: &[T]) -> Self {
        let buffer = Buffer::poisoned(values.len());
        // SAFETY: both are as long, and the buffer is new.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buffer.start, values.len()) };
        buffer
    }

    /// For a kernel's parameters.
    #[must_use]
    pub fn ptr(&self) -> Ptr {
        Ptr(self.start as u64)
    }

    /// A copy of what is there now.
    ///
    /// # Panics
    /// If something was written just before or after the values.
    #[must_use]
    pub fn values(&self) -> Vec<T> {
        self.check();
        // SAFETY: the values are the mapping's own, and no kernel is running.
        unsafe { std::slice::from_raw_parts(self.start, self.len).to_vec() }
    }

    /// # Panics
    /// If something was written just before or after the values.
    pub fn check(&self) {
        let end = self.start.cast::<u8>().wrapping_add(self.len * size_of::<T>());
        let first = self.mapping.wrapping_add(GUARD_BYTES);
        let last = self.mapping.wrapping_add(self.mapped - GUARD_BYTES);
        // SAFETY: all of it is the mapping's accessible middle, and no kernel is running.
        unsafe {
            let before = std::slice::from_raw_parts(first, self.start as usize - first as usize);
            let after = std::slice::from_raw_parts(end, last as usize - end as usize);
            assert!(before.iter().chain(after).all(|byte| *byte == POISON), "a write outside of a buffer's values");
        }
    }

    /// Gives the memory back and keeps the addresses, which nobody may touch any more.
    pub(crate) fn retire(&mut self) {
        // SAFETY: the mapping is this buffer's own, and nothing borrows from it.
        let done = unsafe {
            libc::madvise(self.mapping.cast(), self.mapped, libc::MADV_DONTNEED) == 0
                && libc::mprotect(self.mapping.cast(), self.mapped, libc::PROT_NONE) == 0
        };
        assert!(done, "{} bytes of one's own can be given back", self.mapped);
    }
}

// SAFETY: a mapping belongs to no thread, and the values are plain data.
unsafe impl<T: Copy + Send> Send for Buffer<T> {}

impl<T: Copy> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this buffer's own.
        unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
    }
}
