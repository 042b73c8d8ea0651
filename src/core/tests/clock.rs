//! The core against a device whose steps take what a cost model says, half as much again as the core was told: fairness,
//! the objective for the inter-token latency, and how good the predictions are.

use kvern_core::{
    CacheSalt, ClassId, ClassSpec, CoreConfig, CostModel, Effect, Engine, FinishReason, Input, Micros, Probe, Refusal,
    RequestId, Sampled, StepPlan, Submission, TenantId, TenantSpec, Timed, WorkerId,
};
use std::collections::HashMap;

const COST: CostModel = CostModel {
    step_ps: 2_000_000_000,
    prefill_token_ps: 20_000_000,
    prefill_context_ps: 4_000,
    decode_sequence_ps: 50_000_000,
    decode_context_ps: 100_000,
};

struct Arrival {
    at: u64,
    tenant: u32,
    prompt: u32,
    output: u32,
    deadline: Option<u64>,
}

fn arrival(at: u64, tenant: u32, prompt: u32, output: u32) -> Arrival {
    Arrival { at, tenant, prompt, output, deadline: None }
}

/// What became of a request; times in microseconds.
#[derive(Clone, Debug, Default)]
struct Outcome {
    predicted_ttft: u64,
    ttft: Option<u64>,
    gaps: Vec<u64>,
    end: u64,
    last: u64,
    retry_in: Option<u64>,
    reason: Option<FinishReason>,
}

struct Clock {
    engine: Engine,
    now: u64,
    outcomes: HashMap<RequestId, (u64, Outcome)>,
    tokens: HashMap<u32, u64>,
    tenants: HashMap<RequestId, u32>,
}

impl Clock {
    fn new(config: CoreConfig, num_tenants: u32) -> Self {
        let mut engine = Engine::new(config);
        let specs = (0..num_tenants).map(|tenant| TenantSpec::new(TenantId(tenant))).collect();
        engine.apply(Timed { at: Micros(0), input: Input::SetTenants(specs) }, &mut Vec::new());
        let (outcomes, tokens, tenants) = (HashMap::new(), HashMap::new(), HashMap::new());
        Clock { engine, now: 0, outcomes, tokens, tenants }
    }

    fn apply(&mut self, at: u64, input: Input) {
        let mut effects = Vec::new();
        self.engine.apply(Timed { at: Micros(at), input }, &mut effects);
        self.take(at, effects);
    }

    fn take(&mut self, at: u64, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Token { request, .. } => {
                    let (submitted, outcome) = self.outcomes.get_mut(&request).expect("it was submitted");
                    match outcome.ttft {
                        None => outcome.ttft = Some(at - *submitted),
                        Some(_) => outcome.gaps.push(at - outcome.last),
                    }
                    outcome.last = at;
                    *self.tokens.entry(self.tenants[&request]).or_default() += 1;
                }
                Effect::Finish { request, reason, .. } => {
                    let (_, outcome) = self.outcomes.get_mut(&request).expect("it was submitted");
                    outcome.end = at;
                    outcome.reason = Some(reason);
                    if let FinishReason::Refused(Refusal::Deadline(backoff)) = reason {
                        outcome.retry_in = Some(backoff.retry_in.0);
                    }
                }
                _ => {}
            }
        }
    }

    fn submit(&mut self, number: u64, arrival: &Arrival) {
        let request = RequestId(number);
        let (tenant, class) = (TenantId(arrival.tenant), ClassId(0));
        let probe = Probe { tenant, class, cached_tokens: 0, uncached_tokens: arrival.prompt };
        let predicted_ttft = self.engine.predict_ttft(&probe).0;
        self.outcomes.insert(request, (arrival.at, Outcome { predicted_ttft, ..Outcome::default() }));
        self.tenants.insert(request, arrival.tenant);
        let submission = Submission {
            request,
            // No two alike.
            prompt: (0..arrival.prompt).map(|at| at ^ ((number as u32 + 1) << 14)).collect(),
            max_new_tokens: arrival.output,
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: Vec::new(),
            salt: CacheSalt(0),
            shared_tokens: 0,
            tenant,
            class,
            deadline: arrival.deadline.map(|after| Micros(arrival.at + after)),
        };
        self.apply(arrival.at, Input::Submit(submission));
    }

    /// Runs until all are finished; gives the outcomes in order.
    fn run(&mut self, arrivals: &[Arrival]) -> Vec<Outcome> {
        let mut next = 0;
        let mut plan = StepPlan::empty();
        loop {
            while next < arrivals.len() && arrivals[next].at <= self.now {
                self.submit(next as u64, &arrivals[next]);
                next += 1;
            }
            let mut effects = Vec::new();
            let is_planned = self.engine.plan(WorkerId(0), &mut plan, &mut effects);
            self.take(self.now, effects);
            if !is_planned {
                assert!(self.engine.is_idle(), "requests wait although the worker is idle");
                let Some(arrival) = arrivals.get(next) else { break };
                self.now = arrival.at;
                continue;
            }
            let device_us = device_us(&plan);
            let end = self.now + device_us;
            // Who comes during the step is submitted then.
            while next < arrivals.len() && arrivals[next].at <= end {
                self.submit(next as u64, &arrivals[next]);
                next += 1;
            }
            self.now = end;
            let samples = plan.slices.iter().filter(|slice| slice.sample);
            let sampled = samples.map(|slice| (slice.request, Sampled::Token(7))).collect();
            self.apply(end, Input::StepDone { worker: plan.worker, step: plan.step, device_us, sampled });
        }
        (0..arrivals.len() as u64).map(|number| self.outcomes[&RequestId(number)].1.clone()).collect()
    }
}

