//! `POST /v1/chat/completions` on the wire.

use super::Object;
use super::common::{FinishReason, StopReason, Usage, generation_request};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize as DeriveDeserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use utoipa::ToSchema;

generation_request! {
    /// A chat request.
    pub struct ChatRequest {
        /// The conversation so far; at least one message.
        #[schema(value_type = Option<Vec<Message>>)]
        pub messages: Option<Vec<Object<Message>>>,
        /// Most tokens to make; goes before `max_tokens`.
        pub max_completion_tokens: Option<i64>,
        /// Whether each token comes with its log-probability.
        pub logprobs: Option<bool>,
        /// How many of the likeliest tokens come with each token, 0 to 20; needs `logprobs`.
        pub top_logprobs: Option<i64>,
        /// Whether the template opens an assistant message at the end (true).
        pub add_generation_prompt: Option<bool>,
        /// Whether the last message is left open to be continued.
        pub continue_final_message: Option<bool>,
        /// Variables for the chat template.
        #[schema(value_type = Option<Object>)]
        pub chat_template_kwargs: Option<Map<String, Value>>,
        /// A hint to the model, given to the chat template under this name.
        pub reasoning_effort: Option<String>,
    }
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, DeriveDeserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    /// OpenAI's newer name of `system`; templates see `system`.
    Developer,
    User,
    Assistant,
    Tool,
}

impl Role {
    /// The name that chat templates know.
    #[must_use]
    pub fn template_name(self) -> &'static str {
        match self {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, DeriveDeserialize, ToSchema)]
pub struct Message {
    pub role: Role,
    /// May be absent or null in an assistant message with `tool_calls`.
    pub content: Option<Content>,
    pub name: Option<String>,
    /// What the assistant called, in OpenAI's shape.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Vec<Value>>,
    /// The call that a tool message answers.
    pub tool_call_id: Option<String>,
    /// What the assistant thought, for templates that show it.
    pub reasoning_content: Option<String>,
}

/// A text, or a list of parts.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a message; only parts of the type `text` are supported.
#[derive(Debug, DeriveDeserialize, ToSchema)]
pub struct ContentPart {
    pub r#type: String,
    pub text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }
            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(Object(part)) = list.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

/// The whole answer of a chat request that does not stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatResponse<'a> {
    pub id: &'a str,
    /// `chat.completion`
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    pub system_fingerprint: &'a str,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: u32,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: FinishReason,
    pub stop_reason: Option<StopReason>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`
    pub role: &'static str,
    pub content: String,
    /// Always null: this server does not refuse on a model's behalf.
    pub refusal: Option<String>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<TokenLogprob>,
}

/// A token, the natural logarithm of its probability under the model's raw logits, and its alternatives.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenLogprob {
    pub token: String,
    pub logprob: f32,
    /// The token's bytes, which need not be whole UTF-8.
    pub bytes: Vec<u8>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Vec<u8>,
}

/// One event of a streamed chat answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunk<'a> {
    /// The same in every chunk of an answer.
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Unix time in seconds, the same in every chunk of an answer.
    pub created: u64,
    pub model: &'a str,
    /// Empty in the chunk that carries the usage.
    pub choices: Vec<ChunkChoice<'a>>,
    pub system_fingerprint: &'a str,
    /// Present when `stream_options` asks for it; null in all chunks that carry none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChunkChoice<'a> {
    pub index: u32,
    pub delta: Delta<'a>,
    pub logprobs: Option<ChatLogprobs>,
    /// Null until the last chunk of the choice.
    pub finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta<'a> {
    /// Only in the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
}
