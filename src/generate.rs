//! `kvern generate "prompt"`: one answer on the terminal, streamed as it is made, by the same engine that serves.

use crate::config::GenerateConfig;
use crate::request::{Engine, Request, SamplingParams, Terms, TokenEvent};
use crate::runtime::Runtime;
use crate::text::{IncrementalDetokenizer, RenderInput, TemplateError, TextModel, TokenizerError};
use kvern_core::{FinishReason, TokenId, Usage};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Generated {
    pub reason: FinishReason,
    pub usage: Usage,
    pub time_to_first_token: Duration,
    pub total: Duration,
}

impl Generated {
    /// Tokens a second after the first one; `None` below two tokens.
    #[must_use]
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        let gaps = self.usage.completion_tokens.checked_sub(1).filter(|n| *n > 0)?;
        Some(f64::from(gaps) / (self.total - self.time_to_first_token).as_secs_f64())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    #[error("the prompt has {found} tokens and leaves no room for an answer within {limit}")]
    TooLong { found: usize, limit: u32 },
    #[error("the prompt is empty")]
    Empty,
    #[error(transparent)]
    Submit(#[from] crate::request::SubmitError),
    #[error("the engine ended before the answer did")]
    EngineStopped,
    #[error("could not write the answer: {0}")]
    Write(#[from] std::io::Error),
}

/// Why a prompt could not be made into tokens.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// The tokens of `prompt` as one user message, or as it stands when `raw` or the model has no chat template.
pub fn encode(text: &TextModel, prompt: &str, raw: bool) -> Result<Vec<TokenId>, PromptError> {
    match text.template.as_ref().filter(|_| !raw) {
        None => Ok(text.tokenizer.encode(prompt, true)?),
        Some(template) => {
            let messages = serde_json::json!([{ "role": "user", "content": prompt }]);
            Ok(text.tokenizer.encode(&template.render(&RenderInput::new(&messages))?, false)?)
        }
    }
}

/// Sampling as the command line asks for it; without a seed, a new one.
#[must_use]
pub fn sampling(wanted: &GenerateConfig, text: &TextModel) -> SamplingParams {
    SamplingParams {
        temperature: wanted.temperature,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: wanted.seed.unwrap_or_else(|| getrandom::u64().unwrap_or_default()),
        stop_tokens: text.stop_tokens.clone(),
        min_tokens: 0,
        logit_bias: Vec::new(),
        logprobs: None,
    }
}

/// Answers `prompt`, writing text to `out` as soon as it is certain. Ends at the model's stop tokens, at `max_tokens`, or
/// where the context is full.
pub fn generate(
    runtime: &Runtime,
    text: &Arc<TextModel>,
    prompt: Vec<TokenId>,
    sampling: SamplingParams,
    max_tokens: Option<u32>,
    out: &mut dyn Write,
) -> Result<Generated, GenerateError> {
    if prompt.is_empty() {
        return Err(GenerateError::Empty);
    }
    let too_long = GenerateError::TooLong { found: prompt.len(), limit: runtime.max_model_len };
    let room = (runtime.max_model_len as usize).checked_sub(prompt.len()).filter(|room| *room > 0).ok_or(too_long)?;
    let started = Instant::now();
    let mut events = runtime.handle.submit(Request {
        id: runtime.handle.next_id(),
        external_id: "generate".into(),
        prompt,
        sampling,
        max_new_tokens: max_tokens.unwrap_or(u32::MAX).clamp(1, room as u32),
        n: 1,
        terms: Terms::default(),
    })?;
    let mut detokenizer = IncrementalDetokenizer::new(Arc::clone(&text.tokenizer), true);
    let mut first = None;
    loop {
        match events.blocking_recv().ok_or(GenerateError::EngineStopped)? {
            TokenEvent::Accepted => {}
            TokenEvent::Token { token, .. } => {
                first.get_or_insert_with(|| started.elapsed());
                out.write_all(detokenizer.push(token).as_bytes())?;
                out.flush()?;
            }
            TokenEvent::Finished { reason, usage } => {
                out.write_all(detokenizer.finish().as_bytes())?;
                out.flush()?;
                let total = started.elapsed();
                return Ok(Generated { reason, usage, time_to_first_token: first.unwrap_or(total), total });
            }
        }
    }
}