/// What the step really takes.
fn device_us(plan: &StepPlan) -> u64 {
    let mut ps = COST.step_ps;
    for slice in &plan.slices {
        let (start, tokens) = (u64::from(slice.start), slice.tokens.len() as u64);
        ps += if tokens == 1 && slice.sample {
            COST.decode_sequence_ps + COST.decode_context_ps * (start + 1)
        } else {
            COST.prefill_token_ps * tokens + COST.prefill_context_ps * (tokens * start + tokens * (tokens + 1) / 2)
        };
    }
    ps * 3 / 2 / 1_000_000
}

fn config() -> CoreConfig {
    CoreConfig {
        step_tokens_max: 2048,
        running_max: 32,
        waiting_max: 10_000,
        cost: COST,
        classes: vec![ClassSpec { ttft: None, itl: Some(Micros(30_000)) }],
        ..CoreConfig::mixed(4_000, 16)
    }
}

fn percentile(mut values: Vec<u64>, percent: usize) -> u64 {
    values.sort_unstable();
    values[(values.len() - 1) * percent / 100]
}

/// What a light tenant has of a flood.
struct Flood {
    /// TTFT in microseconds: of the light tenant alone and in the flood, p99, and of the flood, p50.
    alone: u64,
    light: u64,
    flood: u64,
    /// Thousandths: the time for all requests in the order that knows no tenants, of the time with them.
    throughput: u64,
}

/// Tenant 1 sends a request of `prompt` tokens at a time, tenant 0 hundreds at once, with outputs of `output` tokens.
fn flood(config: &CoreConfig, prompt: u32, output: u32) -> Flood {
    let light: Vec<_> = (0..30).map(|at| arrival(1_000_000 + at * 613_000, 1, prompt, 8)).collect();
    let alone = Clock::new(config.clone(), 2).run(&light);
    let mut both: Vec<_> = (0..800).map(|at| arrival(at * 1_000, 0, 600, output)).collect();
    both.extend(light);
    both.sort_by_key(|arrival| arrival.at);
    let outcomes = Clock::new(config.clone(), 2).run(&both);
    let of = |tenant| both.iter().zip(&outcomes).filter(move |(a, _)| a.tenant == tenant).filter_map(|(_, o)| o.ttft);
    let (light, flood) = (of(1).collect(), of(0).collect());
    let end = |outcomes: &[Outcome]| outcomes.iter().map(|outcome| outcome.end).max().expect("there are some");
    let unfair: Vec<_> = both.iter().map(|a| Arrival { tenant: 0, deadline: None, ..*a }).collect();
    let unfair = end(&Clock::new(config.clone(), 2).run(&unfair));
    Flood {
        alone: percentile(alone.iter().filter_map(|outcome| outcome.ttft).collect(), 99),
        light: percentile(light, 99),
        flood: percentile(flood, 50),
        throughput: unfair * 1000 / end(&outcomes),
    }
}

#[test]
fn a_flood_hardly_delays_a_light_tenant() {
    // What a light request of the flood's own size waits for is the step that has begun and the decodes beside it; what a long
    // one waits for is little beside its own prompt.
    let table = [
        (16, Some(30_000), 4_000, 1_400),
        (16, Some(30_000), 2_000, 1_450),
        (32, Some(30_000), 4_000, 1_600),
        (32, Some(30_000), 400, 3_200),
        (16, None, 4_000, 1_400),
        (32, None, 400, 3_200),
    ];
    for (running_max, itl, prompt, most) in table {
        let classes = vec![ClassSpec { ttft: None, itl: itl.map(Micros) }];
        let config = CoreConfig { running_max, classes, ..config() };
        let Flood { alone, light, flood, throughput } = flood(&config, prompt, 40);
        let times = light * 1000 / alone;
        println!(
            "{running_max} places, objective {itl:?} us, light prompts of {prompt}: TTFT p99 {light} us in the flood, {alone} us alone \
             ({times} thousandths); the flood's p50 {flood} us; throughput {throughput} thousandths of the unfair order"
        );
        assert!(times <= most, "{times} thousandths of the time alone, expected {most} at most");
        assert!(throughput >= 970, "{throughput} thousandths of the unfair order's throughput");
        assert!(light * 5 <= flood, "{light} us of the light tenant, {flood} us of the flood");
    }
}

