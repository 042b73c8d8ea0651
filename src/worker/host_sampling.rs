//! Sampling on the host: a step's rows are dealt out to its threads, each of which draws from its own.

use super::SequenceSampling;
use super::sampler::{Draw, Scratch};
use kvern_core::{RequestId, Sampled, SeqSlice, StepPlan};
use kvern_kernels::{Device, Tensor};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// One host thread's share of the sampling of a step: rows `lane, lane + lanes, ..`.
pub(super) struct SamplerLane {
    pub(super) scratch: Scratch,
    pub(super) draws: Vec<Draw>,
}

/// Draws a token for each slice that samples, its logits being the rows of `logits` in order.
pub(super) fn sample_rows(
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
