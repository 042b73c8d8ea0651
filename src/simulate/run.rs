//! The simulation itself: events in the order of time, each applied to the core, and a step for every worker that is idle.
//!
//! Events at one time are all applied before anything is planned, as the server's loop does with its inbox. Complexity: that
//! of the core, and O(log workers) an event.

use super::figures::Times;
use super::profile::Profile;
use super::trace::{Arrival, TraceError, mix, token};
use super::{Figures, SimulateError};
use crate::config::Objectives;
use kvern_core::{
    CacheSalt, ClassId, CostModel, Effect, Engine, Input, Micros, RequestId, Sampled, StepPlan, Submission, TenantId,
    TenantSpec, Timed, TokenId, TransferId, WorkerId,
};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

/// Ends an answer: above the 31 bits of all other tokens.
const STOP: TokenId = 1 << 31;

/// Most tenants of a trace.
const TENANTS_MAX: usize = 4096;

/// Turns in which nothing can happen, after which the core is stuck.
const IDLE_TURNS_MAX: u32 = 1_000;
const IDLE_TURN_US: u64 = 100_000;

const PS_PER_US: u64 = 1_000_000;

/// What happens at a time that was known before; ordered by what it is, so that equal times have one order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    StepDone(u8),
    TransferDone(u64),
}

/// A request that has not ended, or not yet been forgotten.
#[derive(Clone, Copy, Debug)]
struct Live {
    times: Times,
    /// Names the tokens of its answer.
    text: u64,
    emitted: u32,
    output_tokens: u32,
    tenant: u32,
    has_ended: bool,
}

struct Simulation<'a> {
    profile: &'a Profile,
    engine: Engine,
    now: Micros,
    events: BinaryHeap<Reverse<(Micros, Event)>>,
    /// By worker; empty while it is idle.
    steps: Vec<StepPlan>,
    /// From request number `first` on.
    live: VecDeque<Live>,
    first: u64,
    tenants: HashMap<String, u32>,
    specs: Vec<TenantSpec>,
    effects: Vec<Effect>,
    figures: Figures,
}

/// Runs all arrivals to their end. `Figures::took` is left to the caller.
///
/// # Errors
/// When an arrival cannot be read, or there are none.
pub fn simulate(
    arrivals: impl Iterator<Item = Result<Arrival, TraceError>>,
    profile: &Profile,
    objectives: Objectives,
) -> Result<Figures, SimulateError> {
    let mut simulation = Simulation::new(profile, objectives);
    let mut arrivals = arrivals;
    let mut next = arrivals.next().transpose()?;
    if next.is_none() {
        return Err(SimulateError::Empty);
    }
    let mut idle_turns = 0;
    loop {
        let event = simulation.events.peek().map(|Reverse((at, _))| *at);
        simulation.now = match (next.as_ref().map(|arrival| arrival.at), event) {
            (Some(arrival), Some(event)) => arrival.min(event),
            (Some(at), None) | (None, Some(at)) => at,
            (None, None) if simulation.engine.is_idle() => break,
            // Only time passes: deadlines may.
            (None, None) => {
                idle_turns += 1;
                if idle_turns > IDLE_TURNS_MAX {
                    let left = simulation.live.iter().filter(|live| !live.has_ended).count() as u64;
                    return Err(SimulateError::Stuck { left });
                }
                Micros(simulation.now.0 + IDLE_TURN_US)
            }
        };
        if event.is_none() && next.is_none() {
            simulation.apply(Input::Tick);
        }
        simulation.take_events();
        while let Some(arrival) = next.take_if(|arrival| arrival.at <= simulation.now) {
            simulation.submit(&arrival)?;
            next = arrivals.next().transpose()?;
        }
        simulation.plan();
    }
    Ok(simulation.finish())
}

impl<'a> Simulation<'a> {
    fn new(profile: &'a Profile, objectives: Objectives) -> Self {
        let num_workers = profile.core.workers.len();
        Simulation {
            profile,
            engine: Engine::new(profile.core.clone()),
            now: Micros(0),
            events: BinaryHeap::new(),
            steps: vec![StepPlan::empty(); num_workers],
            live: VecDeque::new(),
            first: 0,
            tenants: HashMap::new(),
            specs: Vec::new(),
            effects: Vec::new(),
            figures: Figures { objectives, ..Figures::default() },
        }
    }

    fn finish(self) -> Figures {
        let stats = self.engine.stats();
        Figures {
            prefix_queries: stats.prefix_queries,
            prefix_hits: stats.prefix_hits,
            preemptions: stats.preemptions,
            simulated: self.now,
            ..self.figures
        }
    }

    fn apply(&mut self, input: Input) {
        self.engine.apply(Timed { at: self.now, input }, &mut self.effects);
        self.take_effects();
    }

    /// Applies what is due.
    fn take_events(&mut self) {
        while let Some(Reverse((at, event))) = self.events.peek().copied()
            && at <= self.now
        {
            self.events.pop();
            match event {
                Event::StepDone(worker) => self.step_done(worker),
                Event::TransferDone(transfer) => {
                    self.apply(Input::TransferDone { transfer: TransferId(transfer) });
                }
            }
        }
    }

