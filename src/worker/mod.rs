//! One thread per worker: a planned step in, its result out. A worker owns the model's weights, workspace and K/V; it
//! decides nothing.
//!
//! A step that fails, or panics, fails nothing else: the thread goes on with the next step, and the core finds out whose
//! fault it was.

pub(crate) mod batch;
mod sampler;
mod transfer;

pub use transfer::{Mover, Transfer};

pub use sampler::{Draw, Scratch, TokenCounts, sample};

use crate::request::{SamplingParams, TokenLogprobs};
use batch::BatchBuffers;
use kvern_core::{RequestId, Sampled, SeqSlice, StepPlan, TokenId};
use kvern_kernels::{Device, KernelError, KvCache, Tensor};
use kvern_models::{Model, StepLimits};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A step and what changed since the last one. Sent to a worker that is idle, or at one step, so a channel of two is enough.
#[derive(Debug)]
pub struct StepCommand {
    pub plan: StepPlan,
    /// What changed among the worker's sequences, in order; comes back empty in [`StepResult::changes`].
    pub changes: Vec<SequenceChange>,
    /// Empty; comes back filled in [`StepResult::sampled`].
    pub sampled: Vec<(RequestId, Sampled)>,
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
        // What a panic leaves half changed is a scratch; the counts change in one place, whole.
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, token)) = drawn.last.take_if(|(at, _)| *at < position) {
            drawn.counts.push(token, &self.params);
        }
        let draw = sample(logits, &self.params, &drawn.counts, position, scratch);
        drawn.last = match draw.sampled {
            Sampled::Token(token) => Some((position, token)),
            Sampled::Failed => None,
        };
        draw
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
    /// Why the whole step failed, for the log.
    pub error: Option<String>,
}

/// What a worker runs on; built once at start.
pub struct WorkerParts {
    pub device: Device,
    pub model: Box<dyn Model>,
    pub kv: KvCache,
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
}

/// One host thread's share of the sampling of a step: rows `lane, lane + lanes, ..`.
struct SamplerLane {
    scratch: Scratch,
    draws: Vec<Draw>,
}

impl Worker {
    #[must_use]
    pub fn new(parts: WorkerParts) -> Self {
        let lane = || SamplerLane { scratch: Scratch::new(parts.vocab_size), draws: Vec::new() };
        Worker {
            batch: BatchBuffers::new(parts.limits, parts.block_size),
            lanes: (0..parts.threads.max(1)).map(|_| Mutex::new(lane())).collect(),
            sequences: HashMap::new(),
            device: parts.device,
            model: parts.model,
            kv: parts.kv,
        }
    }

    /// Serves steps until the engine hangs up, or until `killed` is found set after a step, which then is not reported.
    /// `report` gives a result to the engine.
    pub fn run(mut self, commands: &Receiver<StepCommand>, killed: &AtomicBool, mut report: impl FnMut(StepResult)) {
        while let Ok(command) = commands.recv() {
            let result = self.step(command);
            if killed.load(Ordering::Relaxed) {
                return;
            }
            report(result);
        }
    }

    fn step(&mut self, command: StepCommand) -> StepResult {
        let StepCommand { plan, mut changes, mut sampled } = command;
        for change in changes.drain(..) {
            match change {
                SequenceChange::Admit(id, sampling) => {
                    self.sequences.insert(id, sampling);
                }
                SequenceChange::Forget(id) => {
                    self.sequences.remove(&id);
                    self.batch.forget(id);
                }
            }
        }
        let started = Instant::now();
        let mut logprobs = Vec::new();
        // Sound to go on after a panic: a step overwrites whatever buffers it reads.
        let outcome = catch_unwind(AssertUnwindSafe(|| self.compute(&plan, &mut sampled, &mut logprobs)));
        let error = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(panic_text(panic.as_ref())),
        };
        if error.is_some() {
            logprobs.clear();
            sampled.clear();
        }
        let device_us = started.elapsed().as_micros() as u64;
        StepResult { plan, sampled, changes, logprobs, device_us, error }
    }

    fn compute(
        &mut self,
        plan: &StepPlan,
        sampled: &mut Vec<(RequestId, Sampled)>,
        logprobs: &mut Vec<(RequestId, Box<TokenLogprobs>)>,
    ) -> Result<(), KernelError> {
        let batch = self.batch.fill(plan);
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

/// Draws a token for each slice that samples, its logits being the rows of `logits` in order.
fn sample_rows(
    device: &Device,
    lanes: &[Mutex<SamplerLane>],
    sequences: &HashMap<RequestId, Arc<SequenceSampling>>,
    plan: &StepPlan,
    logits: &Tensor,
) {
    let vocab = logits.cols();
    let values = logits.host();
    device.parallel_for(lanes.len(), &|index| {
        let mut lane = lanes[index].lock().unwrap_or_else(PoisonError::into_inner);
        let SamplerLane { scratch, draws } = &mut *lane;
        draws.clear();
        let sampling = plan.slices.iter().filter(|s| s.sample).enumerate();
        for (row, slice) in sampling.skip(index).step_by(lanes.len()) {
            let row_logits = &values[row * vocab..(row + 1) * vocab];
            draws.push(draw_slice(row_logits, slice, sequences, scratch));
        }
    });
}

fn draw_slice(
    logits: &[f32],
    slice: &SeqSlice,
    sequences: &HashMap<RequestId, Arc<SequenceSampling>>,
    scratch: &mut Scratch,
) -> Draw {
    let position = slice.start + slice.tokens.len() as u32;
    match sequences.get(&slice.request) {
        Some(sequence) => sequence.draw(logits, position, scratch),
        None => Draw { sampled: Sampled::Failed, logprobs: None },
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the step panicked: {}", text.unwrap_or("no message"))
}
