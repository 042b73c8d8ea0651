//! Handles to what the driver has made: a table that only grows, up to a limit, and is read without a lock.

use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{KernelError, Result};

/// A pointer to an object of the driver's.
pub(super) struct Raw<T>(pub(super) *mut T);

impl<T> Clone for Raw<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Raw<T> {}

// SAFETY: the driver's objects mean the same on every thread, and its calls on them may come from any; that those on
// one stream come from one thread at a time is what the trait asks of its callers.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above; a shared reference only gives out the pointer.
unsafe impl<T> Sync for Raw<T> {}

/// Objects by number. They stay until the table goes.
pub(super) struct Table<T> {
    /// What they are, in the plural, for the error of a full table.
    what: &'static str,
    slots: Box<[OnceLock<T>]>,
    /// How many slots are filled; held while one is.
    used: Mutex<usize>,
}

impl<T> Table<T> {
    pub(super) fn new(what: &'static str, most: usize) -> Self {
        Table { what, slots: (0..most).map(|_| OnceLock::new()).collect(), used: Mutex::new(0) }
    }

    /// Makes an object if there is room for it, and returns its number.
    pub(super) fn add(&self, make: impl FnOnce() -> Result<T>) -> Result<u32> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = self.slots.get(*used) else {
            let (most, what) = (self.slots.len(), self.what);
            return Err(KernelError::Unsupported(format!("expected at most {most} {what} on one GPU, found one more")));
        };
        let number = u32::try_from(*used).expect("tables are small");
        let object = make()?;
        assert!(slot.set(object).is_ok(), "slots are filled in order");
        *used += 1;
        Ok(number)
    }

    /// The object of a number that [`add`](Self::add) has returned.
    pub(super) fn get(&self, number: u32) -> &T {
        self.slots[number as usize].get().expect("a handle that this driver gave out")
    }

    /// All objects; none are left.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        *self.used.get_mut().unwrap_or_else(PoisonError::into_inner) = 0;
        self.slots.iter_mut().filter_map(OnceLock::take)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_table_numbers_its_objects_and_has_a_limit() {
        let mut table = Table::new("letters", 2);
        assert_eq!(table.add(|| Ok('a')).unwrap(), 0);
        let failed = table.add(|| Err(KernelError::Unsupported("no letter".into()))).unwrap_err();
        assert_eq!(failed.to_string(), "no letter");
        assert_eq!(table.add(|| Ok('b')).unwrap(), 1);
        assert_eq!((*table.get(0), *table.get(1)), ('a', 'b'));
        let full = table.add(|| panic!("nothing is made without a place")).unwrap_err();
        assert_eq!(full.to_string(), "expected at most 2 letters on one GPU, found one more");
        assert_eq!(table.drain().collect::<String>(), "ab");
        assert_eq!(table.drain().count(), 0);
    }
}
