//! The driver of an NVIDIA GPU: CUDA's driver API and cuBLASLt, loaded at run time.
//!
//! ```text
//! context  the library, the device's properties, its primary context
//! status   which statuses end the device
//! table    handles
//! modules  kernels: found, prepared, launched
//! graphs   captured work
//! parts    parts of the multiprocessors
//! tensor_map matrices as kernels copy boxes of them
//! products products of matrices; choices: which algorithm for which sizes
//! ```
//!
//! Only the raw bindings are used: what a call does on the device is what is written here. Every call makes the
//! context the thread's and checks the status. No call waits for the device but `synchronize`, `free` and the end of
//! the driver.

#[path = "real/choices.rs"]
mod choices;
#[path = "real/context.rs"]
mod context;
#[path = "real/graphs.rs"]
mod graphs;
#[path = "real/modules.rs"]
mod modules;
#[path = "real/parts.rs"]
mod parts;
#[path = "real/products.rs"]
mod products;
#[path = "real/status.rs"]
mod status;
#[path = "real/table.rs"]
mod table;
#[path = "real/tensor_map.rs"]
mod tensor_map;

use std::ffi::{c_int, c_void};
use std::num::NonZeroU32;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{self, CUevent_flags as EventFlags, CUresult, CUstream_flags as StreamFlags};

use self::context::Context;
use self::modules::Modules;
use self::parts::GreenContext;
use self::products::Products;
use self::table::{Raw, Table};
use crate::cuda::driver::{
    BoxedMatrix, DeviceProperties, Driver, Event, Gemm, Graph, Kernel, LaunchShape, Layout, Part, Ptr, Stream,
    StreamPriority, TensorMap,
};
use crate::{KernelError, Result};

/// Most streams, parts, events and graphs of one device: a worker has a few streams, and a graph per size of a decode
/// batch.
const STREAMS_MAX: usize = 64;
const PARTS_MAX: usize = 16;
const EVENTS_MAX: usize = 1024;
const GRAPHS_MAX: usize = 4096;

/// Opens a GPU by its number: loads the driver, cuBLASLt and this binary's kernels.
///
/// # Errors
/// In one line what is missing: the driver, a GPU of that number, a version, a library, kernels.
pub(crate) fn open(ordinal: usize) -> Result<Arc<dyn Driver>> {
    let (context, properties) = Context::open(ordinal)?;
    Ok(Arc::new(Gpu {
        priorities: Priorities::of(&context)?,
        parts: Table::new("parts", PARTS_MAX),
        streams: Table::new("streams", STREAMS_MAX),
        events: Table::new("events", EVENTS_MAX),
        graphs: Table::new("graphs", GRAPHS_MAX),
        modules: Modules::load(&context, properties.compute_capability)?,
        products: Products::open()?,
        properties,
        context,
    }))
}

/// A GPU that is open. Fields go in this order, the context last.
struct Gpu {
    properties: DeviceProperties,
    priorities: Priorities,
    streams: Table<Placed>,
    parts: Table<GreenContext>,
    events: Table<Raw<sys::CUevent_st>>,
    graphs: Table<Raw<sys::CUgraphExec_st>>,
    modules: Modules,
    products: Products,
    context: Context,
}

/// A stream, and the part of the device that it is on.
struct Placed {
    raw: Raw<sys::CUstream_st>,
    part: Option<u32>,
}

/// Priorities as the driver numbers them.
struct Priorities {
    normal: c_int,
    high: c_int,
}

impl Priorities {
    fn of(context: &Context) -> Result<Self> {
        let (mut normal, mut high) = (0, 0);
        // SAFETY: the pointers are to locals of the type that is written.
        let status = unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut normal, &raw mut high) };
        context.check("cuCtxGetStreamPriorityRange", status)?;
        Ok(Priorities { normal, high })
    }
}

impl Gpu {
    fn raw_stream(&self, stream: Stream) -> sys::CUstream {
        self.streams.get(stream.0).raw.0
    }

    fn raw_event(&self, event: Event) -> sys::CUevent {
        self.events.get(event.0).0
    }

    /// Makes an event in the context of this stream.
    fn add_event(&self, stream: Stream, flags: u32) -> Result<Event> {
        self.context.enter()?;
        let create = || {
            let mut raw = std::ptr::null_mut();
            // SAFETY: the pointer is to a local of the type that is written.
            let status = unsafe { sys::cuEventCreate(&raw mut raw, flags) };
            self.context.check("cuEventCreate", status).map(|()| Raw(raw))
        };
        let number = self.events.add(|| match self.streams.get(stream.0).part {
            Some(part) => self.parts.get(part).within(&self.context, create),
            None => create(),
        })?;
        Ok(Event(number))
    }
}

