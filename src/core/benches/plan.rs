//! A whole turn of the core (`plan`, then `apply` of its `StepDone`) with all requests decoding, alone and with 10,000 waiting,
//! for a place or for blocks, and with steps planned ahead.

use divan::Bencher;
use kvern_core::{
    CacheSalt, ClassId, CoreConfig, Effect, Engine, Input, Micros, RequestId, Sampled, StepPlan, Submission, TenantId,
    Timed, WorkerId,
};
use std::cmp::Ordering;

fn main() {
    divan::main();
}

/// Tokens of each prompt: the block tables then are 32 blocks and more.
const PROMPT: u32 = 512;
/// And of the first that waits: more than the pool has left. The others are short.
const FIRST_WAITING: u32 = 70_000;

/// What the waiting wait for.
#[derive(Clone, Copy)]
enum Lack {
    Places,
    Blocks,
}

fn engine(num_running: u32, num_waiting: u32, lack: Lack) -> Engine {
    let mut engine = Engine::new(CoreConfig {
        plan_ahead: true,
        step_tokens_max: 8192,
        running_max: match lack {
            Lack::Places => num_running,
            Lack::Blocks => 8192,
        },
        waiting_max: num_running + num_waiting,
        request_tokens_max: 1 << 20,
        ..CoreConfig::mixed(
            match lack {
                Lack::Places => num_running * 256 + FIRST_WAITING / 16,
                // All that runs, with what it decodes while it is measured, and less than the first that waits.
                Lack::Blocks => num_running * 48,
            },
            16,
        )
    });
    for request in 0..num_running + num_waiting {
        let len = match request.cmp(&num_running) {
            Ordering::Less => PROMPT,
            Ordering::Equal => FIRST_WAITING,
            Ordering::Greater => 64,
        };
        let submission = Submission {
            request: RequestId(u64::from(request)),
            prompt: (0..len).map(|at| at ^ (request << 17)).collect(),
            // Of those that run never reached: the measured steps are all alike.
            max_new_tokens: if request < num_running { 256 * 16 - PROMPT } else { 1 },
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: vec![1, 2, 3],
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

fn turn(engine: &mut Engine, plan: &mut StepPlan, effects: &mut Vec<Effect>) {
    effects.clear();
    assert!(engine.plan(WorkerId(0), plan, effects), "requests run");
    report(engine, plan, effects);
}

/// The same with two plans, the first of which is in flight before and after.
fn turn_ahead(engine: &mut Engine, plans: &mut [StepPlan; 2], effects: &mut Vec<Effect>) {
    effects.clear();
    assert!(engine.plan_ahead(WorkerId(0), &mut plans[1]), "all of them go on");
    report(engine, &plans[0], effects);
    plans.swap(0, 1);
}

fn report(engine: &mut Engine, plan: &StepPlan, effects: &mut Vec<Effect>) {
    let mut sampled = engine.recycle_sampled();
    let samples = plan.slices.iter().filter(|slice| slice.sample);
    sampled.extend(samples.map(|slice| (slice.request, Sampled::Token(100))));
    let input = Input::StepDone { worker: plan.worker, step: plan.step, device_us: 0, sampled };
    engine.apply(Timed { at: Micros(0), input }, effects);
}

/// Measures turns in which all of `num_running` requests decode.
fn measure(bencher: Bencher, num_running: u32, num_waiting: u32, lack: Lack) {
    let mut engine = engine(num_running, num_waiting, lack);
    let (mut plan, mut effects) = (StepPlan::empty(), Vec::new());
    while plan.slices.len() < num_running as usize || plan.tokens.len() > plan.slices.len() {
        turn(&mut engine, &mut plan, &mut effects);
    }
    bencher.bench_local(|| turn(&mut engine, &mut plan, &mut effects));
    assert_eq!((engine.stats().running, engine.stats().waiting), (num_running, num_waiting));
}

/// Aim: 10 us + 30 ns for each running request.
#[divan::bench(args = [1, 64, 256, 1024, 2048], sample_count = 200, sample_size = 10)]
fn decode_step(bencher: Bencher, num_running: u32) {
    measure(bencher, num_running, 0, Lack::Places);
}

/// The same aim: who waits for a place costs nothing.
#[divan::bench(args = [1, 256], sample_count = 200, sample_size = 10)]
fn decode_step_10_000_wait_for_places(bencher: Bencher, num_running: u32) {
    measure(bencher, num_running, 10_000, Lack::Places);
}

/// The same aim: who waits for blocks is looked up once.
#[divan::bench(args = [256], sample_count = 100, sample_size = 2)]
fn decode_step_10_000_wait_for_blocks(bencher: Bencher, num_running: u32) {
    measure(bencher, num_running, 10_000, Lack::Blocks);
}

/// The same aim: a step ahead costs no more than one that is planned in its time.
#[divan::bench(args = [1, 256, 2048], sample_count = 200, sample_size = 10)]
fn decode_step_ahead(bencher: Bencher, num_running: u32) {
    let mut engine = engine(num_running, 0, Lack::Places);
    let (mut plans, mut effects) = ([StepPlan::empty(), StepPlan::empty()], Vec::new());
    while plans[0].slices.len() < num_running as usize || plans[0].tokens.len() > plans[0].slices.len() {
        turn(&mut engine, &mut plans[0], &mut effects);
    }
    assert!(engine.plan(WorkerId(0), &mut plans[0], &mut effects), "requests run");
    bencher.bench_local(|| turn_ahead(&mut engine, &mut plans, &mut effects));
    assert_eq!(engine.stats().running, num_running);
}
