//! `GET /v1/models` and `GET /v1/models/{id}`.

use crate::error::ServeError;
use crate::http::types::models::{ModelCard, ModelList};
use crate::http::{AppState, ServedModel};
use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// The served model under each of its names.
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses(
    (status = 200, body = ModelList), (status = 401, body = crate::error::ErrorBody),
    (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn list(State(state): State<Arc<AppState>>) -> Result<Response, ServeError> {
    let model = state.model()?;
    let data = model.names.iter().map(|name| card(model, name)).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

/// The served model under one of its names.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "openai",
    params(("id" = String, Path, description = "A served model's name, which may hold slashes")),
    responses((status = 200, body = ModelCard), (status = 401, body = crate::error::ErrorBody),
    (status = 404, body = crate::error::ErrorBody), (status = 503, body = crate::error::ErrorBody)))]
pub(crate) async fn one(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<Response, ServeError> {
    let model = state.model()?;
    let name = model.resolve(Some(&id))?;
    Ok(Json(card(model, name)).into_response())
}

fn card<'a>(model: &'a ServedModel, name: &'a str) -> ModelCard<'a> {
    ModelCard {
        id: name,
        object: "model",
        created: model.created,
        owned_by: "kvern",
        root: &model.root,
        parent: None,
        max_model_len: model.context_tokens_max,
    }
}
