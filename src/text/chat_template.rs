//! Messages to the prompt that a model was trained on.
//!
//! Owner: shared by all HTTP tasks inside [`super::TextModel`]; immutable. A model's Jinja template is rendered by minijinja
//! in an environment that imitates the one of transformers (`utils/chat_template_utils.py`); expected texts in the tests
//! are transformers' own.
//!
//! Steps and output are bounded; rendering is as long as the template makes it within [`STEPS_MAX`].

use super::template_environment::{self, Raised};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};
use std::io::Write;

/// Instructions of one rendering; real templates take about a hundred per message.
const STEPS_MAX: u64 = 10_000_000;
/// Bytes of one rendered prompt.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
const TEMPLATE_NAME: &str = "chat_template";
/// What transformers appends to the message to be continued, to find its end in the prompt.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
/// One message's reasoning goes by these names; the first is the one that templates read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Whose fault it is that there is no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template refuses these messages, or they lack what it needs: the client's fault, and the text is for it.
    #[error("the chat template rejects the messages: {0}")]
    Rejected(String),
    /// The template itself is wrong: the model's or the operator's fault.
    #[error("the chat template is broken: {0}")]
    Broken(String),
}

/// What a prompt is rendered from. `messages` is the array of a chat request as it came.
#[derive(Clone, Copy, Debug)]
pub struct RenderInput<'a> {
    pub messages: &'a Value,
    pub tools: Option<&'a Value>,
    pub documents: Option<&'a Value>,
    /// Ends the prompt with the start of an assistant's message.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, for the model to go on with.
    pub continue_final_message: bool,
    /// `chat_template_kwargs`: further variables; those above win.
    pub kwargs: Option<&'a Map<String, Value>>,
}

impl<'a> RenderInput<'a> {
    /// Messages alone, with a generation prompt.
    pub fn new(messages: &'a Value) -> Self {
        Self {
            messages,
            tools: None,
            documents: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
        }
    }
}

/// A model's templates, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    default: Compiled,
    tool_use: Option<Compiled>,
    /// bos_token, eos_token and the other special tokens by name.
    special_tokens: Map<String, Value>,
}

#[derive(Debug)]
struct Compiled {
    environment: Environment<'static>,
    source: String,
    /// Renders a message whose content is text.
    takes_text: bool,
    /// Renders a message whose content is a list of parts.
    takes_parts: bool,
}

impl ChatTemplate {
    /// Compiles the templates that a model names. One of them is used whatever its name; of several, `default`, and
    /// `tool_use`, if there is one, when tools are given.
    pub fn new(sources: &[(String, String)], special_tokens: Map<String, Value>) -> Result<Self, TemplateError> {
        let named = |name: &str| sources.iter().find(|source| source.0 == name);
        let default = match sources {
            [only] => only,
            _ => named("default").ok_or_else(|| {
                let names: Vec<&str> = sources.iter().map(|source| source.0.as_str()).collect();
                TemplateError::Broken(format!("expected a template named default, found {names:?}"))
            })?,
        };
        let tool_use = named("tool_use").filter(|source| source.0 != default.0);
        Ok(Self {
            default: Compiled::new(&default.1, &special_tokens)?,
            tool_use: tool_use.map(|source| Compiled::new(&source.1, &special_tokens)).transpose()?,
            special_tokens,
        })
    }

