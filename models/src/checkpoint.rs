//! Where a model's files are, and the files opened.

use std::fmt;
use std::path::{Path, PathBuf};

use kvern_kernels::Format;

use crate::error::LoadError;
use crate::gguf::Gguf;
use crate::safetensors::SafeTensorsFiles;

/// Most entries of a folder that a message lists.
const LISTED_MAX: usize = 12;
/// Most entries of a folder that are looked at.
const ENTRIES_MAX: usize = 100_000;

/// The files of a model, found but not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelFiles {
    /// A GGUF file, or the first of a split set.
    Gguf(PathBuf),
    /// A folder with config.json and safetensors.
    SafeTensors { dir: PathBuf },
    /// A folder with config.json, for a model with random weights.
    ConfigOnly { dir: PathBuf },
}

impl ModelFiles {
    /// The model at a path: a `.gguf` file, a folder with config.json and safetensors, or a folder with one GGUF model.
    ///
    /// # Errors
    /// There is none, or more than one; the error lists what was found.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let metadata = std::fs::metadata(path).map_err(|source| LoadError::io(path, source))?;
        if metadata.is_dir() {
            return Self::in_dir(path);
        }
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if metadata.is_file() && is_gguf {
            return Ok(ModelFiles::Gguf(path.to_owned()));
        }
        Err(LoadError::file(
            path,
            "expected a .gguf file, or a folder with config.json and safetensors or with one .gguf file",
        ))
    }

    /// The configuration at a path, for a model with random weights: as [`open`](Self::open), but a folder needs no weights.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn open_config(path: &Path) -> Result<Self, LoadError> {
        if path.join("config.json").is_file() {
            return Ok(ModelFiles::ConfigOnly { dir: path.to_owned() });
        }
        ModelFiles::open(path)
    }

    fn in_dir(dir: &Path) -> Result<Self, LoadError> {
        let entries = std::fs::read_dir(dir).map_err(|source| LoadError::io(dir, source))?;
        let mut names = Vec::new();
        for entry in entries.take(ENTRIES_MAX) {
            let entry = entry.map_err(|source| LoadError::io(dir, source))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        let has = |name: &str| names.iter().any(|found| found == name);
        if has("config.json") && (has("model.safetensors") || has("model.safetensors.index.json")) {
            return Ok(ModelFiles::SafeTensors { dir: dir.to_owned() });
        }
        let ggufs: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf") && !is_later_part(name)).collect();
        match ggufs.as_slice() {
            [name] => Ok(ModelFiles::Gguf(dir.join(name))),
            [] => Err(LoadError::file(
                dir,
                format!(
                    "expected config.json with model.safetensors or model.safetensors.index.json, or one .gguf file; found {}",
                    List(&names)
                ),
            )),
            _ => Err(LoadError::file(
                dir,
                format!("expected one .gguf file, found {}; name the one to load", List(&ggufs)),
            )),
        }
    }

    /// The file or the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            ModelFiles::Gguf(path) => path,
            ModelFiles::SafeTensors { dir } | ModelFiles::ConfigOnly { dir } => dir,
        }
    }
}

/// Whether a name is that of a split set's second or later file: `…-00002-of-00003.gguf`.
fn is_later_part(name: &str) -> bool {
    let Some((rest, count)) = name.trim_end_matches(".gguf").rsplit_once("-of-") else { return false };
    let number = rest.rsplit_once('-').map_or("", |(_, number)| number);
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits(count) && digits(number) && number != "00001"
}

/// Names for a message, the first few of many.
struct List<'a, T>(&'a [T]);

impl<T: AsRef<str>> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        for (index, name) in self.0.iter().take(LISTED_MAX).enumerate() {
            write!(f, "{}{}", if index > 0 { ", " } else { "" }, crate::error::quoted(name.as_ref()))?;
        }
        match self.0.len().saturating_sub(LISTED_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// The files of a model, mapped and checked.
#[derive(Debug)]
pub enum Checkpoint {
    Gguf(Gguf),
    SafeTensors(SafeTensorsFiles),
    /// The folder of a config.json; there are no tensors.
    ConfigOnly(PathBuf),
}

impl Checkpoint {
    /// Maps the files and reads their headers; weights stay untouched.
    ///
    /// # Errors
    /// A file cannot be read or is not sound.
    pub fn open(files: &ModelFiles) -> Result<Self, LoadError> {
        match files {
            ModelFiles::Gguf(path) => Gguf::open(path).map(Checkpoint::Gguf),
            ModelFiles::SafeTensors { dir } => SafeTensorsFiles::open(dir).map(Checkpoint::SafeTensors),
            ModelFiles::ConfigOnly { dir } => Ok(Checkpoint::ConfigOnly(dir.clone())),
        }
    }

    /// The file that a missing tensor is missing from.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Checkpoint::Gguf(gguf) => gguf.path(),
            Checkpoint::SafeTensors(files) => files.path(),
            Checkpoint::ConfigOnly(dir) => dir,
        }
    }

    /// The format that most bytes of its tensors have, among those that Kvern reads: of the matrices, as norms and biases are
    /// small beside them. `None` where there are no such tensors.
    #[must_use]
    pub fn stored_format(&self) -> Option<Format> {
        let mut sums: Vec<(Format, usize)> = Vec::new();
        let mut count = |format: Option<Format>, bytes: usize| {
            let Some(format) = format else { return };
            match sums.iter_mut().find(|(known, _)| *known == format) {
                Some((_, sum)) => *sum += bytes,
                None => sums.push((format, bytes)),
            }
        };
        match self {
            Checkpoint::Gguf(gguf) => {
                gguf.tensors().for_each(|(_, info)| count(info.tensor_type.format(), gguf.tensor_bytes(info).len()));
            }
            Checkpoint::SafeTensors(files) => {
                files.tensors().for_each(|(_, info)| count(info.format(), files.bytes(info).len()));
            }
            Checkpoint::ConfigOnly(_) => {}
        }
        sums.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(format, _)| format)
    }
}
