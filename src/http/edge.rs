//! What every request passes first and every answer last: its id, the count of answers in flight, the drain.

use super::drain::TrackedBody;
use super::state::AppState;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use std::fmt::Write;
use std::sync::Arc;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What logs and answers call a request: the caller's `X-Request-Id` if it is a plain short word, else 32 random hex digits.
#[derive(Clone, Debug)]
pub(crate) struct RequestName(pub(crate) Arc<str>);

/// Names the request, counts it as in flight until its body is gone, and closes connections while draining.
pub(crate) async fn edge(State(state): State<Arc<AppState>>, mut request: Request, next: Next) -> Response {
    let in_flight = state.drain.enter();
    let name = request_name(request.headers().get(X_REQUEST_ID));
    request.extensions_mut().insert(RequestName(Arc::clone(&name)));
    let mut response = next.run(request).await;
    let value = HeaderValue::from_str(&name).expect("request names are visible ASCII");
    response.headers_mut().insert(X_REQUEST_ID, value);
    if state.draining() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response.map(|body| TrackedBody::wrap(body, in_flight))
}

fn request_name(header: Option<&HeaderValue>) -> Arc<str> {
    let plain = |text: &&str| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
    };
    match header.and_then(|value| value.to_str().ok()).filter(plain) {
        Some(name) => Arc::from(name),
        None => Arc::from(hex(random_u128())),
    }
}

fn hex(number: u128) -> String {
    let mut text = String::with_capacity(32);
    write!(text, "{number:032x}").expect("writing to a String never fails");
    text
}

/// 128 random bits from the operating system.
pub(crate) fn random_u128() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    u128::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_ids_are_kept_and_others_replaced() {
        let long = "a".repeat(129);
        for (header, kept) in
            [("abc-1_2.3:4", true), ("", false), ("a b", false), ("a\"b", false), (long.as_str(), false)]
        {
            let value = HeaderValue::from_str(header).expect("a legal header");
            let name = request_name(Some(&value));
            assert_eq!(&*name == header, kept, "{header:?} became {name:?}");
            assert!(kept || name.len() == 32, "{name:?}");
        }
    }
}
