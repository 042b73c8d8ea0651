//! In the steady state of a running batch no verb of the core allocates, however many requests wait, and whether steps are
//! planned ahead or not.

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

fn engine(plan_ahead: bool) -> Engine {
    let mut engine = Engine::new(CoreConfig {
        step_tokens_max: 512,
        running_max: NUM_REQUESTS as u32,
        waiting_max: 2000,
        request_tokens_max: 4096,
        plan_ahead,
        ..CoreConfig::mixed(8192, 16)
    });
    for request in 0..NUM_REQUESTS + NUM_WAITING {
        let submission = Submission {
            request: RequestId(request),
            prompt: (0..100 + request as u32).map(|at| at * (1 + request as u32 % 3)).collect(),
            max_new_tokens: 1_000,
            min_new_tokens: 0,
            needs_tokens: false,
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

/// Plans a step and reports it back.
fn turn(engine: &mut Engine, plan: &mut StepPlan, effects: &mut Vec<Effect>, token: u32) -> usize {
    effects.clear();
    assert!(engine.plan(WorkerId(0), plan, effects), "requests run");
    report(engine, plan, effects, token)
}

/// The same with two plans, the first of which is in flight before and after.
fn turn_ahead(engine: &mut Engine, plans: &mut [StepPlan; 2], effects: &mut Vec<Effect>, token: u32) -> usize {
    effects.clear();
    assert!(engine.plan_ahead(WorkerId(0), &mut plans[1]), "all of them go on");
    assert!(!engine.plan_ahead(WorkerId(0), &mut StepPlan::empty()), "one step ahead is the most");
    let num_slices = report(engine, &plans[0], effects, token);
    plans.swap(0, 1);
    num_slices
}

/// Reports a step with `token` for each slice that samples; gives the number of slices.
fn report(engine: &mut Engine, plan: &StepPlan, effects: &mut Vec<Effect>, token: u32) -> usize {
    let mut sampled = engine.recycle_sampled();
    let samples = plan.slices.iter().filter(|slice| slice.sample);
    sampled.extend(samples.map(|slice| (slice.request, Sampled::Token(token))));
    let input = Input::StepDone { worker: plan.worker, step: plan.step, device_us: 0, sampled };
    engine.apply(Timed { at: Micros(0), input }, effects);
    plan.slices.len()
}

/// Runs until all prompts are computed: that, and one step in which all decode, sizes every buffer.
fn warm(engine: &mut Engine, plan: &mut StepPlan, effects: &mut Vec<Effect>) {
    for step in 0.. {
        let num_slices = turn(engine, plan, effects, 100);
        if num_slices == NUM_REQUESTS as usize && plan.tokens.len() == plan.slices.len() {
            return;
        }
        assert!(step < 100, "the prompts are computed by now");
    }
}

/// One test, as the allocations of all threads are counted.
#[test]
fn decoding_allocates_nothing() {
    for plan_ahead in [false, true] {
        let mut engine = engine(plan_ahead);
        let (mut plans, mut effects) = ([StepPlan::empty(), StepPlan::empty()], Vec::new());
        warm(&mut engine, &mut plans[0], &mut effects);
        if plan_ahead {
            assert!(engine.plan(WorkerId(0), &mut plans[0], &mut effects), "requests run");
            // The step ahead has buffers of its own.
            for _ in 0..2 {
                turn_ahead(&mut engine, &mut plans, &mut effects, 100);
            }
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        // Each request fills 50 blocks.
        for step in 0..800 {
            let token = 100 + step % 7;
            let num_slices = if plan_ahead {
                turn_ahead(&mut engine, &mut plans, &mut effects, token)
            } else {
                turn(&mut engine, &mut plans[0], &mut effects, token)
            };
            assert_eq!(num_slices, NUM_REQUESTS as usize);
            assert_eq!(effects.len(), NUM_REQUESTS as usize);
        }
        assert_eq!(u64::from(engine.stats().waiting), NUM_WAITING);
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert_eq!(allocations, 0, "allocations in 800 steps of 64 decoding requests, ahead: {plan_ahead}");
        assert_eq!(engine.check(), Ok(()));
    }
}
