//! Loads a Kvern server of its own with one scenario and prints its figures as one JSON object; progress goes to standard
//! error. `make bench-serve` runs all scenarios in rounds and prints tables.
//!
//! Owner: one thread, which shares the machine's cores with the server: requests are prepared bytes, connections are kept, and
//! a token costs one read and one search. What the generator itself used is part of its result.

mod answer;
mod client;
mod fairness;
mod http;
mod itl;
mod keys;
mod load;
mod mixture;
mod overload;
mod prompt;
mod report;
mod retry;
mod server;
mod soak;
mod split;
mod stats;

use clap::{Parser, ValueEnum};
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// A light tenant beside a flood; equal tenants; what fairness costs
    Fairness,
    /// Twice the capacity in open loop: goodput, refusals, when to come back, memory
    Overload,
    /// Long prompts beside decoding streams, for several objectives and chunk sizes
    Itl,
    /// Mixed and separate workers under the same load
    Split,
    /// A long mixed load with cancels and preemptions, recorded and replayed
    Load,
}

/// What every scenario is told.
#[derive(Debug, Parser)]
#[command(name = "serve", about = "Loads a server with one scenario and prints its figures as JSON")]
pub(crate) struct Setup {
    #[arg(value_enum)]
    scenario: Scenario,
    /// The server's program
    #[arg(long, default_value = env!("CARGO_BIN_EXE_kvern"))]
    kvern: PathBuf,
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/models-cache/SmolLM2-135M-Instruct.Q4_1.gguf"))]
    model: PathBuf,
    #[arg(long, default_value_t = 2)]
    threads: u32,
    /// Names the run: prompts, lengths and arrivals
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Multiplies the time of every phase; figures are meant for 1
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Time of the load of the scenario `load`
    #[arg(long, default_value_t = 600.0)]
    seconds: f64,
    /// A further flag of the server, as in --flag=--max-num-seqs=16; may be repeated
    #[arg(long, value_name = "FLAG")]
    flag: Vec<String>,
    /// Where the scenario `load` has the server write its record [default: a temporary folder]
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
    #[arg(skip = Instant::now())]
    epoch: Instant,
}

/// Says on standard error how far the run is.
pub(crate) fn note(text: &str) {
    eprintln!("  {text}");
}

/// More than any scenario takes on a machine that is fit for it: every run ends.
const SECONDS_MAX: f64 = 900.0;

async fn run(setup: &Setup) -> Outcome<Report> {
    let load_s = if setup.scenario == Scenario::Load { 2.0 * setup.seconds } else { 0.0 };
    let limit = Duration::from_secs_f64(SECONDS_MAX * setup.scale.max(1.0) + load_s);
    let late = |_| format!("the scenario was not over after {} s", limit.as_secs());
    tokio::time::timeout(limit, scenario(setup)).await.map_err(late)?
}

async fn scenario(setup: &Setup) -> Outcome<Report> {
    match setup.scenario {
        Scenario::Fairness => fairness::run(setup).await,
        Scenario::Overload => overload::run(setup).await,
        Scenario::Itl => itl::run(setup).await,
        Scenario::Split => split::run(setup).await,
        Scenario::Load => soak::run(setup).await,
    }
}

fn main() -> ExitCode {
    match measured(&Setup::parse()) {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measured(setup: &Setup) -> Outcome<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut report = tokio::task::LocalSet::new().block_on(&runtime, run(setup))?;
    report.add_generator(setup.epoch.elapsed());
    Ok(serde_json::to_string(&report)?)
}
