//! How requests are ordered, refused and dealt to workers.

use super::values::parse_filled;
use clap::ValueEnum;
use std::time::Duration;

/// What the scheduler is told beside the engine's limits.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulingConfig {
    /// Priority classes, the most urgent first; 1 to [`CLASSES_MAX`].
    pub classes: Vec<PriorityClass>,
    /// Most uncached prompt tokens that wait; `None`: no limit but the number of requests.
    pub queued_tokens_max: Option<u64>,
    pub workers: WorkerLayout,
    pub pools: PoolLayout,
    /// Compute threads of the decode worker of a split layout; `None`: half of all.
    pub decode_threads: Option<usize>,
    /// Multiprocessors of a GPU that the decode worker of a split layout has while the prefill worker is at work, which
    /// then has the others; alone each has all. `None`: both always have all.
    pub decode_multiprocessors: Option<u32>,
    /// Without a finished step for this long while there is work, the server is not live.
    pub stall_timeout: Duration,
    /// The saturation that replicas should have, in thousandths.
    pub target_saturation: u32,
}

impl Default for SchedulingConfig {
    fn default() -> Self {
        SchedulingConfig {
            classes: PriorityClass::defaults(),
            queued_tokens_max: None,
            workers: WorkerLayout::Mixed,
            pools: PoolLayout::Shared,
            decode_threads: None,
            decode_multiprocessors: None,
            stall_timeout: Duration::from_secs(120),
            target_saturation: 700,
        }
    }
}

/// Most classes that the scheduler knows.
pub const CLASSES_MAX: usize = kvern_core::CLASSES_MAX;

/// A priority class and what it is promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriorityClass {
    pub name: String,
    /// A request that would have to wait longer for its first token, behind others, is refused.
    pub ttft: Option<Duration>,
    /// Steps with running answers of this class take no more prefill than keeps their time within this.
    pub itl: Option<Duration>,
}

impl PriorityClass {
    /// `high`, `normal` and `low`, without promises.
    #[must_use]
    pub fn defaults() -> Vec<PriorityClass> {
        ["high", "normal", "low"].map(|name| PriorityClass { name: name.to_owned(), ttft: None, itl: None }).to_vec()
    }
}

/// Who computes prompts and who decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WorkerLayout {
    /// One worker does both.
    Mixed,
    /// A prefill and a decode worker, each with threads of its own.
    Split,
}

/// Where the workers of a split layout keep K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PoolLayout {
    /// In one pool: a request is handed over by name.
    Shared,
    /// In a pool each: blocks are copied when a request is handed over.
    Apart,
}

/// A class as typed: `NAME[:ttft=2s][:itl=40ms]`.
pub(super) fn parse_class(text: &str) -> Result<PriorityClass, String> {
    let mut parts = text.split(':');
    let name = parse_filled(parts.next().unwrap_or_default())?;
    let mut class = PriorityClass { name, ttft: None, itl: None };
    for part in parts {
        let expected = || format!("expected ttft=DURATION or itl=DURATION after the class's name, found `{part}`");
        let (key, value) = part.split_once('=').ok_or_else(expected)?;
        let slot = match key {
            "ttft" => &mut class.ttft,
            "itl" => &mut class.itl,
            _ => return Err(expected()),
        };
        if slot.replace(parse_duration(value)?).is_some() {
            return Err(format!("expected {key} once, found it twice in `{text}`"));
        }
    }
    Ok(class)
}

/// Longest promise that is one.
const DURATION_MAX: f64 = 86_400.0;

/// A positive time with its unit: `40ms`, `1.5s`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("expected a time such as 40ms or 1.5s, up to a day, found `{text}`");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').ok_or_else(expected)?, 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|_| expected())? * unit;
    // Positive in microseconds too, which is what the scheduler counts in.
    if (1e-6..=DURATION_MAX).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(expected()) }
}

/// A saturation as typed, 0 to 1, in thousandths.
pub(super) fn parse_saturation(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.001..=1.0).contains(&value) => Ok((value * 1000.0).round() as u32),
        _ => Err(format!("expected a number above 0 and at most 1, found `{text}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_as_typed() {
        let class = |name: &str, ttft: Option<u64>, itl: Option<u64>| {
            let [ttft, itl] = [ttft, itl].map(|ms| ms.map(Duration::from_millis));
            Some(PriorityClass { name: name.to_owned(), ttft, itl })
        };
        let cases = [
            ("chat", class("chat", None, None)),
            ("chat:ttft=2s", class("chat", Some(2000), None)),
            ("chat:itl=40ms:ttft=1.5s", class("chat", Some(1500), Some(40))),
            ("", None),
            (":ttft=2s", None),
            ("chat:", None),
            ("chat:ttft", None),
            ("chat:tpot=2s", None),
            ("chat:ttft=2", None),
            ("chat:ttft=0s", None),
            ("chat:ttft=-1s", None),
            ("chat:ttft=NaNs", None),
            ("chat:ttft=infs", None),
            ("chat:ttft=90000s", None),
            ("chat:ttft=1s:ttft=2s", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_class(text).ok(), expected, "{text:?}");
        }
    }
}
