//! Threads that answer clients are woken at once, although compute threads use every core.
//!
//! Linux lets a thread of the fair class run for a slice of some 3 ms before another one has its turn, and within a step compute
//! threads do not sleep. Since 6.12 a thread may ask for a slice of its own, down to 0.1 ms, by the runtime in `sched_attr`; when
//! it wakes, it goes before those whose slice is longer (`PREEMPT_SHORT`). It gets no more of the machine by this.

/// Asks for the shortest slice for the calling thread. Nothing changes where the system knows no such thing.
#[cfg(target_os = "linux")]
pub fn at_once() {
    const SLICE_NS: u64 = 100_000;
    // SAFETY: reads the priority of the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        // The threads that it starts are not such ones.
        sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the attributes outlive the call, which reads as many bytes as their size says.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result != 0 {
        tracing::debug!(problem = %std::io::Error::last_os_error(), "no slice of its own for a thread that answers");
    }
}

#[cfg(not(target_os = "linux"))]
pub fn at_once() {}
