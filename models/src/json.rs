//! JSON files of a model's folder, with a bound on what is read.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::LoadError;

/// Reads a JSON file of at most `bytes_max`. The text and what it parses to are in memory at the same time.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, bytes_max: u64) -> Result<T, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|source| LoadError::io(path, source))?;
    if !metadata.is_file() {
        return Err(LoadError::file(path, "expected a regular file"));
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(|source| LoadError::io(path, source))?;
    file.take(bytes_max + 1).read_to_end(&mut text).map_err(|source| LoadError::io(path, source))?;
    if text.len() as u64 > bytes_max {
        return Err(LoadError::file(path, format!("expected at most {bytes_max} bytes of JSON, found more")));
    }
    serde_json::from_slice(&text).map_err(|error| LoadError::file(path, format!("expected JSON: {error}")))
}
