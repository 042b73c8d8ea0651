//! Figures with their aims, as the scripts read them.

use crate::answer::{Answer, End};
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the project wants a figure to be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Aim {
    AtMost(f64),
    AtLeast(f64),
}

#[derive(Debug, Serialize)]
struct Figure {
    /// The row of the scenario's table: a setting, or empty where every figure is a row.
    row: String,
    name: String,
    unit: &'static str,
    /// Null in JSON where there was nothing to measure.
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    aim: Option<Aim>,
}

/// What one run of a scenario found.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    figures: Vec<Figure>,
    /// Further numbers, for whoever looks closer.
    detail: Map<String, Value>,
}

impl Report {
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        self.add_to("", name, unit, value);
    }

    pub(crate) fn add_to(&mut self, row: &str, name: &str, unit: &'static str, value: f64) {
        self.figures.push(Figure { row: row.to_owned(), name: name.to_owned(), unit, value, aim: None });
    }

    /// The figure that was added last is meant to be so.
    pub(crate) fn aim(&mut self, aim: Aim) {
        self.figures.last_mut().expect("a figure was added before its aim").aim = Some(aim);
    }

    pub(crate) fn detail(&mut self, name: &str, value: impl Serialize) {
        let value = serde_json::to_value(value).expect("numbers, strings and lists of them serialize");
        self.detail.insert(name.to_owned(), value);
    }

    /// Cores that this process used, over its whole run.
    pub(crate) fn add_generator(&mut self, wall: Duration) {
        // SAFETY: an all-zero rusage is a valid one.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a whole rusage, which the call fills.
        unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
        self.detail("generator_cores", (seconds(usage.ru_utime) + seconds(usage.ru_stime)) / wall.as_secs_f64());
    }
}

/// How many answers ended how.
pub(crate) fn ends<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        let end = match &answer.end {
            End::Whole => "finished".to_owned(),
            End::Refused(refusal) => format!("refused: {} {}", refusal.status, refusal.code),
            End::Told(code) => format!("ended with an error event: {code}"),
            End::Left => "left by the client".to_owned(),
            End::Lost(why) => format!("lost: {why}"),
        };
        *counts.entry(end).or_insert(0) += 1;
    }
    counts
}

/// Answers that ended without a word.
pub(crate) fn lost(answers: &[Answer]) -> usize {
    answers.iter().filter(|answer| matches!(answer.end, End::Lost(_))).count()
}

/// Fails unless every answer is whole: for scenarios in which nothing may be refused.
pub(crate) fn all_whole(what: &str, answers: &[Answer]) -> crate::Outcome<()> {
    if answers.iter().all(Answer::whole) {
        return Ok(());
    }
    Err(format!("{what}: expected whole answers, found {:?}", ends(answers)).into())
}
