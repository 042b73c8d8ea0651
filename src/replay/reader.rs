//! Reads a recording piece by piece: what is held is at most twice the largest entry, or [`PIECE`].

use super::ReplayError;
use kvern_core::CoreConfig;
use kvern_core::record::{Entry, RecordError, read_entry, read_header};
use std::io::{self, Read};

/// Bytes that are asked for at once.
const PIECE: usize = 1 << 20;

pub(super) struct Reader<R> {
    source: R,
    buffer: Vec<u8>,
    /// In the buffer, where the next entry begins.
    start: usize,
    /// Where the buffer begins in the source.
    base: u64,
    has_ended: bool,
}

impl<R: Read> Reader<R> {
    fn new(source: R) -> Self {
        Reader { source, buffer: Vec::new(), start: 0, base: 0, has_ended: false }
    }

    /// Bytes that were read and understood.
    pub(super) fn position(&self) -> u64 {
        self.base + self.start as u64
    }

    /// The next entry, `None` at the end. Behind an entry that is no entry nothing can be read.
    pub(super) fn next(&mut self) -> io::Result<Option<Result<Entry, RecordError>>> {
        loop {
            if self.start == self.buffer.len() && self.has_ended {
                return Ok(None);
            }
            match read_entry(&self.buffer[self.start..]) {
                Ok((entry, len)) => {
                    self.start += len;
                    return Ok(Some(Ok(entry)));
                }
                Err(RecordError::Truncated { .. }) if !self.has_ended => self.fill()?,
                Err(error) => return Ok(Some(Err(error.moved(self.position() as usize)))),
            }
        }
    }

    /// Reads as much again as is held, or a piece.
    fn fill(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.start);
        self.base += self.start as u64;
        self.start = 0;
        let wanted = self.buffer.len().max(PIECE);
        let read = self.source.by_ref().take(wanted as u64).read_to_end(&mut self.buffer)?;
        self.has_ended = read < wanted;
        Ok(())
    }
}

/// Reads the header; gives the reader of what follows.
pub(super) fn read_config<R: Read>(source: R, path: &str) -> Result<(CoreConfig, Reader<R>), ReplayError> {
    let mut reader = Reader::new(source);
    loop {
        reader.fill().map_err(|source| ReplayError::Read { path: path.to_owned(), source })?;
        match read_header(&reader.buffer) {
            Ok((config, len)) => {
                reader.start = len;
                return Ok((config, reader));
            }
            Err(RecordError::Truncated { .. }) if !reader.has_ended => {}
            Err(source) => return Err(ReplayError::NotARecording { path: path.to_owned(), source }),
        }
    }
}
