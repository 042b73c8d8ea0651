//! Probes, version and metrics: open to all (but for metrics with `--guard-metrics`), and answered in every state of the server.
//!
//! | state | `/health`, `/ping` | `/health/ready` | `/health/live` |
//! |---|---|---|---|
//! | loading | 503 | 503 | 200 |
//! | serving | 200 | 200 | 200 |
//! | draining | 200 | 503 | 200 |
//! | engine stuck or dead | 503 | 503 | 503 |
//!
//! `/health` stays 200 while draining because charts use it for liveness, and a draining pod must not be killed.

use super::state::AppState;
use crate::error::ServeError;
use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

#[derive(Serialize, ToSchema)]
pub(crate) struct Health {
    /// `ok`
    status: &'static str,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct Version {
    version: &'static str,
}

type HealthResult = Result<Json<Health>, ServeError>;

const OK: HealthResult = Ok(Json(Health { status: "ok" }));

/// Whether the model is loaded and the engine makes progress.
#[utoipa::path(get, path = "/health", tag = "operations", responses(
    (status = 200, body = Health), (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn health(State(state): State<Arc<AppState>>) -> HealthResult {
    if !state.model()?.engine.health().live {
        return Err(ServeError::EngineStopped);
    }
    OK
}

/// Whether the process should go on living: true while loading and draining.
#[utoipa::path(get, path = "/health/live", tag = "operations", responses(
    (status = 200, body = Health), (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn live(State(state): State<Arc<AppState>>) -> HealthResult {
    if state.published().is_some_and(|model| !model.engine.health().live) {
        return Err(ServeError::EngineStopped);
    }
    OK
}

/// Whether new work is taken.
#[utoipa::path(get, path = "/health/ready", tag = "operations", responses(
    (status = 200, body = Health), (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn ready(State(state): State<Arc<AppState>>) -> HealthResult {
    if !state.model_for_work()?.engine.health().live {
        return Err(ServeError::EngineStopped);
    }
    OK
}

/// The server's version.
#[utoipa::path(get, path = "/version", tag = "operations", responses((status = 200, body = Version)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Metrics in Prometheus' text format; empty until the model is loaded. Guarded by keys where the operator says so.
#[utoipa::path(get, path = "/metrics", tag = "operations", responses(
    (status = 200, body = String, content_type = "text/plain"), (status = 401, body = crate::error::ErrorBody)))]
pub(crate) async fn metrics(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    let text = state.published().map(|model| model.engine.metrics_text()).unwrap_or_default();
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}
