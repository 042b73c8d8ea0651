//! Fields that other servers have and this one does not: refused by name, because an answer that silently ignores what
//! was asked for is the worst one. A value that changes nothing, such as a default, passes.

use crate::error::ServeError;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use std::fmt;

/// Where a field was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completion,
    Tokenize,
    Detokenize,
}

/// The value, besides `null`, that asks for nothing.
#[derive(Clone, Copy, Debug)]
enum NoOp {
    /// Any value asks for something.
    Null,
    Bool(bool),
    Number(f64),
    /// An empty string, list or object.
    Empty,
    Words(&'static [&'static str]),
    /// `["text"]`
    TextOnly,
    /// `{"type": "text"}`
    TextFormat,
}

/// A known field without support.
struct Unsupported {
    field: &'static str,
    noop: NoOp,
}

const fn field(field: &'static str, noop: NoOp) -> Unsupported {
    Unsupported { field, noop }
}

/// On every endpoint that generates.
const GENERATING: &[Unsupported] = &[
    field("allowed_token_ids", NoOp::Null),
    field("bad_words", NoOp::Empty),
    field("best_of", NoOp::Number(1.0)),
    field("ec_transfer_params", NoOp::Null),
    field("grammar", NoOp::Empty),
    field("guided_choice", NoOp::Null),
    field("guided_decoding_backend", NoOp::Null),
    field("guided_grammar", NoOp::Null),
    field("guided_json", NoOp::Null),
    field("guided_regex", NoOp::Null),
    field("guided_whitespace_pattern", NoOp::Null),
    field("json_schema", NoOp::Null),
    field("kv_transfer_params", NoOp::Null),
    field("length_penalty", NoOp::Number(1.0)),
    field("logprob_token_ids", NoOp::Null),
    field("prompt_embeds", NoOp::Null),
    field("prompt_logprobs", NoOp::Null),
    field("repetition_detection", NoOp::Null),
    field("request_id", NoOp::Null),
    field("response_format", NoOp::TextFormat),
    field("return_token_ids", NoOp::Bool(false)),
    field("return_token_offsets", NoOp::Bool(false)),
    field("return_tokens_as_token_ids", NoOp::Bool(false)),
    field("spaces_between_special_tokens", NoOp::Bool(true)),
    field("store", NoOp::Bool(false)),
    field("stream_interval", NoOp::Number(1.0)),
    field("structured_outputs", NoOp::Null),
    field("suffix", NoOp::Empty),
    field("thinking_token_budget", NoOp::Null),
    field("truncate_prompt_tokens", NoOp::Null),
    field("use_beam_search", NoOp::Bool(false)),
    field("vllm_xargs", NoOp::Empty),
];

/// On chat requests, and where a chat is tokenized.
const CHAT: &[Unsupported] = &[
    field("audio", NoOp::Null),
    field("chat_template", NoOp::Null),
    field("documents", NoOp::Empty),
    field("echo", NoOp::Bool(false)),
    field("function_call", NoOp::Words(&["none", "auto"])),
    field("functions", NoOp::Empty),
    field("include_reasoning", NoOp::Bool(true)),
    field("media_io_kwargs", NoOp::Empty),
    field("mm_processor_kwargs", NoOp::Empty),
    field("modalities", NoOp::TextOnly),
    field("moderation", NoOp::Null),
    field("prediction", NoOp::Null),
    field("tool_choice", NoOp::Words(&["none", "auto"])),
    field("tools", NoOp::Empty),
    field("verbosity", NoOp::Words(&["medium"])),
    field("web_search_options", NoOp::Null),
];

/// A rendered chat holds the special tokens that it needs; `/tokenize` and completions let the client choose.
const CHAT_ONLY: &[Unsupported] = &[field("add_special_tokens", NoOp::Bool(false))];

impl Endpoint {
    fn tables(self) -> [&'static [Unsupported]; 3] {
        match self {
            Endpoint::Chat => [GENERATING, CHAT, CHAT_ONLY],
            Endpoint::Completion => [GENERATING, &[], &[]],
            Endpoint::Tokenize => [CHAT, &[], &[]],
            Endpoint::Detokenize => [&[], &[], &[]],
        }
    }

    fn find(self, name: &str) -> Option<&'static Unsupported> {
        self.tables().into_iter().flatten().find(|entry| entry.field == name)
    }
}

