//! `GET /v1/models` on the wire.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList<'a> {
    /// `list`
    pub object: &'static str,
    pub data: Vec<ModelCard<'a>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ModelCard<'a> {
    pub id: &'a str,
    /// `model`
    pub object: &'static str,
    /// When the model was loaded, unix time in seconds.
    pub created: u64,
    pub owned_by: &'static str,
    /// What was loaded: a path or a repository.
    pub root: &'a str,
    /// Always null: adapters are not supported.
    pub parent: Option<&'a str>,
    /// Most tokens (prompt and answer) of one request.
    pub max_model_len: u32,
}