    /// The prompt for these messages.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, TemplateError> {
        let compiled = match &self.tool_use {
            Some(tool_use) if input.tools.is_some() => tool_use,
            _ => &self.default,
        };
        if input.continue_final_message && input.add_generation_prompt {
            return Err(TemplateError::Rejected(
                "expected at most one of add_generation_prompt and continue_final_message, found both".into(),
            ));
        }
        let mut messages = compiled.prepare(input.messages)?;
        let continued = match messages.last_mut() {
            Some(last) if input.continue_final_message => Some(tag_final_message(last)?),
            None if input.continue_final_message => return Err(rejected("there is no final message to continue")),
            _ => None,
        };
        let mut variables = self.special_tokens.clone();
        if let Some(kwargs) = input.kwargs {
            variables.extend(kwargs.clone());
        }
        variables.insert("messages".into(), Value::Array(messages));
        variables.insert("tools".into(), input.tools.cloned().unwrap_or_default());
        variables.insert("documents".into(), input.documents.cloned().unwrap_or_default());
        variables.insert("add_generation_prompt".into(), input.add_generation_prompt.into());
        let prompt = compiled.run(&variables)?;
        match continued {
            Some(text) => cut_after_final_message(prompt, &text),
            None => Ok(prompt),
        }
    }

    /// The source used when no tools are given.
    pub fn source(&self) -> &str {
        &self.default.source
    }
}

impl Compiled {
    fn new(source: &str, special_tokens: &Map<String, Value>) -> Result<Self, TemplateError> {
        let mut environment = template_environment::new(STEPS_MAX);
        let compilable = template_environment::without_generation_tags(source);
        environment
            .add_template_owned(TEMPLATE_NAME, compilable)
            .map_err(|error| TemplateError::Broken(describe(&error)))?;
        let mut compiled = Self { environment, source: source.into(), takes_text: true, takes_parts: false };
        (compiled.takes_text, compiled.takes_parts) = compiled.content_formats(special_tokens);
        Ok(compiled)
    }

    /// Which kinds of content the template renders, by trying: a template that prints a list as such shows its keys.
    fn content_formats(&self, special_tokens: &Map<String, Value>) -> (bool, bool) {
        const NEEDLE: &str = "needle7f3a";
        let render = |content: Value| {
            let mut variables = special_tokens.clone();
            variables.insert("messages".into(), json!([{"role": "user", "content": content}]));
            variables.insert("tools".into(), Value::Null);
            variables.insert("documents".into(), Value::Null);
            variables.insert("add_generation_prompt".into(), false.into());
            self.run(&variables).unwrap_or_default()
        };
        let text = render(NEEDLE.into());
        let parts = render(json!([{"type": "text", "text": NEEDLE}]));
        let takes_parts = parts.contains(NEEDLE) && !parts.contains("'text'") && !parts.contains("\"text\"");
        // A template that renders neither, maybe because it wants more than one message, gets text.
        (text.contains(NEEDLE) || !takes_parts, takes_parts)
    }

    /// The messages as the template wants them: content in its format, tool arguments as objects, reasoning by all names.
    fn prepare(&self, messages: &Value) -> Result<Vec<Value>, TemplateError> {
        let Some(messages) = messages.as_array() else {
            return Err(TemplateError::Rejected(format!("expected a list of messages, found {}", kind(messages))));
        };
        let mut prepared = messages.clone();
        for (index, message) in prepared.iter_mut().enumerate() {
            let found = kind(message);
            let Some(message) = message.as_object_mut() else {
                return Err(TemplateError::Rejected(format!("messages[{index}]: expected an object, found {found}")));
            };
            if let Some(content) = message.get_mut("content") {
                self.prepare_content(content);
            }
            parse_tool_arguments(message, index)?;
            fill_reasoning(message);
        }
        Ok(prepared)
    }

    fn prepare_content(&self, content: &mut Value) {
        match content {
            Value::String(text) if !self.takes_text => *content = json!([{"type": "text", "text": text}]),
            Value::Array(parts) if !self.takes_parts => {
                let texts: Option<Vec<&str>> = parts.iter().map(part_text).collect();
                // What holds more than text stays as it is: the template knows whether it can show it.
                if let Some(texts) = texts {
                    *content = texts.join("\n").into();
                }
            }
            _ => {}
        }
    }

    fn run(&self, variables: &Map<String, Value>) -> Result<String, TemplateError> {
        let template =
            self.environment.get_template(TEMPLATE_NAME).map_err(|error| TemplateError::Broken(describe(&error)))?;
        let mut output = BoundedOutput::default();
        let done = template.render_captured_to(variables, &mut output).map(|_| ());
        if output.overflowed {
            return Err(TemplateError::Rejected(format!("the prompt is longer than {OUTPUT_BYTES_MAX} bytes")));
        }
        done.map_err(|error| classify(&error))?;
        String::from_utf8(output.bytes).map_err(|_| TemplateError::Broken("the output is not UTF-8".into()))
    }
}

