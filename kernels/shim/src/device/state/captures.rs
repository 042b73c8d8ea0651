//! Captures: work that is recorded and not run, the calls that have no place meanwhile, and graphs.

use std::sync::Arc;
use std::thread::ThreadId;

use kvern_kernels::Result;
use kvern_kernels::cuda::driver::{Graph, Part, Stream};

use super::{State, place};
use crate::device::faults::Call;
use crate::device::work::Operation;

/// What was put on a stream instead of being run.
pub(super) struct Capture {
    pub(super) operations: Vec<Operation>,
    pub(super) thread: ThreadId,
    /// A call that is not allowed during a capture, after which there is no graph.
    broken: Option<String>,
}

/// A graph, and the part of the device whose multiprocessors its launches were captured for.
pub(super) struct Captured {
    operation: Arc<Operation>,
    part: Option<Part>,
}

impl State {
    /// Fails, and spoils the capture, if the calling thread has one under way. Others may go on meanwhile, as with a
    /// GPU whose captures restrict a thread.
    pub(in crate::device) fn refuse_in_capture(&mut self, call: &str) -> Result<()> {
        let own = std::thread::current().id();
        self.refuse_in_captures(call, |_, capture| capture.thread == own)
    }

    /// As above, for the captures for which the call `matters`.
    pub(super) fn refuse_in_captures(&mut self, call: &str, matters: impl Fn(usize, &Capture) -> bool) -> Result<()> {
        let mut found = None;
        for (index, stream) in self.streams.iter_mut().enumerate() {
            if let Some(capture) = stream.capture.as_mut().filter(|capture| matters(index, capture)) {
                capture.broken.get_or_insert_with(|| call.to_owned());
                found = Some(index);
            }
        }
        match found {
            Some(index) => {
                Err(self.refuse(call, format!("expected no {call} during a capture, found s{index} in one")))
            }
            None => Ok(()),
        }
    }

    pub(in crate::device) fn begin_capture(&mut self, stream: Stream) -> Result<()> {
        let index = self.stream("begin_capture", stream)?;
        if self.streams[index].capture.is_some() {
            return Err(
                self.refuse("begin_capture", format!("expected s{index} outside of a capture, found it in one"))
            );
        }
        self.note(format!("begin_capture s{index}"));
        let thread = std::thread::current().id();
        self.streams[index].capture = Some(Capture { operations: Vec::new(), thread, broken: None });
        Ok(())
    }

    /// Ends the capture, whatever comes of it.
    pub(in crate::device) fn abandon_capture(&mut self, stream: Stream) {
        if let Some(stream) = self.streams.get_mut(stream.0 as usize) {
            stream.capture = None;
        }
    }

    pub(in crate::device) fn end_capture(&mut self, stream: Stream) -> Result<Graph> {
        let index = self.stream("end_capture", stream)?;
        let Some(capture) = self.streams[index].capture.take() else {
            return Err(self.refuse("end_capture", format!("expected s{index} in a capture, found it outside of one")));
        };
        if let Some(call) = capture.broken {
            return Err(self.refuse("end_capture", format!("expected a whole capture, found {call} in it")));
        }
        let graph = self.graphs.len();
        self.note(format!("end_capture g{graph} s{index} [{} operations]", capture.operations.len()));
        let operation = Arc::new(Operation::graph(graph, capture.operations));
        self.graphs.push(Captured { operation, part: self.streams[index].part });
        Ok(Graph(graph as u32))
    }

    pub(in crate::device) fn launch_graph(&mut self, graph: Graph, stream: Stream) -> Result<()> {
        let index = self.stream("launch_graph", stream)?;
        self.refuse_in_captures("launch_graph", |captured, _| captured == index)?;
        let Some(Captured { operation, part }) = self.graphs.get(graph.0 as usize) else {
            let found = format!("expected one of {} graphs, found {}", self.graphs.len(), graph.0);
            return Err(self.refuse("launch_graph", found));
        };
        let (operation, captured, found) = (Arc::clone(operation), *part, self.streams[index].part);
        if captured != found {
            let [captured, found] = [captured, found].map(place);
            let text = format!("expected g{} on a stream of {captured}, found one of {found}", graph.0);
            return Err(self.refuse("launch_graph", text));
        }
        let line = format!("{} s{index} [{} operations]", operation.what, operation.parts());
        self.submit(Call::LaunchGraph, index, operation, line)
    }
}
