//! The prefix cache, with a prompt of 10,000 tokens that it holds: looking it up, admitting it, and submitting it (which
//! hashes it).

use divan::Bencher;
use kvern_core::{
    CacheSalt, CancelReason, ClassId, CoreConfig, Engine, Input, Micros, RequestId, Sampled, StepPlan, Submission,
    TenantId, Timed, WorkerId,
};

fn main() {
    divan::main();
}

const PROMPT: u32 = 10_000;

struct Bench {
    engine: Engine,
    plan: StepPlan,
    next_request: u64,
}

impl Bench {
    /// An engine whose cache holds the prompts of requests 0..`num_prompts`.
    fn new(num_prompts: u32) -> Self {
        let engine = Engine::new(CoreConfig {
            step_tokens_max: 16_384,
            running_max: 8,
            waiting_max: 8,
            request_tokens_max: 1 << 30,
            ..CoreConfig::mixed((num_prompts + 1) * 640, 16)
        });
        let mut bench = Bench { engine, plan: StepPlan::empty(), next_request: 0 };
        for prompt in 0..num_prompts {
            bench.submit(prompt);
            bench.admit();
            bench.report();
        }
        bench
    }

    fn apply(&mut self, input: Input) {
        self.engine.apply(Timed { at: Micros(0), input }, &mut Vec::new());
    }

    fn submit(&mut self, prompt: u32) {
        self.submit_with(prompt, 0, 1);
    }

    /// Submits prompt number `prompt`, with `tail` more tokens that no other has.
    fn submit_with(&mut self, prompt: u32, tail: u32, max_new_tokens: u32) {
        let submission = Submission {
            request: RequestId(self.next_request),
            prompt: (0..PROMPT + tail).map(|at| at ^ (prompt << 16)).collect(),
            max_new_tokens,
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: Vec::new(),
            salt: CacheSalt(0),
            shared_tokens: 0,
            tenant: TenantId(0),
            class: ClassId(0),
            deadline: None,
        };
        self.next_request += 1;
        self.apply(Input::Submit(submission));
    }

    fn cancel(&mut self) {
        let request = RequestId(self.next_request - 1);
        self.apply(Input::Cancel { request, reason: CancelReason::ClientGone });
    }

    fn admit(&mut self) {
        assert!(self.engine.plan(WorkerId(0), &mut self.plan, &mut Vec::new()), "a request waits");
    }

    fn report(&mut self) {
        let sampled = self.plan.slices.iter().map(|slice| (slice.request, Sampled::Token(0))).collect();
        self.apply(Input::StepDone { worker: WorkerId(0), step: self.plan.step, device_us: 0, sampled });
    }
}

/// `plan` of a step of one decode in which the oldest waiting request, with a cached prefix of 10,000 tokens, is looked up but
/// has no room: little else than the lookup. Aim: 6 us.
#[divan::bench(args = [1, 100], sample_count = 300, sample_size = 1)]
fn lookup(bencher: Bencher, num_prompts: u32) {
    let mut bench = Bench::new(num_prompts);
    // One long request runs, so that what follows must wait for room.
    bench.submit_with(num_prompts, 0, 600 * 16 * num_prompts);
    bench.admit();
    let too_much = bench.engine.stats().blocks_total * 16 - 2 * PROMPT;
    let state = std::cell::RefCell::new((bench, 0));
    bencher
        .with_inputs(|| {
            let (bench, prompt) = &mut *state.borrow_mut();
            if *prompt > 0 {
                bench.cancel();
            }
            bench.report();
            *prompt += 1;
            bench.submit_with(*prompt % num_prompts, too_much, 1);
        })
        .bench_local_values(|()| state.borrow_mut().0.admit());
    let stats = state.borrow().0.engine.stats();
    assert_eq!((stats.running, stats.waiting), (1, 1), "the long request must be all that runs");
}

/// `plan` of a step that admits one cached prompt: lookup, 625 references taken, one block, one slice with its table.
/// Aim: 10 us + 1.5 us + 40 ns for each of 625 blocks = 36.5 us.
#[divan::bench(args = [1, 100], sample_count = 300, sample_size = 1)]
fn admit_cached_prompt(bencher: Bencher, num_prompts: u32) {
    let bench = std::cell::RefCell::new((Bench::new(num_prompts), 0));
    bencher
        .with_inputs(|| {
            let (bench, prompt) = &mut *bench.borrow_mut();
            if *prompt > 0 {
                bench.report();
            }
            *prompt += 1;
            bench.submit(*prompt % num_prompts);
        })
        .bench_local_values(|()| bench.borrow_mut().0.admit());
}

/// `apply` of a submission of 10,000 tokens, which hashes 625 blocks, and of its cancellation.
#[divan::bench(sample_count = 300)]
fn submit_prompt(bencher: Bencher) {
    let mut bench = Bench::new(1);
    bencher.bench_local(|| {
        bench.submit(0);
        bench.cancel();
    });
}
