//! Split sets of GGUF files: `NAME-00001-of-00003.gguf`, as llama.cpp's `gguf-split` writes them.
//!
//! The first file carries the model's metadata; each file says its number (from 0) and the number of files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::value::Value;
use crate::LoadError;

const NUMBER_KEY: &str = "split.no";
const COUNT_KEY: &str = "split.count";
const TENSORS_KEY: &str = "split.tensors.count";
/// The names have five digits.
const FILES_MAX: u64 = 99_999;

type Metadata = BTreeMap<String, Value>;

/// The other files of the set that starts with `path`; none when the file is whole.
pub(super) fn rest_of_set(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, LoadError> {
    let count = integer(path, metadata, COUNT_KEY)?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    if count > FILES_MAX {
        return Err(LoadError::key(path, COUNT_KEY, format!("expected at most {FILES_MAX} files, found {count}")));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(prefix) = name.strip_suffix(&suffix(0, count)) else {
        return Err(LoadError::file(
            path,
            format!(
                "expected the first of the {count} files of a split model, named `…{}`; found number {}",
                suffix(0, count),
                integer(path, metadata, NUMBER_KEY)?.map_or("unknown".to_owned(), |number| (number + 1).to_string())
            ),
        ));
    };
    check_member(path, metadata, 0, count as usize)?;
    Ok((1..count).map(|number| path.with_file_name(format!("{prefix}{}", suffix(number, count)))).collect())
}

/// Checks that a file is number `number` (from 0) of a set of `count`.
pub(super) fn check_member(path: &Path, metadata: &Metadata, number: usize, count: usize) -> Result<(), LoadError> {
    for (key, expected) in [(NUMBER_KEY, number as u64), (COUNT_KEY, count as u64)] {
        let found = integer(path, metadata, key)?;
        if found != Some(expected) {
            let found = found.map_or("nothing".to_owned(), |found| found.to_string());
            return Err(LoadError::key(path, key, format!("expected {expected}, found {found}")));
        }
    }
    Ok(())
}

/// Checks the number of tensors of the whole set, when its first file says it.
pub(super) fn check_tensor_count(path: &Path, metadata: &Metadata, found: usize) -> Result<(), LoadError> {
    match integer(path, metadata, TENSORS_KEY)? {
        Some(expected) if expected != found as u64 => Err(LoadError::key(
            path,
            TENSORS_KEY,
            format!("expected {expected} tensors in the files of the model, found {found}"),
        )),
        _ => Ok(()),
    }
}

fn integer(path: &Path, metadata: &Metadata, key: &str) -> Result<Option<u64>, LoadError> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    match value.as_u64() {
        Some(integer) => Ok(Some(integer)),
        None => Err(LoadError::key(path, key, format!("expected a count, found {}", value.describe()))),
    }
}

fn suffix(number: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", number + 1)
}
