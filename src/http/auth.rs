//! Bearer keys on the endpoints that generate or tell about the model.

use super::state::AppState;
use crate::error::ServeError;
use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use std::fmt;
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// The keys that open the server; none means that it is open to all.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<String>);

impl ApiKeys {
    /// Empty keys are dropped: an unset variable must not become a key that everyone knows.
    #[must_use]
    pub fn new(keys: Vec<String>) -> Self {
        ApiKeys(keys.into_iter().filter(|key| !key.is_empty()).collect())
    }

    /// Compares with every key in full, so that time tells nothing about a key but its length.
    fn contains(&self, key: &[u8]) -> bool {
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.as_bytes().ct_eq(key));
        found.into()
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({} keys)", self.0.len())
    }
}

/// Lets a request pass that carries `Authorization: Bearer KEY` with a known key.
pub(crate) async fn require_key(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Result<Response, ServeError> {
    if !state.keys.0.is_empty() {
        let header = request.headers().get(AUTHORIZATION).ok_or(ServeError::MissingKey)?;
        let key = bearer(header.as_bytes()).ok_or(ServeError::MissingKey)?;
        if !state.keys.contains(key) {
            return Err(ServeError::WrongKey);
        }
    }
    Ok(next.run(request).await)
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

    #[test]
    fn only_whole_keys_open() {
        let keys = ApiKeys::new(vec!["one".into(), String::new(), "two".into()]);
        for (key, opens) in
            [("one", true), ("two", true), ("", false), ("on", false), ("onee", false), ("onetwo", false)]
        {
            assert_eq!(keys.contains(key.as_bytes()), opens, "{key:?}");
        }
    }
}
