//! The figures as a table for people or as a line of JSON for programs.

use super::figures::{Figures, REFUSALS, ratio};
use super::histogram::Histogram;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::Duration;

const PERCENTILES: [f64; 3] = [50.0, 90.0, 99.0];

fn percentiles_ms(histogram: &Histogram) -> [f64; 3] {
    PERCENTILES.map(|percent| histogram.percentile(percent).0 as f64 / 1e3)
}

fn share(part: u64, whole: u64) -> f64 {
    ratio(part as f64, whole as f64)
}

pub(super) fn write_table(figures: &Figures, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{:12} {:>10} {:>10} {:>10}", "", "p50", "p90", "p99")?;
    for (name, histogram) in [("ttft, ms", &figures.ttft), ("itl, ms", &figures.itl)] {
        let [p50, p90, p99] = percentiles_ms(histogram);
        writeln!(out, "{name:12} {p50:>10.1} {p90:>10.1} {p99:>10.1}")?;
    }
    let Figures { submitted, served, .. } = *figures;
    writeln!(out, "requests     {submitted}: {served} served, {} dropped", figures.dropped())?;
    writeln!(
        out,
        "throughput   {:.2} requests/s, {:.0} output tokens/s, {:.0} prompt tokens/s of which {:.0} computed",
        figures.per_second(served),
        figures.per_second(figures.output_tokens),
        figures.per_second(figures.prompt_tokens),
        figures.per_second(figures.computed_tokens),
    )?;
    let limit =
        |name, limit: Option<Duration>| limit.map(|limit| format!("{name} <= {} ms", limit.as_secs_f64() * 1e3));
    let limits: Vec<String> =
        [limit("ttft", figures.objectives.ttft), limit("itl", figures.objectives.itl)].into_iter().flatten().collect();
    let limits = if limits.is_empty() { "no objective is set".to_owned() } else { limits.join(", ") };
    let good = figures.good;
    let percent = share(good, submitted) * 100.0;
    writeln!(out, "goodput      {:.2} requests/s, {percent:.1}% of all ({limits})", figures.per_second(good))?;
    writeln!(out, "hit rate     {:.1}% of the prompt tokens", figures.hit_rate() * 100.0)?;
    writeln!(out, "fairness     {:.3} (Jain's index over {} tenants)", figures.fairness(), figures.tenants.len())?;
    write!(out, "drop rate    {:.2}%", share(figures.dropped(), submitted) * 100.0)?;
    let reasons = REFUSALS.iter().copied().zip(figures.refused);
    let others = [("stopped at their deadline", figures.late), ("failed", figures.failed)];
    let reasons: Vec<String> = reasons
        .map(|(reason, count)| (format!("refused: {reason}"), count))
        .chain(others.map(|(reason, count)| (reason.to_owned(), count)))
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    if reasons.is_empty() {
        writeln!(out)?
    } else {
        writeln!(out, " ({})", reasons.join(", "))?
    }
    writeln!(out, "preemptions  {}", figures.preemptions)?;
    let (simulated, took) = (figures.simulated.0 as f64 / 1e6, figures.took.as_secs_f64());
    let speed = ratio(simulated, took);
    writeln!(out, "time         {simulated:.1} s, {} steps, in {took:.2} s: {speed:.0} times as fast", figures.steps)?;
    if figures.out_of_order > 0 {
        writeln!(out, "{} rows of the trace are earlier than the row before and came with it", figures.out_of_order)?;
    }
    Ok(())
}

pub(super) fn write_json(figures: &Figures, out: &mut dyn Write) -> io::Result<()> {
    let ms = |histogram: &Histogram| {
        let [p50, p90, p99] = percentiles_ms(histogram);
        json!({ "p50": p50, "p90": p90, "p99": p99 })
    };
    let limit_ms = |limit: Option<Duration>| limit.map(|limit| limit.as_secs_f64() * 1e3);
    let refused: serde_json::Map<String, Value> =
        REFUSALS.iter().zip(figures.refused).map(|(reason, count)| ((*reason).to_owned(), count.into())).collect();
    let took = figures.took.as_secs_f64();
    let record = json!({
        "ttft_ms": ms(&figures.ttft),
        "itl_ms": ms(&figures.itl),
        "requests": figures.submitted,
        "served": figures.served,
        "requests_per_s": figures.per_second(figures.served),
        "output_tokens_per_s": figures.per_second(figures.output_tokens),
        "prompt_tokens_per_s": figures.per_second(figures.prompt_tokens),
        "computed_tokens_per_s": figures.per_second(figures.computed_tokens),
        "objective_ttft_ms": limit_ms(figures.objectives.ttft),
        "objective_itl_ms": limit_ms(figures.objectives.itl),
        "goodput_per_s": figures.per_second(figures.good),
        "goodput_share": share(figures.good, figures.submitted),
        "hit_rate": figures.hit_rate(),
        "fairness": figures.fairness(),
        "tenants": figures.tenants.len(),
        "drop_rate": share(figures.dropped(), figures.submitted),
        "refused": refused,
        "late": figures.late,
        "failed": figures.failed,
        "preemptions": figures.preemptions,
        "steps": figures.steps,
        "simulated_s": figures.simulated.0 as f64 / 1e6,
        "took_s": took,
        "out_of_order": figures.out_of_order,
    });
    writeln!(out, "{record}")
}
