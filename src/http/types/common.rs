//! What the chat and the completion endpoint share on the wire.

use serde::Serialize;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use std::fmt;
use utoipa::ToSchema;

/// Declares a request type: its own fields, and after them the fields that every generating endpoint takes. Written out
/// by a macro because `#[serde(flatten)]` would buffer the whole body and lose the path to a wrong field.
macro_rules! generation_request {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default, serde::Deserialize, utoipa::ToSchema)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            /// A served model's name; the first one when absent.
            pub model: Option<String>,
            /// Most tokens to make.
            pub max_tokens: Option<i64>,
            /// Fewest tokens to make before a stop token or stop string counts.
            pub min_tokens: Option<i64>,
            /// 0 is greedy; up to 2.
            pub temperature: Option<f32>,
            /// Nucleus sampling, (0, 1].
            pub top_p: Option<f32>,
            /// Only the k likeliest tokens; 0 or -1 for all.
            pub top_k: Option<i64>,
            /// Only tokens at least this likely relative to the likeliest, [0, 1].
            pub min_p: Option<f32>,
            /// [-2, 2]
            pub presence_penalty: Option<f32>,
            /// [-2, 2]
            pub frequency_penalty: Option<f32>,
            /// (0, 10]; 1 is off.
            pub repetition_penalty: Option<f32>,
            /// The same seed and parameters give the same text; -1 or absent for a random one.
            pub seed: Option<i64>,
            /// Texts that end the answer.
            pub stop: Option<$crate::http::types::common::Stop>,
            /// Tokens that end the answer.
            pub stop_token_ids: Option<Vec<u32>>,
            /// Do not end at the model's end-of-sequence token.
            pub ignore_eos: Option<bool>,
            /// Whether the stop string or token that ended the answer is part of its text.
            pub include_stop_str_in_output: Option<bool>,
            /// Whether special tokens are left out of the text (true).
            pub skip_special_tokens: Option<bool>,
            /// Answers per prompt, 1 to 128.
            pub n: Option<i64>,
            /// Token id (as text) to a bias in [-100, 100] added to its logit.
            pub logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            /// Answer as server-sent events while tokens are made.
            pub stream: Option<bool>,
            #[schema(value_type = Option<$crate::http::types::common::StreamOptions>)]
            pub stream_options: Option<$crate::http::types::Object<$crate::http::types::common::StreamOptions>>,
            /// Lower is more urgent: so many classes above or below the caller's own (0), as far as its key allows.
            pub priority: Option<i64>,
            /// `priority` is one class more urgent, `flex` one less.
            pub service_tier: Option<$crate::http::types::common::ServiceTier>,
            /// The cache of prefixes is shared only with requests of the same tenant and the same text here, 1 to 1024
            /// characters.
            pub cache_salt: Option<String>,
            /// Seconds, at most a day, after which the request is given up. The header `x-request-timeout-ms` says the same.
            pub timeout: Option<f64>,
            /// The end user on whose behalf the request is made; not used.
            pub user: Option<String>,
        }

        impl $name {
            /// The fields shared by all generating endpoints, moved out.
            pub(crate) fn take_generation(&mut self) -> $crate::http::types::common::GenerationFields {
                $crate::http::types::common::GenerationFields {
                    min_tokens: self.min_tokens,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    repetition_penalty: self.repetition_penalty,
                    seed: self.seed,
                    stop: self.stop.take().map(|stop| stop.0).unwrap_or_default(),
                    stop_token_ids: self.stop_token_ids.take().unwrap_or_default(),
                    ignore_eos: self.ignore_eos.unwrap_or(false),
                    include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
                    skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
                    n: self.n,
                    logit_bias: self.logit_bias.take().unwrap_or_default(),
                    stream: self.stream.unwrap_or(false),
                    stream_options: self.stream_options.take().map(|options| options.0),
                    priority: self.priority,
                    service_tier: self.service_tier,
                    cache_salt: self.cache_salt.take(),
                    timeout: self.timeout,
                }
            }
        }
    };
}
pub(crate) use generation_request;

/// The shared fields of a request, as typed by the client.
#[derive(Debug, Default)]
pub(crate) struct GenerationFields {
    pub(crate) min_tokens: Option<i64>,
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) seed: Option<i64>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) include_stop_str_in_output: bool,
    pub(crate) skip_special_tokens: bool,
    pub(crate) n: Option<i64>,
    pub(crate) logit_bias: std::collections::BTreeMap<String, f32>,
    pub(crate) stream: bool,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) priority: Option<i64>,
    pub(crate) service_tier: Option<ServiceTier>,
    pub(crate) cache_salt: Option<String>,
    pub(crate) timeout: Option<f64>,
}

/// OpenAI's words for how urgent a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ServiceTier {
    Auto,
    Default,
    Flex,
    Priority,
}

/// What a streamed answer carries besides text.
#[derive(Debug, Default, Clone, Copy, serde::Deserialize, ToSchema)]
pub struct StreamOptions {
    /// One more chunk at the end, without choices, that holds the usage.
    pub include_usage: Option<bool>,
    /// The usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
    /// Padding against traffic analysis; only `false` is supported.
    pub include_obfuscation: Option<bool>,
}

/// A stop string or a list of them.
#[derive(Debug, Default, ToSchema)]
#[schema(value_type = StopSchema)]
pub struct Stop(pub Vec<String>);

/// How [`Stop`] is described in the OpenAPI document.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub enum StopSchema {
    One(String),
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;
        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Stop, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = list.next_element()? {
                    texts.push(text);
                }
                Ok(Stop(texts))
            }
        }
        deserializer.deserialize_any(StopVisitor)
    }
}

/// Token counts of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub total_tokens: u32,
    pub completion_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Prompt tokens that were found in the prefix cache and not computed again.
    pub cached_tokens: u32,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop string or stop token did.
    Stop,
    /// `max_tokens` were made.
    Length,
}

/// The stop string or the requested stop token that ended an answer; `null` for the model's own end of sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    Text(String),
    Token(u32),
}
