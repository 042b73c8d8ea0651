//! Parts of a device: disjoint sets of its multiprocessors, each a green context with streams of its own.
//!
//! A green context shares memory and code with the device's own context, which stays the thread's current one: a
//! stream knows where its work runs, and kernels that belong to no context ([`Modules`](super::modules::Modules)) run
//! where the stream says. Events are the exception. They have to be of their stream's context, and are of the one that
//! is current when they are made; the driver allows that for one thread at a time, the one that starts the server.

use cudarc::driver::sys::{self, CUdevResourceType, CUgreenCtxCreate_flags as Flags, CUresult};

use super::context::Context;
use super::table::Raw;
use crate::{KernelError, Result};

/// A part of a device. It goes before the device's context does, and after its streams.
pub(super) struct GreenContext {
    green: Raw<sys::CUgreenCtx_st>,
    /// The same, where a context is asked for.
    context: Raw<sys::CUctx_st>,
    pub(super) multiprocessors: u32,
}

/// At least so many multiprocessors, and all others; sizes are rounded up as the device needs it. Every driver that
/// this backend takes (CUDA 13.0 or later) has the calls; not every device, nor every mode of one, can do it.
pub(super) fn divide(context: &Context, multiprocessors: u32) -> Result<[GreenContext; 2]> {
    let (mut all, mut first, mut rest) = (nothing(), nothing(), nothing());
    let kind = CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM;
    // SAFETY: the device is the context's; the pointer is to a local of the type that is written.
    let status = unsafe { sys::cuDeviceGetDevResource(context.device(), &raw mut all, kind) };
    check(context, "cuDeviceGetDevResource", status)?;
    let mut groups = 1;
    // SAFETY: room for one group, as said; the pointers are to locals of the types that are read and written.
    let status = unsafe {
        sys::cuDevSmResourceSplitByCount(
            &raw mut first,
            &raw mut groups,
            &raw const all,
            &raw mut rest,
            0,
            multiprocessors,
        )
    };
    check(context, "cuDevSmResourceSplitByCount", status)?;
    let [found, left] = [&first, &rest].map(count);
    if groups != 1 || found == 0 || left == 0 {
        return Err(KernelError::Unsupported(format!(
            "expected a division of {} multiprocessors into {multiprocessors} and others, found {found} and {left}",
            count(&all)
        )));
    }
    Ok([GreenContext::new(context, first)?, GreenContext::new(context, rest)?])
}

impl GreenContext {
    fn new(context: &Context, mut resource: sys::CUdevResource) -> Result<Self> {
        let mut description = std::ptr::null_mut();
        // SAFETY: one resource, as said; the pointers are to locals of the types that are read and written.
        let status = unsafe { sys::cuDevResourceGenerateDesc(&raw mut description, &raw mut resource, 1) };
        check(context, "cuDevResourceGenerateDesc", status)?;
        let (mut green, flags) = (std::ptr::null_mut(), Flags::CU_GREEN_CTX_DEFAULT_STREAM as u32);
        // SAFETY: the description was made for this device; the pointer is to a local of the type that is written.
        let status = unsafe { sys::cuGreenCtxCreate(&raw mut green, description, context.device(), flags) };
        check(context, "cuGreenCtxCreate", status)?;
        let multiprocessors = count(&resource);
        let mut part = GreenContext { green: Raw(green), context: Raw(std::ptr::null_mut()), multiprocessors };
        // SAFETY: the green context lives; the pointer is to a field of the type that is written.
        let status = unsafe { sys::cuCtxFromGreenCtx(&raw mut part.context.0, green) };
        check(context, "cuCtxFromGreenCtx", status)?;
        Ok(part)
    }

    /// A stream whose work runs on this part.
    pub(super) fn stream(&self, context: &Context, flags: u32, priority: i32) -> Result<Raw<sys::CUstream_st>> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the green context lives as long as this; the pointer is to a local of the type that is written.
        let status = unsafe { sys::cuGreenCtxStreamCreate(&raw mut raw, self.green.0, flags, priority) };
        context.check("cuGreenCtxStreamCreate", status).map(|()| Raw(raw))
    }

    /// Makes something while this part's context is the thread's; then it is the device's again.
    pub(super) fn within<T>(&self, context: &Context, make: impl FnOnce() -> Result<T>) -> Result<T> {
        // SAFETY: the context lives as long as this.
        let status = unsafe { sys::cuCtxSetCurrent(self.context.0) };
        let made = context.check("cuCtxSetCurrent", status).and_then(|()| make());
        context.enter()?;
        made
    }
}

impl Drop for GreenContext {
    fn drop(&mut self) {
        // SAFETY: made once by `new`; its streams are gone.
        let _ = unsafe { sys::cuGreenCtxDestroy(self.green.0) };
    }
}

fn nothing() -> sys::CUdevResource {
    sys::CUdevResource {
        type_: CUdevResourceType::CU_DEV_RESOURCE_TYPE_INVALID,
        _internal_padding: [0; 92],
        __bindgen_anon_1: sys::CUdevResource_st__bindgen_ty_1 { _oversize: [0; 48] },
    }
}

/// Multiprocessors of a resource; none of what is not such a resource.
fn count(resource: &sys::CUdevResource) -> u32 {
    match resource.type_ {
        // SAFETY: the type says what is in it.
        CUdevResourceType::CU_DEV_RESOURCE_TYPE_SM => unsafe { resource.__bindgen_anon_1.sm.smCount },
        CUdevResourceType::CU_DEV_RESOURCE_TYPE_INVALID => 0,
    }
}

/// The result of a call that a device may not have.
fn check(context: &Context, call: &str, status: CUresult) -> Result<()> {
    match status {
        CUresult::CUDA_ERROR_NOT_SUPPORTED | CUresult::CUDA_ERROR_NOT_PERMITTED => Err(KernelError::Unsupported(
            format!("expected a GPU whose multiprocessors can be divided (green contexts), found {status:?} of {call}"),
        )),
        status => context.check(call, status),
    }
}
