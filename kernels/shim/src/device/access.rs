//! Who used which bytes of an allocation last, so that the next use can be checked against them.
//!
//! A use costs O(log stretches + stretches it covers). A write makes one stretch of what it covers, and reads of equal
//! history grow together, so that there are no more stretches than distinct bounds of what is read between two writes.

use std::collections::BTreeMap;
use std::ops::Range;

use super::clock::{Clock, Stamp};

/// What an operation does to bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Either, where the order is not the streams' affair: blocks of a KV cache, which the scheduler keeps apart.
    Unordered,
}

/// Whose memory an address has to lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Device,
    Pinned,
}

/// How many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    Bytes(u64),
    /// Depends on data; for order, the first byte stands for all. The address may be an allocation's end.
    Unknown,
}

/// One operand of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access {
    pub(super) name: &'static str,
    pub(super) at: u64,
    pub(super) extent: Extent,
    pub(super) kind: Kind,
    pub(super) place: Place,
}

/// The last write of a stretch, and who read it since, at most one per stream. What the host knows to be done may be
/// missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Uses {
    write: Option<Stamp>,
    reads: Vec<Stamp>,
}

impl Uses {
    fn add_read(&mut self, stamp: &Stamp, host: &Clock) {
        self.write.take_if(|write| host.knows(write));
        self.reads.retain(|read| read.stream != stamp.stream && !host.knows(read));
        self.reads.push(stamp.clone());
    }

    /// A use that is not known to come before one with this clock.
    fn conflict(&self, writes: bool, clock: &Clock) -> Option<&Stamp> {
        let reads = if writes { self.reads.as_slice() } else { &[] };
        self.write.iter().chain(reads).find(|stamp| !clock.knows(stamp))
    }
}

/// Uses of one allocation, by offset; what is in no stretch was not used.
#[derive(Debug, Default)]
pub(super) struct History {
    /// Start to end and uses; stretches do not overlap and are not empty.
    stretches: BTreeMap<u64, (u64, Uses)>,
}

impl History {
    /// A use of `range` that one of `writes`, with this clock, is not known to come after.
    pub(super) fn conflict(&self, range: &Range<u64>, writes: bool, clock: &Clock) -> Option<&Stamp> {
        if range.is_empty() {
            return None;
        }
        let before = self.stretches.range(..range.start).next_back().filter(|(_, (end, _))| *end > range.start);
        let inside = self.stretches.range(range.clone());
        before.into_iter().chain(inside).find_map(|(_, (_, uses))| uses.conflict(writes, clock))
    }

    /// A use that has been checked. `host` is what the host knows to be done, with which all that comes agrees.
    pub(super) fn note(&mut self, range: Range<u64>, writes: bool, stamp: &Stamp, host: &Clock) {
        if range.is_empty() {
            return;
        }
        self.split(range.start);
        self.split(range.end);
        let starts: Vec<u64> = self.stretches.range(range.clone()).map(|(start, _)| *start).collect();
        if writes {
            starts.iter().for_each(|start| drop(self.stretches.remove(start)));
            let uses = Uses { write: Some(stamp.clone()), reads: Vec::new() };
            self.stretches.insert(range.start, (range.end, uses));
            return;
        }
        let mut read: Vec<(Range<u64>, Uses)> = Vec::new();
        let mut add = |range: Range<u64>, mut uses: Uses| {
            uses.add_read(stamp, host);
            match read.last_mut() {
                Some((last, same)) if *same == uses => last.end = range.end,
                _ => read.push((range, uses)),
            }
        };
        let mut at = range.start;
        for start in starts {
            let (end, uses) = self.stretches.remove(&start).expect("it was there when starts were listed");
            if at < start {
                add(at..start, Uses::default());
            }
            add(start..end, uses);
            at = end;
        }
        if at < range.end {
            add(at..range.end, Uses::default());
        }
        self.stretches.extend(read.into_iter().map(|(range, uses)| (range.start, (range.end, uses))));
    }

    /// Makes `at` a bound of stretches.
    fn split(&mut self, at: u64) {
        let Some((_, (end, uses))) = self.stretches.range_mut(..at).next_back() else { return };
        if *end > at {
            let rest = (*end, uses.clone());
            *end = at;
            self.stretches.insert(at, rest);
        }
    }

    #[cfg(test)]
    fn stretches(&self) -> usize {
        self.stretches.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(stream: usize, number: u64) -> Stamp {
        Stamp { stream, number, what: "work".into() }
    }

    fn clock(numbers: &[u64]) -> Clock {
        let mut clock = Clock::default();
        numbers.iter().enumerate().for_each(|(stream, number)| clock.set(stream, *number));
        clock
    }

    #[test]
    fn uses_of_the_same_bytes_are_found_and_others_are_not() {
        let mut history = History::default();
        let host = Clock::default();
        history.note(10..20, true, &stamp(0, 3), &host);
        let found = |history: &History, range, writes, numbers: &[u64]| {
            history.conflict(&range, writes, &clock(numbers)).map(|stamp| (stamp.stream, stamp.number))
        };
        for range in [0..11, 19..30, 12..13, 0..40] {
            assert_eq!(found(&history, range.clone(), false, &[2]), Some((0, 3)));
            assert_eq!(found(&history, range, false, &[3]), None);
        }
        for range in [0..10, 20..30, 15..15] {
            assert_eq!(found(&history, range, true, &[0]), None);
        }
        history.note(15..25, false, &stamp(1, 7), &host);
        assert_eq!(found(&history, 22..23, false, &[0, 0]), None, "two reads");
        assert_eq!(found(&history, 22..23, true, &[0, 6]), Some((1, 7)));
        assert_eq!(found(&history, 14..16, true, &[3, 6]), Some((1, 7)));
        assert_eq!(found(&history, 14..15, true, &[3, 6]), None);
        assert_eq!(found(&history, 0..99, true, &[3, 7]), None);
    }

    #[test]
    fn a_use_within_a_stretch_leaves_what_is_around_it() {
        for writes in [false, true] {
            let mut history = History::default();
            history.note(0..100, true, &stamp(0, 1), &Clock::default());
            history.note(40..60, writes, &stamp(1, 1), &clock(&[1]));
            let found = |range| history.conflict(&range, true, &clock(&[0, 0])).map(|stamp| stamp.stream);
            assert_eq!([found(0..40), found(60..100)], [Some(0); 2]);
            assert_eq!(found(40..60), Some(1));
        }
    }

    #[test]
    fn stretches_grow_together() {
        let mut history = History::default();
        for part in 0..100 {
            history.note(part * 8..part * 8 + 8, true, &stamp(0, part + 1), &Clock::default());
        }
        assert_eq!(history.stretches(), 100);
        history.note(0..800, false, &stamp(1, 1), &Clock::default());
        assert_eq!(history.stretches(), 100, "the writes are different ones");
        history.note(0..800, false, &stamp(1, 2), &clock(&[100]));
        assert_eq!(history.stretches(), 1, "the host knows all of them");
        for part in 0..100 {
            history.note(part * 8..part * 8 + 8, false, &stamp(1, 3 + part), &clock(&[100]));
        }
        history.note(0..800, true, &stamp(1, 200), &clock(&[100]));
        assert_eq!(history.stretches(), 1);
    }
}
