//! What an answer says of its key's limits, and of the server's pressure, in headers.

use super::state::AppState;
use crate::keys::{Standing, Window};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use std::sync::Arc;
use std::time::Duration;

const X_BACKPRESSURE_LEVEL: HeaderName = HeaderName::from_static("x-backpressure-level");

/// Limit, remaining and reset of each kind.
const REQUESTS: [&str; 3] =
    ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
const TOKENS: [&str; 3] = ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];

/// OpenAI's headers, for the limits that the key has.
pub(super) fn insert(headers: &mut HeaderMap, standing: &Standing) {
    for (names, window) in [(REQUESTS, standing.requests), (TOKENS, standing.tokens)] {
        let Some(Window { limit, remaining, reset }) = window else { continue };
        headers.insert(names[0], HeaderValue::from(limit));
        headers.insert(names[1], HeaderValue::from(remaining));
        headers.insert(names[2], visible(duration(reset)));
    }
}

/// Says on every answer how full the server is: 0.00 to 1.00, and 1.00 while it loads.
pub(super) async fn tell_pressure(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let level = state.published().map_or(1.0, |model| model.engine.saturation().clamp(0.0, 1.0));
    response.headers_mut().insert(X_BACKPRESSURE_LEVEL, visible(format!("{level:.2}")));
    response
}

fn visible(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("numbers and units are visible ASCII")
}

/// A time as OpenAI writes it, rounded up to milliseconds: `0s`, `12ms`, `1.5s`, `6m0s`, `1h0m0.25s`.
fn duration(time: Duration) -> String {
    let ms = time.as_nanos().div_ceil(1_000_000);
    let (hours, minutes, rest) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    if (1..1000).contains(&ms) {
        return format!("{ms}ms");
    }
    let seconds = match rest % 1000 {
        0 => format!("{}s", rest / 1000),
        fraction => format!("{}.{}s", rest / 1000, format!("{fraction:03}").trim_end_matches('0')),
    };
    match (hours, minutes) {
        (0, 0) => seconds,
        (0, minutes) => format!("{minutes}m{seconds}"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let cases: [(u64, &str); 11] = [
            (0, "0s"),
            (1, "1ms"),
            (12_000_000, "12ms"),
            (999_000_001, "1s"),
            (1_000_000_000, "1s"),
            (1_500_000_000, "1.5s"),
            (8_640_000_001, "8.641s"),
            (59_999_999_999, "1m0s"),
            (360_000_000_000, "6m0s"),
            (3_600_250_000_000, "1h0m0.25s"),
            (86_399_007_000_000, "23h59m59.007s"),
        ];
        for (nanos, text) in cases {
            assert_eq!(duration(Duration::from_nanos(nanos)), text, "{nanos} ns");
        }
    }

    #[test]
    fn only_limits_that_there_are() {
        let mut headers = HeaderMap::new();
        insert(&mut headers, &Standing::default());
        assert!(headers.is_empty());
        let window = Window { limit: 60, remaining: 59, reset: Duration::from_secs(1) };
        insert(&mut headers, &Standing { requests: Some(window), tokens: None });
        let mut found: Vec<_> = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        found.sort_unstable();
        let expected: [(&str, &[u8]); 3] = [(REQUESTS[0], b"60"), (REQUESTS[1], b"59"), (REQUESTS[2], b"1s")];
        assert_eq!(found, expected);
    }
}
