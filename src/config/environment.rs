//! The process environment as a value, so that nothing else reads it and tests can make one.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// The variables that Kvern knows how to read, copied once at start.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, String>);

/// Variables without Kvern's prefix that are read: the Hub's own, and what its default folder depends on.
const FOREIGN: [&str; 8] =
    ["HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH", "HOME", "XDG_CACHE_HOME"];

impl Environment {
    /// A copy of the process environment. Values that are not Unicode are taken as if they were not set.
    #[must_use]
    pub fn from_process() -> Self {
        let known = |name: &str| name.starts_with("KVERN_") || FOREIGN.contains(&name);
        let unicode = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Environment(std::env::vars_os().filter_map(unicode).filter(|(name, _)| known(name)).collect())
    }

    /// An environment of these variables only.
    #[must_use]
    pub fn from_pairs(pairs: &[(&str, &str)]) -> Self {
        Environment(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    /// The value of a variable; an empty one counts as not set, as shells and manifests mean it.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Where the Hub keeps its files: `HF_HOME`, else `huggingface` in the user's cache folder.
    pub(super) fn hub_home(&self) -> PathBuf {
        if let Some(home) = self.get("HF_HOME") {
            return PathBuf::from(home);
        }
        let cache = match (self.get("XDG_CACHE_HOME"), self.get("HOME")) {
            (Some(cache), _) => PathBuf::from(cache),
            (None, Some(home)) => PathBuf::from(home).join(".cache"),
            (None, None) => PathBuf::from(".cache"),
        };
        cache.join("huggingface")
    }
}
