//! Read-only memory maps of weight files.
//!
//! A map is owned by the reader that opened it and lives until the weights are packed. The file must not change
//! meanwhile: a file that another process truncates makes a read fault (SIGBUS), which no reader can turn into an error.
//! Model files are written once and renamed into place, so that this does not happen in practice.

use std::fs::File;
use std::path::Path;

use memmap2::{Advice, Mmap};

use crate::LoadError;

/// Maps a regular file. Directories, pipes and devices are refused before they are opened, since opening a pipe blocks.
pub(crate) fn map_file(path: &Path) -> Result<Mmap, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|source| LoadError::io(path, source))?;
    if !metadata.is_file() {
        return Err(LoadError::file(path, "expected a regular file"));
    }
    if metadata.len() == 0 {
        return Err(LoadError::file(path, "the file is empty"));
    }
    let file = File::open(path).map_err(|source| LoadError::io(path, source))?;
    // SAFETY: the map is private to this process and read-only; that no one truncates the file is the contract above.
    unsafe { Mmap::map(&file) }.map_err(|source| LoadError::io(path, source))
}

/// Asks the operating system to read the whole file into the page cache, in the background. Only a hint: a failure costs
/// speed, nothing else.
pub(crate) fn read_ahead(map: &Mmap) {
    let _ = map.advise(Advice::WillNeed);
}
