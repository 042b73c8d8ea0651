//! Recordings: everything that went into a core, so that the run can be repeated exactly.
//!
//! ```text
//!   header   "KVERNREC"  version: u32  then an entry with the configuration
//!   entry    length of the body: u32   checksum: u32   body: a tag, then its fields
//!   after an input or a call of `plan` or `plan_ahead`: an entry with the digest of what the core decided
//! ```
//!
//! Fixed-width numbers are little-endian; fields are varints (LEB128, shortest form), lists carry their length first. The
//! checksum is the CRC-32 of IEEE 802.3 over the body. Entries follow each other to the end of the bytes, so a recording
//! is written by appending and a torn last entry costs only itself.
//!
//! A run is repeated by making an [`crate::Engine`] of [`Recording::config`] and doing what each [`Entry`] says. Plans of a
//! worker that is busy or lost, and of an engine without requests, need not be recorded: they change nothing. Every call of
//! `plan_ahead` must be.
//!
//! Reading never panics and allocates at most a small multiple of the bytes it is given, whatever they are. That a decoded
//! input makes sense to the engine it is applied to is not checked: see [`crate::Engine::apply`].

mod bytes;
mod config;
mod digest;
mod encoder;
mod input;
mod pseudonyms;

pub use digest::Digest;
pub use encoder::Encoder;
pub use pseudonyms::{Prf, Pseudonyms};

use crate::{CoreConfig, Input, Timed, WorkerId};
use bytes::{Reader, crc32, put_varint};
use config::{put_config, read_config};
use input::{TAG_DIGEST, TAG_PLAN, TAG_PLAN_AHEAD, put_input, read_input, read_worker};
use std::fmt;

const MAGIC: &[u8; 8] = b"KVERNREC";
/// Raised whenever the meaning of the bytes changes.
const VERSION: u32 = 7;

/// One thing that was done to the core, or what it made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// [`crate::Engine::apply`].
    Input(Timed<Input>),
    /// [`crate::Engine::plan`].
    Plan(WorkerId),
    /// [`crate::Engine::plan_ahead`].
    PlanAhead(WorkerId),
    /// The [`Digest`] of what the core decided on the entry before; a recording may leave it out.
    Digest(u64),
}

/// Why bytes are not a recording. `at` is an offset in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordError {
    NotARecording,
    Version { found: u32 },
    Truncated { at: usize },
    Checksum { at: usize, expected: u32, found: u32 },
    Malformed { at: usize, expected: &'static str },
    Config { problem: String },
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordError::NotARecording => {
                write!(f, "expected a recording that starts with KVERNREC, found other bytes")
            }
            RecordError::Version { found } => write!(f, "expected a recording of version {VERSION}, found {found}"),
            RecordError::Truncated { at } => write!(f, "expected a whole entry at byte {at}, found the end"),
            RecordError::Checksum { at, expected, found } => {
                write!(f, "expected checksum {expected:08x} of the entry at byte {at}, found {found:08x}")
            }
            RecordError::Malformed { at, expected } => {
                write!(f, "expected {expected} in the entry at byte {at}, found something else")
            }
            RecordError::Config { problem } => write!(f, "the recorded configuration is unusable: {problem}"),
        }
    }
}

impl std::error::Error for RecordError {}

impl RecordError {
    /// The same error of bytes that stand `by` bytes further back.
    #[must_use]
    pub fn moved(mut self, by: usize) -> Self {
        match &mut self {
            RecordError::Truncated { at } | RecordError::Checksum { at, .. } | RecordError::Malformed { at, .. } => {
                *at += by;
            }
            RecordError::NotARecording | RecordError::Version { .. } | RecordError::Config { .. } => {}
        }
        self
    }
}

/// Starts a recording of a core with this configuration at the end of `out`, which is otherwise empty.
pub fn write_header(config: &CoreConfig, out: &mut Vec<u8>) {
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    write_entry(out, |out| put_config(out, config));
}

/// Appends an input. Allocates only when `out` grows.
pub fn write_input(input: &Timed<Input>, out: &mut Vec<u8>) {
    write_entry(out, |out| put_input(out, input));
}

/// Appends that a step was asked for, for this worker.
pub fn write_plan(worker: WorkerId, out: &mut Vec<u8>) {
    write_entry(out, |out| {
        put_varint(out, TAG_PLAN);
        put_varint(out, u64::from(worker.0));
    });
}

