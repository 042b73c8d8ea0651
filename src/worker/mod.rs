//! One thread per worker: a planned step in, its result out. A worker owns the model's weights, workspace and K/V; it
//! decides nothing.
//!
//! A step that fails, or panics, fails nothing else: the thread goes on with the next step, and the core finds out whose
//! fault it was.

pub(crate) mod batch;
mod sampler;

pub use sampler::{Draw, Scratch, TokenCounts, sample};

use crate::request::{SamplingParams, TokenLogprobs};
use batch::BatchBuffers;
use kvern_core::{RequestId, Sampled, SeqSlice, StepPlan};
use kvern_kernels::{Device, KernelError, KvCache, Tensor};
use kvern_models::{Model, StepLimits};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// A step and what changed since the last one. Sent only to an idle worker, so a channel of one is enough.
#[derive(Debug)]
pub struct StepCommand {
    pub plan: StepPlan,
    /// Requests that appear in a plan for the first time.
    pub admitted: Vec<(RequestId, SequenceSampling)>,
    /// Requests that will not appear again.
    pub forgotten: Vec<RequestId>,
    /// Empty; comes back filled in [`StepResult::sampled`].
    pub sampled: Vec<(RequestId, Sampled)>,
}

/// How a sequence is sampled; the worker keeps it until the request is forgotten, preemptions included.
#[derive(Debug)]
pub struct SequenceSampling {
    pub params: Arc<SamplingParams>,
    pub counts: TokenCounts,
}

#[derive(Debug)]
pub struct StepResult {
    /// The plan, given back to be filled again.
    pub plan: StepPlan,
    /// One entry per slice that samples, in the order of the slices; empty when the step failed.
    pub sampled: Vec<(RequestId, Sampled)>,
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
    sequences: HashMap<RequestId, SequenceSampling>,
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

    /// Serves steps until the engine hangs up. `report` gives a result to the engine.
    pub fn run(mut self, commands: &Receiver<StepCommand>, mut report: impl FnMut(StepResult)) {
        while let Ok(command) = commands.recv() {
            report(self.step(command));
        }
    }

    fn step(&mut self, command: StepCommand) -> StepResult {
        let StepCommand { plan, admitted, forgotten, mut sampled } = command;
        for id in forgotten {
            self.sequences.remove(&id);
            self.batch.forget(id);
        }
        self.sequences.extend(admitted);
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
        StepResult { plan, sampled, logprobs, device_us, error }
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
        let mut lanes: Vec<_> = self.lanes.iter_mut().map(|l| l.get_mut().expect("no lane panicked")).collect();
        let num_lanes = lanes.len();
        // Rows were dealt out lane by lane; taking them back from the end keeps each lane's order.
        lanes.iter_mut().for_each(|lane| lane.draws.reverse());
        for (row, slice) in plan.slices.iter().filter(|s| s.sample).enumerate() {
            let draw = lanes[row % num_lanes].draws.pop().expect("every sampled row was drawn");
            if let (Sampled::Token(token), Some(sequence)) = (draw.sampled, self.sequences.get_mut(&slice.request)) {
                let SequenceSampling { params, counts } = sequence;
                counts.push(token, params);
            }
            sampled.push((slice.request, draw.sampled));
            logprobs.extend(draw.logprobs.map(|l| (slice.request, l)));
        }
        Ok(())
    }
}

/// Draws a token for each slice that samples, its logits being the rows of `logits` in order.
fn sample_rows(
    device: &Device,
    lanes: &[Mutex<SamplerLane>],
    sequences: &HashMap<RequestId, SequenceSampling>,
    plan: &StepPlan,
    logits: &Tensor,
) {
    let vocab = logits.cols();
    let values = logits.host();
    device.parallel_for(lanes.len(), &|index| {
        let mut lane = lanes[index].lock().expect("no lane panicked");
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
    sequences: &HashMap<RequestId, SequenceSampling>,
    scratch: &mut Scratch,
) -> Draw {
    let position = slice.start + slice.tokens.len() as u32;
    match sequences.get(&slice.request) {
        Some(sequence) => sample(logits, &sequence.params, &sequence.counts, position, scratch),
        None => Draw { sampled: Sampled::Failed, logprobs: None },
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the step panicked: {}", text.unwrap_or("no message"))
}
