//! What can go wrong between a client's bytes and the engine, and its one mapping to HTTP.
//!
//! Owner: the HTTP task that met the error. Each variant says whose fault it is and, by its status, whether a retry
//! helps. Clients read OpenAI's `error.type` and `error.code` under vLLM's status codes. Internal causes are logged where
//! they are made and never shown to the client.

use crate::keys::Denied;
use crate::request::SubmitError;
use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde::Serialize;
use std::borrow::Cow;
use std::time::Duration;
use utoipa::ToSchema;

/// An error of one request. The text of each variant is what the client reads as `error.message`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeError {
    /// The client's fault, in the parameter that `param` names, if it is one parameter's.
    #[error("{message}")]
    Invalid { message: String, param: Option<Cow<'static, str>>, code: Option<&'static str> },
    #[error("no API key was given: expected the header `Authorization: Bearer KEY` or `x-api-key: KEY`")]
    MissingKey,
    #[error("the API key is not one of this server's")]
    WrongKey,
    #[error("the model `{asked}` does not exist: this server has {served}")]
    ModelNotFound { asked: String, served: String },
    #[error("there is no {method} {path}: see /openapi.json for what there is")]
    RouteNotFound { method: String, path: String },
    #[error("{path} does not take the method {method}")]
    MethodNotAllowed { method: String, path: String },
    #[error("the body is larger than the limit of {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("the body did not arrive within {} s", .limit.as_secs_f32())]
    BodyTimeout { limit: Duration },
    #[error("expected the content type application/json, found {found}")]
    WrongMediaType { found: String },
    /// A limit of the client's key.
    #[error("{denied}{}", again(*.denied))]
    RateLimited { denied: Denied },
    /// The server has too much to do; another replica may not.
    #[error("{why}: {} requests wait; try again in {:.1} s", .backoff.queue_depth, .backoff.seconds())]
    Overloaded { why: Overload, backoff: Backoff },
    #[error("the answer was not complete within the request's time limit")]
    DeadlinePassed,
    #[error("the same prompt made the model fail a short while ago; it is taken again in {:.1} s", .backoff.seconds())]
    Quarantined { backoff: Backoff },
    #[error("the prompt and the answer need more memory than this server has for one request")]
    TooLongForCache,
    #[error("the model is still loading")]
    Loading,
    #[error("the server is shutting down and takes no new requests")]
    Draining,
    #[error("the engine has stopped")]
    EngineStopped,
    #[error("the server shut down before the answer was complete")]
    Shutdown,
    #[error("the answer was given up because it was not read as fast as it was made")]
    SlowReader,
    #[error("the model failed on this request")]
    GenerationFailed,
    /// A broken promise of our own; the cause is in the log.
    #[error("internal error")]
    Internal,
}

/// What the server has too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overload {
    #[error("the queue of requests is full")]
    Queue,
    #[error("the queue of prompt tokens is full")]
    QueueTokens,
    #[error("the answer would come later than its time limit or than its class is promised")]
    Deadline,
}

/// When a refused request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// As predicted by the model of what steps cost.
    pub retry_in: Duration,
    /// Requests that wait.
    pub queue_depth: u32,
}

impl Backoff {
    fn seconds(self) -> f64 {
        self.retry_in.as_secs_f64()
    }
}

impl From<kvern_core::Backoff> for Backoff {
    fn from(backoff: kvern_core::Backoff) -> Self {
        Backoff { retry_in: Duration::from_micros(backoff.retry_in.0), queue_depth: backoff.queue_depth }
    }
}

/// When to come back, as the end of a message.
fn again(denied: Denied) -> String {
    denied.retry_in().map_or_else(String::new, |wait| format!("; try again in {:.3} s", wait.as_secs_f64()))
}

/// `{"error": {...}}`, the body of every error.
#[derive(Serialize, ToSchema)]
pub struct ErrorBody<'a> {
    pub error: ErrorDetail<'a>,
}

#[derive(Serialize, ToSchema)]
pub struct ErrorDetail<'a> {
    /// What was expected and what was found.
    pub message: Cow<'a, str>,
    /// OpenAI's kind of error, such as `invalid_request_error`.
    pub r#type: &'static str,
    /// The parameter at fault, such as `messages[0].content`.
    pub param: Option<&'a str>,
    /// A stable word for programs, such as `context_length_exceeded`.
    pub code: Option<&'static str>,
    /// Seconds after which the same request is expected to be taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_in: Option<f64>,
    /// Requests that wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_depth: Option<u32>,
}

