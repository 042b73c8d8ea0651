//! Steps that are planned one ahead: what is in them, where there are none, and what becomes of them when the step before
//! ends a request or fails.

use kvern_core::{
    CacheSalt, CancelReason, ClassId, CoreConfig, Effect, Engine, FinishReason, Input, LAST_SAMPLED, Micros, RequestId,
    Sampled, StepPlan, Submission, TenantId, Timed, TokenId, WorkerId,
};

const WORKER: WorkerId = WorkerId(0);
const STOP: TokenId = 7;

struct Server {
    engine: Engine,
    effects: Vec<Effect>,
}

impl Server {
    fn new(config: CoreConfig) -> Self {
        Server { engine: Engine::new(config), effects: Vec::new() }
    }

    fn apply(&mut self, input: Input) -> &[Effect] {
        self.effects.clear();
        self.engine.apply(Timed { at: Micros(0), input }, &mut self.effects);
        assert_eq!(self.engine.check(), Ok(()));
        &self.effects
    }

    fn submit(&mut self, submission: Submission) {
        assert_eq!(self.apply(Input::Submit(submission)), []);
    }

    fn plan(&mut self) -> StepPlan {
        let mut plan = StepPlan::empty();
        assert!(self.engine.plan(WORKER, &mut plan, &mut self.effects), "requests run");
        plan
    }

    fn ahead(&mut self) -> Option<StepPlan> {
        let mut plan = StepPlan::empty();
        let is_planned = self.engine.plan_ahead(WORKER, &mut plan);
        assert_eq!(self.engine.check(), Ok(()));
        is_planned.then_some(plan)
    }

    fn done(&mut self, plan: &StepPlan, tokens: &[TokenId]) -> &[Effect] {
        let sampling = plan.slices.iter().filter(|slice| slice.sample).map(|slice| slice.request);
        let sampled = sampling.zip(tokens.iter().map(|token| Sampled::Token(*token))).collect();
        self.apply(Input::StepDone { worker: WORKER, step: plan.step, device_us: 0, sampled })
    }

    fn failed(&mut self, plan: &StepPlan) -> &[Effect] {
        self.apply(Input::StepFailed { worker: WORKER, step: plan.step })
    }

    fn live(&self) -> u32 {
        self.engine.stats().blocks_live
    }
}

fn config() -> CoreConfig {
    CoreConfig { plan_ahead: true, ..CoreConfig::mixed(20, 4) }
}

fn submission(request: u64) -> Submission {
    Submission {
        request: RequestId(request),
        prompt: vec![request as u32; 6],
        max_new_tokens: 10,
        min_new_tokens: 0,
        needs_tokens: false,
        stop_tokens: vec![STOP],
        salt: CacheSalt(0),
        shared_tokens: 0,
        tenant: TenantId(0),
        class: ClassId(0),
        deadline: None,
    }
}

/// A server at the first decode of two requests: 7 tokens of each are known, in 2 blocks.
fn decoding(config: CoreConfig) -> (Server, StepPlan) {
    let mut server = Server::new(config);
    server.submit(submission(1));
    server.submit(submission(2));
    let prompts = server.plan();
    server.done(&prompts, &[50, 60]);
    let plan = server.plan();
    assert_eq!(plan.tokens, [50, 60]);
    (server, plan)
}

fn token(request: u64, index: u32, token: TokenId) -> Effect {
    Effect::Token { request: RequestId(request), index, token }
}

fn starts(plan: &StepPlan) -> Vec<(u64, u32)> {
    plan.slices.iter().map(|slice| (slice.request.0, slice.start)).collect()
}

#[test]
fn takes_the_next_tokens_before_they_are_known() {
    let (mut server, mut plan) = decoding(config());
    for step in 0..5u32 {
        let ahead = server.ahead().expect("both go on");
        assert_eq!(ahead.tokens, [LAST_SAMPLED; 2]);
        assert_eq!(starts(&ahead), [(1, 7 + step), (2, 7 + step)]);
        assert!(ahead.slices.iter().all(|slice| slice.last_sampled && slice.sample));
        // Each takes its next block when it needs it.
        assert_eq!(ahead.blocks.len(), if step % 4 == 1 { 2 } else { 0 }, "step {step}");
        assert_eq!(server.ahead(), None, "one step ahead is the most");
        assert_eq!(
            server.done(&plan, &[51 + step, 61 + step]),
            [token(1, 1 + step, 51 + step), token(2, 1 + step, 61 + step)]
        );
        plan = ahead;
    }
}

#[test]
fn follows_the_end_of_a_prompt_and_not_its_middle() {
    let mut server = Server::new(CoreConfig { step_tokens_max: 8, ..config() });
    server.submit(submission(1));
    server.submit(submission(2));
    // A whole prompt and a part of the other, then its end beside a decode.
    let parts = server.plan();
    assert_eq!(parts.tokens, [1, 1, 1, 1, 1, 1, 2, 2]);
    assert_eq!(server.ahead(), None, "how much of the prompt comes next is not foreseen");
    server.done(&parts, &[50]);
    let ends = server.plan();
    assert_eq!(ends.tokens, [50, 2, 2, 2, 2]);
    let ahead = server.ahead().expect("both go on");
    assert_eq!((starts(&ahead), &ahead.tokens[..]), (vec![(1, 7), (2, 6)], &[LAST_SAMPLED; 2][..]));
    assert_eq!(server.done(&ends, &[51, 60]), [token(1, 1, 51), token(2, 0, 60)]);
    assert_eq!(server.done(&ahead, &[52, 61]), [token(1, 2, 52), token(2, 1, 61)]);
}

