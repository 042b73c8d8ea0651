//! A conversation on the wire to what a chat template renders.

use crate::error::ServeError;
use crate::http::types::Object;
use crate::http::types::chat::{Content, ContentPart, Message, Role};
use crate::text::RenderInput;
use serde_json::{Map, Value};

/// A conversation that can be rendered.
#[derive(Debug)]
pub(crate) struct ChatInput {
    /// An array of objects, at least one.
    messages: Value,
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Option<Map<String, Value>>,
}

impl ChatInput {
    pub(crate) fn new(
        messages: Option<Vec<Object<Message>>>,
        add_generation_prompt: Option<bool>,
        continue_final_message: Option<bool>,
        mut kwargs: Option<Map<String, Value>>,
        reasoning_effort: Option<String>,
    ) -> Result<Self, ServeError> {
        let messages = messages.ok_or_else(|| ServeError::missing("messages"))?;
        if messages.is_empty() {
            return Err(ServeError::invalid("messages", "`messages`: expected at least one message, found none"));
        }
        let continue_final_message = continue_final_message.unwrap_or(false);
        // Continuing a message and opening a new one exclude each other; only an explicit wish for both is an error.
        let add_generation_prompt = add_generation_prompt.unwrap_or(!continue_final_message);
        if continue_final_message && add_generation_prompt {
            return Err(ServeError::invalid(
                "continue_final_message",
                "expected at most one of `continue_final_message` and `add_generation_prompt`, found both",
            ));
        }
        if let Some(effort) = reasoning_effort {
            kwargs.get_or_insert_default().entry("reasoning_effort").or_insert(Value::String(effort));
        }
        let messages = messages.into_iter().enumerate().map(|(at, message)| message_value(at, message.0));
        Ok(ChatInput {
            messages: Value::Array(messages.collect::<Result<_, _>>()?),
            add_generation_prompt,
            continue_final_message,
            kwargs,
        })
    }

    pub(crate) fn render_input(&self) -> RenderInput<'_> {
        RenderInput {
            messages: &self.messages,
            tools: None,
            documents: None,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: self.kwargs.as_ref(),
        }
    }
}

fn message_value(at: usize, message: Message) -> Result<Value, ServeError> {
    let calls = message.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty());
    let content = match message.content {
        Some(Content::Text(text)) => Value::String(text),
        Some(Content::Parts(parts)) => {
            let parts = parts.into_iter().enumerate().map(|(part_at, part)| part_value(at, part_at, part));
            Value::Array(parts.collect::<Result<_, _>>()?)
        }
        None if message.role == Role::Assistant && calls => Value::Null,
        None => {
            let param = format!("messages[{at}].content");
            let message = format!("`{param}`: expected a string or a list of content parts, found none");
            return Err(ServeError::invalid(param, message));
        }
    };
    let mut value = Map::new();
    value.insert("role".into(), message.role.template_name().into());
    value.insert("content".into(), content);
    let mut insert = |key: &str, field: Option<Value>| {
        if let Some(field) = field {
            value.insert(key.into(), field);
        }
    };
    insert("name", message.name.map(Value::String));
    insert("tool_calls", message.tool_calls.filter(|_| calls).map(Value::Array));
    insert("tool_call_id", message.tool_call_id.map(Value::String));
    insert("reasoning_content", message.reasoning_content.map(Value::String));
    Ok(Value::Object(value))
}

fn part_value(at: usize, part_at: usize, part: ContentPart) -> Result<Value, ServeError> {
    let param = format!("messages[{at}].content[{part_at}]");
    if part.r#type != "text" {
        let kind: String = part.r#type.chars().take(64).collect();
        return Err(ServeError::unsupported(param, &format!(": expected a part of the type `text`, found `{kind}`")));
    }
    let Some(text) = part.text else {
        let message = format!("`{param}.text`: expected a string, found none");
        return Err(ServeError::invalid(format!("{param}.text"), message));
    };
    Ok(Value::Object(Map::from_iter([("type".into(), "text".into()), ("text".into(), text.into())])))
}
