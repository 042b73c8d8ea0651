//! The one error of loading: what is wrong, in which file, at which tensor or key.
//!
//! Names come from files that may be hostile, so [`quoted`] escapes and shortens them before they reach a log or a
//! terminal.

use std::path::{Path, PathBuf};

use kvern_kernels::KernelError;
use thiserror::Error;

/// Why a model does not load. Every case but [`LoadError::Io`] is final: a retry meets the same file.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// The file as a whole is not what its name says.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// One entry of metadata or of a JSON file is missing, malformed or out of range.
    #[error("{}: key {}: {reason}", path.display(), quoted(key))]
    Key { path: PathBuf, key: String, reason: String },
    /// One tensor is missing, malformed, of the wrong shape or left over.
    #[error("{}: tensor {}: {reason}", path.display(), quoted(tensor))]
    Tensor { path: PathBuf, tensor: String, reason: String },
    /// The file is sound and asks for something that Kvern does not have.
    #[error("{}: {reason}", path.display())]
    Unsupported { path: PathBuf, reason: String },
    /// The device refused the weights.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl LoadError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        LoadError::Io { path: path.to_owned(), source }
    }
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        LoadError::File { path: path.to_owned(), reason: reason.into() }
    }
    pub(crate) fn key(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        LoadError::Key { path: path.to_owned(), key: key.to_owned(), reason: reason.into() }
    }
    pub(crate) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        LoadError::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
    }
    pub(crate) fn unsupported(path: &Path, reason: impl Into<String>) -> Self {
        LoadError::Unsupported { path: path.to_owned(), reason: reason.into() }
    }
}

/// Most characters of a file's own text that a message repeats.
const QUOTED_CHARS_MAX: usize = 80;

/// `text` in backquotes, escaped, and cut with an ellipsis when it is long.
pub(crate) fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(QUOTED_CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(QUOTED_CHARS_MAX).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}