    fn submit(&mut self, arrival: &Arrival) -> Result<(), SimulateError> {
        let tenant = match &arrival.tenant {
            None => self.tenant("")?,
            Some(name) => self.tenant(name)?,
        };
        let number = self.first + self.live.len() as u64;
        let text = mix(!number);
        self.figures.submitted += 1;
        self.figures.prompt_tokens += u64::from(arrival.prompt_tokens);
        let times = Times { arrived: self.now, ..Times::default() };
        let output_tokens = arrival.output_tokens;
        self.live.push_back(Live { times, text, emitted: 0, output_tokens, tenant, has_ended: false });
        let has_more = arrival.output_tokens_max > output_tokens;
        self.apply(Input::Submit(Submission {
            request: RequestId(number),
            prompt: arrival.prompt(mix(text)),
            max_new_tokens: arrival.output_tokens_max,
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: if has_more { vec![STOP] } else { Vec::new() },
            salt: CacheSalt(tenant.into()),
            shared_tokens: arrival.shared_tokens,
            tenant: TenantId(tenant),
            class: ClassId(arrival.class),
            deadline: arrival.timeout.map(|timeout| Micros(self.now.0.saturating_add(timeout.0))),
        }));
        Ok(())
    }

    /// The number of a tenant, which the core is told of when it comes first. Requests without a tenant have one of no name.
    fn tenant(&mut self, name: &str) -> Result<u32, SimulateError> {
        if let Some(tenant) = self.tenants.get(name) {
            return Ok(*tenant);
        }
        if self.tenants.len() == TENANTS_MAX {
            return Err(SimulateError::Tenants { limit: TENANTS_MAX });
        }
        let tenant = self.tenants.len() as u32;
        let mut spec = TenantSpec::new(TenantId(tenant));
        if let Some(row) = self.profile.tenants.iter().find(|row| row.name == name) {
            (spec.weight, spec.floor_blocks, spec.ceiling_blocks) = (row.weight, row.floor_blocks, row.ceiling_blocks);
        }
        self.tenants.insert(name.to_owned(), tenant);
        self.figures.tenants.push((spec.weight, 0));
        self.specs.push(spec);
        self.apply(Input::SetTenants(self.specs.clone()));
        Ok(tenant)
    }

    /// Starts a step on every worker that is idle and has something to run.
    fn plan(&mut self) {
        for at in 0..self.steps.len() {
            if !self.steps[at].slices.is_empty() {
                continue;
            }
            let worker = WorkerId(at as u8);
            if self.engine.plan(worker, &mut self.steps[at], &mut self.effects) {
                self.figures.steps += 1;
                let ends = Micros(self.now.0.saturating_add(step_us(&self.profile.core.cost, &self.steps[at])));
                self.events.push(Reverse((ends, Event::StepDone(at as u8))));
            }
            self.take_effects();
        }
    }

    fn step_done(&mut self, worker: u8) {
        let step = &mut self.steps[usize::from(worker)];
        let mut sampled = self.engine.recycle_sampled();
        for slice in step.slices.iter().filter(|slice| slice.sample) {
            let live = &self.live[(slice.request.0 - self.first) as usize];
            let is_last = live.emitted + 1 >= live.output_tokens;
            let made = if is_last { STOP } else { token(live.text, live.emitted) };
            sampled.push((slice.request, Sampled::Token(made)));
        }
        let device_us = step_us(&self.profile.core.cost, step);
        step.slices.clear();
        let step = step.step;
        self.apply(Input::StepDone { worker: WorkerId(worker), step, device_us, sampled });
    }

    fn take_effects(&mut self) {
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Token { request, .. } => {
                    let live = &mut self.live[(request.0 - self.first) as usize];
                    if live.emitted == 0 {
                        live.times.first = self.now;
                    } else {
                        self.figures.itl.add(Micros(self.now.0 - live.times.last.0));
                    }
                    live.times.last = self.now;
                    live.emitted += 1;
                }
                Effect::Finish { request, reason, usage } => {
                    let live = &mut self.live[(request.0 - self.first) as usize];
                    live.has_ended = true;
                    self.figures.finish(reason, &usage, live.times, live.tenant as usize);
                }
                Effect::Transfer { transfer, blocks, .. } => {
                    let takes = self.profile.transfer_block_us.saturating_mul(blocks.len() as u64);
                    let ends = Micros(self.now.0.saturating_add(takes));
                    self.events.push(Reverse((ends, Event::TransferDone(transfer.0))));
                }
                Effect::Scheduled { .. } | Effect::Preempted { .. } | Effect::Moved { .. } => {}
            }
        }
        while self.live.front().is_some_and(|live| live.has_ended) {
            self.live.pop_front();
            self.first += 1;
        }
    }
}

/// What a step takes, in the words of `kvern_core::CostModel`; at least a microsecond.
fn step_us(cost: &CostModel, plan: &StepPlan) -> u64 {
    let mut ps = u128::from(cost.step_ps);
    for slice in &plan.slices {
        let (start, tokens) = (u128::from(slice.start), u128::from(slice.tokens.end - slice.tokens.start));
        ps += if tokens == 1 && slice.sample {
            u128::from(cost.decode_sequence_ps) + u128::from(cost.decode_context_ps) * (start + 1)
        } else {
            let context = tokens * start + tokens * (tokens + 1) / 2;
            u128::from(cost.prefill_token_ps) * tokens + u128::from(cost.prefill_context_ps) * context
        };
    }
    u64::try_from(ps.div_ceil(PS_PER_US.into())).unwrap_or(u64::MAX).max(1)
}
