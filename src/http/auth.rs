//! Keys on the endpoints that generate or tell about the model: who asks, and whether that key may ask now.

use super::drain::TrackedBody;
use super::rate_headers;
use super::state::AppState;
use crate::error::ServeError;
use crate::keys::{Caller, Keyring};
use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderName, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Lets a request pass that carries a known key, and gives it its [`Caller`]. Each `POST` counts against the key's limits of
/// requests, and as running until its answer's body has ended; every answer of a key with limits says what is left.
pub(crate) async fn require_key(State(state): State<Arc<AppState>>, mut request: Request, next: Next) -> Response {
    // A browser asks what it may ask before it sends a key.
    if request.method() == Method::OPTIONS {
        return next.run(request).await;
    }
    let caller = match identify(&state.keys, request.headers()) {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    let Some(account) = caller.account.clone() else {
        request.extensions_mut().insert(caller);
        return next.run(request).await;
    };
    let is_work = request.method() == Method::POST;
    let permit = is_work.then(|| account.enter(state.keys.now())).transpose();
    let (mut response, permit) = match permit {
        Ok(permit) => {
            request.extensions_mut().insert(caller);
            (next.run(request).await, permit)
        }
        Err(denied) => (ServeError::RateLimited { denied }.into_response(), None),
    };
    rate_headers::insert(response.headers_mut(), &account.standing(state.keys.now()));
    response.map(|body| TrackedBody::wrap(body, permit))
}

/// Whose key a request carries; anyone's, if the server is open.
fn identify(keys: &Keyring, headers: &HeaderMap) -> Result<Caller, ServeError> {
    if keys.is_open() {
        return Ok(keys.anyone());
    }
    let bearer = headers.get(AUTHORIZATION).and_then(|header| bearer(header.as_bytes()));
    let key = bearer.or_else(|| headers.get(X_API_KEY).map(|header| header.as_bytes().trim_ascii()));
    keys.find(key.ok_or(ServeError::MissingKey)?).ok_or(ServeError::WrongKey)
}

/// The key of a bearer header; the scheme's case does not matter (RFC 7235).
fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = header.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_headers() {
        let cases: &[(&str, Option<&str>)] = &[
            ("Bearer abc", Some("abc")),
            ("bearer abc ", Some("abc")),
            ("BEARER  abc", Some("abc")),
            ("Basic abc", None),
            ("Bearer", None),
            ("", None),
        ];
        for (header, key) in cases {
            assert_eq!(bearer(header.as_bytes()), key.map(str::as_bytes), "{header:?}");
        }
    }
}
