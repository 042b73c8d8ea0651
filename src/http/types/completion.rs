//! `POST /v1/completions` on the wire.

use super::common::{FinishReason, StopReason, Usage, generation_request};
use serde::Serialize;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use utoipa::ToSchema;

generation_request! {
    /// A completion request.
    pub struct CompletionRequest {
        /// A text, a list of texts, a list of tokens or a list of lists of tokens.
        pub prompt: Option<Prompt>,
        /// The log-probabilities of each token and of this many of the likeliest ones, 0 to 20.
        pub logprobs: Option<i64>,
        /// Whether the answer's text starts with the prompt.
        pub echo: Option<bool>,
        /// Whether the tokenizer adds its special tokens, such as a beginning of sequence (true).
        pub add_special_tokens: Option<bool>,
    }
}

/// One or more prompts, as text or as tokens.
#[derive(Debug, PartialEq, Eq, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// The first element of a list decides what the whole list holds.
enum PromptElement {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for PromptElement {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = PromptElement;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptElement, E> {
                Ok(PromptElement::Text(text.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, token: u64) -> Result<PromptElement, E> {
                let token = u32::try_from(token)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(token), &"a token id below 2^32"))?;
                Ok(PromptElement::Token(token))
            }
            fn visit_i64<E: de::Error>(self, token: i64) -> Result<PromptElement, E> {
                Err(E::invalid_value(de::Unexpected::Signed(token), &"a token id of at least 0"))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PromptElement, A::Error> {
                let mut tokens = Vec::new();
                while let Some(token) = list.next_element()? {
                    tokens.push(token);
                }
                Ok(PromptElement::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids or a list of lists of token ids")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_owned()))
            }
            fn visit_string<E: de::Error>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(text))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
                let mut prompt = match list.next_element()? {
                    None => return Ok(Prompt::Tokens(Vec::new())),
                    Some(PromptElement::Text(text)) => Prompt::Texts(vec![text]),
                    Some(PromptElement::Token(token)) => Prompt::Tokens(vec![token]),
                    Some(PromptElement::Tokens(tokens)) => Prompt::TokenLists(vec![tokens]),
                };
                while let Some(element) = list.next_element()? {
                    match (&mut prompt, element) {
                        (Prompt::Texts(texts), PromptElement::Text(text)) => texts.push(text),
                        (Prompt::Tokens(tokens), PromptElement::Token(token)) => tokens.push(token),
                        (Prompt::TokenLists(lists), PromptElement::Tokens(tokens)) => lists.push(tokens),
                        _ => return Err(de::Error::custom("a list of prompts must hold elements of one kind")),
                    }
                }
                Ok(prompt)
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

/// A whole answer, or one event of a streamed one.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionResponse<'a> {
    pub id: &'a str,
    /// `text_completion`
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    pub model: &'a str,
    /// Empty in the chunk that carries the usage.
    pub choices: Vec<CompletionChoice<'a>>,
    pub system_fingerprint: &'a str,
    /// In a stream: present when `stream_options` asks for it, null in all chunks that carry none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice<'a> {
    pub index: u32,
    pub text: &'a str,
    pub logprobs: Option<CompletionLogprobs>,
    /// Null until the last chunk of the choice.
    pub finish_reason: Option<FinishReason>,
    pub stop_reason: Option<StopReason>,
}

/// Four lists of the same length, one element per token.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token starts in the choice's text, in characters.
    pub text_offset: Vec<u32>,
    pub token_logprobs: Vec<f32>,
    pub tokens: Vec<String>,
    /// Token text to log-probability, likeliest first.
    #[schema(value_type = Vec<Object>)]
    pub top_logprobs: Vec<Map<String, Value>>,
}