impl NoOp {
    fn allows(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null) => true,
            (NoOp::Bool(noop), Value::Bool(given)) => noop == *given,
            (NoOp::Number(noop), Value::Number(given)) => given.as_f64() == Some(noop),
            (NoOp::Empty, Value::String(text)) => text.is_empty(),
            (NoOp::Empty, Value::Array(list)) => list.is_empty(),
            (NoOp::Empty, Value::Object(map)) => map.is_empty(),
            (NoOp::Words(words), Value::String(given)) => words.contains(&given.as_str()),
            (NoOp::TextOnly, Value::Array(list)) => list.iter().all(|entry| entry == "text"),
            (NoOp::TextFormat, Value::Object(map)) => map.get("type").is_some_and(|kind| kind == "text"),
            _ => false,
        }
    }
}

/// Refuses a body that asks for what this server does not have. A body that is no JSON passes: the parser of the wire
/// type, which follows, says what is wrong with it.
pub(crate) fn refuse_unsupported(endpoint: Endpoint, body: &str) -> Result<(), ServeError> {
    let mut deserializer = serde_json::Deserializer::from_str(body);
    let Ok(findings) = deserializer.deserialize_map(FindingsVisitor(endpoint)) else { return Ok(()) };
    match findings.first {
        // Tools that must not be used need no support.
        Some("tools") if findings.tool_choice_none => Ok(()),
        Some(field) => Err(ServeError::unsupported(field, " with this value")),
        None => Ok(()),
    }
}

#[derive(Default)]
struct Findings {
    /// The first field that asks for something; another one than `tools`, if there is another.
    first: Option<&'static str>,
    tool_choice_none: bool,
}

struct FindingsVisitor(Endpoint);

impl<'de> Visitor<'de> for FindingsVisitor {
    type Value = Findings;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Findings, A::Error> {
        let mut findings = Findings::default();
        while let Some(known) = map.next_key_seed(KeySeed(self.0))? {
            let Some(entry) = known else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let value: Value = map.next_value()?;
            findings.tool_choice_none |= entry.field == "tool_choice" && value == "none";
            if !entry.noop.allows(&value) && findings.first.is_none_or(|first| first == "tools") {
                findings.first = Some(entry.field);
            }
        }
        Ok(findings)
    }
}

/// Looks a key up without copying it.
struct KeySeed(Endpoint);

impl<'de> DeserializeSeed<'de> for KeySeed {
    type Value = Option<&'static Unsupported>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed {
    type Value = Option<&'static Unsupported>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.find(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_ask_for_something_are_refused_by_name() {
        let cases: &[(Endpoint, &str, Option<&str>)] = &[
            (Endpoint::Chat, r#"{"best_of": 1, "suffix": "", "store": false, "echo": null}"#, None),
            (Endpoint::Chat, r#"{"best_of": 2}"#, Some("best_of")),
            (Endpoint::Chat, r#"{"tools": []}"#, None),
            (Endpoint::Chat, r#"{"tools": [{"type": "function"}]}"#, Some("tools")),
            (Endpoint::Chat, r#"{"tools": [{}], "tool_choice": "none"}"#, None),
            (Endpoint::Chat, r#"{"tool_choice": "none", "tools": [{}]}"#, None),
            (Endpoint::Chat, r#"{"tools": [{}], "tool_choice": "none", "suffix": "x"}"#, Some("suffix")),
            (Endpoint::Chat, r#"{"tool_choice": "required"}"#, Some("tool_choice")),
            (Endpoint::Chat, r#"{"response_format": {"type": "text"}}"#, None),
            (Endpoint::Chat, r#"{"response_format": {"type": "json_object"}}"#, Some("response_format")),
            (Endpoint::Chat, r#"{"modalities": ["text"]}"#, None),
            (Endpoint::Chat, r#"{"modalities": ["text", "audio"]}"#, Some("modalities")),
            (Endpoint::Chat, r#"{"guided_json": {}}"#, Some("guided_json")),
            (Endpoint::Chat, r#"{"made_up": 1}"#, None),
            (Endpoint::Chat, r#"{"add_special_tokens": true}"#, Some("add_special_tokens")),
            (Endpoint::Completion, r#"{"add_special_tokens": true, "echo": true}"#, None),
            (Endpoint::Tokenize, r#"{"add_special_tokens": true}"#, None),
            (Endpoint::Tokenize, r#"{"chat_template": "x"}"#, Some("chat_template")),
            (Endpoint::Chat, "[", None),
        ];
        for (endpoint, body, refused) in cases {
            let param = match refuse_unsupported(*endpoint, body) {
                Ok(()) => None,
                Err(ServeError::Invalid { param, .. }) => param,
                Err(other) => panic!("{body}: {other:?}"),
            };
            assert_eq!(param.as_deref(), *refused, "{body}");
        }
    }
}