/// Collects a prompt up to [`OUTPUT_BYTES_MAX`].
#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl Write for BoundedOutput {
    fn write(&mut self, piece: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + piece.len() > OUTPUT_BYTES_MAX {
            self.overflowed = true;
            return Err(std::io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An error of a template that compiled: most come from messages that lack what it reads.
fn classify(error: &minijinja::Error) -> TemplateError {
    if let Some(message) = raised(error) {
        return TemplateError::Rejected(message);
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::Rejected(format!("rendering took more than {STEPS_MAX} steps")),
        ErrorKind::SyntaxError
        | ErrorKind::TemplateNotFound
        | ErrorKind::UnknownBlock
        | ErrorKind::UnknownFilter
        | ErrorKind::UnknownFunction
        | ErrorKind::UnknownTest => TemplateError::Broken(describe(error)),
        _ => TemplateError::Rejected(describe(error)),
    }
}

/// What the template said through `raise_exception`, however deep in macros it stood.
fn raised(error: &minijinja::Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

fn describe(error: &minijinja::Error) -> String {
    error.to_string()
}

fn rejected(message: &str) -> TemplateError {
    TemplateError::Rejected(message.into())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn part_text(part: &Value) -> Option<&str> {
    part.as_str().or_else(|| part.get("text")?.as_str())
}

/// Clients send a call's arguments as JSON text, templates read an object.
fn parse_tool_arguments(message: &mut Map<String, Value>, index: usize) -> Result<(), TemplateError> {
    let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) else { return Ok(()) };
    for (call_index, call) in calls.iter_mut().enumerate() {
        let Some(arguments) = call.get_mut("function").and_then(|function| function.get_mut("arguments")) else {
            continue;
        };
        let Some(text) = arguments.as_str() else { continue };
        let parsed = if text.trim().is_empty() { Ok(json!({})) } else { serde_json::from_str(text) };
        *arguments = parsed.map_err(|error| {
            let place = format!("messages[{index}].tool_calls[{call_index}].function.arguments");
            TemplateError::Rejected(format!("{place}: expected JSON text, found {error}"))
        })?;
    }
    Ok(())
}

fn fill_reasoning(message: &mut Map<String, Value>) {
    let given = REASONING_FIELDS.iter().find_map(|field| message.get(*field).filter(|value| !value.is_null()));
    if let Some(reasoning) = given.cloned() {
        message.entry("thinking").or_insert_with(|| reasoning.clone());
        message.insert("reasoning_content".into(), reasoning);
    }
}

/// Marks the end of the last message; returns its text.
fn tag_final_message(message: &mut Value) -> Result<String, TemplateError> {
    let content = message.get_mut("content").filter(|content| !content.is_null());
    let content = content.ok_or_else(|| rejected("the final message has no content to continue"))?;
    let text = match content {
        Value::Array(parts) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        content => Some(content),
    };
    match text {
        Some(Value::String(text)) => {
            let continued = text.clone();
            text.push_str(CONTINUE_TAG);
            Ok(continued)
        }
        _ => Err(rejected("the final message has no text to continue")),
    }
}

/// Cuts the prompt where the final message ends; if the template trims messages, so does this.
fn cut_after_final_message(mut prompt: String, text: &str) -> Result<String, TemplateError> {
    let Some(at) = prompt.rfind(CONTINUE_TAG.trim_end()).filter(|_| prompt.contains(text.trim())) else {
        return Err(rejected("the final message does not appear in the prompt, so it cannot be continued"));
    };
    let keeps_spaces = prompt[at..].starts_with(CONTINUE_TAG);
    prompt.truncate(at);
    if !keeps_spaces {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(prompt)
}
