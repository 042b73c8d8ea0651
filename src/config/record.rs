//! What `kvern serve` is told to record, and `kvern replay` to read.

use std::path::PathBuf;

/// Where and how the core's inputs are recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordConfig {
    pub path: PathBuf,
    /// The recording ends before it grows beyond this.
    pub bytes_max: u64,
    /// Tokens are written as they are; else as pseudonyms.
    pub prompts: bool,
}

/// `kvern replay`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplayConfig {
    pub path: PathBuf,
}
