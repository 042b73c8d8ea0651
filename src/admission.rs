//! Wire to request, or a 4xx now: parse, don't validate.
//!
//! Owner: the HTTP task of one request. What leaves here is complete: every number in its range, every token in the
//! vocabulary, prompt and answer within the context. Large texts are rendered and tokenized on blocking threads, a
//! bounded number at a time, so that they delay nobody's stream. O(bytes of the body).

mod messages;
mod prompt;
mod sampling;
mod terms;
mod unsupported;

pub(crate) use messages::ChatInput;
pub(crate) use prompt::{check_tokens, encode_chat, encode_text, off_runtime};
pub(crate) use sampling::REPETITION_PENALTY_MAX;
pub(crate) use terms::header_timeout;
pub(crate) use unsupported::{Endpoint, refuse_unsupported};

use crate::error::ServeError;
use crate::http::types::chat::ChatRequest;
use crate::http::types::completion::CompletionRequest;
use crate::http::{AppState, ServedModel};
use crate::keys::Asked;
use crate::request::SamplingParams;
use crate::text::StopMatcher;
use kvern_core::TokenId;
use std::sync::Arc;
use std::time::Duration;

/// Most likeliest tokens that an answer may show per token, as of OpenAI's API.
pub(crate) const LOGPROBS_MAX: usize = 20;

/// What a request that names no value gets: the model's `generation_config.json` over vLLM's defaults. Each value must be
/// in the range that a request's would have to be in.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationDefaults {
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    pub min_p: f32,
    pub repetition_penalty: f32,
}

