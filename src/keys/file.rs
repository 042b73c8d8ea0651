//! The keys file: TOML to checked entries, or an error that names the line.
//!
//! Owner: whoever reads it; nothing here touches a disk. O(bytes). Names are unique, numbers in their ranges, classes known,
//! and no two keys have the same secret; what the entries mean together is [`super::table`]'s.

use super::account::Limits;
use super::classes::ClassNames;
use super::secret::HashedSecret;
use crate::telemetry;
use kvern_core::ClassId;
use serde::Deserialize;
use std::collections::HashSet;
use std::ops::Range;
use toml::Spanned;

/// Most `[[key]]` and most `[[tenant]]` entries.
pub(super) const ENTRIES_MAX: usize = 10_000;
/// Most `[[shared_prefix]]` entries: a prompt is compared with each.
const SHARED_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 64;
/// Names of series that are no tenant of the file.
const RESERVED_NAMES: [&str; 2] = [telemetry::OTHERS, telemetry::ANONYMOUS];
/// As the core has it: more would count as this.
const WEIGHT_MAX: i64 = 1 << 16;
const RATE_MAX: i64 = 1_000_000_000_000;
const TOKENS_MAX: i64 = 1_000_000_000_000;
const CONCURRENT_MAX: i64 = 1_000_000;

/// All that a keys file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyFile {
    pub tenants: Vec<TenantEntry>,
    pub keys: Vec<KeyEntry>,
    pub shared: Vec<SharedText>,
}

/// `[[tenant]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantEntry {
    pub name: String,
    /// 1 to 65,536.
    pub weight: u32,
    /// Tokens of the KV cache.
    pub kv_floor: u64,
    /// Tokens of the KV cache, at least the floor.
    pub kv_ceiling: Option<u64>,
}

/// `[[key]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyEntry {
    pub name: String,
    pub secret: HashedSecret,
    pub tenant: String,
    /// Of a request that asks for none.
    pub class: ClassId,
    /// The most urgent one that a request may ask for.
    pub highest: ClassId,
    pub limits: Limits,
}

/// `[[shared_prefix]]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedText {
    /// Where it stands, for the log.
    pub line: usize,
    pub text: PublicText,
}

