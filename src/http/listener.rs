//! Accepts connections and serves HTTP/1.1 on each, within limits of number, size and time.
//!
//! Owner: the task that calls [`serve`]. One task per connection. A client can hold at most one connection's buffers: a
//! head of [`HttpLimits::head_bytes_max`] bytes in, and about as much out once its socket is full.

use super::limits::HttpLimits;
use super::state::AppState;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, timeout};

/// hyper's write buffer per connection; its minimum for the head is 8 KiB.
const BUFFER_BYTES_MIN: usize = 8 << 10;
/// Pause after a failed accept, which is most often a lack of file descriptors that only time cures.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long idle connections may take to notice the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How a connection's task learns that the server stops.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Nothing is in flight: finish what a connection is at and close it.
    Closing,
}

/// Serves `router` until `shutdown` resolves, then drains: new work is refused with 503 while answers in flight go on for at
/// most [`HttpLimits::drain_timeout`]. Returns whether they all ended in time; those that did not are cut off, which
/// cancels their requests.
pub async fn serve(listener: TcpListener, state: Arc<AppState>, shutdown: impl Future<Output = ()>) -> bool {
    let router = super::router(Arc::clone(&state));
    let (phase, _) = watch::channel(Phase::Serving);
    let slots = Arc::new(Semaphore::new(state.limits.connections_max));
    let mut connections = JoinSet::new();
    let end = async {
        shutdown.await;
        tracing::info!("draining: new requests are refused, running ones finish");
        state.drain.start();
        timeout(state.limits.drain_timeout, state.drain.idle()).await.is_ok()
    };
    let mut end = pin!(end);
    let drained = loop {
        let accept = async {
            let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
            (slot, listener.accept().await)
        };
        tokio::select! {
            drained = &mut end => break drained,
            Some(_) = connections.join_next() => {}
            (slot, accepted) = accept => match accepted {
                Ok((stream, _)) => {
                    let connection = connection(stream, router.clone(), state.limits.clone(), phase.subscribe());
                    connections.spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    };
    drop(listener);
    phase.send_replace(Phase::Closing);
    if drained {
        // Errors and stragglers end with the set.
        let all_closed = async { while connections.join_next().await.is_some() {} };
        let _ = timeout(CLOSE_TIMEOUT, all_closed).await;
    } else {
        tracing::warn!("the drain time is over: answers in flight are cut off");
    }
    connections.shutdown().await;
    drained
}

/// One connection from its first byte to its last.
async fn connection(stream: TcpStream, router: Router, limits: HttpLimits, mut phase: watch::Receiver<Phase>) {
    // Tokens are small and must not wait for an acknowledgement. A socket that cannot be set is about to fail anyway.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(WriteDeadline::new(stream, limits.write_timeout));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_header_size(limits.head_bytes_max)
        .max_buf_size(limits.head_bytes_max.max(BUFFER_BYTES_MIN))
        .serve_connection(io, TowerToHyperService::new(router));
    let mut served = pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = closing(&mut phase) => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended early");
    }
}

/// Resolves when the server closes its connections; also when it is gone.
async fn closing(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase == Phase::Closing).await;
}

/// A socket whose writes fail once it has taken no byte for `limit`: a reader that stopped reading must not hold its
/// buffers for ever.
struct WriteDeadline {
    stream: TcpStream,
    limit: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl WriteDeadline {
    fn new(stream: TcpStream, limit: Duration) -> Self {
        WriteDeadline { stream, limit, waiting: None }
    }

    fn check<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        ready!(waiting.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl AsyncRead for WriteDeadline {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WriteDeadline {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.check(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.check(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
