//! `kvern simulate TRACE --profile P`: what the scheduler makes of a workload, without a model.
//!
//! Owner: `main`, for one run. The core is the server's own; the device is a clock that takes for each step what the cost
//! model says. So time passes as fast as the core plans, and every run of the same trace and profile is the same.
//!
//! ```text
//! trace.rs      arrivals, from jsonl.rs (Mooncake's format and ours), azure.rs, synthetic.rs
//! profile.rs    configuration and costs, from a file, a recording, or by default
//! run.rs        events in the order of time -> core -> effects
//! figures.rs    what came of it; report.rs: as a table or JSON
//! ```
//!
//! What is absent: the front end, the sampler, steps that are planned ahead, the spread of real step times, and devices that
//! slow each other down.

mod azure;
mod figures;
mod histogram;
mod jsonl;
mod profile;
mod report;
mod run;
mod synthetic;
mod trace;

pub use figures::Figures;
pub use profile::{Profile, ProfileError};
pub use run::simulate;
pub use trace::{Arrival, Content, Trace, TraceError};

use crate::config::SimulateConfig;
use std::io::{self, Write};
use std::time::Instant;

#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error("expected a trace with requests, found none")]
    Empty,
    #[error("expected at most {limit} tenants, found more")]
    Tenants { limit: usize },
    #[error("the core stopped with {left} requests left")]
    Stuck { left: u64 },
    #[error("could not write the result: {0}")]
    Write(#[from] io::Error),
}

/// Runs the trace on the profile and writes the figures to `out`.
///
/// # Errors
/// When the trace or the profile cannot be read, or `out` cannot be written.
pub fn run(config: &SimulateConfig, out: &mut dyn Write) -> Result<(), SimulateError> {
    let mut profile = Profile::open(&config.profile)?;
    profile.core.prefix_caching &= !config.no_prefix_caching;
    if config.print_profile {
        return Ok(out.write_all(profile.to_toml().as_bytes())?);
    }
    let Some(source) = &config.trace else { return Err(SimulateError::Empty) };
    let mut trace = Trace::open(source, config.speed_up)?;
    let requests_max = usize::try_from(config.requests_max.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
    let started = Instant::now();
    let mut figures = simulate(trace.by_ref().take(requests_max), &profile, config.objectives)?;
    figures.took = started.elapsed();
    figures.out_of_order = trace.out_of_order();
    Ok(if config.json { report::write_json(&figures, out) } else { report::write_table(&figures, out) }?)
}

#[cfg(test)]
mod tests;
