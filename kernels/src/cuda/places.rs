//! Where a worker's work goes on a GPU: a stream on all of it and, where the worker has a part of the multiprocessors,
//! one on that.
//!
//! ```text
//!   whole   [ step 1 ]            wait [ step 4 ]
//!                   \ left       /  left
//!   part             wait [ step 2 ][ step 3 ]
//! ```
//!
//! Work is put on one of the two at a time, and what moves to the other one waits there for what was left behind, on
//! the device. So all work of a worker has one order, and whoever waits for the last of it has waited for all.
//!
//! Owner: the device. What is made for one stream alone, events, captured work and what is cut for a number of
//! multiprocessors, is there once for each place, in the order of [`DeviceShare`].

use std::sync::atomic::{AtomicUsize, Ordering};

use super::driver::{Driver, Event, Part, Stream, StreamPriority};
use crate::device::DeviceShare;
use crate::{KernelError, Result};

/// Shares that a device may have; by the number of a share.
pub(super) const SHARES: [DeviceShare; 2] = [DeviceShare::Whole, DeviceShare::Part];

/// A stream and what it is on.
pub(super) struct Place {
    pub(super) stream: Stream,
    /// `None`: all of the device.
    pub(super) part: Option<Part>,
    /// The end of what was here when work moved on.
    left: Event,
}

impl Place {
    fn new(driver: &dyn Driver, priority: StreamPriority, part: Option<Part>) -> Result<Self> {
        let stream = driver.stream(priority, part)?;
        Ok(Place { stream, part, left: driver.event(stream)? })
    }
}

/// The places of one worker.
pub(super) struct Places {
    /// By share: all of the device, and the part if there is one.
    all: Vec<Place>,
    /// Where work is put now. Only the thread that puts it there changes it.
    at: AtomicUsize,
}

impl Places {
    /// All of the device, where work is put at first, and a part of it.
    pub(super) fn new(driver: &dyn Driver, priority: StreamPriority, part: Option<Part>) -> Result<Self> {
        let parts = std::iter::once(None).chain(part.map(Some));
        let all = parts.map(|part| Place::new(driver, priority, part)).collect::<Result<_>>()?;
        Ok(Places { all, at: AtomicUsize::new(0) })
    }

    /// The number of the place where work is put now, of [`len`](Self::len).
    pub(super) fn at(&self) -> usize {
        self.at.load(Ordering::Relaxed)
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Where work is put now.
    pub(super) fn current(&self) -> &Place {
        &self.all[self.at()]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Place> {
        self.all.iter()
    }

    /// The part, where there is one.
    pub(super) fn part(&self) -> Option<Part> {
        self.all.iter().find_map(|place| place.part)
    }

    /// Work is put there from now on, and begins after all that was put elsewhere. Nothing happens where it is there
    /// already.
    ///
    /// # Errors
    /// There is no part; or the driver's, and then work stays where it was.
    pub(super) fn move_to(&self, driver: &dyn Driver, share: DeviceShare) -> Result<()> {
        let (from, to) = (self.current(), share as usize);
        if to == self.at() {
            return Ok(());
        }
        let place = self.all.get(to).ok_or_else(|| no_part("a GPU without"))?;
        driver.record(from.left, from.stream)?;
        driver.wait(place.stream, from.left)?;
        self.at.store(to, Ordering::Relaxed);
        Ok(())
    }
}

/// A part of a device was asked for that has none.
pub(crate) fn no_part(found: &str) -> KernelError {
    KernelError::Unsupported(format!("expected a device with a part for its worker, found {found}"))
}
