//! Values as Python writes them: `json.dumps` for the `tojson` filter, `repr` for what a template prints.
//!
//! Chat templates were written for Python; a space more or less in a tool's schema is another prompt for the model.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// Nesting that a template may build; JSON from a request is bounded by its parser.
const DEPTH_MAX: usize = 200;
/// Spaces per level that a template may ask for.
const INDENT_MAX: usize = 32;

/// How `json.dumps` writes: the arguments that transformers' `tojson` takes.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// `value | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn tojson(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let argument = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = positional.get(index).cloned().or(named.get::<Option<Value>>(name)?);
        Ok(given.filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let indent = argument(1, "indent")?.map(|value| indent_text(&value)).transpose()?;
    let separators = argument(2, "separators")?;
    let separator = |index: usize, default: &str| -> Result<String, Error> {
        let Some(separators) = &separators else { return Ok(default.to_string()) };
        separators
            .get_item_by_index(index)?
            .as_str()
            .map(str::to_string)
            .ok_or_else(|| invalid("expected two separators"))
    };
    let style = Style {
        ensure_ascii: argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true()),
        item_separator: separator(0, if indent.is_some() { "," } else { ", " })?,
        key_separator: separator(1, ": ")?,
        sort_keys: argument(3, "sort_keys")?.is_some_and(|value| value.is_true()),
        indent,
    };
    named.assert_all_used()?;
    let mut out = String::new();
    write_json(&mut out, value, &style, 0)?;
    Ok(Value::from_safe_string(out))
}

/// `str(value)` in Python: text as it is, containers by their `repr`.
pub(super) fn python_str(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        ValueKind::Undefined => {}
        _ => write_repr(&mut out, value, 0)?,
    }
    Ok(out)
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > DEPTH_MAX { Err(invalid("a value is nested too deeply")) } else { Ok(()) }
}

fn indent_text(value: &Value) -> Result<String, Error> {
    let text = match value.as_str() {
        Some(text) => text.to_string(),
        None => " ".repeat(value.as_usize().unwrap_or(INDENT_MAX + 1).min(INDENT_MAX + 1)),
    };
    if text.len() > INDENT_MAX { Err(invalid("expected an indent of at most 32 spaces")) } else { Ok(text) }
}

fn write_json(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => write_json_string(out, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Map => return write_json_map(out, value, style, depth),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                write_separator(out, style, index, depth + 1);
                write_json(out, item, style, depth + 1)?;
            }
            write_end(out, style, items.len(), depth);
            out.push(']');
        }
        kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("{kind} is not JSON serializable"))),
    }
    Ok(())
}

fn write_json_map(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    let mut entries = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        let name = match key.kind() {
            ValueKind::String => key.as_str().unwrap_or_default().to_string(),
            ValueKind::None => "null".to_string(),
            ValueKind::Bool => key.is_true().to_string(),
            ValueKind::Number => number(&key),
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("{kind} cannot be a key in JSON"))),
        };
        entries.push((name, item));
    }
    if style.sort_keys {
        entries.sort_by(|left, right| left.0.cmp(&right.0));
    }
    out.push('{');
    for (index, (key, item)) in entries.iter().enumerate() {
        write_separator(out, style, index, depth + 1);
        write_json_string(out, key, style.ensure_ascii);
        out.push_str(&style.key_separator);
        write_json(out, item, style, depth + 1)?;
    }
    write_end(out, style, entries.len(), depth);
    out.push('}');
    Ok(())
}

fn write_separator(out: &mut String, style: &Style, index: usize, depth: usize) {
    if index > 0 {
        out.push_str(&style.item_separator);
    }
    write_line(out, style, depth);
}

fn write_end(out: &mut String, style: &Style, items: usize, depth: usize) {
    if items > 0 {
        write_line(out, style, depth);
    }
}

fn write_line(out: &mut String, style: &Style, depth: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..depth {
            out.push_str(indent);
        }
    }
}

fn write_json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            _ if character < ' ' || (ensure_ascii && character > '~') => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(character),
        }
    }
    out.push('"');
}

fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    check_depth(depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => write_repr_string(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Python prefers single quotes, and double ones where that saves escapes.
fn write_repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for character in text.chars() {
        match character {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if character == quote => {
                out.push('\\');
                out.push(character);
            }
            _ if character < ' ' || ('\u{7f}'..='\u{a0}').contains(&character) || character == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", character as u32);
            }
            _ => out.push(character),
        }
    }
    out.push(quote);
}

/// Integers as they are, floats as Python's `repr`: shortest digits, exponents of two digits from 1e16 and below 1e-4.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let size = float.abs();
    if size == 0.0 || (1e-4..1e16).contains(&size) {
        return format!("{float:?}");
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use minijinja::{Environment, context};

    fn render(template: &str, value: serde_json::Value) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", tojson);
        environment.add_filter("str", |value: &Value| python_str(value));
        environment.render_str(template, context! { x => value }).unwrap()
    }

    /// Expected texts are what CPython 3.11 prints.
    #[test]
    fn writes_as_python_does() {
        let value = serde_json::json!({"b": [1, 2.0, 1e16, 1e-5, 123456.789, true, null], "a": {"é<&'>": "\"\\\n\u{1}\u{7f}😀"}, "e": [], "o": {}});
        let cases = [
            (
                "{{ x|tojson }}",
                "{\"b\": [1, 2.0, 1e+16, 1e-05, 123456.789, true, null], \"a\": {\"é<&'>\": \"\\\"\\\\\\n\\u0001\u{7f}😀\"}, \"e\": [], \"o\": {}}",
            ),
            ("{{ x.a|tojson(ensure_ascii=true) }}", "{\"\\u00e9<&'>\": \"\\\"\\\\\\n\\u0001\\u007f\\ud83d\\ude00\"}"),
            ("{{ [1, x.e, x.o]|tojson(indent=2) }}", "[\n  1,\n  [],\n  {}\n]"),
            ("{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}", "{\"a\":2,\"b\":1}"),
            ("{{ x.b|str }}", "[1, 2.0, 1e+16, 1e-05, 123456.789, True, None]"),
            ("{{ x.a|str }}", "{\"é<&'>\": '\"\\\\\\n\\x01\\x7f😀'}"),
            ("{{ 'text'|str }}", "text"),
        ];
        for (template, expected) in cases {
            assert_eq!(render(template, value.clone()), expected, "{template}");
        }
    }

    #[test]
    fn bounds_are_errors() {
        let environment = |template: &str| {
            let mut environment = Environment::new();
            environment.add_filter("tojson", tojson);
            environment.render_str(template, ()).map_err(|error| error.to_string())
        };
        assert!(environment("{{ 1|tojson(indent=1000000) }}").unwrap_err().contains("at most 32 spaces"));
        assert!(environment("{{ missing|tojson }}").unwrap_err().contains("undefined is not JSON serializable"));
        let deep = "{% set ns = namespace(x=1) %}{% for i in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}";
        assert!(environment(deep).unwrap_err().contains("nested too deeply"));
    }
}