/// Appends that a step ahead was asked for, for this worker.
pub fn write_plan_ahead(worker: WorkerId, out: &mut Vec<u8>) {
    write_entry(out, |out| {
        put_varint(out, TAG_PLAN_AHEAD);
        put_varint(out, u64::from(worker.0));
    });
}

/// Appends the digest of what was decided on the entry before.
pub fn write_digest(digest: u64, out: &mut Vec<u8>) {
    write_entry(out, |out| {
        put_varint(out, TAG_DIGEST);
        put_varint(out, digest);
    });
}

/// The configuration at the start of a recording, and the length of the header in bytes.
///
/// # Errors
/// When the bytes do not start with a header of this version and a usable configuration; [`RecordError::Truncated`] where the
/// bytes end within it.
pub fn read_header(bytes: &[u8]) -> Result<(CoreConfig, usize), RecordError> {
    let head = &bytes[..bytes.len().min(MAGIC.len())];
    if !MAGIC.starts_with(head) || bytes.is_empty() {
        return Err(RecordError::NotARecording);
    }
    let rest = &bytes[head.len()..];
    let version = rest.first_chunk().ok_or(RecordError::Truncated { at: head.len() })?;
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(RecordError::Version { found });
    }
    let mut at = MAGIC.len() + 4;
    let config = read_config(&mut next_body(bytes, &mut at)?)?;
    match config.problem() {
        Some(problem) => Err(RecordError::Config { problem }),
        None => Ok((config, at)),
    }
}

/// The entry at the start of `bytes`, and its length in bytes.
///
/// # Errors
/// When the bytes are not a whole entry; [`RecordError::Truncated`] where they end within it.
pub fn read_entry(bytes: &[u8]) -> Result<(Entry, usize), RecordError> {
    let mut at = 0;
    let mut body = next_body(bytes, &mut at)?;
    let tag = body.varint()?;
    let entry = match tag {
        TAG_PLAN => Entry::Plan(read_worker(&mut body)?),
        TAG_PLAN_AHEAD => Entry::PlanAhead(read_worker(&mut body)?),
        TAG_DIGEST => Entry::Digest(body.varint()?),
        tag => return read_input(&mut body, tag).map(|input| (Entry::Input(input), at)),
    };
    body.end()?;
    Ok((entry, at))
}

/// Appends what `body` writes, with its length and checksum before it.
fn write_entry(out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 8]);
    body(out);
    let len = u32::try_from(out.len() - start - 8).expect("a request's tokens are bounded far below 2^32 bytes");
    let checksum = crc32(&out[start + 8..]);
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    out[start + 4..start + 8].copy_from_slice(&checksum.to_le_bytes());
}

/// A recording in memory; iterates over its entries, and ends after the first error.
#[derive(Clone, Debug)]
pub struct Recording<'a> {
    config: CoreConfig,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Recording<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// When the bytes do not start with a header of this version and a usable configuration.
    pub fn open(bytes: &'a [u8]) -> Result<Self, RecordError> {
        read_header(bytes).map(|(config, at)| Recording { config, bytes, at })
    }

    #[must_use]
    pub fn config(&self) -> &CoreConfig {
        &self.config
    }
}

impl Iterator for Recording<'_> {
    type Item = Result<Entry, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at == self.bytes.len() {
            return None;
        }
        let entry = read_entry(&self.bytes[self.at..]).map_err(|error| error.moved(self.at));
        match entry {
            Ok((entry, len)) => {
                self.at += len;
                Some(Ok(entry))
            }
            Err(error) => {
                self.at = self.bytes.len();
                Some(Err(error))
            }
        }
    }
}

/// The body of the entry at `at`, which moves behind it.
fn next_body<'a>(bytes: &'a [u8], at: &mut usize) -> Result<Reader<'a>, RecordError> {
    let start = *at;
    let truncated = RecordError::Truncated { at: start };
    let (head, rest) = bytes[start..].split_first_chunk::<8>().ok_or(truncated.clone())?;
    let [l0, l1, l2, l3, c0, c1, c2, c3] = *head;
    let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let body = rest.get(..len).ok_or(truncated)?;
    let (expected, found) = (u32::from_le_bytes([c0, c1, c2, c3]), crc32(body));
    if expected != found {
        return Err(RecordError::Checksum { at: start, expected, found });
    }
    *at = start + 8 + len;
    Ok(Reader::new(body, start))
}

#[cfg(test)]
mod tests;
