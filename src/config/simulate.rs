//! What `kvern simulate` is told to run.

use super::values::parse_filled;
use std::path::PathBuf;
use std::time::Duration;

/// `kvern simulate`.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulateConfig {
    /// `None` only where the profile is to be printed.
    pub trace: Option<TraceSource>,
    pub profile: ProfileSource,
    /// Only so many of the trace's requests.
    pub requests_max: Option<u64>,
    /// Arrivals come so many times as fast.
    pub speed_up: f64,
    pub objectives: Objectives,
    /// Prefixes are not cached, whatever the profile says.
    pub no_prefix_caching: bool,
    pub json: bool,
    /// The profile is written as TOML, and nothing is run.
    pub print_profile: bool,
}

/// What a request must keep to count for the goodput.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Objectives {
    /// Time to the first token.
    pub ttft: Option<Duration>,
    /// Mean time between its tokens.
    pub itl: Option<Duration>,
}

/// Where arrivals come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceSource {
    File(PathBuf),
    Synthetic(Synthetic),
}

/// Random traces that look like public ones; each is always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Synthetic {
    /// Unrelated prompts of about 1,150 tokens, answers of about 210, ten a second.
    Azure,
    /// Conversations that grow, under one system prompt.
    Mooncake,
}

/// Where the configuration and the costs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProfileSource {
    Default,
    /// TOML, JSON, or a recording.
    File(PathBuf),
}

pub(super) fn parse_trace(text: &str) -> Result<TraceSource, String> {
    match text.strip_prefix("synthetic:") {
        Some("azure") => Ok(TraceSource::Synthetic(Synthetic::Azure)),
        Some("mooncake") => Ok(TraceSource::Synthetic(Synthetic::Mooncake)),
        Some(other) => Err(format!("expected synthetic:azure or synthetic:mooncake, found `synthetic:{other}`")),
        None => parse_filled(text).map(|text| TraceSource::File(PathBuf::from(text))),
    }
}

pub(super) fn parse_profile(text: &str) -> Result<ProfileSource, String> {
    match text {
        "default" => Ok(ProfileSource::Default),
        text => parse_filled(text).map(|text| ProfileSource::File(PathBuf::from(text))),
    }
}

pub(super) fn parse_factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if (0.001..=1e6).contains(&factor) => Ok(factor),
        _ => Err(format!("expected a factor between 0.001 and 1000000, found `{text}`")),
    }
}

/// A time in milliseconds, at most a day.
pub(super) fn parse_milliseconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(time) if (0.0..=86_400_000.0).contains(&time) => Ok(Duration::from_secs_f64(time / 1e3)),
        _ => Err(format!("expected milliseconds between 0 and 86400000, found `{text}`")),
    }
}
