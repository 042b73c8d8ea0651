//! The file of a recording, and the thread that writes it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender};

/// Earlier recordings that are kept: FILE.1 is the latest.
const KEPT: u32 = 3;

/// Larger buffers, of very long prompts, are not used again.
const BUFFER_BYTES_KEPT: usize = 1 << 20;

/// Makes the file, which only its owner can read; what was there is moved aside, and the oldest removed.
pub(super) fn create(path: &Path) -> io::Result<File> {
    for number in (1..=KEPT).rev() {
        let from = if number == 1 { path.to_path_buf() } else { numbered(path, number - 1) };
        match fs::rename(&from, numbered(path, number)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// `FILE.n`.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

/// Writes buffers until there are no more, and gives them back empty.
pub(super) fn write(mut file: File, path: &Path, full: &Receiver<Vec<u8>>, empty: &SyncSender<Vec<u8>>) {
    for mut buffer in full {
        if let Err(error) = file.write_all(&buffer) {
            tracing::error!(path = %path.display(), %error, "the recording cannot be written");
            return;
        }
        buffer.clear();
        if buffer.capacity() <= BUFFER_BYTES_KEPT {
            // There is room for every buffer; the other side is gone when the recording has ended.
            let _ = empty.try_send(buffer);
        } else {
            let _ = empty.try_send(Vec::new());
        }
    }
}
