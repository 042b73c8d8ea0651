//! `POST /v1/completions`.

use super::Heading;
use crate::admission::{self, Endpoint, StreamUsage};
use crate::error::ServeError;
use crate::http::edge::RequestName;
use crate::http::generation::{Choice, Finish, Generation};
use crate::http::sse::{AnswerStream, EventBuffer, Events, PreparedEvent};
use crate::http::types::common::Usage;
use crate::http::types::completion::{CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse};
use crate::http::{AppState, ServedModel};
use crate::keys::Caller;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use std::sync::Arc;

/// Continues one or more prompts.
#[utoipa::path(post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest,
    params(("x-request-timeout-ms" = Option<u64>, Header, description = "As `timeout`, in milliseconds; the shorter one counts")),
    responses(
    (status = 200, description = "The answer; as server-sent events of the same shape when `stream` is true", content(
        (CompletionResponse = "application/json"), (CompletionResponse = "text/event-stream"))),
    (status = 400, body = crate::error::ErrorBody), (status = 401, body = crate::error::ErrorBody),
    (status = 404, body = crate::error::ErrorBody), (status = 413, body = crate::error::ErrorBody),
    (status = 429, body = crate::error::ErrorBody), (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn completions(
    State(state): State<Arc<AppState>>,
    Extension(name): Extension<RequestName>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ServeError> {
    let model = Arc::clone(state.model_for_work()?);
    let time_limit = admission::header_timeout(request.headers())?;
    let (wire, bytes) = super::read::<CompletionRequest>(&state, Endpoint::Completion, request).await?;
    let heading = Heading::new("cmpl", &name.0, model.resolve(wire.model.as_deref())?, &model.fingerprint);
    let admitted = admission::completion(&state, &model, wire, bytes).await?.within(time_limit);
    let stream = admitted.stream;
    let logprobs = admitted.rules.logprobs;
    let generation = super::submit(&state, &model, &caller, admitted, &heading.id).await?;
    match stream {
        None => whole(heading, &model, generation, logprobs).await,
        Some(usage) => {
            let events = CompletionEvents { heading, model, logprobs, usage, prepared: Vec::new() };
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
    let mut collected: Vec<CompletionLogprobs> =
        generation.choices_mut().iter().map(|_| CompletionLogprobs::default()).collect();
    generation
        .run(|choice| choice.logprobs.take_completion(&model.text.tokenizer, &mut collected[choice.index as usize]))
        .await?;
    let usage = generation.usage();
    let mut choices = Vec::with_capacity(collected.len());
    for (choice, lists) in generation.choices_mut().iter_mut().zip(collected) {
        let finish = choice.finish.take().expect("a choice that ended has its finish");
        choices.push(CompletionChoice {
            index: choice.index,
            text: &choice.text,
            logprobs: logprobs.then_some(lists),
            finish_reason: Some(finish.reason),
            stop_reason: finish.stop,
        });
    }
    Ok(Json(response(&heading, choices, Some(Some(usage)))).into_response())
}

fn response<'a>(
    heading: &'a Heading,
    choices: Vec<CompletionChoice<'a>>,
    usage: Option<Option<Usage>>,
) -> CompletionResponse<'a> {
    CompletionResponse {
        id: &heading.id,
        object: "text_completion",
        created: heading.created,
        model: &heading.model,
        choices,
        system_fingerprint: &heading.fingerprint,
        usage,
    }
}

/// Completion chunks.
struct CompletionEvents {
    heading: Heading,
    model: Arc<ServedModel>,
    logprobs: bool,
    usage: StreamUsage,
    /// For each choice the event that carries text and nothing else.
    prepared: Vec<PreparedEvent>,
}

impl CompletionEvents {
    fn chunk<'a>(&'a self, choices: Vec<CompletionChoice<'a>>, usage: Option<Usage>) -> CompletionResponse<'a> {
        response(&self.heading, choices, (self.usage != StreamUsage::Never).then_some(usage))
    }
}

impl Events for CompletionEvents {
    /// Says the prompt, if it is to be echoed.
    fn open(&mut self, choice: &mut Choice, out: &mut EventBuffer) {
        let index = choice.index;
        let empty = CompletionChoice { index, text: "", logprobs: None, finish_reason: None, stop_reason: None };
        let prepared = PreparedEvent::new(&self.chunk(vec![empty], None), "text");
        self.prepared.push(prepared);
        if !choice.text.is_empty() {
            self.progress(choice, out);
        }
    }

    fn progress(&mut self, choice: &mut Choice, out: &mut EventBuffer) {
        let usage = (self.usage == StreamUsage::Always).then(|| choice.usage());
        let logprobs = (self.logprobs && !choice.logprobs.is_empty()).then(|| {
            let mut lists = CompletionLogprobs::default();
            choice.logprobs.take_completion(&self.model.text.tokenizer, &mut lists);
            lists
        });
        if usage.is_none() && logprobs.is_none() && choice.finish.is_none() {
            out.prepared(&self.prepared[choice.index as usize], &choice.text);
        } else {
            let (finish_reason, stop_reason) = match choice.finish.take() {
                Some(Finish { reason, stop }) => (Some(reason), stop),
                None => (None, None),
            };
            let said =
                CompletionChoice { index: choice.index, text: &choice.text, logprobs, finish_reason, stop_reason };
            out.event(&self.chunk(vec![said], usage));
        }
        choice.text.clear();
    }

    fn usage(&mut self, usage: Usage, out: &mut EventBuffer) {
        out.event(&self.chunk(Vec::new(), Some(usage)));
    }
}
