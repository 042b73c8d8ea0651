//! Vector clocks (Mattern, 1989): which work is done where, as an order of events proves it.
//!
//! Every operation has a number in its stream; a clock says, for each stream, up to which number its work is done.
//! Operation A comes before operation B if B's clock knows A's number, which is one comparison (epochs, as in
//! FastTrack, Flanagan and Freund, 2009).

use std::fmt;
use std::sync::Arc;

/// Per stream, the last operation that is known to be done; none is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Clock(Vec<u64>);

impl Clock {
    /// Knows what either knew.
    pub(super) fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (own, other) in self.0.iter_mut().zip(&other.0) {
            *own = (*own).max(*other);
        }
    }

    pub(super) fn set(&mut self, stream: usize, number: u64) {
        if self.0.len() <= stream {
            self.0.resize(stream + 1, 0);
        }
        self.0[stream] = number;
    }

    pub(super) fn number(&self, stream: usize) -> u64 {
        self.0.get(stream).copied().unwrap_or(0)
    }

    pub(super) fn knows(&self, stamp: &Stamp) -> bool {
        self.number(stamp.stream) >= stamp.number
    }
}

/// One operation: its stream, its number there from 1 on, and what it is, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) stream: usize,
    pub(super) number: u64,
    pub(super) what: Arc<str>,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on s{}", self.what, self.stream)
    }
}
