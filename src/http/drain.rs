//! Counts answers in flight, so that a shutdown can wait for the last one.
//!
//! Owner: [`super::AppState`]; each answer holds an [`InFlight`] until its body is dropped.

use axum::body::{Body, Bytes, HttpBody};
use http_body::Frame;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use tokio::sync::Notify;

/// Whether the server drains, and what is still in flight.
#[derive(Default)]
pub(crate) struct Drain {
    started: AtomicBool,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    in_flight: AtomicUsize,
    idle: Notify,
}

/// One answer in flight.
pub(crate) struct InFlight(Arc<Shared>);

impl Drain {
    pub(crate) fn start(&self) {
        self.started.store(true, Ordering::SeqCst);
    }

    pub(crate) fn started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    pub(crate) fn enter(&self) -> InFlight {
        self.shared.in_flight.fetch_add(1, Ordering::SeqCst);
        InFlight(Arc::clone(&self.shared))
    }

    /// Waits until nothing is in flight.
    pub(crate) async fn idle(&self) {
        loop {
            let idle = self.shared.idle.notified();
            if self.shared.in_flight.load(Ordering::SeqCst) == 0 {
                return;
            }
            idle.await;
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

/// A body that holds something until it was sent or given up: what counts it as in flight, or a key's permit.
pub(crate) struct TrackedBody<G> {
    inner: Body,
    _guard: G,
}

impl<G: Send + Unpin + 'static> TrackedBody<G> {
    pub(crate) fn wrap(inner: Body, guard: G) -> Body {
        Body::new(TrackedBody { inner, _guard: guard })
    }
}

impl<G: Unpin> HttpBody for TrackedBody<G> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}
