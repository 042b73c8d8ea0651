//! One thread per worker: a planned step in, its result out. A worker owns the model's weights, workspace and K/V; it
//! decides nothing.
//!
//! A step that fails, or panics, fails nothing else: the thread goes on with the next step, and the core finds out whose
//! fault it was.

pub(crate) mod batch;
mod device_sampling;
mod host_sampling;
mod sampler;
mod step_time;
mod transfer;

pub use transfer::{Mover, Transfer};

pub use sampler::{Draw, Scratch, TokenCounts, sample};

use crate::request::{SamplingParams, TokenLogprobs};
use batch::{BatchBuffers, BatchError};
use host_sampling::{SamplerLane, sample_rows};
use kvern_core::{RequestId, Sampled, StepPlan, TokenId};
use kvern_kernels::{Device, DeviceSampler, DeviceShare, KernelError, KvCache, StepClock, StepSpan};
use kvern_models::{Model, StepLimits};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use step_time::StepTime;

/// A step and what changed since the last one. Sent to a worker that is idle, or at one step, so a channel of two is enough.
#[derive(Debug)]
pub struct StepCommand {
    pub plan: StepPlan,
    /// What changed among the worker's sequences, in order; comes back empty in [`StepResult::changes`].
    pub changes: Vec<SequenceChange>,
    /// Empty; comes back filled in [`StepResult::sampled`].
    pub sampled: Vec<(RequestId, Sampled)>,
    /// The worker has had something to do since its last step, so that a time until this one begins is lost.
    pub follows: bool,
}

#[derive(Debug)]
pub enum SequenceChange {
    /// The request appears in this worker's plans from now on.
    Admit(RequestId, Arc<SequenceSampling>),
    /// The request does not appear again, unless it is admitted again.
    Forget(RequestId),
}

/// How a sequence is sampled. It goes with its request from worker to worker; a worker keeps it until the request is
/// forgotten, preemptions included.
#[derive(Debug)]
pub struct SequenceSampling {
    pub params: SamplingParams,
    /// Never contended: a request is in one step at a time.
    drawn: Mutex<Drawn>,
}

/// The tokens that a sequence has said.
#[derive(Debug)]
struct Drawn {
    counts: TokenCounts,
    /// The last token drawn, with its position. It counts from the next position on: a step that failed or was lost with its
    /// worker is repeated, and its token was never said.
    last: Option<(u32, TokenId)>,
}

impl SequenceSampling {
    #[must_use]
    pub fn new(prompt: &[TokenId], params: SamplingParams) -> Self {
        SequenceSampling { drawn: Mutex::new(Drawn { counts: TokenCounts::new(prompt, &params), last: None }), params }
    }

    /// Draws the token at `position`.
    fn draw(&self, logits: &[f32], position: u32, scratch: &mut Scratch) -> Draw {
        let draw = self.with_counts(position, |params, counts| sample(logits, params, counts, position, scratch));
        self.has_drawn(position, draw.sampled);
        draw
    }

    /// What the tokens before `position` say of the one there.
    fn with_counts<R>(&self, position: u32, work: impl FnOnce(&SamplingParams, &TokenCounts) -> R) -> R {
        let mut drawn = self.lock();
        if let Some((_, token)) = drawn.last.take_if(|(at, _)| *at < position) {
            drawn.counts.push(token, &self.params);
        }
        work(&self.params, &drawn.counts)
    }

    /// Takes note of the token at `position`.
    fn has_drawn(&self, position: u32, sampled: Sampled) {
        self.lock().last = match sampled {
            Sampled::Token(token) => Some((position, token)),
            Sampled::Failed => None,
        };
    }

    /// What a panic leaves half changed is a scratch; the counts change in one place, whole.
    fn lock(&self) -> MutexGuard<'_, Drawn> {
        self.drawn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub struct StepResult {
    /// The plan, given back to be filled again.
    pub plan: StepPlan,
    /// One entry per slice that samples, in the order of the slices; empty when the step failed.
    pub sampled: Vec<(RequestId, Sampled)>,
    /// Empty, to be filled again.
    pub changes: Vec<SequenceChange>,
    pub logprobs: Vec<(RequestId, Box<TokenLogprobs>)>,
    pub device_us: u64,
    /// How long the device was at it, by its own clock; nothing of a step that failed.
    pub busy: Duration,
    /// How long the device waited for it although the worker had something to do.
    pub idle: Duration,
    /// Why the whole step failed, for the log.
    pub error: Option<String>,
}

/// What a worker runs on; built once at start.
pub struct WorkerParts {
    pub device: Device,
    pub model: Box<dyn Model>,
    pub kv: KvCache,
    /// Samples on the device, where it can.
    pub sampler: Option<DeviceSampler>,
    pub clock: StepClock,
    /// The engine plans steps ahead.
    pub plan_ahead: bool,
    pub limits: StepLimits,
    pub block_size: u32,
    pub vocab_size: usize,
    /// Host threads that sample rows in parallel.
    pub threads: usize,
}

/// A worker and its buffers; everything that a step needs is allocated here, once.
pub struct Worker {
    device: Device,
    model: Box<dyn Model>,
    kv: KvCache,
    batch: BatchBuffers,
    sequences: HashMap<RequestId, Arc<SequenceSampling>>,
    lanes: Vec<Mutex<SamplerLane>>,
    sampler: Option<DeviceSampler>,
    /// Steps may come before the one before them has ended.
    is_ahead: bool,
    step_time: StepTime,
    clock: StepClock,
    /// The device cannot be used any more; no step can succeed.
    is_lost: bool,
}

/// Why a step failed, panics apart.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(
        "request {}: expected the tokens that it has seen before position {position} on the device, as the step was \
         planned ahead, found others",
        request.0
    )]
    Seen { request: RequestId, position: u32 },
}

