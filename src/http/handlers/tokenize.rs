//! `POST /tokenize` and `POST /detokenize`.

use crate::admission::{ChatInput, Endpoint, check_tokens, encode_chat, encode_text, off_runtime};
use crate::error::ServeError;
use crate::http::AppState;
use crate::http::types::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
use axum::Json;
use axum::extract::{Request, State};
use std::sync::Arc;

/// The tokens of a text or of a conversation.
#[utoipa::path(post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest, responses(
    (status = 200, body = TokenizeResponse), (status = 400, body = crate::error::ErrorBody),
    (status = 401, body = crate::error::ErrorBody), (status = 404, body = crate::error::ErrorBody),
    (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn tokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<TokenizeResponse>, ServeError> {
    let model = Arc::clone(state.model()?);
    let (wire, bytes) = super::read::<TokenizeRequest>(&state, Endpoint::Tokenize, request).await?;
    model.resolve(wire.model.as_deref())?;
    let shared = Arc::clone(&model);
    let tokens = match (wire.prompt, wire.messages) {
        (Some(text), None) => {
            let add_special = wire.add_special_tokens.unwrap_or(true);
            off_runtime(&state, bytes, move || encode_text(&shared, "prompt", &text, add_special)).await??
        }
        (None, Some(messages)) => {
            let input = ChatInput::new(
                Some(messages),
                wire.add_generation_prompt,
                wire.continue_final_message,
                wire.chat_template_kwargs,
                None,
            )?;
            let add_special = wire.add_special_tokens.unwrap_or(false);
            off_runtime(&state, bytes, move || encode_chat(&shared, &input, add_special)).await??
        }
        (None, None) => return Err(ServeError::missing("prompt")),
        (Some(_), Some(_)) => {
            return Err(ServeError::invalid("messages", "expected one of `prompt` and `messages`, found both"));
        }
    };
    let tokenizer = &model.text.tokenizer;
    let texts = |tokens: &[u32]| tokens.iter().map(|&token| tokenizer.token_text(token)).collect();
    Ok(Json(TokenizeResponse {
        count: tokens.len(),
        max_model_len: model.context_tokens_max,
        token_strs: wire.return_token_strs.unwrap_or(false).then(|| texts(&tokens)),
        tokens,
    }))
}

/// The text of tokens.
#[utoipa::path(post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest, responses(
    (status = 200, body = DetokenizeResponse), (status = 400, body = crate::error::ErrorBody),
    (status = 401, body = crate::error::ErrorBody), (status = 404, body = crate::error::ErrorBody),
    (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn detokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<DetokenizeResponse>, ServeError> {
    let model = Arc::clone(state.model()?);
    let (wire, bytes) = super::read::<DetokenizeRequest>(&state, Endpoint::Detokenize, request).await?;
    model.resolve(wire.model.as_deref())?;
    let tokens = wire.tokens.ok_or_else(|| ServeError::missing("tokens"))?;
    check_tokens(&model, "tokens", &tokens)?;
    let prompt = off_runtime(&state, bytes, move || model.text.tokenizer.decode(&tokens, false)).await?;
    Ok(Json(DetokenizeResponse { prompt }))
}
