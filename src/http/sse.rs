//! Answers as server-sent events.
//!
//! Owner: hyper, as the body of one response. The body polls its token channels itself and writes what is there into one
//! buffer: one frame of the socket may carry many events. It holds at most [`FRAME_BYTES`] and an event more; while the
//! socket is full it is not polled, the channels fill up, and the engine gives the request up.
//!
//! Events are `data: JSON`, an empty line after each, the last `data: [DONE]`. There are no `id:` or `retry:` lines and no
//! empty events, which break clients; a keep-alive is one comment line without an empty line after it.

use super::generation::{Choice, Generation};
use super::types::common::Usage;
use crate::admission::StreamUsage;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, Response, header};
use bytes::{BufMut, BytesMut};
use http_body::Frame;
use serde::Serialize;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// A frame is sent once it holds this much, even if more tokens wait.
const FRAME_BYTES: usize = 16 << 10;
const KEEP_ALIVE: &[u8] = b": keep-alive\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// Which JSON stands for what happens: the chat or the completion API's.
pub(crate) trait Events: Send + Unpin + 'static {
    /// Before any token, for each choice.
    fn open(&mut self, choice: &mut Choice, out: &mut EventBuffer);
    /// New text, log-probabilities or the finish of a choice, whatever it holds; takes them.
    fn progress(&mut self, choice: &mut Choice, out: &mut EventBuffer);
    /// The usage of the whole request, after all choices.
    fn usage(&mut self, usage: Usage, out: &mut EventBuffer);
}

/// Collects events for one frame.
pub(crate) struct EventBuffer(BytesMut);

impl EventBuffer {
    pub(crate) fn event(&mut self, data: &impl Serialize) {
        self.0.put_slice(b"data: ");
        serde_json::to_writer((&mut self.0).writer(), data).expect("wire types serialize, and memory takes them");
        self.0.put_slice(b"\n\n");
    }
}

/// The body of a streamed answer.
pub(crate) struct AnswerStream<E> {
    events: E,
    /// `None` once the answer has ended; what is left in the buffer goes out.
    generation: Option<Generation>,
    usage: StreamUsage,
    buffer: EventBuffer,
    keep_alive: Interval,
    /// Whether anything was sent since the last tick of `keep_alive`.
    sent_since_tick: bool,
}

impl<E: Events> AnswerStream<E> {
    /// The whole response. `silence` is the least time without events after which a comment is sent.
    pub(crate) fn respond(
        mut generation: Generation,
        mut events: E,
        usage: StreamUsage,
        silence: Duration,
    ) -> Response<Body> {
        let mut buffer = EventBuffer(BytesMut::new());
        for choice in generation.choices_mut() {
            events.open(choice, &mut buffer);
        }
        let mut keep_alive = interval_at(Instant::now() + silence, silence);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let generation = Some(generation);
        let stream = AnswerStream { events, generation, usage, buffer, keep_alive, sent_since_tick: false };
        let mut response = Response::new(Body::new(stream));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    /// Writes events until the frame is full, nothing more is there, or the answer has ended.
    fn fill(&mut self, cx: &mut Context<'_>) {
        while let Some(generation) = &mut self.generation
            && self.buffer.0.len() < FRAME_BYTES
        {
            match generation.poll_next(cx) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok(choice))) => self.events.progress(choice, &mut self.buffer),
                Poll::Ready(Some(Err(error))) => {
                    tracing::warn!(%error, "a streamed answer failed");
                    self.buffer.event(&error.body());
                    self.end();
                }
                Poll::Ready(None) => {
                    let usage = generation.usage();
                    if self.usage != StreamUsage::Never {
                        self.events.usage(usage, &mut self.buffer);
                    }
                    self.end();
                }
            }
        }
    }

    fn end(&mut self) {
        self.buffer.0.put_slice(DONE);
        self.generation = None;
    }
}

impl<E: Events> HttpBody for AnswerStream<E> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        this.fill(cx);
        if this.buffer.0.is_empty() {
            if this.generation.is_none() {
                return Poll::Ready(None);
            }
            // The tick that finds the stream silent; one that does not is consumed, so that the next one wakes.
            while this.keep_alive.poll_tick(cx).is_ready() {
                if !std::mem::take(&mut this.sent_since_tick) {
                    this.buffer.0.put_slice(KEEP_ALIVE);
                    break;
                }
            }
            if this.buffer.0.is_empty() {
                return Poll::Pending;
            }
        } else {
            this.sent_since_tick = true;
        }
        Poll::Ready(Some(Ok(Frame::data(this.buffer.0.split().freeze()))))
    }

    fn is_end_stream(&self) -> bool {
        self.generation.is_none() && self.buffer.0.is_empty()
    }
}
