//! Persistent compute threads that fork and join within microseconds.
//!
//! Owner: a [`CpuDevice`](super::CpuDevice). The caller of [`Pool::run`] takes part as worker 0. Each worker owns an equal,
//! contiguous range of the tasks, the same from call to call (so that its caches keep its part of the weights), and helps
//! with the ranges of the others when its own is empty. A worker that is slow to wake up is not waited for: its tasks are
//! done by the others. Between jobs a worker spins for [`SPIN`] and then sleeps, so an idle pool uses no CPU.
//!
//! The whole state is one word, the gate:
//!
//! ```text
//! | epoch, 32 bits | open, 1 bit | workers inside, 31 bits |
//! ```
//!
//! Invariants: a job is written only while the gate is closed and nobody is inside; a worker reads it only while inside.
//! A call costs O(threads), allocates nothing, and returns only when no worker is inside.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};
use std::{hint, mem, ptr};

use crate::{KernelError, Result};

/// Called with the worker's number and the task's.
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// How long a worker looks for the next job before it sleeps: longer than the serial work between two ops of a step.
const SPIN: Duration = Duration::from_micros(50);
/// Polls of the gate between two looks at the clock.
const POLLS: usize = 32;
/// More threads than any machine has cores; a typing error, not a wish.
const THREADS_MAX: usize = 1024;

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

fn epoch(gate: u64) -> u64 {
    gate >> 32
}

/// The tasks of one worker that nobody has claimed, on a cache line of its own.
#[repr(align(128))]
struct Range {
    next: AtomicUsize,
    end: AtomicUsize,
}

struct Shared {
    gate: AtomicU64,
    /// The job's work; meaningful while a caller is in `run`.
    work: UnsafeCell<*const Work<'static>>,
    ranges: Vec<Range>,
    sleeping: Vec<AtomicBool>,
    shutdown: AtomicBool,
    /// The first panic of a job's tasks.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    panicked: AtomicBool,
}

// SAFETY: `work` is written and read as the module's invariants say; everything else is `Sync` by itself, and the work it
// points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `work` is used only within `run`, whatever thread that is on.
unsafe impl Send for Shared {}

/// The threads of one device.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    sleepers: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
    busy: AtomicBool,
}

impl Pool {
    /// A pool of `threads`, the caller's included.
    pub(crate) fn new(threads: usize) -> Result<Pool> {
        if !(1..=THREADS_MAX).contains(&threads) {
            return Err(KernelError::Unsupported(format!("expected 1 to {THREADS_MAX} threads, found {threads}")));
        }
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            work: UnsafeCell::new(ptr::null::<fn(usize, usize)>() as *const Work<'static>),
            ranges: (0..threads).map(|_| Range { next: AtomicUsize::new(0), end: AtomicUsize::new(0) }).collect(),
            sleeping: (0..threads).map(|_| AtomicBool::new(false)).collect(),
            shutdown: AtomicBool::new(false),
            panic: Mutex::new(None),
            panicked: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, sleepers: Vec::new(), handles: Vec::new(), busy: AtomicBool::new(false) };
        for worker in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("kvern-cpu-{worker}"))
                .spawn(move || shared.serve(worker))
                .map_err(|error| KernelError::Unsupported(format!("cannot start a compute thread: {error}")))?;
            pool.sleepers.push(handle.thread().clone());
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.shared.ranges.len()
    }

    /// Runs `work(worker, task)` once for each task below `tasks`; no two tasks run with the same worker number at once.
    /// A panic in a task cancels those not begun and becomes this call's. Panics if another call is running.
    pub(crate) fn run(&self, tasks: usize, work: &Work<'_>) {
        assert!(
            !self.busy.swap(true, Ordering::Acquire),
            "an op was issued while another one was running on its device"
        );
        let _release = Release(&self.busy);
        if tasks <= 1 || self.handles.is_empty() {
            return (0..tasks).for_each(|task| work(0, task));
        }
        self.open(tasks, work);
        self.shared.take_part(0);
        self.shared.close();
        if self.shared.panicked.swap(false, Ordering::Relaxed) {
            let payload = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
            resume_unwind(payload.expect("a panic is stored before it is announced"));
        }
    }

    fn open(&self, tasks: usize, work: &Work<'_>) {
        let shared = &*self.shared;
        let threads = self.threads();
        for (worker, range) in shared.ranges.iter().enumerate() {
            range.next.store(share(tasks, worker, threads), Ordering::Relaxed);
            range.end.store(share(tasks, worker + 1, threads), Ordering::Relaxed);
        }
        // SAFETY: nobody is inside, so nobody reads `work`; `close` returns before the borrow that is stretched here ends.
        unsafe { *shared.work.get() = mem::transmute::<*const Work<'_>, *const Work<'static>>(work) };
        let next = epoch(shared.gate.load(Ordering::Relaxed)).wrapping_add(1) << 32;
        // Sequentially consistent against `sleeping`: either we see a sleeper, or it sees the open gate.
        shared.gate.store(next | OPEN, Ordering::SeqCst);
        for (sleeping, thread) in shared.sleeping[1..].iter().zip(&self.sleepers).take(tasks - 1) {
            if sleeping.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.shutdown.store(true, Ordering::SeqCst);
        for (thread, handle) in self.sleepers.iter().zip(self.handles.drain(..)) {
            thread.unpark();
            // A worker cannot panic: tasks run under `catch_unwind`.
            let _ = handle.join();
        }
    }
}

