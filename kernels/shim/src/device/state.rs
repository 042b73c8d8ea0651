//! Streams, events and what is known of their order; the queues that operations wait in until they run.

mod captures;
mod timers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use captures::{Capture, Captured};
use kvern_kernels::cuda::driver::{Event, Part, Stream};
use kvern_kernels::{KernelError, Result};

use super::access::{Access, Extent, Kind, Place};
use super::clock::{Clock, Stamp};
use super::faults::{Call, Fault, due};
use super::memory::Memory;
use super::work::{Operation, Work};
use super::{Options, kernels::Kernels};

/// Lines of the log, and refusals, that are kept.
const LOG_LINES_MAX: usize = 16_384;

/// A place in a stream's queue: done when as many items are.
#[derive(Clone, Copy)]
struct Mark {
    stream: usize,
    items: u64,
}

enum Item {
    Run(Arc<Operation>),
    Wait(Mark),
    /// A timer, by its number, is passed.
    Pass(usize),
}

#[derive(Default)]
struct StreamState {
    /// The device's part that it is on; `None` where that is all of it.
    part: Option<Part>,
    clock: Clock,
    operations: u64,
    queue: VecDeque<Item>,
    /// Items that have left the queue.
    done: u64,
    capture: Option<Capture>,
}

/// What an event marked last, if anything.
#[derive(Clone, Default)]
struct EventState {
    /// Of the streams that it may be recorded on.
    part: Option<Part>,
    marked: Option<(Clock, Mark)>,
    /// It is a timer, and when the device passed it last.
    time: Option<Duration>,
}

pub(super) struct State {
    lazy: bool,
    random: u64,
    pub(super) memory: Memory,
    pub(super) kernels: Kernels,
    parts: Vec<Part>,
    streams: Vec<StreamState>,
    events: Vec<EventState>,
    graphs: Vec<Captured>,
    /// The device's time: see [`timers`].
    now: Duration,
    /// What the host's threads know, as one.
    host: Clock,
    faults: Vec<Fault>,
    /// Waits until the one that is left out, that one included.
    wait_left_out: Option<u64>,
    /// The call after which there is no device, and why.
    lost: Option<(String, String)>,
    log: VecDeque<String>,
    refusals: Vec<String>,
}

impl State {
    pub(super) fn new(options: &Options) -> State {
        State {
            lazy: options.lazy,
            random: options.seed,
            memory: Memory::new(options.memory_bytes),
            kernels: Kernels::default(),
            parts: Vec::new(),
            streams: Vec::new(),
            events: Vec::new(),
            graphs: Vec::new(),
            now: Duration::ZERO,
            host: Clock::default(),
            faults: Vec::new(),
            wait_left_out: None,
            lost: None,
            log: VecDeque::new(),
            refusals: Vec::new(),
        }
    }

    /// Before a call: fails if the device is lost, or if a test wants the call to.
    pub(super) fn enter(&mut self, call: Call) -> Result<()> {
        self.check_there()?;
        let Some(fault) = due(&mut self.faults, call) else { return Ok(()) };
        self.note(format!("planted: {}: {}", call.name(), fault.text));
        if fault.lost {
            return Err(self.lose(call.name().to_owned(), fault.text));
        }
        Err(KernelError::Driver { call: call.name().to_owned(), status: fault.text })
    }

