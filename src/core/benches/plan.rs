//! A whole turn of the core (`plan`, then `apply` of its `StepDone`) with all requests decoding.

use divan::Bencher;
use kvern_core::{
    CacheSalt, ClassId, CoreConfig, Effect, Engine, Input, Micros, RequestId, Sampled, StepPlan, Submission, TenantId,
    Timed, WorkerId,
};

fn main() {
    divan::main();
}

/// Tokens of each prompt: the block tables then are 32 blocks and more.
const PROMPT: u32 = 512;

fn engine(num_running: u32) -> Engine {
    let mut engine = Engine::new(CoreConfig {
        step_tokens_max: 8192,
        running_max: num_running,
        waiting_max: num_running,
        request_tokens_max: 1 << 20,
        ..CoreConfig::mixed(num_running * 256, 16)
    });
    for request in 0..num_running {
        let submission = Submission {
            request: RequestId(u64::from(request)),
            prompt: (0..PROMPT).map(|at| at ^ (request << 10)).collect(),
            // Never reached: the measured steps are all alike.
            max_new_tokens: 256 * 16 - PROMPT,
            min_new_tokens: 0,
            stop_tokens: vec![1, 2, 3],
            salt: CacheSalt(0),
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
    let mut sampled = engine.recycle_sampled();
    let samples = plan.slices.iter().filter(|slice| slice.sample);
    sampled.extend(samples.map(|slice| (slice.request, Sampled::Token(100))));
    let input = Input::StepDone { worker: plan.worker, step: plan.step, device_us: 0, sampled };
    engine.apply(Timed { at: Micros(0), input }, effects);
}

/// Aim: 10 us + 30 ns for each running request.
#[divan::bench(args = [1, 64, 256, 1024], sample_count = 200, sample_size = 10)]
fn decode_step(bencher: Bencher, num_running: u32) {
    let mut engine = engine(num_running);
    let (mut plan, mut effects) = (StepPlan::empty(), Vec::new());
    while plan.slices.len() < num_running as usize || plan.tokens.len() > plan.slices.len() {
        turn(&mut engine, &mut plan, &mut effects);
    }
    bencher.bench_local(|| turn(&mut engine, &mut plan, &mut effects));
}
