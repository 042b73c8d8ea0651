//! The Jinja environment of transformers, imitated on minijinja.

use super::template_json::{python_str, tojson};
use super::template_methods;
use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use std::fmt::Write;

/// What `raise_exception` said, carried as the source of the error that ends the rendering.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// An environment with the options, filters and functions that chat templates rely on, and `steps_max` instructions for
/// each rendering.
pub(super) fn new(steps_max: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(steps_max));
    environment.set_recursion_limit(200);
    environment.set_unknown_method_callback(template_methods::call);
    environment.set_formatter(print);
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |value: &Value| python_str(value));
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Prints containers and floats as Python does; the rest is the same in both.
fn print(output: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => output.write_str(text),
        None => output.write_str(&python_str(value)?),
    }
    .map_err(Error::from)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// The local time in Python's notation, in which `%f` has six digits.
fn strftime_now(format: String) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format.replace("%f", "%6f")))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("expected a time format, found {format:?}")))?;
    Ok(text)
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which mark the assistant's tokens for training, by a scope: that
/// is what they mean besides, and whitespace control stays as written.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        match replacement(tag) {
            Some((text, length)) => {
                out.push_str(&text);
                rest = &tag[length..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// For a generation tag at the start of `tag`: what to write instead, and the tag's length.
fn replacement(tag: &str) -> Option<(String, usize)> {
    // Tags are short: looking only this far keeps a source full of open tags linear.
    let inner = &tag.as_bytes()[2..];
    let end = inner.windows(2).take(64).position(|pair| pair == b"%}")?;
    let inner = &tag[2..2 + end];
    let left = if inner.starts_with(['-', '+']) { &inner[..1] } else { "" };
    let right = if inner.len() > left.len() && inner.ends_with(['-', '+']) { &inner[inner.len() - 1..] } else { "" };
    let name = match inner[left.len()..inner.len() - right.len()].trim() {
        "generation" => "with",
        "endgeneration" => "endwith",
        _ => return None,
    };
    Some((format!("{{%{left} {name} {right}%}}"), 2 + end + 2))
}

/// As Python's `iter`: none is not iterable, an undefined value is an empty list.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok() || value.as_str().is_some()
}

/// Whether a value is a list or another thing to go through, text excluded.
pub(super) fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}