/// What prompts of all tenants may begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicText {
    /// The system message of a conversation.
    System(String),
    /// The start of a completion's prompt.
    Start(String),
}

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct KeyFileError {
    /// From 1.
    pub line: usize,
    pub message: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileWire {
    #[serde(default)]
    tenant: Vec<Spanned<TenantWire>>,
    #[serde(default)]
    key: Vec<Spanned<KeyWire>>,
    #[serde(default)]
    shared_prefix: Vec<Spanned<SharedWire>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TenantWire {
    name: Spanned<String>,
    weight: Option<Spanned<i64>>,
    kv_floor: Option<Spanned<i64>>,
    kv_ceiling: Option<Spanned<i64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyWire {
    name: Spanned<String>,
    secret: Spanned<String>,
    tenant: Option<Spanned<String>>,
    class: Option<Spanned<String>>,
    highest_class: Option<Spanned<String>>,
    requests_per_minute: Option<Spanned<i64>>,
    tokens_per_minute: Option<Spanned<i64>>,
    concurrent_requests: Option<Spanned<i64>>,
    tokens_per_day: Option<Spanned<i64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SharedWire {
    system: Option<Spanned<String>>,
    text: Option<Spanned<String>>,
}

impl KeyFile {
    /// Checks the whole file; the first problem is the error.
    pub fn parse(text: &str, classes: &ClassNames) -> Result<Self, KeyFileError> {
        let reader = Reader { text, classes };
        let wire: FileWire = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            reader.error(start..start, error.message().lines().next().unwrap_or("not TOML").to_owned())
        })?;
        reader.at_most("tenant", ENTRIES_MAX, &wire.tenant)?;
        reader.at_most("key", ENTRIES_MAX, &wire.key)?;
        reader.at_most("shared_prefix", SHARED_MAX, &wire.shared_prefix)?;
        let mut file = KeyFile::default();
        let mut names = HashSet::new();
        for entry in &wire.tenant {
            let entry = entry.get_ref();
            file.tenants.push(reader.tenant(entry)?);
            reader.unique(&mut names, &entry.name, "tenant")?;
        }
        let (mut names, mut secrets) = (HashSet::new(), HashSet::new());
        for entry in &wire.key {
            let entry = entry.get_ref();
            let key = reader.key(entry)?;
            reader.unique(&mut names, &entry.name, "key")?;
            if !secrets.insert(key.secret) {
                let message = "`secret`: expected one secret for each key, found that of an earlier key";
                return Err(reader.error(entry.secret.span(), message.to_owned()));
            }
            file.keys.push(key);
        }
        file.shared = wire.shared_prefix.iter().map(|entry| reader.shared(entry)).collect::<Result<_, _>>()?;
        Ok(file)
    }
}

/// The file's text, and what its words may be.
struct Reader<'a> {
    text: &'a str,
    classes: &'a ClassNames,
}

impl Reader<'_> {
    fn error(&self, span: Range<usize>, message: String) -> KeyFileError {
        KeyFileError { line: self.line(span), message }
    }

    fn line(&self, span: Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    fn at_most<T>(&self, what: &str, limit: usize, entries: &[Spanned<T>]) -> Result<(), KeyFileError> {
        match entries.get(limit) {
            None => Ok(()),
            Some(beyond) => {
                let message = format!("expected at most {limit} [[{what}]] entries, found {}", entries.len());
                Err(self.error(beyond.span(), message))
            }
        }
    }

    fn unique<'a>(
        &self,
        names: &mut HashSet<&'a str>,
        name: &'a Spanned<String>,
        what: &str,
    ) -> Result<(), KeyFileError> {
        if names.insert(name.get_ref()) {
            return Ok(());
        }
        let message = format!("`name`: expected one {what} of a name, found `{}` again", name.get_ref());
        Err(self.error(name.span(), message))
    }

    fn tenant(&self, wire: &TenantWire) -> Result<TenantEntry, KeyFileError> {
        let kv_floor = self.integer("kv_floor", &wire.kv_floor, 0, TOKENS_MAX)?.unwrap_or(0);
        let kv_ceiling = self.integer("kv_ceiling", &wire.kv_ceiling, 1, TOKENS_MAX)?;
        if let (Some(ceiling), Some(given)) = (kv_ceiling.filter(|&ceiling| ceiling < kv_floor), &wire.kv_ceiling) {
            let message = format!("`kv_ceiling`: expected at least `kv_floor` ({kv_floor}), found {ceiling}");
            return Err(self.error(given.span(), message));
        }
        Ok(TenantEntry {
            name: self.name("name", &wire.name)?,
            weight: self.integer("weight", &wire.weight, 1, WEIGHT_MAX)?.unwrap_or(1) as u32,
            kv_floor,
            kv_ceiling,
        })
    }

    fn key(&self, wire: &KeyWire) -> Result<KeyEntry, KeyFileError> {
        let name = self.name("name", &wire.name)?;
        let secret = wire.secret.get_ref().parse();
        let class = self.class("class", &wire.class)?.unwrap_or(self.classes.default_class());
        let highest = self.class("highest_class", &wire.highest_class)?.unwrap_or(class);
        if let (true, Some(given)) = (highest > class, &wire.highest_class) {
            let message =
                format!("`highest_class`: expected a class no less urgent than `class`, found `{}`", given.get_ref());
            return Err(self.error(given.span(), message));
        }
        let concurrent = self.integer("concurrent_requests", &wire.concurrent_requests, 1, CONCURRENT_MAX)?;
        Ok(KeyEntry {
            secret: secret.map_err(|why| self.error(wire.secret.span(), format!("`secret`: {why}")))?,
            tenant: match &wire.tenant {
                Some(tenant) => self.name("tenant", tenant)?,
                None => name.clone(),
            },
            name,
            class,
            highest,
            limits: Limits {
                requests_per_minute: self.integer("requests_per_minute", &wire.requests_per_minute, 1, RATE_MAX)?,
                tokens_per_minute: self.integer("tokens_per_minute", &wire.tokens_per_minute, 1, RATE_MAX)?,
                concurrent_requests: concurrent.map(|count| count as u32),
                tokens_per_day: self.integer("tokens_per_day", &wire.tokens_per_day, 1, TOKENS_MAX)?,
            },
        })
    }

    fn shared(&self, entry: &Spanned<SharedWire>) -> Result<SharedText, KeyFileError> {
        let wire = entry.get_ref();
        let (given, text) = match (&wire.system, &wire.text) {
            (Some(given), None) => (given, PublicText::System(given.get_ref().clone())),
            (None, Some(given)) => (given, PublicText::Start(given.get_ref().clone())),
            (both, _) => {
                let found = if both.is_some() { "both" } else { "neither" };
                let message = format!("expected one of `system` and `text`, found {found}");
                return Err(self.error(entry.span(), message));
            }
        };
        if given.get_ref().is_empty() {
            return Err(self.error(given.span(), "expected a text, found an empty one".to_owned()));
        }
        Ok(SharedText { line: self.line(given.span()), text })
    }

    fn name(&self, field: &str, given: &Spanned<String>) -> Result<String, KeyFileError> {
        check_name(field, given.get_ref()).map_err(|message| self.error(given.span(), message))?;
        Ok(given.get_ref().clone())
    }

    fn class(&self, field: &str, given: &Option<Spanned<String>>) -> Result<Option<ClassId>, KeyFileError> {
        let Some(given) = given else { return Ok(None) };
        let found = self.classes.find(given.get_ref());
        found.map(Some).ok_or_else(|| {
            let name: String = given.get_ref().chars().take(NAME_BYTES_MAX).collect();
            let message = format!("`{field}`: expected one of {}, found {name:?}", self.classes.listed());
            self.error(given.span(), message)
        })
    }

    fn integer(
        &self,
        field: &str,
        given: &Option<Spanned<i64>>,
        low: i64,
        high: i64,
    ) -> Result<Option<u64>, KeyFileError> {
        let Some(given) = given else { return Ok(None) };
        let value = *given.get_ref();
        if (low..=high).contains(&value) {
            return Ok(Some(value as u64));
        }
        Err(self.error(given.span(), format!("`{field}`: expected an integer in [{low}, {high}], found {value}")))
    }
}

/// A name that logs, metrics and a file can carry as it is.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:@/".contains(&byte);
    if RESERVED_NAMES.contains(&name) {
        return Err(format!("`{field}`: expected another name than {name:?}, which metrics use"));
    }
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    let found: String = name.chars().take(NAME_BYTES_MAX).collect();
    Err(format!("`{field}`: expected 1 to {NAME_BYTES_MAX} letters, digits and ._-:@/, found {found:?}"))
}
