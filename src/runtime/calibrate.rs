//! What steps cost on this machine, measured with a few of them at start.
//!
//! ```text
//!   decode  1 sequence,  short context      step + sequence
//!   decode  n sequences, short context      step + n x sequence            -> sequence, step
//!   decode  1 sequence,  long context       ... + context x per token      -> decode context
//!   prefill p tokens,    nothing before     step + p x token + ...         -> token
//!   prefill q tokens,    long context       ... + q x context x per token  -> prefill context
//! ```
//!
//! With the share of the device that steps beside another worker's have: the model decides when both are at work.
//!
//! A tenth of a second for a small model on two cores; the core corrects the rest while it runs. What K and V hold does not
//! matter, so the cache is used as it is: nothing in it is in use yet.

use super::team::Member;
use kvern_core::CostModel;
use kvern_kernels::KernelError;
use kvern_models::{ForwardBatch, StepLimits};
use std::time::{Duration, Instant};

/// How large the steps are that are measured: so large that what one more token costs is far above the noise.
struct Sizes {
    /// Sequences of the step that tells what one more costs.
    sequences: usize,
    /// Context of the long steps, in tokens.
    context: usize,
    /// Prompt tokens of the step that tells what one costs: enough for the kernels of large products.
    prompt: usize,
    /// Prompt tokens of the step that tells what context costs them.
    prompt_long: usize,
}

const CPU: Sizes = Sizes { sequences: 4, context: 1024, prompt: 64, prompt_long: 16 };
/// A GPU takes as long for 64 tokens as for one, which is as long as it reads the weights.
const GPU: Sizes = Sizes { sequences: 64, context: 4096, prompt: 2048, prompt_long: 512 };

/// Each step is run so often; the fastest counts. Those of prompts once: they are long enough.
const DECODE_RUNS: usize = 3;

const PS_PER_NS: u64 = 1_000;

/// Measures the steps of a worker, before it serves.
pub(super) fn measure(member: &mut Member, limits: StepLimits) -> Result<CostModel, KernelError> {
    let shape = member.kv_shape();
    let is_gpu = member.is_gpu();
    let sizes = if is_gpu { GPU } else { CPU };
    let slots = (shape.blocks * shape.block_size).min(limits.context_max);
    let sequences = sizes.sequences.min(limits.sequences_max).min(limits.tokens_max).min(shape.blocks);
    let prompt = sizes.prompt.min(limits.tokens_max).min(slots);
    let prompt_long = sizes.prompt_long.min(prompt);
    let context = sizes.context.min(slots - prompt_long);
    let mut fastest = |runs: usize, sequences, context, tokens| -> Result<Duration, KernelError> {
        let mut best = Duration::MAX;
        for _ in 0..runs {
            best = best.min(time_step(member, sequences, context, tokens)?);
        }
        Ok(best)
    };
    let one = fastest(DECODE_RUNS, 1, 0, 1)?;
    let many = fastest(DECODE_RUNS, sequences, 0, 1)?;
    let long = fastest(DECODE_RUNS, 1, context, 1)?;
    // What a GPU does at its first product of a kind takes longer than the product.
    let prefill_runs = if is_gpu { 2 } else { 1 };
    let prefill = fastest(prefill_runs, 1, 0, prompt)?;
    let short = fastest(2, 1, 0, prompt_long)?;
    let prefill_long = fastest(prefill_runs, 1, context, prompt_long)?;

    let each = |longer: Duration, shorter: Duration, count: usize| {
        let ns = longer.saturating_sub(shorter).as_nanos() as u64;
        (ns * PS_PER_NS / count.max(1) as u64).max(1)
    };
    let sequence_ps = each(many, one, sequences - 1);
    let step_ps = (one.as_nanos() as u64 * PS_PER_NS).saturating_sub(sequence_ps);
    let prefill_context_ps = each(prefill_long, short, prompt_long * context);
    let in_prompt = Duration::from_nanos(prefill_context_ps * (prompt * prompt / 2) as u64 / PS_PER_NS);
    let step = Duration::from_nanos(step_ps / PS_PER_NS);
    Ok(CostModel {
        step_ps,
        prefill_token_ps: each(prefill, step + in_prompt, prompt),
        prefill_context_ps,
        decode_sequence_ps: if sequences > 1 { sequence_ps } else { one.as_nanos() as u64 * PS_PER_NS / 10 },
        decode_context_ps: each(long, one, context),
    })
}

/// How long a step takes of `sequences` sequences, each with `context` tokens before and `tokens` to compute.
pub(super) fn time_step(
    member: &mut Member,
    sequences: usize,
    context: usize,
    tokens: usize,
) -> Result<Duration, KernelError> {
    let shape = member.kv_shape();
    let (size, blocks) = (shape.block_size, (context + tokens).div_ceil(shape.block_size));
    let block = |sequence: usize, at: usize| ((sequence * blocks + at) % shape.blocks) as u32;
    let all = || (0..sequences).flat_map(|sequence| (context..context + tokens).map(move |at| (sequence, at)));
    let positions: Vec<u32> = all().map(|(_, at)| at as u32).collect();
    let slots: Vec<u32> = all().map(|(s, at)| block(s, at / size) * size as u32 + (at % size) as u32).collect();
    let ends: Vec<u32> = (0..=sequences).map(|sequence| (sequence * tokens) as u32).collect();
    let tables: Vec<u32> = (0..sequences).flat_map(|s| (0..blocks).map(move |at| block(s, at))).collect();
    let lens = vec![(context + tokens) as u32; sequences];
    let rows: Vec<u32> = ends[1..].iter().map(|end| end - 1).collect();
    let batch = ForwardBatch {
        input_ids: &vec![0; positions.len()],
        positions: &positions,
        slot_mapping: &slots,
        cu_seqlens_q: &ends,
        context_lens: &lens,
        block_tables: &tables,
        block_table_stride: blocks,
        sample_rows: &rows,
        last_sampled: &[],
    };
    let started = Instant::now();
    member.forward(&batch)?;
    Ok(started.elapsed())
}
