//! The API's description, made from the wire types and the handlers.

use super::types::{chat, common, completion, models, tokenize};
use crate::error::{ErrorBody, ErrorDetail};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use std::sync::OnceLock;
use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(title = "Kvern", description = "An LLM inference server with the OpenAI API", license(name = "Apache-2.0")),
    paths(
        super::handlers::chat::chat,
        super::handlers::completions::completions,
        super::handlers::models::list,
        super::handlers::models::one,
        super::handlers::tokenize::tokenize,
        super::handlers::tokenize::detokenize,
        super::health::health,
        super::health::live,
        super::health::ready,
        super::health::version,
        super::health::metrics,
        serve_document,
    ),
    components(schemas(
        chat::ChatRequest,
        chat::ChatResponse,
        chat::ChatChunk,
        completion::CompletionRequest,
        completion::CompletionResponse,
        models::ModelList,
        tokenize::TokenizeRequest,
        tokenize::TokenizeResponse,
        tokenize::DetokenizeRequest,
        tokenize::DetokenizeResponse,
        common::Usage,
        ErrorBody,
        ErrorDetail,
    ))
)]
struct Api;

/// The OpenAPI document as indented JSON with a final newline, as it is committed in `docs/openapi.json`.
#[must_use]
pub fn document() -> String {
    Api::openapi().to_pretty_json().expect("the document serializes") + "\n"
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "operations", responses(
    (status = 200, body = String, content_type = "application/json"), (status = 401, body = crate::error::ErrorBody)))]
pub(crate) async fn serve_document() -> impl IntoResponse {
    static DOCUMENT: OnceLock<String> = OnceLock::new();
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.get_or_init(document).as_str())
}
