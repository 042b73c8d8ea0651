//! Python's methods of strings, lists and dicts that chat templates call.
//!
//! Most come from minijinja-contrib; here is what it lacks. A list's `append` is missing on purpose: the sandbox of
//! transformers refuses it too.

use super::template_environment::is_list;
use minijinja::value::{Value, from_args};
use minijinja::{Error, ErrorKind, State};

/// Calls `value.method(args)`.
pub(super) fn call(state: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, method, args)
    {
        return result;
    }
    if is_list(value) && method == "index" {
        let (wanted,): (Value,) = from_args(args)?;
        let position = value.try_iter()?.position(|item| item == wanted);
        return position.map(Value::from).ok_or_else(|| invalid(format!("{wanted} is not in list")));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "removeprefix" => one(args).map(|prefix| Value::from(text.strip_prefix(&*prefix).unwrap_or(text))),
        "removesuffix" => one(args).map(|suffix| Value::from(text.strip_suffix(&*suffix).unwrap_or(text))),
        "index" => one(args).and_then(|part| position(text, &part, text.find(&*part))),
        "rindex" => one(args).and_then(|part| position(text, &part, text.rfind(&*part))),
        "partition" => separator(args).map(|part| match text.split_once(&*part) {
            Some((before, after)) => list(&[before, &part, after]),
            None => list(&[text, "", ""]),
        }),
        "rpartition" => separator(args).map(|part| match text.rsplit_once(&*part) {
            Some((before, after)) => list(&[before, &part, after]),
            None => list(&["", "", text]),
        }),
        "rsplit" => rsplit(text, args),
        _ => return None,
    })
}

fn list(items: &[&str]) -> Value {
    items.iter().copied().map(Value::from).collect()
}

fn one(args: &[Value]) -> Result<String, Error> {
    from_args::<(String,)>(args).map(|(text,)| text)
}

fn separator(args: &[Value]) -> Result<String, Error> {
    let part = one(args)?;
    if part.is_empty() { Err(invalid("expected a separator, found an empty one".into())) } else { Ok(part) }
}

/// Python counts characters, Rust bytes.
fn position(text: &str, part: &str, at: Option<usize>) -> Result<Value, Error> {
    match at {
        Some(at) => Ok(Value::from(text[..at].chars().count())),
        None => Err(invalid(format!("substring {part:?} not found"))),
    }
}

/// `rsplit(sep=None, maxsplit=-1)`.
fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (part, maxsplit): (Option<String>, Option<i64>) = from_args(args)?;
    let limit =
        maxsplit.and_then(|count| usize::try_from(count).ok()).map_or(usize::MAX, |count| count.saturating_add(1));
    let mut pieces: Vec<&str> = match &part {
        Some(part) if part.is_empty() => return Err(invalid("expected a separator, found an empty one".into())),
        Some(part) => text.rsplitn(limit, part.as_str()).collect(),
        None => rsplit_whitespace(text, limit),
    };
    pieces.reverse();
    Ok(list(&pieces))
}

fn rsplit_whitespace(text: &str, limit: usize) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        match rest.rsplit_once(char::is_whitespace) {
            Some((before, word)) if pieces.len() + 1 < limit => {
                pieces.push(word);
                rest = before.trim_end();
            }
            _ => {
                pieces.push(rest);
                rest = "";
            }
        }
    }
    pieces
}
