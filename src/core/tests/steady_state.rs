//! In the steady state of a running batch neither verb of the core allocates, however many requests wait.

use kvern_core::{
    CacheSalt, ClassId, CoreConfig, Effect, Engine, Input, Micros, RequestId, Sampled, StepPlan, Submission, TenantId,
    Timed, WorkerId,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, counting.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `realloc`'s contract, and the pointer came from the system's allocator.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const NUM_REQUESTS: u64 = 64;
/// Those that find no place.
const NUM_WAITING: u64 = 1000;

fn engine() -> Engine {
    let mut engine = Engine::new(CoreConfig {
        step_tokens_max: 512,
        running_max: NUM_REQUESTS as u32,
        waiting_max: 2000,
        request_tokens_max: 4096,
        ..CoreConfig::mixed(8192, 16)
    });
    for request in 0..NUM_REQUESTS + NUM_WAITING {
        let submission = Submission {
            request: RequestId(request),
            prompt: (0..100 + request as u32).map(|at| at * (1 + request as u32 % 3)).collect(),
            max_new_tokens: 1_000,
            min_new_tokens: 0,
            stop_tokens: vec![2, 3],
            salt: CacheSalt(0),
            shared_tokens: 0,
            tenant: TenantId(0),
            class: ClassId(0),
            deadline: None,
        };
        engine.apply(Timed { at: Micros(0), input: Input::Submit(submission) }, &mut Vec::new());
    }
    engine
}

/// Plans a step and reports it back; gives the number of slices.
fn turn(engine: &mut Engine, plan: &mut StepPlan, effects: &mut Vec<Effect>, token: u32) -> usize {
    effects.clear();
    assert!(engine.plan(WorkerId(0), plan, effects), "requests run");
    let mut sampled = engine.recycle_sampled();
    let samples = plan.slices.iter().filter(|slice| slice.sample);
    sampled.extend(samples.map(|slice| (slice.request, Sampled::Token(token))));
    let input = Input::StepDone { worker: plan.worker, step: plan.step, device_us: 0, sampled };
    engine.apply(Timed { at: Micros(0), input }, effects);
    plan.slices.len()
}

#[test]
fn decoding_allocates_nothing() {
    let mut engine = engine();
    let (mut plan, mut effects) = (StepPlan::empty(), Vec::new());
    // Prefill, and one step in which all decode, sizes every buffer.
    for step in 0.. {
        if turn(&mut engine, &mut plan, &mut effects, 100) == NUM_REQUESTS as usize
            && plan.tokens.len() == plan.slices.len()
        {
            break;
        }
        assert!(step < 100, "the prompts are computed by now");
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    // Each request fills 50 blocks.
    for step in 0..800 {
        assert_eq!(turn(&mut engine, &mut plan, &mut effects, 100 + step % 7), NUM_REQUESTS as usize);
        assert_eq!(effects.len(), NUM_REQUESTS as usize);
    }
    assert_eq!(u64::from(engine.stats().waiting), NUM_WAITING);
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(allocations, 0, "allocations in 800 steps of 64 decoding requests");
    assert_eq!(engine.check(), Ok(()));
}
