//! A slice that the tasks of one job write in disjoint parts.

use std::marker::PhantomData;
use std::ops::Range;
use std::slice;

/// A mutable borrow that may be handed out in parts.
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `part`, whose callers keep the parts disjoint.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}
// SAFETY: it is a mutable borrow, which is `Send` for such `T`.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        SharedSlice { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// A part of the slice; panics outside of it.
    ///
    /// # Safety
    /// Parts that are alive at the same time do not overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} elements", self.len);
        // SAFETY: in bounds as just asserted, and disjoint from other live parts by the caller's promise.
        unsafe { slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
