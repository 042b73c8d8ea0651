//! A device without a GPU: runs work on the host, records it, and refuses work in a wrong order.
//!
//! [`ShimDriver`] is the backend's driver in tests. A call that a GPU would take without a word, and sometimes survive,
//! is an error here that names what is wrong: a pointer into no allocation, a use that no event orders after the one
//! before it, a copy's host memory touched while the copy may be under way, an allocation during a capture. Such errors
//! leave the device as it was. A kernel that fails while it runs loses the device, as a GPU's does.
//!
//! Order is proved, not observed: each operation has a vector clock, made of its stream's past, of the events it waited
//! for and of what the host had waited for when it was put on the stream. Two uses of the same bytes, one of them a
//! write, must be ordered by these clocks, whatever order they happened to run in. The host has one clock for all of
//! its threads, as if every value passed between them ordered them: a thread that relies on what another one waited
//! for, without having heard of it, is not found. Where a kernel's extents depend on data, the first byte of an operand
//! stands for all of it. KV caches are exempt from order, not from being alive: the scheduler keeps blocks apart. As on
//! a GPU, an event that was never recorded is done. What was captured on a part of the device is launched there alone.
//!
//! Work runs at once, or, with [`Options::lazy`], when the host waits for it, streams taking turns by a seed: what is
//! read too early is then poison. Launches run in either order of threads, by the same seed.
//!
//! ```text
//! device.rs          the driver's calls
//! state.rs           streams, events, queues; which work runs when
//! state/captures.rs  captures and graphs
//! state/timers.rs    the device's time
//! clock.rs           what is known to come before what
//! memory.rs          allocations, and the checks of operands against them
//! access.rs          who used which bytes last
//! fields.rs          what kernels do with the memory that parameters name
//! kernels.rs         kernels by handle, and shapes that they take
//! work.rs            operations, and how they run
//! gemm.rs            products
//! faults.rs          failures that tests plant
//! ```
//!
//! A call costs O(operands x log allocations), beside the work itself.

mod access;
mod clock;
mod faults;
mod fields;
mod gemm;
mod kernels;
mod memory;
mod state;
mod work;

use std::num::NonZeroU32;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use faults::Call;
use kvern_kernels::cuda::driver::{
    BoxedMatrix, DeviceProperties, Driver, Event, Gemm, Graph, HostAccess, Kernel, LaunchShape, Layout, Part, Ptr,
    Stream, StreamPriority, TensorMap,
};
use kvern_kernels::{KernelError, Result};

use access::Place;
use faults::Fault;
use state::State;
use work::Operation;

/// What blocks may have of shared memory on a device of this capability.
const fn block_shared_bytes(compute_capability: (u32, u32)) -> u32 {
    if compute_capability.0 < 9 { 163 * 1024 } else { 227 * 1024 }
}

const GRID_ROWS_MAX: u32 = 65_535;
/// Parts of the multiprocessors are rounded up to a multiple of this.
const PART_STEP: u32 = 2;
/// What every kernel's blocks are said to be per multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: NonZeroU32 = NonZeroU32::new(2).expect("two is not zero");

/// The device that tests want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub multiprocessors: usize,
    /// Major and minor; it says how much shared memory there is, and whether there are tensor maps.
    pub compute_capability: (u32, u32),
    /// Device memory; pinned memory is the host's and not counted.
    pub memory_bytes: usize,
    /// Draws whose turn it is among streams, and the order of a launch's threads.
    pub seed: u64,
    /// Work runs when the host waits for it, and not before.
    pub lazy: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { multiprocessors: 4, compute_capability: (8, 0), memory_bytes: 1 << 30, seed: 0, lazy: false }
    }
}

/// The device; see the [module](self).
pub struct ShimDriver {
    properties: DeviceProperties,
    state: Mutex<State>,
}

impl ShimDriver {
    #[must_use]
    pub fn new(options: Options) -> Arc<ShimDriver> {
        let block_shared_bytes = block_shared_bytes(options.compute_capability) as usize;
        let properties = DeviceProperties {
            name: "shim".to_owned(),
            compute_capability: options.compute_capability,
            driver_version: (13, 0),
            multiprocessors: options.multiprocessors,
            shared_bytes: block_shared_bytes + 1024,
            block_shared_bytes,
            memory_bytes: options.memory_bytes,
        };
        Arc::new(ShimDriver { properties, state: Mutex::new(State::new(&options)) })
    }

