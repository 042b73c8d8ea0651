//! One file per endpoint that does the server's work.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod models;
pub(crate) mod tokenize;

use super::generation::Generation;
use super::types::Object;
use super::{AppState, ServedModel, limits};
use crate::admission::{Admitted, Endpoint, refuse_unsupported};
use crate::error::ServeError;
use crate::keys::{Account, Caller};
use axum::extract::Request;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Reads and parses a request's body; also gives its size.
async fn read<T: DeserializeOwned>(
    state: &AppState,
    endpoint: Endpoint,
    request: Request,
) -> Result<(T, usize), ServeError> {
    let body = limits::read_json_body(request, &state.limits).await?;
    let text = limits::utf8(&body)?;
    refuse_unsupported(endpoint, text)?;
    let wire: Object<T> = limits::parse(text)?;
    Ok((wire.0, text.len()))
}

/// Submits what was admitted, on its caller's behalf and within its limits.
async fn submit(
    state: &AppState,
    model: &Arc<ServedModel>,
    caller: &Caller,
    admitted: Admitted,
    id: &Arc<str>,
) -> Result<Generation, ServeError> {
    let terms = state.keys.terms(caller, &admitted.asked);
    let reserve = |account: &Arc<_>| Account::reserve(account, admitted.tokens_max(), state.keys.now());
    let charge = caller.account.as_ref().map(reserve).transpose();
    let charge = charge.map_err(|denied| ServeError::RateLimited { denied })?;
    Generation::submit(Arc::clone(model), admitted, id, terms, charge).await
}

/// What every part of one answer repeats.
#[derive(Clone)]
struct Heading {
    /// `chatcmpl-` or `cmpl-` and the request's name.
    id: Arc<str>,
    model: Arc<str>,
    fingerprint: Arc<str>,
    /// Unix time in seconds.
    created: u64,
}

impl Heading {
    fn new(prefix: &str, name: &str, model: &str, fingerprint: &str) -> Self {
        Heading {
            id: Arc::from(format!("{prefix}-{name}")),
            model: Arc::from(model),
            fingerprint: Arc::from(fingerprint),
            created: unix_time(),
        }
    }
}

fn unix_time() -> u64 {
    // A clock before 1970 is no reason to fail.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