// SAFETY of the calls below: streams, events, kernels and graphs come from tables, where they stay while the driver
// lives; pointers to results are to locals of the types that are written; memory is what the caller says it is.
impl Driver for Gpu {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn free_bytes(&self) -> Result<usize> {
        self.context.enter()?;
        self.context.free_bytes()
    }

    fn allocate(&self, bytes: usize) -> Result<Ptr> {
        self.context.enter()?;
        let mut memory = 0;
        // The driver refuses to allocate nothing.
        // SAFETY: as above.
        match unsafe { sys::cuMemAlloc_v2(&raw mut memory, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(KernelError::OutOfMemory {
                what: "one allocation".into(),
                asked: bytes,
                free: self.context.free_bytes()?,
            }),
            status => self.context.check(format_args!("cuMemAlloc of {bytes} bytes"), status).map(|()| Ptr(memory)),
        }
    }

    unsafe fn free(&self, memory: Ptr) {
        if memory == Ptr::NULL || self.context.enter().is_err() {
            return;
        }
        // SAFETY: the caller's. An error has been noted for the next call, which can do something about it.
        let _ = self.context.check("cuMemFree", unsafe { sys::cuMemFree_v2(memory.0) });
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.context.enter()?;
        let (mut memory, bytes) = (std::ptr::null_mut::<c_void>(), bytes.max(1));
        // SAFETY: as above.
        let status = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes, 0) };
        self.context.check(format_args!("cuMemHostAlloc of {bytes} bytes"), status)?;
        let memory = NonNull::new(memory.cast::<u8>()).expect("memory that was allocated is somewhere");
        // SAFETY: it is new and as long as asked for.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(memory)
    }

    unsafe fn free_pinned(&self, memory: NonNull<u8>, _bytes: usize) {
        if self.context.enter().is_err() {
            return;
        }
        // SAFETY: the caller's; as of `free`.
        let _ = self.context.check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(memory.as_ptr().cast()) });
    }

    fn divide(&self, multiprocessors: u32) -> Result<[Part; 2]> {
        self.context.enter()?;
        self.properties.check_division(multiprocessors)?;
        let [first, rest] = parts::divide(&self.context, multiprocessors)?;
        let keep = |part: GreenContext| {
            let multiprocessors = part.multiprocessors;
            self.parts.add(|| Ok(part)).map(|number| Part { number, multiprocessors })
        };
        Ok([keep(first)?, keep(rest)?])
    }

    fn stream(&self, priority: StreamPriority, part: Option<Part>) -> Result<Stream> {
        self.context.enter()?;
        let priority = match priority {
            StreamPriority::Normal => self.priorities.normal,
            StreamPriority::High => self.priorities.high,
        };
        let part = part.map(|part| part.number);
        let number = self.streams.add(|| {
            let flags = StreamFlags::CU_STREAM_NON_BLOCKING as u32;
            let raw = match part {
                Some(part) => self.parts.get(part).stream(&self.context, flags, priority)?,
                None => {
                    let mut raw = std::ptr::null_mut();
                    // SAFETY: as above.
                    let status = unsafe { sys::cuStreamCreateWithPriority(&raw mut raw, flags, priority) };
                    self.context.check("cuStreamCreateWithPriority", status).map(|()| Raw(raw))?
                }
            };
            Ok(Placed { raw, part })
        })?;
        Ok(Stream(number))
    }

    fn event(&self, stream: Stream) -> Result<Event> {
        // Whoever waits sleeps instead of spinning: the cores have requests to serve.
        self.add_event(stream, EventFlags::CU_EVENT_DISABLE_TIMING as u32 | EventFlags::CU_EVENT_BLOCKING_SYNC as u32)
    }

    fn timer(&self, stream: Stream) -> Result<Event> {
        self.add_event(stream, EventFlags::CU_EVENT_BLOCKING_SYNC as u32)
    }

    fn kernel(&self, name: &str, shared_bytes: u32) -> Result<Kernel> {
        self.context.enter()?;
        self.modules.find(&self.context, name, shared_bytes).map(Kernel)
    }

    fn blocks_per_multiprocessor(&self, kernel: Kernel, threads: u32, shared_bytes: u32) -> Result<NonZeroU32> {
        self.context.enter()?;
        self.modules.blocks(&self.context, kernel.0, threads, shared_bytes)
    }

    fn tensor_map(&self, matrix: &BoxedMatrix) -> Result<TensorMap> {
        self.context.enter()?;
        tensor_map::encode(&self.context, matrix)
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        self.context.enter()?;
        // SAFETY: as above.
        let status = unsafe { sys::cuEventRecord(self.raw_event(event), self.raw_stream(stream)) };
        self.context.check("cuEventRecord", status)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.context.enter()?;
        // SAFETY: as above.
        let status = unsafe { sys::cuStreamWaitEvent(self.raw_stream(stream), self.raw_event(event), 0) };
        self.context.check("cuStreamWaitEvent", status)
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        self.context.enter()?;
        // SAFETY: as above.
        self.context.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw_event(event)) })
    }

    fn elapsed(&self, from: Event, to: Event) -> Result<Duration> {
        self.context.enter()?;
        let mut milliseconds = 0.0_f32;
        // SAFETY: as above.
        let status =
            unsafe { sys::cuEventElapsedTime_v2(&raw mut milliseconds, self.raw_event(from), self.raw_event(to)) };
        self.context.check("cuEventElapsedTime", status)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1000.0))
    }

    unsafe fn copy_to_device(&self, stream: Stream, to: Ptr, from: NonNull<u8>, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        let from = from.as_ptr().cast_const().cast();
        // SAFETY: as above.
        let status = unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from, bytes, self.raw_stream(stream)) };
        self.context.check(format_args!("cuMemcpyHtoDAsync of {bytes} bytes"), status)
    }

    unsafe fn copy_to_host(&self, stream: Stream, to: NonNull<u8>, from: Ptr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: as above.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_ptr().cast(), from.0, bytes, self.raw_stream(stream)) };
        self.context.check(format_args!("cuMemcpyDtoHAsync of {bytes} bytes"), status)
    }

    unsafe fn launch(
        &self,
        stream: Stream,
        kernel: Kernel,
        shape: LaunchShape,
        params: &[u8],
        layout: &'static Layout,
    ) -> Result<()> {
        self.context.enter()?;
        let stream = self.raw_stream(stream);
        // SAFETY: the caller's.
        unsafe { self.modules.launch(&self.context, stream, (kernel.0, shape), (params, layout)) }
    }

    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the caller's; the context is current.
        unsafe { self.products.run(&self.context, self.raw_stream(stream), gemm) }
    }

    fn begin_capture(&self, stream: Stream) -> Result<()> {
        self.context.enter()?;
        graphs::begin(&self.context, self.raw_stream(stream))
    }

    fn end_capture(&self, stream: Stream) -> Result<Graph> {
        self.context.enter()?;
        // Out of the table's closure: a capture ends also where there is no room for what it recorded.
        let graph = graphs::finish(&self.context, self.raw_stream(stream))?;
        self.graphs.add(|| Ok(graph)).map(Graph).inspect_err(|_| graphs::destroy(graph))
    }

    unsafe fn launch_graph(&self, graph: Graph, stream: Stream) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the caller's.
        unsafe { graphs::launch(&self.context, *self.graphs.get(graph.0), self.raw_stream(stream)) }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.context.settle();
        self.graphs.drain().for_each(graphs::destroy);
        for event in self.events.drain() {
            // SAFETY: made once by `event`; nothing waits for it any more.
            let _ = unsafe { sys::cuEventDestroy_v2(event.0) };
        }
        for stream in self.streams.drain() {
            // SAFETY: made once by `stream`; its work is done.
            let _ = unsafe { sys::cuStreamDestroy_v2(stream.raw.0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Machines differ: without a driver opening says so in one line; with one, the ordinal is out of range.
    #[test]
    fn what_cannot_be_opened_is_an_error_of_one_line() {
        const NEVER: usize = 1_000_000;
        // SAFETY: as in `context::initialize`.
        let present = unsafe { sys::is_culib_present() };
        let error = open(NEVER).map(|_| "a GPU").expect_err("there are not so many");
        let text = error.to_string();
        assert!(!text.contains('\n') && !text.is_empty(), "{text:?}");
        if present {
            println!("this machine has libcuda: found of GPU {NEVER}: {text}");
            return;
        }
        assert_eq!(text, "expected an NVIDIA driver (libcuda.so.1), found none");
    }
}

#[cfg(test)]
#[path = "real/transcript_tests.rs"]
mod transcript_tests;
