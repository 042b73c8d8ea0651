//! Calls that fail because a test said so.

/// A call of the driver that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Allocate,
    AllocatePinned,
    Kernel,
    Record,
    Wait,
    Synchronize,
    CopyToDevice,
    CopyToHost,
    Launch,
    Gemm,
    BeginCapture,
    EndCapture,
    LaunchGraph,
}

impl Call {
    /// As the trait's function is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Call::Allocate => "allocate",
            Call::AllocatePinned => "allocate_pinned",
            Call::Kernel => "kernel",
            Call::Record => "record",
            Call::Wait => "wait",
            Call::Synchronize => "synchronize",
            Call::CopyToDevice => "copy_to_device",
            Call::CopyToHost => "copy_to_host",
            Call::Launch => "launch",
            Call::Gemm => "gemm",
            Call::BeginCapture => "begin_capture",
            Call::EndCapture => "end_capture",
            Call::LaunchGraph => "launch_graph",
        }
    }
}

/// A failure to come.
pub(super) struct Fault {
    pub(super) call: Call,
    /// Calls until then, the failing one included.
    pub(super) left: u64,
    pub(super) text: String,
    /// Whether the device is lost with it.
    pub(super) lost: bool,
}

/// Counts a call, and takes the failure that is due with it, if one is.
pub(super) fn due(faults: &mut Vec<Fault>, call: Call) -> Option<Fault> {
    faults.iter_mut().filter(|fault| fault.call == call).for_each(|fault| fault.left = fault.left.saturating_sub(1));
    let at = faults.iter().position(|fault| fault.call == call && fault.left == 0)?;
    Some(faults.remove(at))
}