    /// Makes the `nth` call of this kind from now on (1 is the next one) fail with `text`, without doing anything;
    /// `lost` loses the device with it, and every later call fails.
    ///
    /// # Panics
    /// If `nth` is 0.
    pub fn fail(&self, call: Call, nth: u64, text: &str, lost: bool) {
        assert!(nth > 0, "calls are counted from 1 on");
        self.state().plant(Fault { call, left: nth, text: text.to_owned(), lost });
    }

    /// Leaves out the `nth` wait of a stream from now on (1 is the next one), as if the code had forgotten it.
    ///
    /// # Panics
    /// If `nth` is 0.
    pub fn leave_out_wait(&self, nth: u64) {
        assert!(nth > 0, "calls are counted from 1 on");
        self.state().leave_out_wait(nth);
    }

    /// Time goes by on the device in which no work runs. Else only work takes time there: a microsecond for each
    /// operation, on whatever stream, for a graph for each of its own.
    pub fn rest(&self, time: Duration) {
        self.state().rest(time);
    }

    /// What was done, oldest first, a line each; old lines give way.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.state().log()
    }

    pub fn clear_log(&self) {
        self.state().clear_log();
    }

    /// The calls that were refused because they were wrong: a test of right code expects none, also where an error
    /// would be swallowed on its way.
    #[must_use]
    pub fn refusals(&self) -> Vec<String> {
        self.state().refusals()
    }

    /// After a test's failure the state is still good to read and to drop.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, for a call.
    fn enter(&self, call: Call) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.enter(call)?;
        Ok(state)
    }

    /// # Panics
    /// If the memory may not be freed.
    fn release(&self, at: u64, bytes: Option<usize>, place: Place) {
        let mut state = self.state();
        let freed = state.refuse_in_capture("free").and_then(|()| {
            let host = (!state.is_lost()).then(|| state.host().clone());
            let freed = state.memory.free(at, bytes, place, host.as_ref());
            freed.map_err(|problem| state.refuse("free", problem))
        });
        if let Err(error) = freed {
            drop(state);
            // A second panic would end the test's program without a word on the first.
            assert!(std::thread::panicking(), "{error}");
        }
    }
}

impl Driver for ShimDriver {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<usize> {
        let state = self.state();
        state.check_there()?;
        Ok(state.memory.free_bytes())
    }

    fn allocate(&self, bytes: usize) -> Result<Ptr> {
        let mut state = self.enter(Call::Allocate)?;
        state.refuse_in_capture("allocate")?;
        // Nothing has an address too, as on a GPU.
        let bytes = bytes.max(1);
        let free = state.memory.free_bytes();
        if bytes > free {
            return Err(KernelError::OutOfMemory { what: "an allocation".to_owned(), asked: bytes, free });
        }
        state.note(format!("allocate {bytes} bytes"));
        Ok(Ptr(state.memory.allocate(bytes, Place::Device)))
    }

    unsafe fn free(&self, memory: Ptr) {
        if memory != Ptr::NULL {
            self.release(memory.0, None, Place::Device);
        }
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        let mut state = self.enter(Call::AllocatePinned)?;
        state.refuse_in_capture("allocate_pinned")?;
        let bytes = bytes.max(1);
        state.note(format!("allocate_pinned {bytes} bytes"));
        let at = state.memory.allocate(bytes, Place::Pinned);
        Ok(NonNull::new(at as *mut u8).expect("no mapping begins at null"))
    }

    unsafe fn free_pinned(&self, memory: NonNull<u8>, bytes: usize) {
        self.release(memory.as_ptr() as u64, Some(bytes.max(1)), Place::Pinned);
    }

    fn divide(&self, multiprocessors: u32) -> Result<[Part; 2]> {
        let mut state = self.state();
        state.check_there()?;
        self.properties.check_division(multiprocessors)?;
        let all = u32::try_from(self.properties.multiprocessors).expect("a part of them is a u32");
        let first = multiprocessors.next_multiple_of(PART_STEP);
        if first >= all {
            let text = format!("expected a division of {all} multiprocessors, found {first} for the first part");
            return Err(KernelError::Unsupported(text));
        }
        Ok([first, all - first].map(|multiprocessors| state.add_part(multiprocessors)))
    }

    fn stream(&self, priority: StreamPriority, part: Option<Part>) -> Result<Stream> {
        let mut state = self.state();
        state.check_there()?;
        let stream = state.add_stream(part)?;
        let place = part.map(|part| format!(" on p{} of {} multiprocessors", part.number, part.multiprocessors));
        state.note(format!("stream s{} {priority:?}{}", stream.0, place.unwrap_or_default()));
        Ok(stream)
    }

