//! The HTTP front end: bytes to validated requests, token events to answers.
//!
//! Owner: one task per connection. Nothing outside this module knows JSON or HTTP; nothing in it knows the scheduler.
//!
//! ```text
//! listener -> router -> edge (request id, drain) -> auth (key, its limits) -> limits -> handler -> admission -> Engine::submit
//!                                                                                                  |
//! socket <- hyper <- AnswerStream (SSE) or JSON <- Generation (detokenizer, stop strings) <- TokenRx
//! ```
//!
//! A streamed answer is a body that polls its token channels itself: no task and no second channel stand between the
//! engine and the socket, and dropping the body drops the channels, which is how the engine learns that a client left.

mod auth;
mod drain;
mod edge;
mod generation;
mod handlers;
mod health;
mod limits;
mod listener;
mod logprobs;
mod openapi;
mod rate_headers;
mod sse;
mod state;
pub mod types;

pub use crate::keys::ApiKeys;
pub use limits::HttpLimits;
pub use listener::serve;
pub use openapi::document as openapi_document;
pub use state::{AppState, ServedModel};

pub(crate) use edge::random_u128;

use crate::error::ServeError;
use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use std::sync::Arc;

/// All routes over one state.
pub fn router(state: Arc<AppState>) -> Router {
    let guard = from_fn_with_state(Arc::clone(&state), auth::require_key);
    let generating = Router::new()
        .route("/v1/chat/completions", post(handlers::chat::chat))
        .route("/v1/completions", post(handlers::completions::completions))
        .route_layer(guard.clone())
        .route_layer(from_fn_with_state(Arc::clone(&state), rate_headers::tell_pressure));
    let metrics = Router::new().route("/metrics", get(health::metrics));
    let metrics = if state.keys.guards_metrics() { metrics.route_layer(guard.clone()) } else { metrics };
    let guarded = Router::new()
        .route("/v1/models", get(handlers::models::list))
        .route("/v1/models/{*id}", get(handlers::models::one))
        .route("/tokenize", post(handlers::tokenize::tokenize))
        .route("/detokenize", post(handlers::tokenize::detokenize))
        .route("/openapi.json", get(openapi::serve_document))
        .route_layer(guard);
    let open = Router::new()
        .route("/health", get(health::health))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/ping", get(health::health).post(health::health))
        .route("/version", get(health::version));
    generating
        .merge(guarded)
        .merge(metrics)
        .merge(open)
        .fallback(route_not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(from_fn_with_state(Arc::clone(&state), edge::edge))
        .with_state(state)
}

/// A path as an error message may repeat it.
fn shown_path(uri: &Uri) -> String {
    uri.path().chars().take(128).collect()
}

async fn route_not_found(method: Method, uri: Uri) -> ServeError {
    ServeError::RouteNotFound { method: method.to_string(), path: shown_path(&uri) }
}

async fn method_not_allowed(method: Method, uri: Uri) -> ServeError {
    ServeError::MethodNotAllowed { method: method.to_string(), path: shown_path(&uri) }
}