/// A step between its two ends.
struct Begun {
    plan: StepPlan,
    changes: Vec<SequenceChange>,
    sampled: Vec<(RequestId, Sampled)>,
    logprobs: Vec<(RequestId, Box<TokenLogprobs>)>,
    outcome: Result<(), String>,
    at: Instant,
    /// As its command's.
    follows: bool,
    /// A step may come that was planned ahead of this one's end.
    may_be_followed: bool,
    /// Of such steps, one without prompts.
    is_decode: bool,
}

/// What a step gives beside its plan.
struct StepOutput<'a> {
    sampled: &'a mut Vec<(RequestId, Sampled)>,
    logprobs: &'a mut Vec<(RequestId, Box<TokenLogprobs>)>,
}

impl Worker {
    #[must_use]
    pub fn new(parts: WorkerParts) -> Self {
        let lane = || SamplerLane { scratch: Scratch::new(parts.vocab_size), draws: Vec::new() };
        Worker {
            batch: BatchBuffers::new(parts.limits, parts.block_size, parts.sampler.is_some()),
            lanes: (0..parts.threads.max(1)).map(|_| Mutex::new(lane())).collect(),
            sequences: HashMap::new(),
            device: parts.device,
            model: parts.model,
            kv: parts.kv,
            is_ahead: parts.plan_ahead && parts.sampler.is_some(),
            sampler: parts.sampler,
            step_time: StepTime::default(),
            clock: parts.clock,
            is_lost: false,
        }
    }