/// A client that met a server that loads or drains may try again after this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl ServeError {
    /// A parameter with a value that it cannot take.
    pub fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        ServeError::Invalid { message: message.into(), param: Some(param.into()), code: Some("invalid_value") }
    }

    /// A parameter that must be given.
    pub fn missing(param: &'static str) -> Self {
        let message = format!("`{param}`: expected a value, found none");
        ServeError::Invalid { message, param: Some(param.into()), code: Some("missing_parameter") }
    }

    /// A parameter that this server knows and does not have.
    pub fn unsupported(param: impl Into<Cow<'static, str>>, why: &str) -> Self {
        let param = param.into();
        let message = format!("`{param}` is not supported{why}");
        ServeError::Invalid { message, param: Some(param), code: Some("unsupported_parameter") }
    }

    /// A body that is not the JSON that was expected.
    pub fn malformed(message: impl Into<String>) -> Self {
        ServeError::Invalid { message: message.into(), param: None, code: Some("invalid_json") }
    }

    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            ServeError::Invalid { .. } | ServeError::TooLongForCache => StatusCode::BAD_REQUEST,
            ServeError::MissingKey | ServeError::WrongKey => StatusCode::UNAUTHORIZED,
            ServeError::ModelNotFound { .. } | ServeError::RouteNotFound { .. } => StatusCode::NOT_FOUND,
            ServeError::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            ServeError::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            ServeError::BodyTimeout { .. } => StatusCode::REQUEST_TIMEOUT,
            ServeError::WrongMediaType { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            ServeError::SlowReader | ServeError::RateLimited { .. } => StatusCode::TOO_MANY_REQUESTS,
            ServeError::Overloaded { .. }
            | ServeError::Loading
            | ServeError::Draining
            | ServeError::EngineStopped
            | ServeError::Shutdown => StatusCode::SERVICE_UNAVAILABLE,
            ServeError::DeadlinePassed => StatusCode::GATEWAY_TIMEOUT,
            ServeError::Quarantined { .. } | ServeError::GenerationFailed | ServeError::Internal => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }

    /// OpenAI's `error.type`.
    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// `error.code`.
    fn code(&self) -> Option<&'static str> {
        match self {
            ServeError::Invalid { code, .. } => *code,
            ServeError::MissingKey | ServeError::WrongKey => Some("invalid_api_key"),
            ServeError::ModelNotFound { .. } => Some("model_not_found"),
            ServeError::RouteNotFound { .. } => Some("not_found"),
            ServeError::MethodNotAllowed { .. } => Some("method_not_allowed"),
            ServeError::BodyTooLarge { .. } => Some("body_too_large"),
            ServeError::BodyTimeout { .. } => Some("body_timeout"),
            ServeError::WrongMediaType { .. } => Some("unsupported_media_type"),
            ServeError::RateLimited { denied: Denied::Day { .. } } => Some("insufficient_quota"),
            ServeError::RateLimited { .. } => Some("rate_limit_exceeded"),
            ServeError::Overloaded { why: Overload::Queue | Overload::QueueTokens, .. } => Some("queue_full"),
            ServeError::Overloaded { why: Overload::Deadline, .. } => Some("would_be_late"),
            ServeError::DeadlinePassed => Some("deadline_exceeded"),
            ServeError::Quarantined { .. } => Some("quarantined"),
            ServeError::TooLongForCache => Some("context_length_exceeded"),
            ServeError::Loading => Some("model_loading"),
            ServeError::Draining | ServeError::Shutdown => Some("shutting_down"),
            ServeError::EngineStopped => Some("engine_stopped"),
            ServeError::SlowReader => Some("slow_reader"),
            ServeError::GenerationFailed | ServeError::Internal => Some("internal_error"),
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            ServeError::Invalid { param, .. } => param.as_deref(),
            ServeError::ModelNotFound { .. } => Some("model"),
            _ => None,
        }
    }

    /// The body that says this error, also the data of an error frame inside a stream.
    #[must_use]
    pub fn body(&self) -> ErrorBody<'_> {
        let backoff = self.backoff();
        ErrorBody {
            error: ErrorDetail {
                message: Cow::Owned(self.to_string()),
                r#type: self.kind(),
                param: self.param(),
                code: self.code(),
                // Milliseconds are all that a prediction is good for.
                retry_in: self.predicted().map(|wait| (wait.as_secs_f64() * 1e3).ceil() / 1e3),
                queue_depth: backoff.map(|backoff| backoff.queue_depth),
            },
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        match self {
            ServeError::Overloaded { backoff, .. } | ServeError::Quarantined { backoff } => Some(*backoff),
            _ => None,
        }
    }

    /// When the same request may succeed, as far as it can be computed.
    fn predicted(&self) -> Option<Duration> {
        match self {
            ServeError::RateLimited { denied } => denied.retry_in(),
            _ => self.backoff().map(|backoff| backoff.retry_in),
        }
    }

    /// When the same request may succeed, on this replica or on another.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            ServeError::Loading | ServeError::Draining => Some(RETRY_AFTER),
            _ => self.predicted(),
        }
    }

    /// The whole HTTP answer: the one mapping of errors to HTTP.
    #[must_use]
    pub fn into_http(self) -> Response<Body> {
        let status = self.status();
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), error = %self, "request failed");
        } else {
            tracing::debug!(status = status.as_u16(), error = %self, "request refused");
        }
        let body = serde_json::to_vec(&self.body()).expect("strings always serialize");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(after) = self.retry_after() {
            // Whole seconds are what HTTP knows; the SDKs of OpenAI read the milliseconds first.
            let ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX).max(1);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
            headers.insert("retry-after-ms", HeaderValue::from(ms));
        }
        if matches!(self, ServeError::DeadlinePassed | ServeError::RateLimited { denied: Denied::Day { .. } }) {
            // Whoever set the time limit has no more time, and a budget is not there again before midnight.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // After these the connection still holds, or may still send, bytes that nobody will read.
        if matches!(self, ServeError::BodyTooLarge { .. } | ServeError::BodyTimeout { .. } | ServeError::Draining) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl axum::response::IntoResponse for ServeError {
    fn into_response(self) -> Response<Body> {
        self.into_http()
    }
}

impl From<SubmitError> for ServeError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { waiting, retry_in, .. } => {
                ServeError::Overloaded { why: Overload::Queue, backoff: Backoff { retry_in, queue_depth: waiting } }
            }
            SubmitError::Draining => ServeError::Draining,
            SubmitError::Stopped => ServeError::EngineStopped,
        }
    }
}
