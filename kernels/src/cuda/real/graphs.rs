//! Captures of a stream's work, made into graphs that run as one launch.

use cudarc::driver::sys::{self, CUstreamCaptureMode as Mode};

use super::context::Context;
use super::table::Raw;
use crate::Result;

/// Begins to record what is put on `stream`. Only what this thread does is restricted meanwhile: another worker may
/// allocate.
pub(super) fn begin(context: &Context, stream: sys::CUstream) -> Result<()> {
    // SAFETY: the stream lives as long as the driver.
    let status = unsafe { sys::cuStreamBeginCapture_v2(stream, Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) };
    context.check("cuStreamBeginCapture", status)
}

/// Ends a capture, also where it failed, and makes it ready to run: what it needs on the device is uploaded now, not
/// at its first launch.
pub(super) fn finish(context: &Context, stream: sys::CUstream) -> Result<Raw<sys::CUgraphExec_st>> {
    let mut recorded = std::ptr::null_mut();
    // SAFETY: the stream lives as long as the driver; the pointer is to a local of the type that is written.
    let status = unsafe { sys::cuStreamEndCapture(stream, &raw mut recorded) };
    let recorded = Recorded(recorded);
    context.check("cuStreamEndCapture", status)?;
    let mut graph = std::ptr::null_mut();
    // SAFETY: the recording succeeded; the pointer is to a local of the type that is written.
    let status = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut graph, recorded.0, 0) };
    context.check("cuGraphInstantiate", status)?;
    // SAFETY: graph and stream are the driver's, and the stream records no longer.
    let status = unsafe { sys::cuGraphUpload(graph, stream) };
    if let Err(error) = context.check("cuGraphUpload", status) {
        destroy(Raw(graph));
        return Err(error);
    }
    Ok(Raw(graph))
}

/// Runs a graph on a stream.
///
/// # Safety
/// As of the launches in it.
pub(super) unsafe fn launch(context: &Context, graph: Raw<sys::CUgraphExec_st>, stream: sys::CUstream) -> Result<()> {
    // SAFETY: the graph lives as long as the driver; the rest is the caller's.
    context.check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.0, stream) })
}

pub(super) fn destroy(graph: Raw<sys::CUgraphExec_st>) {
    // SAFETY: made by `finish`, destroyed once; a run under way ends undisturbed.
    let _ = unsafe { sys::cuGraphExecDestroy(graph.0) };
}

/// What was recorded, as the driver keeps it until it has been made into a graph; null where the capture failed.
struct Recorded(sys::CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: ended once; what was made of it is independent of it.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// While this lives, the calling thread may load code although it records: for a library's first call of its kind.
pub(super) struct Unrestricted {
    before: Mode,
}

impl Unrestricted {
    pub(super) fn begin(context: &Context) -> Result<Self> {
        let mut mode = Mode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is to a local, from which the new mode is read and to which the old one is written.
        let status = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        context.check("cuThreadExchangeStreamCaptureMode", status)?;
        Ok(Unrestricted { before: mode })
    }
}

impl Drop for Unrestricted {
    fn drop(&mut self) {
        // SAFETY: as in `begin`.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.before) };
    }
}
