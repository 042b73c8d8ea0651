//! The result, as a table for people or as lines of JSON for programs.

use super::cost::Cost;
use super::rates::Rates;
use crate::config::Workload;
use kvern_kernels::Device;
use kvern_kernels::limits::Limit;
use serde_json::{Value, json};
use std::io::{self, Write};

/// All that was measured, and on what.
pub(super) struct Report<'a> {
    pub(super) model: &'a str,
    /// Name of the processor.
    pub(super) machine: String,
    pub(super) device: &'a Device,
    pub(super) weight_bytes: usize,
    /// Most tokens of a chunk of prefill.
    pub(super) chunk: u32,
    pub(super) rows: Vec<Row>,
    /// Empty unless asked for.
    pub(super) limits: Vec<(Limit, Rates)>,
}

/// A workload's result.
pub(super) struct Row {
    pub(super) workload: Workload,
    /// Of one round.
    pub(super) tokens: u64,
    pub(super) cost: Cost,
    /// Tokens per second.
    pub(super) rates: Rates,
    /// For which part of the time the device waited between steps; of decoding alone.
    pub(super) idle_shares: Rates,
}

impl Row {
    fn idle_share(&self) -> Option<f64> {
        (!self.idle_shares.rounds().is_empty()).then(|| self.idle_shares.median())
    }
}

/// Part of a limit that a workload reaches.
struct Share {
    limit: Limit,
    part: f64,
}

impl Report<'_> {
    pub(super) fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let Report { model, machine, device, .. } = self;
        writeln!(out, "{model}, {machine}, {}, kvern {}", device.describe(), env!("CARGO_PKG_VERSION"))?;
        writeln!(out, "{:16} {:>10} {:>10} {:>10}", "tokens/s", "median", "least", "most")?;
        for row in &self.rows {
            let rates = &row.rates;
            let (median, least, most) = (rates.median(), rates.least(), rates.most());
            write!(out, "{:16} {median:>10.1} {least:>10.1} {most:>10.1}", row.workload.to_string())?;
            if let Some(share) = row.idle_share() {
                write!(out, "  {:.1}% idle between steps", share * 100.0)?;
            }
            match self.share(row) {
                Some(Share { limit, part }) => writeln!(out, "  {:.0}% of {}", part * 100.0, limit.name())?,
                None => writeln!(out)?,
            }
        }
        if self.limits.is_empty() {
            return Ok(());
        }
        writeln!(out, "{:16} {:>10} {:>10} {:>10}", "limits, 10^9/s", "median", "least", "most")?;
        for (limit, rates) in &self.limits {
            let giga = [rates.median(), rates.least(), rates.most()].map(|rate| rate / 1e9);
            let [median, least, most] = giga;
            writeln!(out, "{:16} {median:>10.1} {least:>10.1} {most:>10.1}  {}", limit.name(), limit.unit())?;
        }
        Ok(())
    }

    pub(super) fn write_json(&self, out: &mut dyn Write) -> io::Result<()> {
        for row in &self.rows {
            let mut record = self.record(&row.workload.to_string(), "tokens", &row.rates);
            record["tokens"] = row.tokens.into();
            record["chunk"] = self.chunk.into();
            record["product_operations"] = row.cost.product_operations.into();
            record["read_bytes"] = row.cost.read_bytes.into();
            if let Some(share) = row.idle_share() {
                record["idle_share"] = share.into();
            }
            if let Some(Share { limit, part }) = self.share(row) {
                record["limit"] = limit.name().into();
                record["limit_share"] = part.into();
            }
            writeln!(out, "{record}")?;
        }
        for (limit, rates) in &self.limits {
            writeln!(out, "{}", self.record(&format!("limit {}", limit.name()), limit.unit(), rates))?;
        }
        Ok(())
    }

    /// What every line says.
    fn record(&self, workload: &str, unit: &str, rates: &Rates) -> Value {
        json!({
            "workload": workload,
            "unit": format!("{unit}/s"),
            "median": rates.median(),
            "least": rates.least(),
            "most": rates.most(),
            "rounds": rates.rounds(),
            "model": self.model,
            "weight_bytes": self.weight_bytes,
            "machine": self.machine,
            "device": self.device.describe(),
            "isa": self.device.isa().map(|isa| format!("{isa:?}").to_lowercase()),
            "threads": self.device.threads(),
            "version": env!("CARGO_PKG_VERSION"),
        })
    }

    /// Of the reads for one stream, for attention of decoding and for sampling, which are bound by them, and of the
    /// fastest products for prompts.
    fn share(&self, row: &Row) -> Option<Share> {
        let rounds_per_s = row.rates.median() / row.tokens as f64;
        let (limit, spent) = match row.workload {
            Workload::Decode { streams: 1, .. } | Workload::Attention { .. } | Workload::Sampling { .. } => {
                (self.limit(|limit| limit == Limit::Read)?, row.cost.read_bytes?)
            }
            Workload::Decode { .. } => return None,
            Workload::Prefill { .. } | Workload::PromptAttention { .. } => {
                (self.limit(|limit| limit != Limit::Read)?, row.cost.product_operations)
            }
        };
        Some(Share { limit: limit.0, part: spent * rounds_per_s / limit.1 })
    }

    /// The highest of the measured limits that are `wanted`.
    fn limit(&self, wanted: impl Fn(Limit) -> bool) -> Option<(Limit, f64)> {
        let rates = self.limits.iter().map(|(limit, rates)| (*limit, rates.median()));
        rates.filter(|(limit, _)| wanted(*limit)).max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// The name of the processor, where the system tells it.
pub(super) fn machine() -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    name.unwrap_or_else(|| "unknown processor".to_owned())
}