    /// Serves steps until the engine hangs up, or until the device is lost or `killed` is found set after a step, which then is
    /// not reported. `report` gives a result to the engine.
    ///
    /// On a GPU a step is begun before the one before it has ended, where it was planned ahead: then the device goes from one to
    /// the other by itself.
    pub fn run(mut self, commands: &Receiver<StepCommand>, killed: &AtomicBool, mut report: impl FnMut(StepResult)) {
        let mut under_way: Option<Begun> = None;
        loop {
            let command = match &under_way {
                None => match commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return,
                },
                Some(begun) if begun.may_be_followed => commands.recv_timeout(self.step_time.patience()).ok(),
                Some(_) => None,
            };
            let next = command.map(|command| self.begin(command));
            let Some(begun) = std::mem::replace(&mut under_way, next) else { continue };
            let result = self.end(begun);
            if self.is_lost || killed.load(Ordering::Relaxed) {
                return;
            }
            report(result);
        }
    }

    /// Begins a step: puts it on the device, or, where that is the CPU, computes it.
    fn begin(&mut self, command: StepCommand) -> Begun {
        let StepCommand { plan, mut changes, mut sampled, follows } = command;
        for change in changes.drain(..) {
            match change {
                SequenceChange::Admit(id, sampling) => {
                    self.sequences.insert(id, sampling);
                }
                SequenceChange::Forget(id) => {
                    self.sequences.remove(&id);
                    self.batch.forget(id);
                    if let Some(sampler) = &mut self.sampler {
                        sampler.forget(id.0);
                    }
                }
            }
        }
        let at = Instant::now();
        let mut logprobs = Vec::new();
        let outcome = self.guard(&plan, |worker| match worker.sampler {
            Some(_) => worker.launch(&plan),
            None => {
                worker.clock.begin(&worker.device)?;
                worker.compute(&plan, &mut sampled, &mut logprobs)?;
                Ok(worker.clock.end(&worker.device)?)
            }
        });
        if outcome.is_err() {
            self.batch.forget_sampled();
            self.clock.abandon();
            // What was launched of it still writes K and V, in blocks that may be another worker's once this is reported. A device that
            // fails at this, too, is found lost by the next step.
            let _ = self.device.synchronize();
        }
        let may_be_followed = self.is_ahead && outcome.is_ok() && plan.slices.iter().all(|slice| slice.sample);
        let is_decode = may_be_followed && plan.slices.iter().all(|slice| slice.tokens.len() == 1);
        Begun { plan, changes, sampled, logprobs, outcome, at, follows, may_be_followed, is_decode }
    }

    /// Ends the step that was begun first.
    fn end(&mut self, begun: Begun) -> StepResult {
        let Begun { plan, changes, mut sampled, mut logprobs, outcome, at, follows, is_decode, .. } = begun;
        let mut span = StepSpan::default();
        let outcome = outcome.and_then(|()| {
            self.guard(&plan, |worker| {
                let mut output = StepOutput { sampled: &mut sampled, logprobs: &mut logprobs };
                worker.land(&plan, &mut output, &mut span)
            })
        });
        if outcome.is_err() {
            logprobs.clear();
            sampled.clear();
            // Whatever the device has added to what they have seen was never said, nor what a step ahead of this one's end added.
            if let Some(sampler) = &mut self.sampler {
                plan.slices.iter().for_each(|slice| sampler.forget(slice.request.0));
            }
        }
        let device_us = self.step_time.ended(at, is_decode).as_micros() as u64;
        let idle = span.gap.filter(|_| follows).unwrap_or_default();
        StepResult { plan, sampled, changes, logprobs, device_us, busy: span.busy, idle, error: outcome.err() }
    }

    /// What went wrong in `work`, in words. Sound to go on after a panic: a step overwrites whatever buffers it reads.
    fn guard(&mut self, plan: &StepPlan, work: impl FnOnce(&mut Self) -> Result<(), StepError>) -> Result<(), String> {
        match catch_unwind(AssertUnwindSafe(|| work(self))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                if matches!(error, StepError::Kernel(KernelError::DeviceLost { .. })) && !self.is_lost {
                    // That work on a device has failed is found by a later call.
                    tracing::error!(step = plan.step.0, %error, "the worker ends: this step or one beside it failed");
                    self.is_lost = true;
                }
                Err(error.to_string())
            }
            Err(panic) => Err(panic_text(panic.as_ref())),
        }
    }

    fn compute(
        &mut self,
        plan: &StepPlan,
        sampled: &mut Vec<(RequestId, Sampled)>,
        logprobs: &mut Vec<(RequestId, Box<TokenLogprobs>)>,
    ) -> Result<(), StepError> {
        let batch = self.batch.fill(plan)?;
        let rows = batch.sample_rows.len();
        let logits = self.model.forward(&batch, &mut self.kv)?;
        if rows == 0 {
            return Ok(());
        }
        sample_rows(&self.device, &self.lanes, &self.sequences, plan, logits);
        let mut lanes: Vec<_> =
            self.lanes.iter_mut().map(|l| l.get_mut().unwrap_or_else(PoisonError::into_inner)).collect();
        let num_lanes = lanes.len();
        // Rows were dealt out lane by lane; taking them back from the end keeps each lane's order.
        lanes.iter_mut().for_each(|lane| lane.draws.reverse());
        for (row, slice) in plan.slices.iter().filter(|s| s.sample).enumerate() {
            let draw = lanes[row % num_lanes].draws.pop().expect("every sampled row was drawn");
            sampled.push((slice.request, draw.sampled));
            logprobs.extend(draw.logprobs.map(|l| (slice.request, l)));
        }
        self.batch.note(sampled);
        Ok(())
    }
}

impl Worker {
    /// Puts a step on its share of the device. How its rows are sampled goes first, so that nothing of it waits for the
    /// forward pass.
    ///
    /// The clock's marks are around all of it, from the first copy of its inputs to the last of its results: whatever a
    /// step makes the device do is its own, and no captured launch has a mark in it.
    fn launch(&mut self, plan: &StepPlan) -> Result<(), StepError> {
        self.device.move_to(match plan.share {
            kvern_core::DeviceShare::Whole => DeviceShare::Whole,
            kvern_core::DeviceShare::Part => DeviceShare::Part,
        })?;
        let batch = self.batch.fill(plan)?;
        let mut sampler = self.sampler.as_mut().filter(|_| !batch.sample_rows.is_empty());
        if let Some(sampler) = &mut sampler {
            device_sampling::push_rows(sampler, &self.sequences, plan)?;
        }
        self.clock.begin(&self.device)?;
        if let Some(sampler) = &mut sampler {
            sampler.upload()?;
        }
        let logits = self.model.forward(&batch, &mut self.kv)?;
        if let Some(sampler) = &mut sampler {
            sampler.launch(&self.device, logits)?;
        }
        Ok(self.clock.end(&self.device).inspect_err(|_| sampler.into_iter().for_each(DeviceSampler::abandon))?)
    }

    /// Waits for the oldest step on the device, which is `plan`; on a CPU it is done.
    fn land(&mut self, plan: &StepPlan, output: &mut StepOutput<'_>, span: &mut StepSpan) -> Result<(), StepError> {
        let taken = self.clock.take();
        // Whatever became of the wait: results are taken in the order of their steps.
        if let Some(sampler) = self.sampler.as_mut().filter(|_| plan.slices.iter().any(|slice| slice.sample)) {
            device_sampling::take_rows(sampler, &self.sequences, plan, output)?;
        }
        *span = taken?;
        Ok(())
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the step panicked: {}", text.unwrap_or("no message"))
}
