//! The device's time, and events that keep it. It is time in which work runs, a microsecond for each operation on any
//! stream, and what tests add; so a test can say to the microsecond how long things took.
//!
//! To pass a timer is an operation of its stream: the host knows that it has been passed only from a wait for it, or
//! for something after it.

use std::time::Duration;

use kvern_kernels::Result;
use kvern_kernels::cuda::driver::{Event, Stream};

use super::{EventState, Item, State, place};
use crate::device::clock::Stamp;
use crate::device::work::Operation;

/// What each operation takes; a graph takes it for each of its own.
const OPERATION: Duration = Duration::from_micros(1);

impl State {
    pub(in crate::device) fn add_timer(&mut self, stream: Stream) -> Result<Event> {
        let event = self.add_event(stream)?;
        self.events[event.0 as usize].time = Some(Duration::ZERO);
        Ok(event)
    }

    /// Time goes by without work.
    pub(in crate::device) fn rest(&mut self, time: Duration) {
        self.now += time;
    }

    pub(super) fn work_for(&mut self, operation: &Operation) {
        self.now += OPERATION * operation.parts() as u32;
    }

    /// Marks the end of a stream, by a number of its own.
    pub(super) fn record_timer(&mut self, event: usize, index: usize) -> Result<()> {
        let host = self.host.clone();
        let stream = &mut self.streams[index];
        stream.operations += 1;
        stream.clock.join(&host);
        stream.clock.set(index, stream.operations);
        stream.queue.push_back(Item::Pass(event));
        let clock = stream.clock.clone();
        self.events[event].marked = Some((clock, self.end_of(index)));
        self.run_if_eager(index)
    }

    pub(super) fn pass_timer(&mut self, event: usize) {
        self.events[event].time = Some(self.now);
    }

    pub(in crate::device) fn elapsed(&mut self, from: Event, to: Event) -> Result<Duration> {
        let places = [from, to].map(|event| self.events.get(event.0 as usize).and_then(|event| event.part));
        let [from, to] = [self.time_of(from)?, self.time_of(to)?];
        if places[0] != places[1] {
            let [first, second] = places.map(place);
            let text = format!("expected timers of one part of the device, found those of {first} and of {second}");
            return Err(self.refuse("elapsed", text));
        }
        Ok(to.saturating_sub(from))
    }

    /// When a timer was passed, if the host can know that it was.
    fn time_of(&mut self, event: Event) -> Result<Duration> {
        let index = self.event("elapsed", event)?;
        let EventState { marked, time, .. } = self.events[index].clone();
        let problem = match (time, marked) {
            (None, _) => "an event without time",
            (_, None) => "it was never recorded",
            (Some(time), Some((clock, mark))) => {
                let number = clock.number(mark.stream);
                if self.host.knows(&Stamp { stream: mark.stream, number, what: "a timer".into() }) {
                    return Ok(time);
                }
                "the host does not know that it was"
            }
        };
        Err(self.refuse("elapsed", format!("expected e{index} to be a timer that was passed, found {problem}")))
    }
}
