//! `kvern replay FILE`: repeats a recorded run on this program's core and compares every decision.
//!
//! Owner: `main`, for one run. The recording is read piece by piece (`reader.rs`); the comparing itself is
//! `kvern_core::replay`. Says `no difference`, or the first one with what the core decides now; a recording that breaks off,
//! as when the server was killed, is compared up to there.

mod reader;
mod report;

use crate::config::ReplayConfig;
use kvern_core::Micros;
use kvern_core::record::{Entry, RecordError};
use kvern_core::replay::{Divergence, Replay, Replayed};
use reader::read_config;
use std::fs::File;
use std::io::{self, Read, Write};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::{Duration, Instant};

pub use report::write_report;

#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("{path}: {source}")]
    NotARecording { path: String, source: RecordError },
    #[error("{path}: {problem}")]
    Unusable { path: String, problem: String },
    #[error("could not write the result: {0}")]
    Write(#[from] io::Error),
    #[error("the recording does not replay")]
    Differs,
}

/// How a replay ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub entries: u64,
    pub bytes: u64,
    pub replayed: Replayed,
    pub took: Duration,
    pub end: End,
}

#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// After the last entry, or in the midst of one that the server could not finish writing.
    Whole { torn_at: Option<u64> },
    /// Nothing behind this can be read.
    Damaged(RecordError),
    /// The first difference.
    Differs(Box<Difference>),
    /// The core broke one of its own invariants, as it may have done when it was recorded.
    Panicked { entry: u64, at: Micros, message: String },
}

/// Where and how the core decided otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Number of the input or plan, from 0.
    pub entry: u64,
    pub at: Micros,
    pub divergence: Divergence,
    /// What was done, and what the core makes of it now.
    pub done: String,
    pub decision: Vec<String>,
}

impl Outcome {
    /// Every decision that the recording holds was made again, and it held some.
    #[must_use]
    pub fn is_same(&self) -> bool {
        matches!(self.end, End::Whole { .. }) && (self.replayed.compared > 0 || self.entries == 0)
    }
}

/// Replays the recording and writes what came of it to `out`.
///
/// # Errors
/// When the file cannot be read or is no recording, `out` cannot be written, or the replay differs.
pub fn run(config: &ReplayConfig, out: &mut dyn Write) -> Result<(), ReplayError> {
    let path = config.path.display().to_string();
    let file = File::open(&config.path).map_err(|source| ReplayError::Read { path: path.clone(), source })?;
    let outcome = replay(file, &path)?;
    write_report(&path, &outcome, out)?;
    if outcome.is_same() { Ok(()) } else { Err(ReplayError::Differs) }
}

/// The configuration at the start of a recording.
///
/// # Errors
/// When the file cannot be read or is no recording.
pub fn config_of(path: &Path) -> Result<kvern_core::CoreConfig, ReplayError> {
    let shown = path.display().to_string();
    let file = File::open(path).map_err(|source| ReplayError::Read { path: shown.clone(), source })?;
    read_config(file, &shown).map(|(config, _)| config)
}

/// Replays what `source` gives; `path` is for errors.
///
/// # Errors
/// When the source cannot be read, does not begin with a recording's header, or is of an engine that cannot be made.
pub fn replay(source: impl Read, path: &str) -> Result<Outcome, ReplayError> {
    let (config, mut reader) = read_config(source, path)?;
    let mut replay = Replay::new(config).map_err(|problem| ReplayError::Unusable { path: path.to_owned(), problem })?;
    let started = Instant::now();
    let mut run = Run { entries: 0, at: 0, now: Micros(0), done: String::new() };
    let end = loop {
        let entry = match reader.next().map_err(|source| ReplayError::Read { path: path.to_owned(), source })? {
            None => break End::Whole { torn_at: None },
            Some(Err(RecordError::Truncated { at })) => break End::Whole { torn_at: Some(at as u64) },
            Some(Err(error)) => break End::Damaged(error),
            Some(Ok(entry)) => entry,
        };
        if let Some(end) = run.take(&mut replay, entry) {
            break end;
        }
    };
    let (replayed, took) = (*replay.replayed(), started.elapsed());
    Ok(Outcome { entries: run.entries, bytes: reader.position(), replayed, took, end })
}

/// Where the replay is.
struct Run {
    entries: u64,
    /// Number and description of the last input or plan, and the time.
    at: u64,
    now: Micros,
    done: String,
}

impl Run {
    /// Takes one entry; gives the end if the replay ends with it.
    fn take(&mut self, replay: &mut Replay, entry: Entry) -> Option<End> {
        match &entry {
            Entry::Digest(_) => {}
            Entry::Plan(_) | Entry::PlanAhead(_) => self.at = self.entries,
            Entry::Input(input) => {
                self.at = self.entries;
                self.now = self.now.max(input.at);
            }
        }
        self.entries += 1;
        report::describe(&entry, &mut self.done);
        // A broken invariant of the core is a result of a replay, not the end of the program.
        let taken = std::panic::catch_unwind(AssertUnwindSafe(|| replay.take(entry)));
        let (entry, at) = (self.at, self.now);
        match taken {
            Ok(Ok(())) => None,
            Ok(Err(divergence)) => {
                let decision = match divergence {
                    Divergence::Decision { .. } => report::decision(replay),
                    Divergence::Protocol(_) => Vec::new(),
                };
                let done = std::mem::take(&mut self.done);
                Some(End::Differs(Box::new(Difference { entry, at, divergence, done, decision })))
            }
            Err(payload) => {
                let text = payload.downcast_ref::<String>().map(String::as_str);
                let message = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("no words").to_owned();
                Some(End::Panicked { entry, at, message })
            }
        }
    }
}

#[cfg(test)]
mod tests;
