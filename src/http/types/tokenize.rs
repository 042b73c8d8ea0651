//! `POST /tokenize` and `POST /detokenize` on the wire, as vLLM has them.

use super::Object;
use super::chat::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// A text or a conversation to tokenize; exactly one of `prompt` and `messages`.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    /// A served model's name; the first one when absent.
    pub model: Option<String>,
    pub prompt: Option<String>,
    #[schema(value_type = Option<Vec<Message>>)]
    pub messages: Option<Vec<Object<Message>>>,
    /// Whether the tokenizer adds its special tokens (true for a prompt, false for messages).
    pub add_special_tokens: Option<bool>,
    /// Whether the answer holds each token's text too.
    pub return_token_strs: Option<bool>,
    /// Whether the template opens an assistant message at the end (true).
    pub add_generation_prompt: Option<bool>,
    /// Whether the last message is left open to be continued.
    pub continue_final_message: Option<bool>,
    /// Variables for the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TokenizeResponse {
    pub count: usize,
    /// Most tokens (prompt and answer) of one request.
    pub max_model_len: u32,
    pub tokens: Vec<u32>,
    /// Null unless `return_token_strs` asked for it.
    pub token_strs: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    /// A served model's name; the first one when absent.
    pub model: Option<String>,
    pub tokens: Option<Vec<u32>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct DetokenizeResponse {
    pub prompt: String,
}
