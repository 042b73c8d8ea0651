//! Texts to tokens, off the async runtime when they are large.

use super::messages::ChatInput;
use crate::error::ServeError;
use crate::http::types::completion::Prompt;
use crate::http::{AppState, ServedModel};
use crate::text::TemplateError;
use kvern_core::TokenId;
use std::sync::Arc;

/// Bodies up to this size are handled where they are: a thread change costs more than their tokenization.
const INLINE_BYTES_MAX: usize = 4 << 10;

/// Runs `work` on a blocking thread if the body that brought it is large; at most `HttpLimits::text_tasks_max` at once.
pub(crate) async fn off_runtime<T: Send + 'static>(
    state: &AppState,
    body_bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ServeError> {
    if body_bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    let permit = Arc::clone(&state.text_permits).acquire_owned().await.expect("the semaphore is never closed");
    let done = tokio::task::spawn_blocking(move || {
        // Held by the work, not by the waiting task, which may be dropped before.
        let _permit = permit;
        work()
    });
    done.await.map_err(|error| {
        tracing::error!(%error, "rendering or tokenizing failed");
        ServeError::Internal
    })
}

/// The prompt that a conversation is to the model.
pub(crate) fn encode_chat(
    model: &ServedModel,
    input: &ChatInput,
    add_special: bool,
) -> Result<Vec<TokenId>, ServeError> {
    let Some(template) = &model.text.template else {
        return Err(ServeError::invalid("messages", "this model has no chat template: use /v1/completions"));
    };
    let text = template.render(&input.render_input()).map_err(|error| {
        if let TemplateError::Broken(_) = &error {
            tracing::warn!(%error, "the chat template failed");
        }
        ServeError::Invalid {
            message: error.to_string(),
            param: Some("messages".into()),
            code: Some("chat_template_failed"),
        }
    })?;
    encode_text(model, "messages", &text, add_special)
}

/// The tokens of a text, unless it is so long that they cannot fit the context.
pub(crate) fn encode_text(
    model: &ServedModel,
    param: &'static str,
    text: &str,
    add_special: bool,
) -> Result<Vec<TokenId>, ServeError> {
    let tokenizer = &model.text.tokenizer;
    let tokens_min = text.len() / tokenizer.token_bytes_max();
    if tokens_min > model.context_tokens_max as usize {
        return Err(too_long(param, model.context_tokens_max, tokens_min, "at least "));
    }
    tokenizer.encode(text, add_special).map_err(|error| ServeError::invalid(param, format!("`{param}`: {error}")))
}

/// A prompt's tokens and, for `echo`, its text.
type EncodedPrompt = (Vec<TokenId>, Option<String>);

/// All prompts of a completion request.
pub(super) fn encode_prompts(
    model: &ServedModel,
    prompt: Prompt,
    add_special: bool,
    echo: bool,
    choices_max: u32,
) -> Result<Vec<EncodedPrompt>, ServeError> {
    let count = match &prompt {
        Prompt::Text(_) | Prompt::Tokens(_) => 1,
        Prompt::Texts(texts) => texts.len(),
        Prompt::TokenLists(lists) => lists.len(),
    };
    if count > choices_max as usize {
        let message = format!("`prompt`: expected at most {choices_max} prompts, found {count}");
        return Err(ServeError::invalid("prompt", message));
    }
    let from_text = |text: String| {
        let tokens = encode_text(model, "prompt", &text, add_special)?;
        Ok((tokens, echo.then_some(text)))
    };
    let from_tokens = |tokens: Vec<TokenId>| {
        check_tokens(model, "prompt", &tokens)?;
        let text = echo.then(|| model.text.tokenizer.decode(&tokens, false));
        Ok((tokens, text))
    };
    match prompt {
        Prompt::Text(text) => Ok(vec![from_text(text)?]),
        Prompt::Texts(texts) => texts.into_iter().map(from_text).collect(),
        Prompt::Tokens(tokens) => Ok(vec![from_tokens(tokens)?]),
        Prompt::TokenLists(lists) => lists.into_iter().map(from_tokens).collect(),
    }
}

/// No more tokens than the context has, so that their text is bounded, and every id is in the vocabulary.
pub(crate) fn check_tokens(model: &ServedModel, param: &'static str, tokens: &[TokenId]) -> Result<(), ServeError> {
    if tokens.len() > model.context_tokens_max as usize {
        return Err(too_long(param, model.context_tokens_max, tokens.len(), ""));
    }
    match tokens.iter().find(|&&token| token >= model.vocab_size) {
        None => Ok(()),
        Some(token) => Err(ServeError::invalid(
            param,
            format!("`{param}`: expected token ids below the vocabulary's size of {}, found {token}", model.vocab_size),
        )),
    }
}

/// A prompt that leaves no room for an answer.
pub(super) fn too_long(param: &'static str, context: u32, tokens: usize, at_least: &str) -> ServeError {
    ServeError::Invalid {
        message: format!(
            "the model's context is {context} tokens, but `{param}` has {at_least}{tokens}, which leaves no room for an answer"
        ),
        param: Some(param.into()),
        code: Some("context_length_exceeded"),
    }
}
