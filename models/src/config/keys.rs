//! Typed access to the keys of a configuration, the same for config.json and for GGUF metadata: what is absent is `None`,
//! what has the wrong type or size is an error that names file and key.

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::error::{LoadError, quoted};
use crate::gguf::{Gguf, Value};

pub(crate) trait Keys {
    fn path(&self) -> &Path;
    /// The key as the file has it, for messages.
    fn full(&self, key: &str) -> String;
    fn u64(&self, key: &str) -> Result<Option<u64>, LoadError>;
    fn f64(&self, key: &str) -> Result<Option<f64>, LoadError>;

    fn error(&self, key: &str, reason: impl Into<String>) -> LoadError {
        LoadError::key(self.path(), &self.full(key), reason)
    }

    /// An error that says what was expected and what was found.
    fn mismatch(&self, key: &str, expected: &str, found: impl std::fmt::Display) -> LoadError {
        self.error(key, format!("expected {expected}, found {found}"))
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, LoadError> {
        value.ok_or_else(|| self.error(key, "missing"))
    }

    /// A size of 1 to `max`.
    fn size(&self, key: &str, max: usize) -> Result<Option<usize>, LoadError> {
        let Some(found) = self.u64(key)? else { return Ok(None) };
        match usize::try_from(found) {
            Ok(size) if (1..=max).contains(&size) => Ok(Some(size)),
            _ => Err(self.mismatch(key, &format!("a size of 1 to {max}"), found)),
        }
    }

    fn required_size(&self, key: &str, max: usize) -> Result<usize, LoadError> {
        self.required(key, self.size(key, max)?)
    }

    /// A finite number above zero.
    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.f64(key)? {
            Some(found) if !(found.is_finite() && found > 0.0) => {
                Err(self.mismatch(key, "a finite number above 0", found))
            }
            other => Ok(other),
        }
    }
}

/// An object of a JSON file. A `null` counts as absent, as transformers writes what is not set.
#[derive(Clone, Debug)]
pub(crate) struct JsonKeys<'a> {
    path: &'a Path,
    prefix: String,
    map: &'a Map<String, Json>,
}

impl<'a> JsonKeys<'a> {
    /// The outermost object of a file.
    pub(crate) fn new(path: &'a Path, json: &'a Json) -> Result<Self, LoadError> {
        let map = json.as_object().ok_or_else(|| LoadError::file(path, "expected a JSON object"))?;
        Ok(JsonKeys { path, prefix: String::new(), map })
    }

    /// Whether the file has the key at all, be it with `null`.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Json> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, key: &str, expected: &str, of: fn(&'a Json) -> Option<T>) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        of(value).map(Some).ok_or_else(|| self.mismatch(key, expected, describe(value)))
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.typed(key, "true or false", Json::as_bool)
    }

    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.typed(key, "a string", Json::as_str)
    }

    pub(crate) fn array(&self, key: &str) -> Result<Option<&'a [Json]>, LoadError> {
        self.typed(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<JsonKeys<'a>>, LoadError> {
        let map = self.typed(key, "an object", Json::as_object)?;
        Ok(map.map(|map| JsonKeys { path: self.path, prefix: format!("{}.", self.full(key)), map }))
    }

    /// A list of positive numbers, as f32.
    pub(crate) fn factors(&self, key: &str) -> Result<Option<Vec<f32>>, LoadError> {
        let Some(list) = self.array(key)? else { return Ok(None) };
        let factors = list.iter().map(|value| value.as_f64().map(|factor| factor as f32));
        let factors: Option<Vec<f32>> = factors.collect();
        factors.map(Some).ok_or_else(|| self.mismatch(key, "a list of numbers", "another element"))
    }
}

impl Keys for JsonKeys<'_> {
    fn path(&self) -> &Path {
        self.path
    }
    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
    fn u64(&self, key: &str) -> Result<Option<u64>, LoadError> {
        self.typed(key, "a whole number of at least 0", Json::as_u64)
    }
    fn f64(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.typed(key, "a number", Json::as_f64)
    }
}

/// What a JSON value is, for messages.
pub(crate) fn describe(value: &Json) -> String {
    match value {
        Json::Null => "null".to_owned(),
        Json::Bool(value) => value.to_string(),
        Json::Number(value) => value.to_string(),
        Json::String(value) => quoted(value),
        Json::Array(values) => format!("a list of {}", values.len()),
        Json::Object(_) => "an object".to_owned(),
    }
}

/// The metadata of a GGUF file below a prefix.
#[derive(Clone, Debug)]
pub(crate) struct GgufKeys<'a> {
    pub(crate) gguf: &'a Gguf,
    /// With its dot: `llama.`.
    pub(crate) prefix: String,
}

impl<'a> GgufKeys<'a> {
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.gguf.metadata(&self.full(key))
    }

    fn typed<T>(&self, key: &str, expected: &str, of: fn(&'a Value) -> Option<T>) -> Result<Option<T>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        of(value).map(Some).ok_or_else(|| self.mismatch(key, expected, value.describe()))
    }

    pub(crate) fn str(&self, key: &str) -> Result<Option<&'a str>, LoadError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A count that may be an array with one entry per layer; only equal entries are supported.
    pub(crate) fn uniform_size(&self, key: &str, max: usize) -> Result<Option<usize>, LoadError> {
        let Some(counts) = self.get(key).and_then(Value::as_ints) else { return self.size(key, max) };
        let first = counts.first().copied().unwrap_or_default();
        if counts.iter().any(|&count| count != first) {
            return Err(self.mismatch(key, "the same number in every layer", "different ones"));
        }
        match usize::try_from(first) {
            Ok(size) if (1..=max).contains(&size) => Ok(Some(size)),
            _ => Err(self.mismatch(key, &format!("a size of 1 to {max}"), first)),
        }
    }
}

impl Keys for GgufKeys<'_> {
    fn path(&self) -> &Path {
        self.gguf.path()
    }
    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }
    fn u64(&self, key: &str) -> Result<Option<u64>, LoadError> {
        self.typed(key, "a whole number of at least 0", Value::as_u64)
    }
    fn f64(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let number = |value: &Value| value.as_f32().map(f64::from).or_else(|| value.as_i64().map(|int| int as f64));
        self.typed(key, "a number", number)
    }
}
