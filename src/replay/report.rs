//! The result of a replay in words.

use super::{Difference, End, Outcome};
use kvern_core::record::Entry;
use kvern_core::replay::{Divergence, Replay};
use kvern_core::{Effect, Input, Micros, SeqSlice};
use std::fmt::Write as _;
use std::io::{self, Write};

/// Lines of a decision that are shown.
const LINES_MAX: usize = 40;

/// Writes what was replayed and how it ended.
///
/// # Errors
/// When `out` cannot be written.
pub fn write_report(path: &str, outcome: &Outcome, out: &mut dyn Write) -> io::Result<()> {
    let replayed = &outcome.replayed;
    let seconds = |time: Micros| time.0 as f64 / 1e6;
    let simulated = seconds(Micros(replayed.last.0 - replayed.first.map_or(replayed.last.0, |first| first.0)));
    let took = outcome.took.as_secs_f64();
    writeln!(out, "recording  {path}, {} bytes", outcome.bytes)?;
    writeln!(
        out,
        "entries    {}: {} inputs, {} plans, {} decisions compared",
        outcome.entries,
        replayed.inputs,
        replayed.plans + replayed.plans_ahead,
        replayed.compared
    )?;
    let steps = replayed.steps + replayed.steps_ahead;
    writeln!(out, "steps      {steps}, {} of them planned ahead, {} tokens", replayed.steps_ahead, replayed.tokens)?;
    writeln!(out, "requests   {}: {} ended, {} refused", replayed.submitted, replayed.finished, replayed.refused)?;
    let speed = if took > 0.0 { simulated / took } else { 0.0 };
    writeln!(out, "time       {simulated:.3} s replayed in {took:.3} s, {speed:.0} times as fast")?;
    match &outcome.end {
        End::Whole { torn_at } => {
            if let Some(at) = torn_at {
                writeln!(out, "the recording breaks off within an entry at byte {at}, as when the server is killed")?;
            }
            if outcome.is_same() {
                writeln!(out, "no difference")
            } else {
                writeln!(out, "nothing to compare: the recording holds no decisions")
            }
        }
        End::Damaged(error) => {
            writeln!(out, "the recording is damaged: {error}")?;
            writeln!(out, "no difference before that")
        }
        End::Differs(difference) => write_difference(difference, out),
        End::Panicked { entry, at, message } => {
            writeln!(out, "at entry {entry}, {:.6} s, the core breaks an invariant: {message}", seconds(*at))
        }
    }
}

fn write_difference(difference: &Difference, out: &mut dyn Write) -> io::Result<()> {
    let Difference { entry, at, divergence, done, decision } = difference;
    writeln!(out, "first difference at entry {entry}, {:.6} s, {done}: {divergence}", at.0 as f64 / 1e6)?;
    if matches!(divergence, Divergence::Decision { .. }) {
        writeln!(out, "the core decides now:")?;
        decision.iter().try_for_each(|line| writeln!(out, "  {line}"))?;
    }
    Ok(())
}

/// What is done, in a few words, in a text that is used again and again; a digest leaves the words of what it is about.
pub(super) fn describe(entry: &Entry, text: &mut String) {
    let input = match entry {
        Entry::Digest(_) => return,
        Entry::Plan(worker) => {
            text.clear();
            return write!(text, "plan of worker {}", worker.0).expect("a String takes all that is written to it");
        }
        Entry::PlanAhead(worker) => {
            text.clear();
            return write!(text, "plan ahead of worker {}", worker.0)
                .expect("a String takes all that is written to it");
        }
        Entry::Input(input) => &input.input,
    };
    text.clear();
    let written = match input {
        Input::Submit(submission) => {
            let (request, tokens) = (submission.request.0, submission.prompt.len());
            write!(text, "submission of request {request} with {tokens} tokens")
        }
        Input::Cancel { request, reason } => write!(text, "cancel of request {}, {reason:?}", request.0),
        Input::StepDone { worker, step, .. } => write!(text, "end of step {} on worker {}", step.0, worker.0),
        Input::StepFailed { worker, step } => write!(text, "failure of step {} on worker {}", step.0, worker.0),
        Input::SetTenants(specs) => write!(text, "settings of {} tenants", specs.len()),
        Input::Tick => write!(text, "tick"),
        Input::TransferDone { transfer } => write!(text, "end of transfer {}", transfer.0),
        Input::TransferFailed { transfer } => write!(text, "failure of transfer {}", transfer.0),
        Input::WorkerLost { worker } => write!(text, "loss of worker {}", worker.0),
        Input::WorkerBack { worker } => write!(text, "return of worker {}", worker.0),
    };
    written.expect("a String takes all that is written to it");
}

/// What the core just decided, a line for each effect and slice.
pub(super) fn decision(replay: &Replay) -> Vec<String> {
    let (effects, plan) = replay.decision();
    let slice = |slice: &SeqSlice| {
        let blocks: Vec<u32> =
            plan.map_or(&[][..], |plan| plan.slice_blocks(slice)).iter().map(|block| block.0).collect();
        format!(
            "slice of request {}: {} tokens from {}, {} blocks kept, new {blocks:?}{}",
            slice.request.0,
            slice.tokens.end - slice.tokens.start,
            slice.start,
            slice.table_len,
            if slice.sample { ", sampled" } else { "" }
        )
    };
    let mut lines: Vec<String> = effects.iter().map(effect).collect();
    if let Some(plan) = plan {
        lines.push(format!("step {} of {} tokens", plan.step.0, plan.tokens.len()));
        lines.extend(plan.slices.iter().map(slice));
    }
    if lines.is_empty() {
        lines.push("nothing".to_owned());
    }
    let left_out = lines.len().saturating_sub(LINES_MAX);
    lines.truncate(LINES_MAX);
    if left_out > 0 {
        lines.push(format!("and {left_out} more"));
    }
    lines
}

/// Without the token, which is a pseudonym.
fn effect(effect: &Effect) -> String {
    match effect {
        Effect::Token { request, index, .. } => format!("token {index} of request {}", request.0),
        other => format!("{other:?}"),
    }
}
