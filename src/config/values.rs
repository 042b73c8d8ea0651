//! Parsers of single values, and the type of those that must not be shown.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// A text that no log, table or debug output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text itself; for comparing and sending only.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Factors of the suffixes, longest first where one ends another. As in vLLM, a small letter is decimal and a capital one is
/// binary; `KB` and `KiB` are what they say.
const SUFFIXES: [(&str, u64); 16] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("k", 1_000),
    ("m", 1_000_000),
    ("g", 1_000_000_000),
    ("t", 1_000_000_000_000),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
];

/// A positive whole number with an optional suffix: `8192`, `8k`, `1.5GiB`.
pub(super) fn parse_amount(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a positive number such as 4096, 8k or 1.5GiB, found `{text}`");
    let (digits, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?.trim_end(), *factor)))
        .unwrap_or((text, 1));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let plain = |part: &str| part.len() <= 18 && part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !plain(whole) || !plain(fraction) || digits.ends_with('.') {
        return Err(expected());
    }
    // Exact: 18 + 18 digits over a power of ten, times at most 2^40, fits no 128 bits, so each part is scaled on its own.
    let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| expected())?);
    let part = |digits: &str| if digits.is_empty() { Ok(0) } else { digits.parse::<u128>().map_err(|_| expected()) };
    let amount = part(whole)? * u128::from(factor) + part(fraction)? * u128::from(factor) / scale;
    match u64::try_from(amount) {
        Ok(amount) if amount > 0 => Ok(amount),
        _ => Err(expected()),
    }
}

/// [`parse_amount`] for counts.
pub(super) fn parse_count(text: &str) -> Result<u32, String> {
    let amount = parse_amount(text)?;
    u32::try_from(amount).map_err(|_| format!("expected at most {}, found {amount}", u32::MAX))
}

/// An address to listen on.
pub(super) fn parse_host(text: &str) -> Result<IpAddr, String> {
    if text == "localhost" {
        return Ok(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse().map_err(|_| format!("expected an IP address or localhost, found `{text}`"))
}

/// A time in seconds, at most a day.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("expected seconds between 0 and 86400, found `{text}`")),
    }
}

/// A sampling temperature.
pub(super) fn parse_temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(temperature) if (0.0..=2.0).contains(&temperature) => Ok(temperature),
        _ => Err(format!("expected a number between 0 and 2, found `{text}`")),
    }
}

/// A level or a list of directives that the log filter understands.
pub(super) fn parse_log_level(text: &str) -> Result<String, String> {
    match tracing_subscriber::EnvFilter::builder().parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("expected error, warn, info, debug, trace or filter directives: {error}")),
    }
}

/// A text that is not empty: an empty key or name is a variable that somebody forgot to fill.
pub(super) fn parse_filled(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("expected a text, found an empty one".to_owned()) } else { Ok(text.to_owned()) }
}

/// As [`parse_filled`], hidden from then on.
pub(super) fn parse_secret(text: &str) -> Result<Secret, String> {
    parse_filled(text).map(Secret::new)
}
