//! Varints and checksums: the letters in which recordings are written.

use super::RecordError;
use crate::TokenId;

pub(super) fn put_varint(out: &mut Vec<u8>, value: u64) {
    put_varint128(out, u128::from(value));
}

/// LEB128: seven bits a byte, the lowest first; the high bit says that more follow.
pub(super) fn put_varint128(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The CRC-32 of IEEE 802.3 (reflected, polynomial 0xedb88320), a byte at a time.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| (crc >> 8) ^ CRC_TABLE[usize::from(crc as u8 ^ byte)])
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        let mut crc = at as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0xedb8_8320 * (crc & 1));
            bit += 1;
        }
        table[at] = crc;
        at += 1;
    }
    table
};

/// Reads one entry's body from its start to its end.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    /// Where the entry starts in the recording, for errors.
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(body: &'a [u8], at: usize) -> Self {
        Reader { rest: body, at }
    }

    pub(super) fn malformed(&self, expected: &'static str) -> RecordError {
        RecordError::Malformed { at: self.at, expected }
    }

    pub(super) fn varint128(&mut self) -> Result<u128, RecordError> {
        let mut value = 0;
        for shift in (0..128).step_by(7) {
            let (byte, rest) = self.rest.split_first().ok_or(self.malformed("another byte of a number"))?;
            self.rest = rest;
            let bits = u128::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                let is_shortest = *byte != 0 || shift == 0;
                return if is_shortest { Ok(value) } else { Err(self.malformed("a number in its shortest form")) };
            }
        }
        Err(self.malformed("a number below 2^128"))
    }

    pub(super) fn varint(&mut self) -> Result<u64, RecordError> {
        u64::try_from(self.varint128()?).map_err(|_| self.malformed("a number below 2^64"))
    }

    pub(super) fn u32(&mut self) -> Result<u32, RecordError> {
        u32::try_from(self.varint128()?).map_err(|_| self.malformed("a number below 2^32"))
    }

    pub(super) fn flag(&mut self) -> Result<bool, RecordError> {
        match self.varint()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.malformed("a yes or no")),
        }
    }

    /// The length of a list; each element takes a byte at least, so that it bounds what is allocated for the list.
    pub(super) fn len(&mut self) -> Result<usize, RecordError> {
        let len = self.varint()?;
        usize::try_from(len).ok().filter(|len| *len <= self.rest.len()).ok_or(self.malformed("a list within the entry"))
    }

    pub(super) fn tokens(&mut self) -> Result<Vec<TokenId>, RecordError> {
        let len = self.len()?;
        let mut tokens = Vec::with_capacity(len);
        for _ in 0..len {
            tokens.push(self.u32()?);
        }
        Ok(tokens)
    }

    pub(super) fn end(&self) -> Result<(), RecordError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed("the end")) }
    }
}
