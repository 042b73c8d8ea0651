//! Does again what a recording says, and compares every decision.
//!
//! A recording comes from outside: what would break the protocol of [`Engine::apply`], or make an engine of a size that no
//! server has, is told and not done. Complexity: that of the engine, and O(slices) a step.

use crate::record::{Digest, Entry};
use crate::{
    CoreConfig, Effect, Engine, FinishReason, Input, Micros, RequestId, Sampled, StepId, StepPlan, Timed, WorkerId,
};
use std::collections::HashSet;
use std::fmt;

/// Most blocks and tokens of a pool, and most tokens of a request, of an engine that is made for a recording: an engine takes
/// memory for them beforehand.
const BLOCKS_MAX: u32 = 1 << 24;
const POOL_TOKENS_MAX: u64 = 1 << 28;
const REQUEST_TOKENS_MAX: u64 = 1 << 24;

/// Why a replay cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Divergence {
    /// The core decided otherwise when it was recorded: the digests of then and now.
    Decision { recorded: u64, found: u64 },
    /// The entry is one that this core cannot be in the state for.
    Protocol(String),
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Divergence::Decision { recorded, found } => {
                write!(f, "expected the decision with digest {recorded:016x}, found {found:016x}")
            }
            Divergence::Protocol(problem) => f.write_str(problem),
        }
    }
}

/// What was replayed so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    pub inputs: u64,
    pub plans: u64,
    /// Calls of `plan_ahead`, and those that gave a step.
    pub plans_ahead: u64,
    pub steps_ahead: u64,
    /// Calls of `plan` that gave a step.
    pub steps: u64,
    pub submitted: u64,
    /// Requests that ended, those that were refused not among them.
    pub finished: u64,
    pub refused: u64,
    pub tokens: u64,
    /// Decisions that were compared.
    pub compared: u64,
    /// Times of the first and the last input.
    pub first: Option<Micros>,
    pub last: Micros,
}

/// A worker as the recording must see it.
#[derive(Clone, Debug)]
struct Seat {
    is_alive: bool,
    step: Option<StepId>,
    /// Requests of the step that sample, in order.
    sampling: Vec<RequestId>,
    /// The same of the step ahead.
    ahead: Option<StepId>,
    sampling_ahead: Vec<RequestId>,
}

impl Seat {
    /// Nothing is planned.
    fn new(is_alive: bool) -> Self {
        Seat { is_alive, step: None, sampling: Vec::new(), ahead: None, sampling_ahead: Vec::new() }
    }

    /// The step was reported: what is ahead of it is next.
    fn advance(&mut self) {
        self.step = self.ahead.take();
        std::mem::swap(&mut self.sampling, &mut self.sampling_ahead);
    }
}

/// A core that a recording is replayed on.
pub struct Replay {
    engine: Engine,
    seats: Vec<Seat>,
    /// Submitted and not finished.
    live: HashSet<RequestId>,
    plan: StepPlan,
    effects: Vec<Effect>,
    is_planned: bool,
    /// Of the last input or call of `plan` or `plan_ahead`, until it is compared.
    decided: Option<Digest>,
    replayed: Replayed,
}

impl Replay {
    /// A fresh core of this configuration.
    ///
    /// # Errors
    /// When the configuration is out of bounds, or larger than any server's.
    pub fn new(config: CoreConfig) -> Result<Self, String> {
        if let Some(problem) = config.problem() {
            return Err(problem);
        }
        let (largest, smallest) = config.pools.iter().fold((0, u32::MAX), |(a, b), n| (a.max(*n), b.min(*n)));
        if largest > BLOCKS_MAX {
            return Err(format!("expected at most {BLOCKS_MAX} blocks in a pool, found {largest}"));
        }
        let tokens = u64::from(largest) * u64::from(config.block_size);
        if tokens > POOL_TOKENS_MAX {
            return Err(format!("expected a pool of at most {POOL_TOKENS_MAX} tokens, found {tokens}"));
        }
        let tokens = u64::from(config.request_tokens_max).min(u64::from(smallest) * u64::from(config.block_size) + 1);
        if tokens > REQUEST_TOKENS_MAX {
            return Err(format!("expected requests of at most {REQUEST_TOKENS_MAX} tokens, found {tokens}"));
        }
        Ok(Replay {
            seats: vec![Seat::new(true); config.workers.len()],
            engine: Engine::new(config),
            live: HashSet::new(),
            plan: StepPlan::empty(),
            effects: Vec::new(),
            is_planned: false,
            decided: None,
            replayed: Replayed::default(),
        })
    }

    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    #[must_use]
    pub fn replayed(&self) -> &Replayed {
        &self.replayed
    }

    /// What the core decided on the last input or call of `plan` or `plan_ahead`: its effects, and the step if one was planned.
    #[must_use]
    pub fn decision(&self) -> (&[Effect], Option<&StepPlan>) {
        (&self.effects, self.is_planned.then_some(&self.plan))
    }