#[test]
fn a_tenant_without_a_place_gets_one() {
    // The flood holds all places for a long time; without a right to one the light tenant would wait for the first end.
    let Flood { alone, light, throughput, .. } = flood(&config(), 400, 800);
    println!("TTFT p99 {light} us in a flood of long outputs, {alone} us alone; throughput {throughput} thousandths");
    assert!(light <= 3 * alone, "{light} us in the flood, {alone} us alone");
    assert!(throughput >= 970, "{throughput} thousandths of the unfair order's throughput");
}

#[test]
fn equal_tenants_get_equal_tokens() {
    // One sends long prompts and short outputs, one the opposite, all more than they can get.
    let shapes = [(900, 10), (450, 20), (100, 30), (300, 60)];
    let arrivals: Vec<_> = (0..4_000u64)
        .map(|at| {
            let tenant = at as u32 % 4;
            let (prompt, output) = shapes[tenant as usize];
            arrival(at * 10, tenant, prompt, output)
        })
        .collect();
    let mut clock = Clock::new(config(), 4);
    let outcomes = clock.run(&arrivals);
    // While all four wait: up to when the first of them runs out.
    let last =
        |tenant: u32| arrivals.iter().zip(&outcomes).filter(|(a, _)| a.tenant == tenant).map(|(_, o)| o.end).max();
    let until = (0..4).filter_map(last).min().expect("all have requests");
    let served = |tenant: u32| -> f64 {
        let own = arrivals.iter().zip(&outcomes).filter(|(a, o)| a.tenant == tenant && o.end <= until);
        own.map(|(a, _)| f64::from(a.prompt + a.output)).sum()
    };
    let served: Vec<_> = (0..4).map(served).collect();
    let jain = served.iter().sum::<f64>().powi(2) / (4.0 * served.iter().map(|x| x * x).sum::<f64>());
    println!("tokens {served:?}, Jain index {jain:.4}");
    assert!(jain >= 0.98, "{served:?}: {jain}");
}

#[test]
fn decodes_keep_their_objective() {
    let mut arrivals: Vec<_> = (0..12).map(|at| arrival(at * 1_000, 0, 50, 600)).collect();
    arrivals.extend((0..20).map(|at| arrival(500_000 + at * 400_000, 0, 6_000, 4)));
    let outcomes = Clock::new(config(), 1).run(&arrivals);
    let gaps: Vec<_> = outcomes[..12].iter().flat_map(|outcome| outcome.gaps.clone()).collect();
    let (p50, p99) = (percentile(gaps.clone(), 50), percentile(gaps, 99));
    println!("inter-token latency p50 {p50} us, p99 {p99} us, objective 30000 us");
    assert!(p99 <= 31_500, "p99 {p99} us");
    assert!(p50 >= 3_000, "the steps hold decodes and prefill");
}

#[test]
fn predictions_come_true() {
    // Twice of what can be served, so that the queue grows; predictions are taken on arrival.
    let arrivals: Vec<_> = (0..300).map(|at| arrival(at * 30_000, 0, 800, 30)).collect();
    let outcomes = Clock::new(config(), 1).run(&arrivals);
    let error = |outcome: &Outcome| {
        let found = outcome.ttft.expect("all are served");
        found.abs_diff(outcome.predicted_ttft) * 100 / found
    };
    let errors: Vec<_> = outcomes.iter().skip(50).map(error).collect();
    let (median, p90) = (percentile(errors.clone(), 50), percentile(errors, 90));
    println!("predicted TTFT is off by {median}% (median), {p90}% (p90)");
    assert!(median <= 30, "median error {median}%");
}

#[test]
fn overload_refuses_what_would_be_late() {
    // Twice of what can be served, open loop.
    let overload = |deadline| -> Vec<_> {
        (0..1_200).map(|at| Arrival { deadline, ..arrival(at * 15_000, 0, 800, 30) }).collect()
    };
    let arrivals = overload(Some(2_000_000));
    let outcomes = Clock::new(config(), 1).run(&arrivals);
    let count = |is: fn(&Outcome) -> bool| outcomes.iter().filter(|outcome| is(outcome)).count();
    let refused = count(|o| matches!(o.reason, Some(FinishReason::Refused(Refusal::Deadline(_)))));
    let done = count(|o| o.reason == Some(FinishReason::Length));
    let stopped = count(|o| o.reason == Some(FinishReason::Deadline));
    // What the same time is enough for when nobody minds waiting.
    let until = outcomes.iter().map(|outcome| outcome.end).max().expect("there are some");
    let peak = Clock::new(config(), 1).run(&overload(None)).iter().filter(|outcome| outcome.end <= until).count();
    println!("{done} finished in time of {peak} at best, {refused} refused, {stopped} stopped at their deadline");
    assert_eq!(done + refused + stopped, outcomes.len(), "nothing is lost");
    assert!(done * 100 >= peak * 95, "{done} finished in time, {peak} at best");
    assert!(outcomes.iter().all(|o| o.retry_in.is_none_or(|retry| retry > 0)), "a refusal says when to come again");
}
