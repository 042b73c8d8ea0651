//! The shim's driver: that it runs work as a GPU would, and that it refuses each kind of wrong order, next to the right
//! one.
#![allow(clippy::unwrap_used)]

mod memory;
mod order;
mod products;
mod running;
mod timers;

use std::ptr::NonNull;
use std::sync::Arc;

use kvern_cuda_abi::{FillParams, GateParams, KernelParams, Ptr};
use kvern_cuda_shim::device::{Options, ShimDriver};
use kvern_kernels::cuda::driver::{Driver, Event, HostAccess, LaunchShape, Stream, StreamPriority};
use kvern_kernels::{KernelError, Result};

/// A device with two streams and some events.
struct Rig {
    driver: Arc<ShimDriver>,
    streams: [Stream; 2],
    events: [Event; 4],
}

const COLUMNS: usize = 64;

impl Rig {
    fn new() -> Rig {
        Rig::with(Options::default())
    }

    fn with(options: Options) -> Rig {
        let driver = ShimDriver::new(options);
        let streams =
            [StreamPriority::Normal, StreamPriority::High].map(|priority| driver.stream(priority, None).unwrap());
        let events = [(); 4].map(|()| driver.event(streams[0]).unwrap());
        Rig { driver, streams, events }
    }

    /// Room for as many f32.
    fn device(&self, len: usize) -> Ptr {
        self.driver.allocate(len * 4).unwrap()
    }

    fn pinned(&self, values: &[f32]) -> NonNull<u8> {
        let memory = self.driver.allocate_pinned(size_of_val(values)).unwrap();
        self.driver.host_access(memory, size_of_val(values), HostAccess::Write).unwrap();
        // SAFETY: as long, and no copy uses it.
        unsafe { memory.cast::<f32>().copy_from_nonoverlapping(NonNull::from(values).cast(), values.len()) };
        memory
    }

    fn launch<P: KernelParams>(&self, stream: usize, kernel: &str, grid: u32, threads: u32, params: &P) -> Result<()> {
        let kernel = self.driver.kernel(kernel, 0)?;
        let shape = LaunchShape { grid: [grid, 1], threads, shared_bytes: 0, early: false };
        // SAFETY: parameters are plain data without padding; tests of wrong ones expect them to be refused.
        unsafe { self.driver.launch(self.streams[stream], kernel, shape, bytes_of(params), layout::<P>()) }
    }

    /// Random values from a seed, `[COLUMNS * 2]`.
    fn fill(&self, stream: usize, out: Ptr, seed: u64) -> Result<()> {
        let params = FillParams { out, elements: 2 * COLUMNS as u64, seed, limit: 1.0, pad: 0 };
        self.launch(stream, "kvern_fill_f32", 2, 32, &params)
    }

    /// Reads `[COLUMNS * 2]`, writes `[COLUMNS]`.
    fn gate(&self, stream: usize, x: Ptr, out: Ptr) -> Result<()> {
        self.launch(stream, "kvern_silu_mul_f32", 1, 32, &GateParams { x, out, rows: 1, columns: COLUMNS as u32 })
    }

    fn record(&self, event: usize, stream: usize) {
        self.driver.record(self.events[event], self.streams[stream]).unwrap();
    }

    fn wait(&self, stream: usize, event: usize) {
        self.driver.wait(self.streams[stream], self.events[event]).unwrap();
    }

    fn synchronize(&self, event: usize) -> Result<()> {
        self.driver.synchronize(self.events[event])
    }

    fn finish(&self, stream: usize) {
        self.record(3, stream);
        self.synchronize(3).unwrap();
    }

    /// So many bytes of zeros.
    fn zero(&self, stream: usize, to: Ptr, bytes: usize) {
        let from = self.driver.allocate_pinned(bytes).unwrap();
        // SAFETY: as long, and left alone after the copy.
        unsafe { self.driver.copy_to_device(self.streams[stream], to, from, bytes) }.unwrap();
    }

    fn to_device(&self, stream: usize, to: Ptr, from: NonNull<u8>, len: usize) -> Result<()> {
        // SAFETY: tests of wrong copies expect them to be refused.
        unsafe { self.driver.copy_to_device(self.streams[stream], to, from, len * 4) }
    }

    fn to_host(&self, stream: usize, to: NonNull<u8>, from: Ptr, len: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.driver.copy_to_host(self.streams[stream], to, from, len * 4) }
    }

    fn touch(&self, memory: NonNull<u8>, len: usize, access: HostAccess) -> Result<()> {
        self.driver.host_access(memory, len * 4, access)
    }

    /// Values of the device's memory after all work of a stream, as bits.
    fn values(&self, stream: usize, from: Ptr, len: usize) -> Vec<u32> {
        let to = self.driver.allocate_pinned(len * 4).unwrap();
        self.to_host(stream, to, from, len).unwrap();
        self.finish(stream);
        self.touch(to, len, HostAccess::Read).unwrap();
        peek(to, len)
    }
}

/// What is in host memory, whether or not it may be looked at.
fn peek(memory: NonNull<u8>, len: usize) -> Vec<u32> {
    // SAFETY: as long, and work runs only within calls.
    unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u32>(), len).to_vec() }
}

fn bytes_of<P: KernelParams>(params: &P) -> &[u8] {
    // SAFETY: plain data without padding.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<P>()) }
}

fn layout<P: KernelParams>() -> &'static kvern_cuda_abi::Layout {
    const { &P::LAYOUT }
}

/// `ptr` plus as many f32.
fn offset(ptr: Ptr, len: usize) -> Ptr {
    Ptr(ptr.0 + 4 * len as u64)
}

/// The device has to go on after it.
fn refused<T>(result: Result<T>, words: &[&str]) {
    match result.map(drop) {
        Err(error @ KernelError::Driver { .. }) => {
            let text = error.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "expected {words:?}, found {text:?}");
        }
        other => panic!("expected to be refused for {words:?}, found {other:?}"),
    }
}

/// Runs what must panic, with these words.
fn panics(words: &[&str], work: impl FnOnce()) {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).expect_err("a panic");
    let text = panic.downcast_ref::<String>().expect("a message");
    assert!(words.iter().all(|word| text.contains(word)), "expected {words:?}, found {text:?}");
}
