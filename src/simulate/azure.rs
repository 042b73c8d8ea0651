//! Azure's LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`. The traces of 2023 have times such as
//! `2023-11-16 18:17:03.9799600`, those of 2024 such as `2024-05-10 00:00:00.009930+00:00`, whose fraction is left out where
//! it is 0. Nothing is known of the prompts but their length.

use super::trace::{Arrival, Content, Row};
use chrono::{DateTime, NaiveDateTime};
use kvern_core::Micros;

/// Which column holds what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns {
    timestamp: usize,
    context: usize,
    generated: usize,
}

impl Columns {
    /// Those of a header line, if it is one.
    pub(super) fn of(header: &str) -> Option<Self> {
        let find = |name: &str| header.split(',').position(|column| column.trim() == name);
        Some(Columns {
            timestamp: find("TIMESTAMP")?,
            context: find("ContextTokens")?,
            generated: find("GeneratedTokens")?,
        })
    }

    pub(super) fn row(self, text: &str) -> Result<Row, String> {
        let column = |at: usize, name: &str| {
            let found = text.split(',').nth(at).map(str::trim);
            found.ok_or_else(|| format!("expected a column {name}, found `{}`", shortened(text)))
        };
        let tokens = |at: usize, name: &str| {
            let found = column(at, name)?;
            let number = found
                .parse::<u32>()
                .map_err(|_| format!("expected a number in {name}, found `{}`", shortened(found)))?;
            // The core refuses requests for nothing; the traces have a few.
            Ok::<u32, String>(number.max(1))
        };
        let output_tokens = tokens(self.generated, "GeneratedTokens")?;
        let arrival = Arrival {
            at: Micros(0),
            prompt_tokens: tokens(self.context, "ContextTokens")?,
            output_tokens,
            output_tokens_max: output_tokens,
            content: Content::Unique,
            shared_tokens: 0,
            tenant: None,
            class: 0,
            timeout: None,
        };
        Ok(Row { at_us: time_us(column(self.timestamp, "TIMESTAMP")?)?, arrival })
    }
}

/// Microseconds since 1970; a time without a zone is in UTC.
fn time_us(text: &str) -> Result<i64, String> {
    let naive =
        NaiveDateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f").map(|time| time.and_utc().timestamp_micros());
    let zoned = || DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%:z").map(|time| time.timestamp_micros());
    let expected = "expected a time such as 2023-11-16 18:17:03.9799600";
    naive.or_else(|_| zoned()).map_err(|_| format!("{expected}, found `{}`", shortened(text)))
}

fn shortened(text: &str) -> String {
    text.chars().take(60).collect()
}
