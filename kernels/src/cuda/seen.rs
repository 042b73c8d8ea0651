//! Which slot of the sampler's table of seen tokens is whose.
//!
//! Penalties are for the tokens that a sequence has seen. The device keeps them: a slot for each sequence with penalties, to which
//! the sampling kernel adds what it samples. So a step that follows the one before needs nothing of the host, not even the token
//! between the two. Who has no slot, or has one that is not up to the position that is sampled (its step is repeated, or it was
//! somewhere else), begins anew with all its tokens.
//!
//! Owner: a sampler. A row costs a look-up, and one that begins anew without a slot O(slots).

use std::collections::HashMap;

use crate::{KernelError, Result};

/// Where the seen tokens of a row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) slot: u32,
    /// What is there is another's, or not up to date.
    pub(super) anew: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    sequence: Option<u64>,
    /// The position of the first token that is not in the slot, if the last step that used it is not repeated.
    next: u32,
    /// Which step that was.
    step: u64,
}

pub(super) struct SeenSlots {
    slots: Vec<Slot>,
    by_sequence: HashMap<u64, usize>,
    /// Steps so far; the first is 1.
    step: u64,
}

impl SeenSlots {
    /// For steps of at most so many rows: each finds a slot that no other row of its step has.
    pub(super) fn new(rows_max: usize) -> Self {
        SeenSlots { slots: vec![Slot::default(); rows_max], by_sequence: HashMap::with_capacity(rows_max), step: 0 }
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.step += 1;
    }

    /// Whether a sequence's slot has all tokens before `position`, once the steps before have run.
    pub(super) fn knows(&self, sequence: u64, position: u32) -> bool {
        self.by_sequence.get(&sequence).is_some_and(|&slot| self.slots[slot].next == position)
    }

    /// The slot of a sequence whose token at `position` is sampled, and then added to it: its own, else that which was used
    /// longest ago.
    ///
    /// # Errors
    /// The sequence is in the step already, or more rows are than slots.
    pub(super) fn place(&mut self, sequence: u64, position: u32) -> Result<Place> {
        let anew = !self.knows(sequence, position);
        let index = match self.by_sequence.get(&sequence) {
            Some(&own) => own,
            None => self.longest_unused()?,
        };
        let slot = &mut self.slots[index];
        if slot.step == self.step {
            let found = format!("a second one of sequence {sequence}");
            return Err(KernelError::shape("sampler", "one row of each sequence in a step", found));
        }
        if let Some(other) = slot.sequence.replace(sequence).filter(|other| *other != sequence) {
            self.by_sequence.remove(&other);
        }
        (slot.next, slot.step) = (position + 1, self.step);
        self.by_sequence.insert(sequence, index);
        Ok(Place { slot: index as u32, anew })
    }

    fn longest_unused(&self) -> Result<usize> {
        let free = self.slots.iter().enumerate().filter(|(_, slot)| slot.step < self.step);
        let longest = free.min_by_key(|(_, slot)| (slot.sequence.is_some(), slot.step));
        longest.map(|(index, _)| index).ok_or_else(|| {
            KernelError::shape("sampler", format!("at most {} rows with penalties", self.slots.len()), "one more")
        })
    }

    /// A sequence has ended, or a step with it has failed: it has no slot.
    pub(super) fn forget(&mut self, sequence: u64) {
        if let Some(slot) = self.by_sequence.remove(&sequence) {
            self.slots[slot].sequence = None;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Steps of (sequence, position): each row's slot, and whether it begins anew.
    fn step(slots: &mut SeenSlots, rows: &[(u64, u32)]) -> Vec<(u32, bool)> {
        slots.begin();
        let place = |&(sequence, position): &(u64, u32)| {
            let known = slots.knows(sequence, position);
            let Place { slot, anew } = slots.place(sequence, position).unwrap();
            assert_eq!(known, !anew);
            (slot, anew)
        };
        rows.iter().map(place).collect()
    }

    #[test]
    fn a_sequence_goes_on_in_its_slot() {
        let mut slots = SeenSlots::new(3);
        assert_eq!(step(&mut slots, &[(7, 5), (8, 2)]), [(0, true), (1, true)]);
        assert_eq!(step(&mut slots, &[(8, 3), (7, 6)]), [(1, false), (0, false)]);
        // One was not in a step; the other's step is repeated.
        assert_eq!(step(&mut slots, &[(8, 4)]), [(1, false)]);
        assert_eq!(step(&mut slots, &[(7, 7), (8, 4)]), [(0, false), (1, true)]);
        // It sampled two tokens elsewhere.
        assert_eq!(step(&mut slots, &[(7, 10)]), [(0, true)]);
    }

    #[test]
    fn who_has_no_slot_takes_the_one_unused_longest() {
        let mut slots = SeenSlots::new(2);
        step(&mut slots, &[(1, 0)]);
        step(&mut slots, &[(2, 0)]);
        step(&mut slots, &[(1, 1)]);
        assert_eq!(step(&mut slots, &[(3, 4), (1, 2)]), [(1, true), (0, false)]);
        assert!(!slots.knows(2, 1));
        // Its place is another's.
        assert_eq!(step(&mut slots, &[(2, 1)]), [(0, true)]);
        assert_eq!(step(&mut slots, &[(3, 5), (1, 3)]), [(1, false), (0, true)]);
        // One that is free comes before one that is used.
        slots.forget(1);
        slots.forget(1);
        assert_eq!(step(&mut slots, &[(4, 0)]), [(0, true)]);
        assert_eq!(step(&mut slots, &[(3, 6)]), [(1, false)]);
        // An id that comes again is another sequence.
        slots.forget(3);
        assert_eq!(step(&mut slots, &[(3, 7)]), [(1, true)]);
    }

    #[test]
    fn rows_of_a_step_have_slots_of_their_own() {
        let mut slots = SeenSlots::new(2);
        step(&mut slots, &[(1, 0), (2, 0)]);
        let again = slots.place(2, 1).unwrap_err().to_string();
        assert_eq!(again, "sampler: expected one row of each sequence in a step, found a second one of sequence 2");
        let third = slots.place(3, 0).unwrap_err().to_string();
        assert_eq!(third, "sampler: expected at most 2 rows with penalties, found one more");
        // Neither took anything away.
        assert_eq!(step(&mut slots, &[(2, 1), (1, 1)]), [(1, false), (0, false)]);
    }
}
