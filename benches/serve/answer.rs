//! What came back for one request, and when. Events are read by their bytes: only refusals, usages and errors are parsed as
//! JSON, once per request.

use crate::http::Head;
use serde_json::Value;

/// Microseconds since the generator started.
pub(crate) type Micros = u64;

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// With its finish reason and `[DONE]`.
    Whole,
    /// An error status instead of a stream.
    Refused(Refusal),
    /// An error event within the stream, by its code.
    Told(String),
    /// The generator itself closed the connection.
    Left,
    /// The answer ended without a word: what must not happen to an accepted request.
    Lost(String),
}

/// What a refusal says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) code: String,
    /// `error.retry_in`, seconds.
    pub(crate) retry_in: Option<f64>,
    /// `error.queue_depth`
    pub(crate) queue_depth: Option<u64>,
    /// Whether the headers say the same as the body.
    pub(crate) headers_agree: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// The number that the request was given by who made it.
    pub(crate) tag: u32,
    /// When it should have been sent: times are counted from here, so that a late generator flatters nobody.
    pub(crate) due: Micros,
    pub(crate) sent: Micros,
    /// 0 when no head came.
    pub(crate) head: Micros,
    pub(crate) ended: Micros,
    /// When each event with text arrived; a token is one event, but for characters of several tokens.
    pub(crate) tokens: Vec<Micros>,
    /// As the usage at the end counts them; 0 without one.
    pub(crate) completion_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) body_bytes: u64,
    pub(crate) finished: bool,
    pub(crate) end: End,
    /// The text as JSON writes it, if it was to be kept.
    pub(crate) text: Option<Vec<u8>>,
}

impl Answer {
    pub(crate) fn whole(&self) -> bool {
        self.end == End::Whole
    }

    /// The server took it.
    pub(crate) fn accepted(&self) -> bool {
        self.head > 0 && !matches!(self.end, End::Refused(_))
    }

    /// Milliseconds from when it was due to the first event with text.
    pub(crate) fn ttft_ms(&self) -> Option<f64> {
        self.tokens.first().map(|first| ms(first - self.due))
    }

    /// Milliseconds from the last byte sent to the head of the answer.
    pub(crate) fn head_ms(&self) -> f64 {
        ms(self.head - self.sent)
    }

    /// Seconds from when it was due to its end.
    pub(crate) fn seconds(&self) -> f64 {
        ms(self.ended - self.due) / 1e3
    }

    /// Gaps between tokens in milliseconds, each with the time of its end.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = (Micros, f64)> {
        self.tokens.windows(2).map(|pair| (pair[1], ms(pair[1] - pair[0])))
    }

    /// Takes a line of the event stream, without its line end.
    pub(crate) fn take_line(&mut self, line: &[u8], now: Micros) {
        let Some(data) = line.strip_prefix(b"data: ") else { return };
        if data.starts_with(b"[DONE]") {
            if self.finished && matches!(self.end, End::Lost(_)) {
                self.end = End::Whole;
            }
            return;
        }
        if data.starts_with(b"{\"error\"") {
            let found: Value = serde_json::from_slice(data).unwrap_or_default();
            self.end = End::Told(found["error"]["code"].as_str().unwrap_or("an error without a code").to_owned());
            return;
        }
        if let Some(at) = find(data, b"\"text\":\"") {
            let text = &data[at..];
            if text.first() != Some(&b'"') {
                self.tokens.push(now);
                if let Some(kept) = &mut self.text {
                    kept.extend_from_slice(&text[..end_of_string(text)]);
                }
            }
            self.finished |= find(text, b"\"finish_reason\":\"").is_some();
        } else if find(data, b"\"usage\":{").is_some() {
            let found: Value = serde_json::from_slice(data).unwrap_or_default();
            let usage = &found["usage"];
            self.completion_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        }
    }

    /// Takes the body of an answer that is no stream.
    pub(crate) fn take_refusal(&mut self, head: &Head, body: &[u8]) {
        let found: Value = serde_json::from_slice(body).unwrap_or_default();
        let error = &found["error"];
        let retry_in = error["retry_in"].as_f64();
        let ms = retry_in.map(|seconds| ((seconds * 1e3).round() as u64).max(1));
        let agrees = |ms: u64| {
            head.retry_after_ms.is_some_and(|header| header.abs_diff(ms) <= 1)
                && head.retry_after_s.is_some_and(|header| header.abs_diff(ms.div_ceil(1000)) <= 1)
        };
        self.end = End::Refused(Refusal {
            status: head.status,
            code: error["code"].as_str().unwrap_or("none").to_owned(),
            retry_in,
            queue_depth: error["queue_depth"].as_u64(),
            headers_agree: ms.map_or(head.retry_after_ms.is_none(), agrees),
        });
    }
}

pub(crate) fn ms(micros: Micros) -> f64 {
    micros as f64 / 1e3
}

/// Where the bytes after the first `what` begin.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what).map(|at| at + what.len())
}

/// Where a JSON string ends whose first quote is before `bytes`.
fn end_of_string(bytes: &[u8]) -> usize {
    let mut escaped = false;
    let end = bytes.iter().position(|&byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.unwrap_or(bytes.len())
}