    /// Does what the entry says, or compares.
    ///
    /// # Errors
    /// When the core decided otherwise, or cannot do it. The replay is over then.
    pub fn take(&mut self, entry: Entry) -> Result<(), Divergence> {
        match entry {
            Entry::Input(input) => {
                self.check(&input.input).map_err(Divergence::Protocol)?;
                self.apply(input);
            }
            Entry::Plan(worker) => {
                self.seat(worker).map_err(Divergence::Protocol)?;
                self.plan(worker);
            }
            Entry::PlanAhead(worker) => {
                self.seat(worker).map_err(Divergence::Protocol)?;
                self.plan_ahead(worker);
            }
            Entry::Digest(recorded) => {
                let decided = self.decided.take();
                let decided = decided.ok_or_else(|| {
                    Divergence::Protocol("expected an input or a plan before a digest, found none".to_owned())
                })?;
                self.replayed.compared += 1;
                if decided.value() != recorded {
                    return Err(Divergence::Decision { recorded, found: decided.value() });
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, input: Timed<Input>) {
        let (replayed, at) = (&mut self.replayed, input.at);
        replayed.inputs += 1;
        replayed.first.get_or_insert(at);
        replayed.last = replayed.last.max(at);
        match &input.input {
            Input::Submit(submission) => {
                replayed.submitted += 1;
                self.live.insert(submission.request);
            }
            Input::StepDone { worker, .. } | Input::StepFailed { worker, .. } => self.seat_mut(*worker).advance(),
            Input::WorkerLost { worker } => *self.seat_mut(*worker) = Seat::new(false),
            Input::WorkerBack { worker } => self.seat_mut(*worker).is_alive = true,
            Input::Cancel { .. }
            | Input::SetTenants(_)
            | Input::Tick
            | Input::TransferDone { .. }
            | Input::TransferFailed { .. } => {}
        }
        self.effects.clear();
        self.is_planned = false;
        self.engine.apply(input, &mut self.effects);
        self.decide();
    }

    fn plan(&mut self, worker: WorkerId) {
        self.replayed.plans += 1;
        self.effects.clear();
        self.is_planned = self.engine.plan(worker, &mut self.plan, &mut self.effects);
        if self.is_planned {
            self.replayed.steps += 1;
            let sampling = self.plan.slices.iter().filter(|slice| slice.sample).map(|slice| slice.request);
            let seat = &mut self.seats[usize::from(worker.0)];
            seat.step = Some(self.plan.step);
            seat.sampling.clear();
            seat.sampling.extend(sampling);
        }
        self.decide();
    }

    fn plan_ahead(&mut self, worker: WorkerId) {
        self.replayed.plans_ahead += 1;
        self.effects.clear();
        self.is_planned = self.engine.plan_ahead(worker, &mut self.plan);
        if self.is_planned {
            self.replayed.steps_ahead += 1;
            let seat = &mut self.seats[usize::from(worker.0)];
            seat.ahead = Some(self.plan.step);
            seat.sampling_ahead.clear();
            seat.sampling_ahead.extend(self.plan.slices.iter().map(|slice| slice.request));
        }
        self.decide();
    }

    /// Takes the digest of what was just decided.
    fn decide(&mut self) {
        let mut digest = Digest::new();
        if self.is_planned {
            digest.plan(&self.plan);
        }
        for effect in &self.effects {
            digest.effect(effect);
            match effect {
                Effect::Token { .. } => self.replayed.tokens += 1,
                Effect::Finish { request, reason, .. } => {
                    self.live.remove(request);
                    let is_refused = matches!(reason, FinishReason::Refused(_));
                    self.replayed.refused += u64::from(is_refused);
                    self.replayed.finished += u64::from(!is_refused);
                }
                _ => {}
            }
        }
        self.decided = Some(digest);
    }

    fn seat(&self, worker: WorkerId) -> Result<&Seat, String> {
        let found = self.seats.get(usize::from(worker.0));
        found.ok_or_else(|| format!("expected one of {} workers, found worker {}", self.seats.len(), worker.0))
    }

    fn seat_mut(&mut self, worker: WorkerId) -> &mut Seat {
        &mut self.seats[usize::from(worker.0)]
    }

    /// What the engine demands of an input; see [`Engine::apply`].
    fn check(&self, input: &Input) -> Result<(), String> {
        let in_flight = |worker: WorkerId, step: StepId| {
            let seat = self.seat(worker)?;
            let found = seat.step.map_or("none".to_owned(), |step| step.0.to_string());
            let is_it = seat.step == Some(step);
            if is_it {
                Ok(seat)
            } else {
                Err(format!("expected step {} on worker {}, found {found}", step.0, worker.0))
            }
        };
        match input {
            Input::Submit(submission) if self.live.contains(&submission.request) => {
                Err(format!("expected a new request, found {} again", submission.request.0))
            }
            Input::StepDone { worker, step, sampled, .. } => {
                let seat = in_flight(*worker, *step)?;
                let requests =
                    |sampled: &[(RequestId, Sampled)]| sampled.iter().map(|(request, _)| request.0).collect();
                let found: Vec<u64> = requests(sampled);
                let expected: Vec<u64> = seat.sampling.iter().map(|request| request.0).collect();
                let fits = found == expected;
                let short =
                    |list: &[u64]| format!("{} samples of requests {:?}", list.len(), &list[..list.len().min(8)]);
                if fits { Ok(()) } else { Err(format!("expected {}, found {}", short(&expected), short(&found))) }
            }
            Input::StepFailed { worker, step } => in_flight(*worker, *step).map(drop),
            Input::WorkerLost { worker } if !self.seat(*worker)?.is_alive => {
                Err(format!("expected a worker that is alive, found the lost worker {}", worker.0))
            }
            Input::WorkerBack { worker } if self.seat(*worker)?.is_alive => {
                Err(format!("expected a lost worker, found worker {} alive", worker.0))
            }
            _ => Ok(()),
        }
    }
}