impl Default for GenerationDefaults {
    fn default() -> Self {
        GenerationDefaults { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// A request that can be submitted.
#[derive(Clone, Debug)]
pub(crate) struct Admitted {
    /// At least one; times `n` at most `HttpLimits::choices_max`.
    pub(crate) prompts: Vec<AdmittedPrompt>,
    /// The seed is the first choice's; choice `i` of a prompt adds `i`.
    pub(crate) sampling: SamplingParams,
    /// Choices per prompt, at least 1.
    pub(crate) n: u32,
    pub(crate) rules: OutputRules,
    /// `None`: answer in one piece.
    pub(crate) stream: Option<StreamUsage>,
    pub(crate) asked: Asked,
}

impl Admitted {
    /// With a time limit from elsewhere; the shorter one counts.
    pub(crate) fn within(mut self, limit: Option<Duration>) -> Self {
        self.asked.timeout = self.asked.timeout.into_iter().chain(limit).min();
        self
    }

    /// Most tokens that all answers may take: each prompt once, each answer in full.
    pub(crate) fn tokens_max(&self) -> u64 {
        let of =
            |prompt: &AdmittedPrompt| prompt.tokens.len() as u64 + u64::from(self.n) * u64::from(prompt.max_new_tokens);
        self.prompts.iter().map(of).sum()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct AdmittedPrompt {
    /// At least one.
    pub(crate) tokens: Vec<TokenId>,
    /// At least 1; prompt and answer fit the context.
    pub(crate) max_new_tokens: u32,
    /// Text that the answer starts with.
    pub(crate) echo: Option<String>,
    /// So many of its first tokens the operator made public.
    pub(crate) shared_tokens: u32,
}

/// How tokens become the answer's text.
#[derive(Clone, Debug)]
pub(crate) struct OutputRules {
    pub(crate) stops: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special_tokens: bool,
    /// Stop strings count only after this many tokens.
    pub(crate) min_tokens: u32,
    /// Log-probabilities were asked for.
    pub(crate) logprobs: bool,
    /// Sorted: all tokens that end an answer.
    stop_tokens: Vec<TokenId>,
    /// Those of them that the client named.
    requested_stop_tokens: Vec<TokenId>,
    matcher: Option<StopMatcher>,
}

impl OutputRules {
    pub(crate) fn ends_at(&self, token: TokenId) -> bool {
        self.stop_tokens.binary_search(&token).is_ok()
    }

    pub(crate) fn requested(&self, token: TokenId) -> bool {
        self.requested_stop_tokens.contains(&token)
    }

    /// A matcher for one answer; `None` when there is no stop string.
    pub(crate) fn stop_matcher(&self) -> Option<StopMatcher> {
        self.matcher.clone()
    }
}

/// Which chunks of a stream carry the usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    Never,
    /// One chunk more, at the end.
    AtEnd,
    /// Every chunk, and one more at the end.
    Always,
}

/// Completions end after this many tokens unless told otherwise, as OpenAI's and vLLM's do.
const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// Admits a chat request. `body_bytes` is the size of its JSON.
pub(crate) async fn chat(
    state: &AppState,
    model: &Arc<ServedModel>,
    mut request: ChatRequest,
    body_bytes: usize,
) -> Result<Admitted, ServeError> {
    let fields = request.take_generation();
    let logprobs = sampling::chat_logprobs(request.logprobs, request.top_logprobs)?;
    let (max_name, max_given) = match (request.max_completion_tokens, request.max_tokens) {
        (Some(given), _) => ("max_completion_tokens", Some(given)),
        (None, given) => ("max_tokens", given),
    };
    let asked = sampling::token_count(max_name, max_given)?;
    let common = sampling::admit(fields, logprobs, model, state.limits.choices_max)?;
    let input = ChatInput::new(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
        request.reasoning_effort,
    )?;
    let shared = Arc::clone(model);
    let tokens = off_runtime(state, body_bytes, move || encode_chat(&shared, &input, false)).await??;
    let max_new_tokens = Budget { model, prompt: "messages", answer: max_name }.answer(tokens.len(), asked, None)?;
    let shared_tokens = state.keys.shared_tokens(&tokens);
    common.with_prompts(vec![AdmittedPrompt { tokens, max_new_tokens, echo: None, shared_tokens }], &state.limits)
}

/// Admits a completion request. `body_bytes` is the size of its JSON.
pub(crate) async fn completion(
    state: &AppState,
    model: &Arc<ServedModel>,
    mut request: CompletionRequest,
    body_bytes: usize,
) -> Result<Admitted, ServeError> {
    let fields = request.take_generation();
    let logprobs = sampling::completion_logprobs(request.logprobs)?;
    let asked = sampling::token_count("max_tokens", request.max_tokens)?;
    let echo = request.echo.unwrap_or(false);
    if echo && logprobs.is_some() {
        return Err(ServeError::unsupported("echo", " together with `logprobs`: the prompt has no log-probabilities"));
    }
    let common = sampling::admit(fields, logprobs, model, state.limits.choices_max)?;
    let prompt = request.prompt.ok_or_else(|| ServeError::missing("prompt"))?;
    let add_special = request.add_special_tokens.unwrap_or(true);
    let shared = Arc::clone(model);
    let choices_max = state.limits.choices_max;
    let encoded =
        off_runtime(state, body_bytes, move || prompt::encode_prompts(&shared, prompt, add_special, echo, choices_max));
    let budget = Budget { model, prompt: "prompt", answer: "max_tokens" };
    let mut prompts = Vec::new();
    for (tokens, echo) in encoded.await?? {
        let max_new_tokens = budget.answer(tokens.len(), asked, Some(COMPLETION_TOKENS_DEFAULT))?;
        let shared_tokens = state.keys.shared_tokens(&tokens);
        prompts.push(AdmittedPrompt { tokens, max_new_tokens, echo, shared_tokens });
    }
    common.with_prompts(prompts, &state.limits)
}

/// What the context leaves for an answer.
struct Budget<'a> {
    model: &'a ServedModel,
    /// The parameters to blame.
    prompt: &'static str,
    answer: &'static str,
}

impl Budget<'_> {
    fn answer(&self, prompt: usize, asked: Option<u32>, default: Option<u32>) -> Result<u32, ServeError> {
        let context = self.model.context_tokens_max;
        if prompt == 0 {
            return Err(ServeError::invalid(
                self.prompt,
                format!("`{}`: expected at least one token, found none", self.prompt),
            ));
        }
        let Some(room) =
            u32::try_from(prompt).ok().and_then(|prompt| context.checked_sub(prompt)).filter(|&room| room > 0)
        else {
            return Err(prompt::too_long(self.prompt, context, prompt, ""));
        };
        match asked {
            Some(asked) if asked > room => Err(ServeError::Invalid {
                message: format!(
                    "the model's context is {context} tokens, but {} were asked for: {prompt} in `{}` and {asked} by `{}`",
                    prompt as u64 + u64::from(asked),
                    self.prompt,
                    self.answer
                ),
                param: Some(self.answer.into()),
                code: Some("context_length_exceeded"),
            }),
            Some(asked) => Ok(asked),
            None => Ok(default.map_or(room, |default| default.min(room))),
        }
    }
}
