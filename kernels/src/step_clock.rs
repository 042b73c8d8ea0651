//! When steps begin and end on a device: how long it is busy with each, and how long it waits from one to the next.
//!
//! A step has two marks, before its first work and after its last. On a GPU they are events on its stream that keep
//! their time: they cost the stream nothing but a note of when it came there, are made once, and are read where the
//! host has to wait for the step anyway. On a CPU, which computes where it is called, they are the host's time. O(1) a
//! step.
//!
//! Up to two steps are under way, and the end of the one before them is still needed: three pairs of marks are used in
//! turns.

use std::time::{Duration, Instant};

use crate::cuda::memory::Milestone;
use crate::device::Backend;
use crate::{Device, KernelError, Result};

const UNDER_WAY_MAX: u64 = 2;
const PAIRS: u64 = UNDER_WAY_MAX + 1;

/// What a step took of its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepSpan {
    /// From its beginning to its end. Gaps within it, as where the host is slower than the device, are part of it.
    pub busy: Duration,
    /// From the end of the step before to its beginning; `None` of the first, where the step before failed, and where
    /// that had another share of the device.
    pub gap: Option<Duration>,
}

/// Marks the steps of one worker on its device.
pub struct StepClock {
    pairs: Vec<Pair>,
    /// Steps are numbered: the one that begins next, or has begun and is still being put on the device.
    next: u64,
    /// The one that is taken next.
    oldest: u64,
    /// The first of those that follow each other without a failure between them.
    first: u64,
    has_begun: bool,
}

struct Pair {
    began: Mark,
    ended: Mark,
}

/// A moment of a device.
enum Mark {
    Host(Instant),
    Device(Milestone),
}

impl Mark {
    fn new(device: &Device) -> Result<Self> {
        Ok(match &device.backend {
            Backend::Cpu(_) => Mark::Host(Instant::now()),
            Backend::Cuda(gpu) => Mark::Device(gpu.timed_milestone()?),
        })
    }

    /// Is now, after all that was put on the device.
    fn set(&mut self, device: &Device) -> Result<()> {
        match (self, &device.backend) {
            (Mark::Host(at), Backend::Cpu(_)) => {
                *at = Instant::now();
                Ok(())
            }
            (Mark::Device(at), Backend::Cuda(gpu)) => at.set(gpu.stream()),
            _ => Err(KernelError::shape("step clock", "the device that it was made for", device.describe())),
        }
    }

    fn wait(&mut self) -> Result<()> {
        match self {
            Mark::Host(_) => Ok(()),
            Mark::Device(at) => at.wait(),
        }
    }

    /// Both are marks of one device, which has passed them; `None` where it had another share at the one than at the
    /// other.
    fn since(&self, earlier: &Mark) -> Result<Option<Duration>> {
        match (self, earlier) {
            (Mark::Host(at), Mark::Host(earlier)) => Ok(Some(at.saturating_duration_since(*earlier))),
            (Mark::Device(at), Mark::Device(earlier)) => at.since(earlier),
            _ => unreachable!("a clock's marks are all of one kind"),
        }
    }
}

impl StepClock {
    /// For the steps of one worker on `device`.
    pub fn new(device: &Device) -> Result<Self> {
        let pair = |_| Ok(Pair { began: Mark::new(device)?, ended: Mark::new(device)? });
        let pairs = (0..PAIRS).map(pair).collect::<Result<_>>()?;
        Ok(StepClock { pairs, next: 0, oldest: 0, first: 0, has_begun: false })
    }

    fn pair(&mut self, step: u64) -> &mut Pair {
        &mut self.pairs[(step % PAIRS) as usize]
    }

    /// A step's first work comes next.
    ///
    /// # Errors
    /// Two steps are under way already, or the device failed.
    pub fn begin(&mut self, device: &Device) -> Result<()> {
        if self.next - self.oldest >= UNDER_WAY_MAX {
            return Err(KernelError::shape("step clock", "at most two steps under way", "a third"));
        }
        let step = self.next;
        self.pair(step).began.set(device)?;
        self.has_begun = true;
        Ok(())
    }

    /// A step's last work was put on the device.
    ///
    /// # Errors
    /// None has begun, or the device failed.
    pub fn end(&mut self, device: &Device) -> Result<()> {
        if !self.has_begun {
            return Err(KernelError::shape("step clock", "a step that has begun", "none"));
        }
        let step = self.next;
        self.pair(step).ended.set(device)?;
        self.has_begun = false;
        self.next += 1;
        Ok(())
    }

    /// The step that begins, or has begun, failed and does not count.
    pub fn abandon(&mut self) {
        self.has_begun = false;
        self.first = self.next;
    }

    /// Waits for the end of the oldest step that was not taken yet.
    ///
    /// # Errors
    /// The device failed, or there is none.
    pub fn take(&mut self) -> Result<StepSpan> {
        if self.oldest == self.next {
            return Err(KernelError::shape("step clock", "a step under way", "none"));
        }
        let step = self.oldest;
        self.oldest += 1;
        self.read(step).inspect_err(|_| self.first = self.first.max(step + 1))
    }

    fn read(&mut self, step: u64) -> Result<StepSpan> {
        self.pair(step).ended.wait()?;
        let at = |step: u64| &self.pairs[(step % PAIRS) as usize];
        let busy = at(step).ended.since(&at(step).began)?;
        let gap = (step > self.first).then(|| at(step).began.since(&at(step - 1).ended)).transpose()?.flatten();
        Ok(StepSpan { busy: busy.unwrap_or_default(), gap })
    }
}
