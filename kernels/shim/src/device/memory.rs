//! Device and pinned memory: allocations between guard pages, what was used last, and what was freed.

use std::collections::BTreeMap;
use std::ops::Range;

use super::access::{Access, Extent, History, Kind, Place};
use super::clock::{Clock, Stamp};
use crate::Buffer;

struct Allocation {
    buffer: Buffer<u8>,
    bytes: u64,
    place: Place,
    /// Whether it was not freed yet; its addresses are not given out again.
    live: bool,
    history: History,
    /// The last use of each stream.
    users: Vec<Stamp>,
}

/// All memory of a device, and what of the host's it copies from and to.
pub(super) struct Memory {
    /// By their first address.
    allocations: BTreeMap<u64, Allocation>,
    device_bytes: usize,
    device_used: usize,
}

impl Memory {
    pub(super) fn new(device_bytes: usize) -> Memory {
        Memory { allocations: BTreeMap::new(), device_bytes, device_used: 0 }
    }

    /// Bytes of device memory that are left.
    pub(super) fn free_bytes(&self) -> usize {
        self.device_bytes - self.device_used
    }

    /// Poison on the device, of which there must be as much; zeros on the host.
    pub(super) fn allocate(&mut self, bytes: usize, place: Place) -> u64 {
        let buffer = Buffer::<u8>::poisoned(bytes);
        let at = buffer.ptr().0;
        match place {
            Place::Device => self.device_used += bytes,
            // SAFETY: the buffer is new and as long.
            Place::Pinned => unsafe { (at as *mut u8).write_bytes(0, bytes) },
        }
        let history = History::default();
        let allocation = Allocation { buffer, bytes: bytes as u64, place, live: true, history, users: Vec::new() };
        self.allocations.insert(at, allocation);
        at
    }

    /// # Errors
    /// Why it may not be freed, in words: it is not the start of a live allocation of this place and (where given)
    /// size, or something uses it that `host` does not know to be done, if `host` is given.
    pub(super) fn free(
        &mut self,
        at: u64,
        bytes: Option<usize>,
        place: Place,
        host: Option<&Clock>,
    ) -> Result<(), String> {
        self.find(at, 0, place)?;
        let Some(allocation) = self.allocations.get_mut(&at) else {
            return Err(format!("expected the start of an allocation, found {at:#x} within one"));
        };
        if let Some(bytes) = bytes.filter(|bytes| *bytes as u64 != allocation.bytes) {
            return Err(format!("expected all {} bytes of the allocation, found {bytes}", allocation.bytes));
        }
        if let Some(user) = host.and_then(|host| allocation.users.iter().find(|user| !host.knows(user))) {
            return Err(format!("expected no work under way that uses it, found {user}"));
        }
        allocation.live = false;
        allocation.buffer.check();
        allocation.buffer.retire();
        allocation.history = History::default();
        if place == Place::Device {
            self.device_used -= allocation.bytes as usize;
        }
        Ok(())
    }

    /// The start of the live allocation of `place` that `bytes` from `at` on lie in.
    ///
    /// # Errors
    /// In words, where they do not.
    pub(super) fn find(&self, at: u64, bytes: u64, place: Place) -> Result<u64, String> {
        let expected = match place {
            Place::Device => "device memory",
            Place::Pinned => "pinned memory",
        };
        let found = self.allocations.range(..=at).next_back();
        let Some((start, allocation)) = found.filter(|(start, own)| at <= **start + own.bytes) else {
            return Err(format!("expected {expected}, found {at:#x} in no allocation"));
        };
        if !allocation.live {
            return Err(format!("expected {expected}, found {at:#x} in an allocation that was freed"));
        }
        if allocation.place != place {
            return Err(format!("expected {expected}, found {at:#x} in the other kind"));
        }
        let left = start + allocation.bytes - at;
        if left < bytes {
            return Err(format!("expected {bytes} bytes from {at:#x} on, found {left} to the end of its allocation"));
        }
        Ok(*start)
    }

    /// Where an access lies: the allocation's start, and offsets in it.
    fn range(&self, access: &Access) -> Result<(u64, Range<u64>), String> {
        let bytes = match access.extent {
            Extent::Bytes(bytes) => bytes,
            Extent::Unknown => 0,
        };
        let start = self.find(access.at, bytes, access.place)?;
        let from = access.at - start;
        let end = match access.extent {
            Extent::Bytes(bytes) => from + bytes,
            Extent::Unknown => self.allocations[&start].bytes.min(from + 1),
        };
        Ok((start, from..end))
    }

    /// # Errors
    /// In words, where an access is not within live memory.
    pub(super) fn check_alive(&self, accesses: &[Access]) -> Result<(), String> {
        accesses.iter().try_for_each(|access| {
            let named = |problem| format!("{}: {problem}", access.name);
            self.range(access).map(drop).map_err(named)
        })
    }

    /// # Errors
    /// In words, where an access may come before one that it has to come after, going by `clock`.
    pub(super) fn check_order(&self, accesses: &[Access], clock: &Clock) -> Result<(), String> {
        for access in accesses.iter().filter(|access| access.kind != Kind::Unordered) {
            let (start, range) = self.range(access)?;
            let writes = access.kind == Kind::Write;
            if let Some(other) = self.allocations[&start].history.conflict(&range, writes, clock) {
                let verb = if writes { "written" } else { "read" };
                return Err(format!(
                    "{}: expected to be {verb} after {other}, found no order between them",
                    access.name
                ));
            }
        }
        Ok(())
    }

    /// Accesses that have been checked.
    pub(super) fn note(&mut self, accesses: &[Access], stamp: &Stamp, host: &Clock) {
        for access in accesses {
            let (start, range) = self.range(access).expect("the access was checked");
            let allocation = self.allocations.get_mut(&start).expect("the access was checked");
            match allocation.users.iter_mut().find(|user| user.stream == stamp.stream) {
                Some(user) => user.clone_from(stamp),
                None => allocation.users.push(stamp.clone()),
            }
            if access.kind != Kind::Unordered {
                allocation.history.note(range, access.kind == Kind::Write, stamp, host);
            }
        }
    }

    /// # Panics
    /// If something was written just outside of an allocation.
    pub(super) fn check_guards(&self) {
        self.allocations.values().filter(|own| own.live).for_each(|own| own.buffer.check());
    }
}
