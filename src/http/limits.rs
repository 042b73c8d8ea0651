//! What a client may ask of the front end before its request is even read, and the reading of bodies within that.

use crate::error::ServeError;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use std::time::Duration;

/// Bounds of the front end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpLimits {
    /// Most bytes of a request body.
    pub body_bytes_max: usize,
    /// Most bytes of a request head (request line and headers).
    pub head_bytes_max: usize,
    /// Connections open at once; more wait in the kernel's backlog.
    pub connections_max: usize,
    /// A head must be complete this long after its connection was opened or its predecessor was answered.
    pub head_timeout: Duration,
    /// A body must be complete this long after its head.
    pub body_timeout: Duration,
    /// A socket that takes no byte for this long is closed.
    pub write_timeout: Duration,
    /// A stream that is silent for one to two of these gets a comment, so that proxies keep it open.
    pub keep_alive: Duration,
    /// How long running answers may go on after a shutdown was asked for.
    pub drain_timeout: Duration,
    /// Answers (prompts times `n`) of one request.
    pub choices_max: u32,
    /// Large texts tokenized at once.
    pub text_tasks_max: usize,
}

impl Default for HttpLimits {
    fn default() -> Self {
        HttpLimits {
            body_bytes_max: 16 << 20,
            head_bytes_max: 32 << 10,
            connections_max: 4096,
            head_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            keep_alive: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(60),
            choices_max: 128,
            text_tasks_max: std::thread::available_parallelism().map_or(2, usize::from),
        }
    }
}

/// Longest part of a parser's message that is shown: it may repeat what the client sent.
const DETAIL_CHARS_MAX: usize = 300;

/// Reads a JSON body within the limits of size and time.
pub(crate) async fn read_json_body(request: Request, limits: &HttpLimits) -> Result<Bytes, ServeError> {
    let headers = request.headers();
    let media_type = headers.get(CONTENT_TYPE).map_or("", |value| value.to_str().unwrap_or("?"));
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let found = if media_type.is_empty() { "none".to_owned() } else { clipped(media_type) };
        return Err(ServeError::WrongMediaType { found });
    }
    let limit = limits.body_bytes_max;
    let promised = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if promised.is_some_and(|bytes| bytes > limit as u64) {
        return Err(ServeError::BodyTooLarge { limit });
    }
    let read = Limited::<Body>::new(request.into_body(), limit).collect();
    match tokio::time::timeout(limits.body_timeout, read).await {
        Err(_) => Err(ServeError::BodyTimeout { limit: limits.body_timeout }),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ServeError::BodyTooLarge { limit }),
        Ok(Err(_)) => Err(ServeError::malformed("the body ended before it was complete")),
    }
}

/// The body as text.
pub(crate) fn utf8(body: &[u8]) -> Result<&str, ServeError> {
    std::str::from_utf8(body).map_err(|error| {
        ServeError::malformed(format!(
            "expected JSON in UTF-8, found a byte that is not at offset {}",
            error.valid_up_to()
        ))
    })
}

/// Parses a wire type. A wrong field is named by its path, as `messages[0].content`.
pub(crate) fn parse<T: DeserializeOwned>(body: &str) -> Result<T, ServeError> {
    serde_json::from_str(body).map_err(|error| {
        if error.classify() != Category::Data {
            return ServeError::malformed(format!("malformed JSON: {}", clipped(&error.to_string())));
        }
        // Only now is the path worth its cost.
        let deserializer = &mut serde_json::Deserializer::from_str(body);
        let path = match serde_path_to_error::deserialize::<_, T>(deserializer) {
            Ok(_) => String::new(),
            Err(error) => error.path().to_string(),
        };
        let detail = clipped(&error.to_string());
        match path.as_str() {
            "" | "." => ServeError::malformed(format!("expected a JSON object: {detail}")),
            _ => {
                let path = clipped(&path);
                let message = format!("`{path}`: {detail}");
                ServeError::Invalid { message, param: Some(path.into()), code: Some("invalid_type") }
            }
        }
    })
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(DETAIL_CHARS_MAX) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