/// Where the range of `worker` begins when `tasks` are dealt to `threads`; no overflow for any number of tasks.
fn share(tasks: usize, worker: usize, threads: usize) -> usize {
    tasks / threads * worker + (tasks % threads).min(worker)
}

struct Release<'a>(&'a AtomicBool);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Shared {
    /// Claims and runs tasks, those of `worker` first, until none is left.
    fn take_part(&self, worker: usize) {
        // SAFETY: the caller of `run` and workers inside the gate see a job that lives until the gate is closed and empty.
        let work = unsafe { &**self.work.get() };
        let threads = self.ranges.len();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            for owner in (worker..threads).chain(0..worker) {
                let range = &self.ranges[owner];
                let end = range.end.load(Ordering::Relaxed);
                while range.next.load(Ordering::Relaxed) < end && !self.panicked.load(Ordering::Relaxed) {
                    let task = range.next.fetch_add(1, Ordering::Relaxed);
                    if task < end {
                        work(worker, task);
                    }
                }
            }
        }));
        if let Err(payload) = outcome {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
            self.panicked.store(true, Ordering::Relaxed);
        }
    }

    /// Lets nobody else in and waits until the workers inside have left.
    fn close(&self) {
        self.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut polls = 0;
        while self.gate.load(Ordering::Acquire) & INSIDE != 0 {
            polls += 1;
            // A worker inside may have lost its core to another process: give ours away rather than burn it.
            if polls % 1024 == 0 { thread::yield_now() } else { hint::spin_loop() }
        }
    }

    /// A worker's life.
    fn serve(&self, worker: usize) {
        let mut seen = 0;
        loop {
            let gate = self.await_change(worker, seen);
            if self.shutdown.load(Ordering::SeqCst) {
                return;
            }
            seen = epoch(gate);
            if self.enter(gate) {
                self.take_part(worker);
                self.gate.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Steps inside the gate if it is still open for the job that `gate` showed.
    fn enter(&self, mut gate: u64) -> bool {
        let job = epoch(gate);
        while gate & OPEN != 0 && epoch(gate) == job {
            match self.gate.compare_exchange_weak(gate, gate + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(current) => gate = current,
            }
        }
        false
    }

    /// The gate once its epoch differs from `seen`, or any value on shutdown: spins, then sleeps.
    fn await_change(&self, worker: usize, seen: u64) -> u64 {
        let began = Instant::now();
        loop {
            for _ in 0..POLLS {
                let gate = self.gate.load(Ordering::Acquire);
                if epoch(gate) != seen {
                    return gate;
                }
                hint::spin_loop();
            }
            if began.elapsed() > SPIN {
                break;
            }
        }
        let sleeping = &self.sleeping[worker];
        sleeping.store(true, Ordering::SeqCst);
        let gate = loop {
            let gate = self.gate.load(Ordering::SeqCst);
            if epoch(gate) != seen || self.shutdown.load(Ordering::SeqCst) {
                break gate;
            }
            thread::park();
        };
        sleeping.store(false, Ordering::Relaxed);
        gate
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