    pub(super) fn check_there(&self) -> Result<()> {
        match self.lost.clone() {
            Some((call, status)) => Err(KernelError::DeviceLost { call, status }),
            None => Ok(()),
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.is_some()
    }

    /// From now on every call fails; what was to come never runs.
    fn lose(&mut self, call: String, status: String) -> KernelError {
        self.note(format!("lost: {call}: {status}"));
        self.lost = Some((call.clone(), status.clone()));
        self.streams.iter_mut().for_each(|stream| stream.queue.clear());
        KernelError::DeviceLost { call, status }
    }

    /// A call that was wrong.
    pub(super) fn refuse(&mut self, call: &str, status: String) -> KernelError {
        let text = format!("refused: {call}: {status}");
        self.note(text.clone());
        if self.refusals.len() < LOG_LINES_MAX {
            self.refusals.push(text);
        }
        KernelError::Driver { call: call.to_owned(), status }
    }

    pub(super) fn plant(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub(super) fn leave_out_wait(&mut self, nth: u64) {
        self.wait_left_out = Some(nth);
    }

    pub(super) fn note(&mut self, line: String) {
        if self.log.len() == LOG_LINES_MAX {
            self.log.pop_front();
        }
        self.log.push_back(line);
    }

    pub(super) fn log(&self) -> Vec<String> {
        self.log.iter().cloned().collect()
    }

    pub(super) fn clear_log(&mut self) {
        self.log.clear();
    }

    pub(super) fn refusals(&self) -> Vec<String> {
        self.refusals.clone()
    }

    pub(super) fn host(&self) -> &Clock {
        &self.host
    }

    /// # Errors
    /// In words, where the host may not touch pinned memory, because of a copy that it does not know to be done.
    pub(super) fn check_host(&self, at: u64, bytes: usize, writes: bool) -> Result<(), String> {
        let kind = if writes { Kind::Write } else { Kind::Read };
        let access = Access { name: "memory", at, extent: Extent::Bytes(bytes as u64), kind, place: Place::Pinned };
        self.memory.check_alive(&[access])?;
        self.memory.check_order(&[access], &self.host)
    }

    pub(super) fn add_part(&mut self, multiprocessors: u32) -> Part {
        let part = Part { number: self.parts.len() as u32, multiprocessors };
        self.note(format!("part p{} of {multiprocessors} multiprocessors", part.number));
        self.parts.push(part);
        part
    }

    pub(super) fn add_stream(&mut self, part: Option<Part>) -> Result<Stream> {
        if let Some(part) = part.filter(|part| !self.parts.contains(part)) {
            let found = format!("expected one of {} parts, found {part:?}", self.parts.len());
            return Err(self.refuse("stream", found));
        }
        self.streams.push(StreamState { part, ..StreamState::default() });
        Ok(Stream(self.streams.len() as u32 - 1))
    }

    pub(super) fn add_event(&mut self, stream: Stream) -> Result<Event> {
        let index = self.stream("event", stream)?;
        self.events.push(EventState { part: self.streams[index].part, ..EventState::default() });
        Ok(Event(self.events.len() as u32 - 1))
    }

    /// A product is cut for the multiprocessors that its stream has, 0 being all.
    pub(super) fn check_product(&mut self, stream: Stream, multiprocessors: u32) -> Result<()> {
        let index = self.stream("gemm", stream)?;
        let expected = self.streams[index].part.map_or(0, |part| part.multiprocessors);
        if multiprocessors == expected {
            return Ok(());
        }
        let found = format!("expected a product for {expected} multiprocessors on s{index}, found {multiprocessors}");
        Err(self.refuse("gemm", found))
    }

    fn stream(&mut self, call: &str, stream: Stream) -> Result<usize> {
        let (index, known) = (stream.0 as usize, self.streams.len());
        if index < known {
            Ok(index)
        } else {
            Err(self.refuse(call, format!("expected one of {known} streams, found {index}")))
        }
    }

    fn event(&mut self, call: &str, event: Event) -> Result<usize> {
        let (index, known) = (event.0 as usize, self.events.len());
        if index < known {
            Ok(index)
        } else {
            Err(self.refuse(call, format!("expected one of {known} events, found {index}")))
        }
    }

    /// Checks an operation, and runs it, or puts it where it waits for its turn.
    pub(super) fn enqueue(&mut self, call: Call, stream: Stream, operation: Result<Operation, String>) -> Result<()> {
        let index = self.stream(call.name(), stream)?;
        let operation = operation.map_err(|problem| self.refuse(call.name(), problem))?;
        let verb = if call == Call::Launch { "launch " } else { "" };
        let line = format!("{verb}{} s{index}", operation.what);
        if self.streams[index].capture.is_none() {
            return self.submit(call, index, Arc::new(operation), line);
        }
        if let Err(problem) = operation.check(&|accesses| self.memory.check_alive(accesses)) {
            return Err(self.refuse(call.name(), format!("{line}: {problem}")));
        }
        self.note(format!("captured {line}"));
        let capture = self.streams[index].capture.as_mut().expect("the stream is in a capture");
        capture.operations.push(operation);
        Ok(())
    }

    fn submit(&mut self, call: Call, index: usize, operation: Arc<Operation>, line: String) -> Result<()> {
        let stream = &self.streams[index];
        let number = stream.operations + 1;
        let mut clock = stream.clock.clone();
        clock.join(&self.host);
        clock.set(index, number);
        let check = |accesses: &_| {
            self.memory.check_alive(accesses)?;
            self.memory.check_order(accesses, &clock)
        };
        if let Err(problem) = operation.check(&check) {
            return Err(self.refuse(call.name(), format!("{line}: {problem}")));
        }
        self.note(line);
        if self.lazy {
            self.poison_host_results(&operation);
        }
        let what = Arc::clone(&operation.what);
        self.memory.note(&operation.accesses, &Stamp { stream: index, number, what }, &self.host);
        let stream = &mut self.streams[index];
        (stream.clock, stream.operations) = (clock, number);
        stream.queue.push_back(Item::Run(operation));
        self.run_if_eager(index)
    }

    /// What a copy is to write shows as poison until it has run, where nothing that comes first may still read it.
    fn poison_host_results(&self, operation: &Operation) {
        let Work::Copy { to, bytes, .. } = operation.work else { return };
        let to_host = operation.accesses.iter().any(|access| access.at == to && access.place == Place::Pinned);
        if to_host && self.check_host(to, bytes, true).is_ok() {
            // SAFETY: the stretch was checked, and neither work under way nor, by the promise of who copies, the host uses it.
            unsafe { (to as *mut u8).write_bytes(0xff, bytes) };
        }
    }

    fn run_if_eager(&mut self, index: usize) -> Result<()> {
        if self.lazy { Ok(()) } else { self.advance(self.end_of(index)) }
    }

    fn end_of(&self, index: usize) -> Mark {
        let stream = &self.streams[index];
        Mark { stream: index, items: stream.done + stream.queue.len() as u64 }
    }

    pub(super) fn record(&mut self, event: Event, stream: Stream) -> Result<()> {
        let (event, index) = (self.event("record", event)?, self.stream("record", stream)?);
        self.refuse_in_captures("record", |captured, _| captured == index)?;
        if self.events[event].part != self.streams[index].part {
            let (own, found) = (place(self.events[event].part), place(self.streams[index].part));
            return Err(self.refuse("record", format!("expected e{event} on a stream of {own}, found one of {found}")));
        }
        self.note(format!("record e{event} s{index}"));
        if self.events[event].time.is_some() {
            return self.record_timer(event, index);
        }
        let mut clock = self.streams[index].clock.clone();
        clock.join(&self.host);
        self.events[event].marked = Some((clock, self.end_of(index)));
        Ok(())
    }

    pub(super) fn wait(&mut self, stream: Stream, event: Event) -> Result<()> {
        let (index, event) = (self.stream("wait", stream)?, self.event("wait", event)?);
        self.refuse_in_captures("wait", |captured, _| captured == index)?;
        self.note(format!("wait e{event} s{index}"));
        self.wait_left_out = self.wait_left_out.map(|left| left - 1);
        if self.wait_left_out.take_if(|left| *left == 0).is_some() {
            self.note("planted: the wait is left out".to_owned());
            return Ok(());
        }
        let Some((clock, mark)) = &self.events[event].marked else { return Ok(()) };
        let stream = &mut self.streams[index];
        stream.clock.join(clock);
        stream.queue.push_back(Item::Wait(*mark));
        self.run_if_eager(index)
    }

    pub(super) fn synchronize(&mut self, event: Event) -> Result<()> {
        let event = self.event("synchronize", event)?;
        let (own, marked) = (std::thread::current().id(), self.events[event].marked.clone());
        let on = marked.as_ref().map(|(_, mark)| mark.stream);
        self.refuse_in_captures("synchronize", |captured, capture| capture.thread == own || on == Some(captured))?;
        self.note(format!("synchronize e{event}"));
        let Some((clock, mark)) = marked else { return Ok(()) };
        self.advance(mark)?;
        self.host.join(&clock);
        Ok(())
    }

    /// Runs what has to be done for `mark`, streams taking turns by chance.
    fn advance(&mut self, mark: Mark) -> Result<()> {
        let mut needed: Vec<u64> = self.streams.iter().map(|stream| stream.done).collect();
        let mut open = vec![mark];
        while let Some(mark) = open.pop() {
            let (stream, from) = (&self.streams[mark.stream], needed[mark.stream]);
            if mark.items > from {
                needed[mark.stream] = mark.items;
                let items = stream.queue.range((from - stream.done) as usize..(mark.items - stream.done) as usize);
                open.extend(items.filter_map(|item| if let Item::Wait(other) = item { Some(*other) } else { None }));
            }
        }
        loop {
            let is_done = |mark: &Mark| self.streams[mark.stream].done >= mark.items;
            let is_ready = |index: &usize| {
                let stream = &self.streams[*index];
                stream.done < needed[*index]
                    && stream.queue.front().is_some_and(|item| match item {
                        Item::Run(_) | Item::Pass(_) => true,
                        Item::Wait(mark) => is_done(mark),
                    })
            };
            let ready: Vec<usize> = (0..self.streams.len()).filter(is_ready).collect();
            if ready.is_empty() {
                return Ok(());
            }
            let index = ready[(random(&mut self.random) % ready.len() as u64) as usize];
            self.step(index)?;
        }
    }

    /// Runs the first item of a stream.
    fn step(&mut self, index: usize) -> Result<()> {
        let stream = &mut self.streams[index];
        stream.done += 1;
        let operation = match stream.queue.pop_front() {
            Some(Item::Run(operation)) => operation,
            Some(Item::Pass(event)) => {
                self.pass_timer(event);
                return Ok(());
            }
            Some(Item::Wait(_)) | None => return Ok(()),
        };
        self.work_for(&operation);
        let seed = &mut self.random;
        let ran = operation.run(&self.memory, &mut || random(seed) & 1 == 1);
        ran.map_err(|problem| self.lose(operation.what.to_string(), problem))
    }

    /// Runs all that was put on streams.
    pub(super) fn finish(&mut self) -> Result<()> {
        (0..self.streams.len()).try_for_each(|index| self.advance(self.end_of(index)))
    }
}

/// What a stream is on, in words.
fn place(part: Option<Part>) -> String {
    part.map_or_else(|| "the whole device".to_owned(), |part| format!("p{}", part.number))
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
