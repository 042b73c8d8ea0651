//! A snapshot of the core in a state that can be counted by hand.

use kvern_core::{
    CacheSalt, ClassId, ClassSpec, CoreConfig, CostModel, Engine, Input, Micros, RequestId, Sampled, StepPlan,
    Submission, TenantId, TenantSignals, TenantSpec, Timed, WorkerId,
};

/// A token of prefill takes 10 us, and nothing else takes time.
const COST: CostModel = CostModel {
    step_ps: 0,
    prefill_token_ps: 10_000_000,
    prefill_context_ps: 0,
    decode_sequence_ps: 0,
    decode_context_ps: 0,
};

fn apply(engine: &mut Engine, at: u64, input: Input) {
    engine.apply(Timed { at: Micros(at), input }, &mut Vec::new());
}

fn submit(engine: &mut Engine, request: u64, tenant: u32, class: u8, prompt: u32) {
    let submission = Submission {
        request: RequestId(request),
        prompt: (0..prompt).map(|at| at ^ ((request as u32) << 12)).collect(),
        max_new_tokens: 10,
        min_new_tokens: 0,
        needs_tokens: false,
        stop_tokens: Vec::new(),
        salt: CacheSalt(u128::from(tenant)),
        shared_tokens: 0,
        tenant: TenantId(tenant),
        class: ClassId(class),
        deadline: None,
    };
    apply(engine, 0, Input::Submit(submission));
}

#[test]
fn counts_what_is_there() {
    let mut engine = Engine::new(CoreConfig {
        running_max: 1,
        waiting_max: 10,
        queue_tokens_max: 1_000,
        classes: vec![ClassSpec::default(); 2],
        cost: COST,
        ..CoreConfig::mixed(100, 16)
    });
    let specs = [0, 7].map(|tenant| TenantSpec::new(TenantId(tenant))).to_vec();
    apply(&mut engine, 0, Input::SetTenants(specs));
    submit(&mut engine, 0, 7, 0, 100);
    let mut plan = StepPlan::empty();
    assert!(engine.plan(WorkerId(0), &mut plan, &mut Vec::new()));
    submit(&mut engine, 1, 7, 0, 50);
    submit(&mut engine, 2, 0, 1, 150);

    let signals = engine.signals();
    // The first request's prompt is in the step in flight: 100 tokens of it in 7 blocks.
    assert_eq!((signals.running, signals.waiting[0], signals.waiting[1]), (1, 1, 1));
    assert_eq!((signals.queued_tokens, signals.queued_prefill), (200, Micros(2_000)));
    // The rest of the step, what waits, and one token.
    assert_eq!(signals.predicted_ttft, Micros(1_000 + 2_000 + 10));
    assert_eq!(
        (signals.blocks_free, signals.blocks_cached, signals.blocks_live, signals.blocks_total),
        (93, 0, 7, 100)
    );
    assert_eq!((signals.queue_pressure, signals.kv_pressure, signals.itl_pressure), (200, 70, 0));
    assert_eq!((signals.saturation, signals.blocks_pinned), (200, 0));

    let mut tenants = Vec::new();
    engine.tenant_signals(&mut tenants);
    let of = |tenant, waiting, running, blocks_live, tokens_charged| TenantSignals {
        tenant: TenantId(tenant),
        waiting,
        running,
        blocks_live,
        blocks_cached: 0,
        tokens_charged,
        tokens_refunded: 0,
    };
    assert_eq!(tenants, [of(0, 1, 0, 0, 0), of(7, 1, 1, 7, 100)]);

    // Its first token, and the six blocks that are full stay to be found when it is withdrawn.
    let sampled = vec![(RequestId(0), Sampled::Token(5))];
    apply(&mut engine, 400, Input::StepDone { worker: WorkerId(0), step: plan.step, device_us: 0, sampled });
    let reason = kvern_core::CancelReason::ClientGone;
    apply(&mut engine, 500, Input::Cancel { request: RequestId(0), reason });
    let signals = engine.signals();
    assert_eq!((signals.at, signals.running), (Micros(500), 0));
    assert_eq!((signals.blocks_free, signals.blocks_cached, signals.blocks_live), (94, 6, 0));
    engine.tenant_signals(&mut tenants);
    assert_eq!((tenants[1].blocks_cached, tenants[1].tokens_charged), (6, 101));
}
