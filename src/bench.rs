//! `kvern bench [MODEL]`: how fast a model computes on this machine, without server, scheduler and sampling.
//!
//! Owner: `main`, for one run. The model's forward pass is called directly, with batches laid out by the worker's own
//! code, so a figure here is what the server's steps cost. Workloads take turns, round by round, so that a change of the
//! machine's speed falls on all of them; with `--limits` the machine's own limits are measured in the same rounds.
//!
//! ```text
//! attention.rs  attention alone
//! runner.rs  sequences in a KV cache; one timed round of a workload
//! cost.rs    what a round at least reads and multiplies
//! rates.rs   the rounds' rates: median, least, most
//! report.rs  table and JSON
//! sampling.rs  sampling alone
//! ```

mod attention;
mod cost;
mod rates;
mod report;
mod runner;
mod sampling;

use crate::config::{BenchConfig, Config, Workload};
use crate::hub::{self, HubError};
use crate::runtime::available_memory;
use cost::{Cost, ReadBytes};
use kvern_kernels::KernelError;
use kvern_kernels::limits::{Gauge, Limit};
use kvern_models::{Checkpoint, LoadError, LoadFormat, ModelConfig, ModelFiles};
use rates::Rates;
use report::{Report, Row};
use runner::{Room, Round, Runner};
use std::io::Write;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("{workload}: expected a context of at most {limit} tokens, found {found} with --steps {steps}")]
    Context { workload: Workload, limit: u32, found: u32, steps: u32 },
    #[error("{workload}: expected at most --max-num-seqs ({limit}) streams")]
    Streams { workload: Workload, limit: u32 },
    #[error("--sampling: expected a GPU, whose sampler can be timed alone, found {device}")]
    Sampling { device: String },
    #[error("no default workload fits a context of {limit} tokens: name one by --prefill or --decode")]
    Nothing { limit: u32 },
    #[error(
        "the workloads need a KV cache of {needed} bytes; {available} are there: shorten them, or lower the streams"
    )]
    Memory { needed: u64, available: u64 },
    #[error("could not write the result: {0}")]
    Write(#[from] std::io::Error),
}

/// Loads the model that `config` names, times what `bench` asks for, and writes the result to `out`.
///
/// # Errors
/// The model cannot be found or loaded, a workload does not fit it or the memory, or `out` cannot be written.
pub fn run(config: &Config, bench: &BenchConfig, out: &mut dyn Write) -> Result<(), BenchError> {
    let located = hub::locate(&config.model)?;
    let files = match config.engine.device.load_format {
        LoadFormat::Files => ModelFiles::open(&located.path)?,
        LoadFormat::Dummy { .. } => ModelFiles::open_config(&located.path)?,
    };
    let checkpoint = Checkpoint::open(&files)?;
    let model = ModelConfig::read(&checkpoint)?;
    let workloads = workloads(config, bench, &model)?;
    let device = crate::device::open(&config.engine, &checkpoint)?;
    let gauge = if bench.limits { Some(Gauge::new(&device)?) } else { None };
    let chunk = config.engine.step_tokens_max(&device);
    let room = Room::for_workloads(&workloads, bench.steps, chunk);
    let mut runner = Runner::open(&device, &files, &config.engine, room, |needed| {
        let free = device.free_bytes().ok().flatten().map(|bytes| bytes as u64);
        let available = config.engine.kv_cache_memory_bytes.or(free).or_else(available_memory).unwrap_or(u64::MAX);
        if needed > available { Err(BenchError::Memory { needed, available }) } else { Ok(()) }
    })?;
    let Measured { rates, idle_shares, limits } = measure(&mut runner, gauge.as_ref(), &workloads, bench)?;
    let steps = bench.steps;
    let read = ReadBytes { weights: runner.weight_bytes(), kv_value: runner.kv_value_bytes() };
    let costs = workloads.iter().map(|&workload| Cost::of(workload, steps, &model, read));
    let rows = workloads.iter().zip(costs).zip(rates.into_iter().zip(idle_shares));
    let report = Report {
        model: &located.name,
        machine: report::machine(),
        device: &device,
        weight_bytes: runner.weight_bytes(),
        chunk,
        rows: rows
            .map(|((&workload, cost), (rates, idle_shares))| {
                let tokens = workload.tokens(steps);
                Row { workload, tokens, cost, rates, idle_shares }
            })
            .collect(),
        limits,
    };
    Ok(if bench.json { report.write_json(out) } else { report.write_table(out) }?)
}

/// What was asked for, if it can be run, or those of the defaults that can be.
fn workloads(config: &Config, bench: &BenchConfig, model: &ModelConfig) -> Result<Vec<Workload>, BenchError> {
    let model_limit = u32::try_from(model.max_position_embeddings).unwrap_or(u32::MAX);
    let limit = config.engine.max_model_len.map_or(model_limit, |asked| asked.min(model_limit));
    let steps = bench.steps;
    let check = |workload: Workload| {
        let found = workload.context_max(steps);
        if found > limit {
            return Err(BenchError::Context { workload, limit, found, steps });
        }
        let limit = config.engine.max_num_seqs;
        if workload.streams() > limit { Err(BenchError::Streams { workload, limit }) } else { Ok(workload) }
    };
    if bench.workloads.is_empty() {
        let fitting: Vec<_> = Workload::defaults().into_iter().filter_map(|workload| check(workload).ok()).collect();
        return if fitting.is_empty() { Err(BenchError::Nothing { limit }) } else { Ok(fitting) };
    }
    bench.workloads.iter().map(|&workload| check(workload)).collect()
}

/// What the rounds gave.
struct Measured {
    /// Of each workload, in tokens per second.
    rates: Vec<Rates>,
    /// Of each, the part of its time for which the device waited between steps; empty where that is not known.
    idle_shares: Vec<Rates>,
    limits: Vec<(Limit, Rates)>,
}

/// Workloads and limits take turns; the first round does not count.
fn measure(
    runner: &mut Runner,
    gauge: Option<&Gauge>,
    workloads: &[Workload],
    bench: &BenchConfig,
) -> Result<Measured, KernelError> {
    let mut rates = vec![Rates::default(); workloads.len()];
    let mut idle_shares = rates.clone();
    let mut limits: Vec<_> =
        gauge.iter().flat_map(|gauge| gauge.limits()).map(|limit| (limit, Rates::default())).collect();
    for round in 0..=bench.rounds {
        for (&workload, (rates, idle_shares)) in workloads.iter().zip(rates.iter_mut().zip(&mut idle_shares)) {
            let Round { time, idle_share } = runner.round(workload, bench.steps)?;
            if round > 0 {
                rates.push(workload.tokens(bench.steps) as f64 / time.as_secs_f64());
                idle_share.into_iter().for_each(|share| idle_shares.push(share));
            }
        }
        for (limit, rates) in &mut limits {
            let rate = gauge.and_then(|gauge| gauge.round(*limit)).expect("only limits of this machine are listed");
            if round > 0 {
                rates.push(rate);
            }
        }
        tracing::info!(round, of = bench.rounds, "timed");
    }
    Ok(Measured { rates, idle_shares, limits })
}