    fn event(&self, stream: Stream) -> Result<Event> {
        let mut state = self.state();
        state.check_there()?;
        state.add_event(stream)
    }

    fn timer(&self, stream: Stream) -> Result<Event> {
        let mut state = self.state();
        state.check_there()?;
        state.add_timer(stream)
    }

    fn kernel(&self, name: &str, shared_bytes: u32) -> Result<Kernel> {
        let mut state = self.enter(Call::Kernel)?;
        if !state.kernels.is_loaded(name) {
            // Code is loaded when it is asked for first, which takes memory.
            state.refuse_in_capture("kernel")?;
        }
        let loaded = state.kernels.load(name, shared_bytes, self.properties.block_shared_bytes as u32);
        loaded.map_err(|problem| state.refuse("kernel", problem))
    }

    fn blocks_per_multiprocessor(&self, kernel: Kernel, threads: u32, shared_bytes: u32) -> Result<NonZeroU32> {
        let mut state = self.state();
        state.check_there()?;
        let checked = state.kernels.check_block(kernel, threads, shared_bytes);
        checked.map_err(|problem| state.refuse("blocks_per_multiprocessor", problem))?;
        Ok(BLOCKS_PER_MULTIPROCESSOR)
    }

    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        let mut state = self.state();
        state.check_there()?;
        matrix.check()?;
        let found = match self.properties.compute_capability {
            (9.., _) => state.memory.find(matrix.memory.0, matrix.bytes() as u64, Place::Device).map(drop),
            found => Err(format!("expected a device of capability 9.0, found {found:?}")),
        };
        found.map_err(|problem| state.refuse("tensor_map", problem))?;
        Ok(crate::tensor_map(matrix))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        self.enter(Call::Record)?.record(event, stream)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.enter(Call::Wait)?.wait(stream, event)
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        self.enter(Call::Synchronize)?.synchronize(event)
    }

    fn elapsed(&self, from: Event, to: Event) -> Result<Duration> {
        let mut state = self.state();
        state.check_there()?;
        state.elapsed(from, to)
    }

    unsafe fn copy_to_device(&self, stream: Stream, to: Ptr, from: NonNull<u8>, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let operation = Operation::copy(true, to.0, from.as_ptr() as u64, bytes);
        self.enter(Call::CopyToDevice)?.enqueue(Call::CopyToDevice, stream, Ok(operation))
    }

    unsafe fn copy_to_host(&self, stream: Stream, to: NonNull<u8>, from: Ptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let operation = Operation::copy(false, to.as_ptr() as u64, from.0, bytes);
        self.enter(Call::CopyToHost)?.enqueue(Call::CopyToHost, stream, Ok(operation))
    }

    unsafe fn launch(
        &self,
        stream: Stream,
        kernel: Kernel,
        shape: LaunchShape,
        params: &[u8],
        layout: &'static Layout,
    ) -> Result<()> {
        let mut state = self.enter(Call::Launch)?;
        let launch = state.kernels.launch(kernel, shape, params, layout).and_then(Operation::launch);
        state.enqueue(Call::Launch, stream, launch)
    }

    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<()> {
        let mut state = self.enter(Call::Gemm)?;
        state.check_product(stream, gemm.multiprocessors)?;
        state.enqueue(Call::Gemm, stream, Operation::gemm(gemm))
    }

    fn begin_capture(&self, stream: Stream) -> Result<()> {
        self.enter(Call::BeginCapture)?.begin_capture(stream)
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph> {
        let mut state = self.state();
        if let Err(error) = state.enter(Call::EndCapture) {
            state.abandon_capture(stream);
            return Err(error);
        }
        state.end_capture(stream)
    }

    unsafe fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()> {
        self.enter(Call::LaunchGraph)?.launch_graph(graph, stream)
    }

    fn host_access(&self, memory: NonNull<u8>, bytes: usize, access: HostAccess) -> Result<()> {
        let mut state = self.state();
        if state.is_lost() {
            return Ok(());
        }
        let checked = state.check_host(memory.as_ptr() as u64, bytes, access == HostAccess::Write);
        checked.map_err(|problem| state.refuse("host_access", problem))
    }
}

impl Drop for ShimDriver {
    /// Runs what is left; a failure of that, or a write just outside of an allocation, is a panic.
    fn drop(&mut self) {
        let mut state = self.state();
        let finished = if state.is_lost() { Ok(()) } else { state.finish() };
        if !std::thread::panicking() {
            state.memory.check_guards();
            if let Err(error) = finished {
                drop(state);
                panic!("{error}");
            }
        }
    }
}