#[test]
fn a_request_that_ends_leaves_its_blocks_to_the_step_ahead() {
    let (mut server, plan) = decoding(config());
    let ahead = server.ahead().expect("both go on");
    let effects = server.done(&plan, &[STOP, 61]);
    assert_eq!((&effects[0], &effects[2]), (&token(1, 1, STOP), &token(2, 1, 61)));
    assert!(matches!(effects[1], Effect::Finish { request: RequestId(1), reason: FinishReason::Stop, .. }));
    assert_eq!(server.live(), 4);
    // Its id is free, its place is not.
    assert_eq!(server.apply(Input::Cancel { request: RequestId(1), reason: CancelReason::ClientGone }), []);
    let after = server.ahead().expect("the other goes on");
    assert_eq!(starts(&after), [(2, 8)]);
    assert_eq!(server.done(&ahead, &[99, 62]), [token(2, 2, 62)]);
    assert_eq!(server.live(), 3);
}

#[test]
fn what_ran_behind_a_failed_step_counts_for_nothing() {
    for is_done in [true, false] {
        let (mut server, plan) = decoding(config());
        let ahead = server.ahead().expect("both go on");
        assert_eq!(server.failed(&plan), []);
        assert_eq!(server.ahead(), None);
        assert!(!server.engine.plan(WORKER, &mut StepPlan::empty(), &mut Vec::new()), "the step ahead is in flight");
        let effects = if is_done { server.done(&ahead, &[1, 2]) } else { server.failed(&ahead) };
        assert_eq!(effects, []);
        // Each alone, as after any failed step.
        for (request, new) in [(1, 51), (2, 61)] {
            let again = server.plan();
            assert_eq!((starts(&again), &again.tokens[..]), (vec![(request, 6)], &[new - 1][..]));
            assert_eq!(server.ahead(), None, "of a suspect");
            assert_eq!(server.done(&again, &[new]), [token(request, 1, new)]);
        }
        assert_eq!(starts(&server.plan()), [(1, 7), (2, 7)]);
    }
}

#[test]
fn a_lost_worker_loses_both_steps() {
    let (mut server, plan) = decoding(config());
    server.ahead().expect("both go on");
    server.done(&plan, &[STOP, 61]);
    server.ahead().expect("the other goes on");
    let effects = server.apply(Input::WorkerLost { worker: WORKER });
    assert_eq!(effects, [Effect::Preempted { request: RequestId(2) }]);
    assert_eq!(server.live(), 0);
}

/// No step ahead of one whose requests were changed by `change`.
fn none_ahead(config: CoreConfig, change: impl Fn(&mut Server)) {
    let (mut server, _) = decoding(config);
    change(&mut server);
    let stats = server.engine.stats();
    assert_eq!(server.ahead(), None);
    assert_eq!(server.engine.stats(), stats);
}

#[test]
fn stays_where_the_next_step_is_not_foreseen() {
    none_ahead(CoreConfig { plan_ahead: false, ..config() }, |_| {});
    none_ahead(config(), |server| {
        server.apply(Input::Cancel { request: RequestId(1), reason: CancelReason::ClientGone });
    });
    none_ahead(config(), |server| server.submit(submission(3)));
    // Who has no place, or no blocks, does not matter.
    let (mut server, _) = decoding(config());
    server.submit(Submission { prompt: vec![9; 70], ..submission(3) });
    assert!(server.ahead().is_some());
    let (mut server, _) = decoding(CoreConfig { running_max: 2, ..config() });
    server.submit(submission(3));
    assert!(server.ahead().is_some());
}

#[test]
fn stays_where_the_host_must_know_the_token() {
    let mut server = Server::new(config());
    server.submit(Submission { needs_tokens: true, ..submission(1) });
    server.submit(submission(2));
    let prompts = server.plan();
    server.done(&prompts, &[50, 60]);
    server.plan();
    assert_eq!(server.ahead(), None);
}

#[test]
fn stays_where_blocks_lack_or_all_end() {
    // Two blocks each, and one for two ninth tokens.
    let (mut server, plan) = decoding(CoreConfig { pools: vec![5], ..config() });
    let ahead = server.ahead().expect("the eighth token has a place");
    server.done(&plan, &[51, 61]);
    assert_eq!(server.ahead(), None);
    server.done(&ahead, &[52, 62]);
    let mut server = Server::new(config());
    server.submit(Submission { max_new_tokens: 2, ..submission(1) });
    let prompt = server.plan();
    server.done(&prompt, &[50]);
    server.plan();
    assert_eq!(server.ahead(), None, "it ends with this step");
}
