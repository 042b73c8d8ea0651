//! `POST /v1/chat/completions`.

use super::Heading;
use crate::admission::{self, Endpoint, StreamUsage};
use crate::error::ServeError;
use crate::http::edge::RequestName;
use crate::http::generation::{Choice, Generation};
use crate::http::sse::{AnswerStream, EventBuffer, Events, PreparedEvent};
use crate::http::types::chat::{
    AssistantMessage, ChatChoice, ChatChunk, ChatLogprobs, ChatRequest, ChatResponse, ChunkChoice, Delta,
};
use crate::http::types::common::Usage;
use crate::http::{AppState, ServedModel};
use crate::keys::Caller;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use std::sync::Arc;

/// Answers a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "As `timeout`, in milliseconds; the shorter one counts")),
    responses(
    (status = 200, description = "The answer; as server-sent events, each a ChatChunk, when `stream` is true", content(
        (ChatResponse = "application/json"), (ChatChunk = "text/event-stream"))),
    (status = 400, body = crate::error::ErrorBody), (status = 401, body = crate::error::ErrorBody),
    (status = 404, body = crate::error::ErrorBody), (status = 413, body = crate::error::ErrorBody),
    (status = 429, body = crate::error::ErrorBody), (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn chat(
    State(state): State<Arc<AppState>>,
    Extension(name): Extension<RequestName>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ServeError> {
    let model = Arc::clone(state.model_for_work()?);
    let time_limit = admission::header_timeout(request.headers())?;
    let (wire, bytes) = super::read::<ChatRequest>(&state, Endpoint::Chat, request).await?;
    let heading = Heading::new("chatcmpl", &name.0, model.resolve(wire.model.as_deref())?, &model.fingerprint);
    let admitted = admission::chat(&state, &model, wire, bytes).await?.within(time_limit);
    let stream = admitted.stream;
    let logprobs = admitted.rules.logprobs;
    let generation = super::submit(&state, &model, &caller, admitted, &heading.id).await?;
    match stream {
        None => whole(heading, &model, generation, logprobs).await,
        Some(usage) => {
            let events = ChatEvents { heading, model, logprobs, usage, prepared: Vec::new() };
            Ok(AnswerStream::respond(generation, events, usage, state.limits.keep_alive))
        }
    }
}

async fn whole(
    heading: Heading,
    model: &ServedModel,
    mut generation: Generation,
    logprobs: bool,
) -> Result<Response, ServeError> {
    let mut collected: Vec<ChatLogprobs> = generation.choices_mut().iter().map(|_| ChatLogprobs::default()).collect();
    generation
        .run(|choice| choice.logprobs.take_chat(&model.text.tokenizer, &mut collected[choice.index as usize]))
        .await?;
    let usage = generation.usage();
    let mut choices = Vec::with_capacity(collected.len());
    for (choice, content) in generation.choices_mut().iter_mut().zip(collected) {
        let finish = choice.finish.take().expect("a choice that ended has its finish");
        choices.push(ChatChoice {
            index: choice.index,
            message: AssistantMessage { role: "assistant", content: std::mem::take(&mut choice.text), refusal: None },
            logprobs: logprobs.then_some(content),
            finish_reason: finish.reason,
            stop_reason: finish.stop,
        });
    }
    let response = ChatResponse {
        id: &heading.id,
        object: "chat.completion",
        created: heading.created,
        model: &heading.model,
        choices,
        usage,
        system_fingerprint: &heading.fingerprint,
    };
    Ok(Json(response).into_response())
}

/// Chat chunks.
struct ChatEvents {
    heading: Heading,
    model: Arc<ServedModel>,
    logprobs: bool,
    usage: StreamUsage,
    /// For each choice the event that carries text and nothing else.
    prepared: Vec<PreparedEvent>,
}

impl ChatEvents {
    fn chunk<'a>(&'a self, choices: Vec<ChunkChoice<'a>>, usage: Option<Usage>) -> ChatChunk<'a> {
        ChatChunk {
            id: &self.heading.id,
            object: "chat.completion.chunk",
            created: self.heading.created,
            model: &self.heading.model,
            choices,
            system_fingerprint: &self.heading.fingerprint,
            usage: (self.usage != StreamUsage::Never).then_some(usage),
        }
    }

    fn send(&self, choices: Vec<ChunkChoice<'_>>, usage: Option<Usage>, out: &mut EventBuffer) {
        out.event(&self.chunk(choices, usage));
    }

    /// A choice's usage so far, in streams that carry it everywhere.
    fn running_usage(&self, choice: &Choice) -> Option<Usage> {
        (self.usage == StreamUsage::Always).then(|| choice.usage())
    }
}

impl Events for ChatEvents {
    fn open(&mut self, choice: &mut Choice, out: &mut EventBuffer) {
        let delta = |role| Delta { role, content: Some("") };
        self.send(vec![saying(choice.index, delta(Some("assistant")))], self.running_usage(choice), out);
        let sample = self.chunk(vec![saying(choice.index, delta(None))], None);
        let prepared = PreparedEvent::new(&sample, "content");
        self.prepared.push(prepared);
    }

    fn progress(&mut self, choice: &mut Choice, out: &mut EventBuffer) {
        let usage = self.running_usage(choice);
        if self.logprobs && !choice.logprobs.is_empty() {
            let mut content = ChatLogprobs::default();
            choice.logprobs.take_chat(&self.model.text.tokenizer, &mut content);
            let delta = Delta { role: None, content: Some(&choice.text) };
            let said = ChunkChoice { logprobs: Some(content), ..saying(choice.index, delta) };
            self.send(vec![said], usage, out);
        } else if usage.is_some() && !choice.text.is_empty() {
            let delta = Delta { role: None, content: Some(&choice.text) };
            self.send(vec![saying(choice.index, delta)], usage, out);
        } else if !choice.text.is_empty() {
            out.prepared(&self.prepared[choice.index as usize], &choice.text);
        }
        choice.text.clear();
        if let Some(finish) = choice.finish.take() {
            let last = ChunkChoice {
                finish_reason: Some(finish.reason),
                stop_reason: finish.stop,
                ..saying(choice.index, Delta::default())
            };
            self.send(vec![last], usage, out);
        }
    }

    fn usage(&mut self, usage: Usage, out: &mut EventBuffer) {
        self.send(Vec::new(), Some(usage), out);
    }
}

/// A choice's chunk with nothing but its delta.
fn saying(index: u32, delta: Delta<'_>) -> ChunkChoice<'_> {
    ChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None }
}
