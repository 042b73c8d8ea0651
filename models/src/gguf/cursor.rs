//! Reads little-endian values from untrusted bytes. A count is held against the bytes that are left before anything is
//! allocated for it, so that memory stays a small multiple of the file.

use super::value::{Array, Value};

/// What is wrong with the bytes; the caller says where.
pub(super) type Reason = String;

/// Arrays of arrays deeper than this are refused; no model has more than two levels.
const ARRAY_DEPTH_MAX: usize = 4;
/// Longest name of a key or a tensor, in bytes, as the format's text says for keys.
const NAME_BYTES_MAX: usize = 65_535;

// Value types, in the numbering of the format.
const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

/// A number as the file stores it.
pub(super) trait Number: Sized {
    fn from_chunk(chunk: &[u8]) -> Self;
}

macro_rules! numbers {
    ($($number:ty),*) => {
        $(impl Number for $number {
            fn from_chunk(chunk: &[u8]) -> Self {
                <$number>::from_le_bytes(chunk.try_into().expect("chunks have the size of the number"))
            }
        })*
    };
}
numbers!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, position: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], Reason> {
        if count > self.remaining() {
            return Err(format!(
                "expected {count} more bytes at offset {}, found {} (is the file truncated?)",
                self.position,
                self.remaining()
            ));
        }
        let taken = &self.bytes[self.position..self.position + count];
        self.position += count;
        Ok(taken)
    }

    pub(super) fn number<T: Number>(&mut self) -> Result<T, Reason> {
        Ok(T::from_chunk(self.take(size_of::<T>())?))
    }

    /// A count of things that take at least `bytes_each` bytes.
    pub(super) fn count(&mut self, bytes_each: usize) -> Result<usize, Reason> {
        let count: u64 = self.number()?;
        let fit = self.remaining() / bytes_each;
        match usize::try_from(count) {
            Ok(count) if count <= fit => Ok(count),
            _ => Err(format!(
                "a count of {count} needs at least {bytes_each} bytes each, but {} bytes are left",
                self.remaining()
            )),
        }
    }

    pub(super) fn string(&mut self) -> Result<&'a str, Reason> {
        let length = self.count(1)?;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|error| {
            format!("expected UTF-8 text, found an invalid byte at {} of a string", error.valid_up_to())
        })
    }

    /// The name of a key or a tensor.
    pub(super) fn name(&mut self) -> Result<&'a str, Reason> {
        let name = self.string()?;
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(format!("expected a name of 1 to {NAME_BYTES_MAX} bytes, found {} bytes", name.len()));
        }
        Ok(name)
    }

    fn bool(&mut self) -> Result<bool, Reason> {
        to_bool(self.number()?)
    }

    /// A type number and the value after it.
    pub(super) fn value(&mut self) -> Result<Value, Reason> {
        Ok(match self.number::<u32>()? {
            U8 => Value::Unsigned(self.number::<u8>()?.into()),
            U16 => Value::Unsigned(self.number::<u16>()?.into()),
            U32 => Value::Unsigned(self.number::<u32>()?.into()),
            U64 => Value::Unsigned(self.number()?),
            I8 => Value::Signed(self.number::<i8>()?.into()),
            I16 => Value::Signed(self.number::<i16>()?.into()),
            I32 => Value::Signed(self.number::<i32>()?.into()),
            I64 => Value::Signed(self.number()?),
            F32 => Value::F32(self.number()?),
            F64 => Value::F64(self.number()?),
            BOOL => Value::Bool(self.bool()?),
            STRING => Value::String(self.string()?.to_owned()),
            ARRAY => Value::Array(self.array(1)?),
            other => return Err(unknown_type(other)),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Array, Reason> {
        if depth > ARRAY_DEPTH_MAX {
            return Err(format!("arrays are nested deeper than {ARRAY_DEPTH_MAX} levels"));
        }
        Ok(match self.number::<u32>()? {
            U8 => Array::U8(self.numbers()?),
            I8 => Array::I8(self.numbers()?),
            U16 => Array::U16(self.numbers()?),
            I16 => Array::I16(self.numbers()?),
            U32 => Array::U32(self.numbers()?),
            I32 => Array::I32(self.numbers()?),
            U64 => Array::U64(self.numbers()?),
            I64 => Array::I64(self.numbers()?),
            F32 => Array::F32(self.numbers()?),
            F64 => Array::F64(self.numbers()?),
            BOOL => {
                let count = self.count(1)?;
                Array::Bool(self.take(count)?.iter().map(|&byte| to_bool(byte)).collect::<Result<_, _>>()?)
            }
            STRING => {
                // A string takes its 8-byte length at least.
                let count = self.count(8)?;
                Array::String((0..count).map(|_| self.string().map(str::to_owned)).collect::<Result<_, _>>()?)
            }
            ARRAY => {
                // An array takes its type and its length at least.
                let count = self.count(12)?;
                Array::Array((0..count).map(|_| self.array(depth + 1)).collect::<Result<_, _>>()?)
            }
            other => return Err(unknown_type(other)),
        })
    }

    fn numbers<T: Number>(&mut self) -> Result<Vec<T>, Reason> {
        let count = self.count(size_of::<T>())?;
        let bytes = self.take(count * size_of::<T>())?;
        Ok(bytes.chunks_exact(size_of::<T>()).map(T::from_chunk).collect())
    }
}

fn to_bool(byte: u8) -> Result<bool, Reason> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("expected a bool of 0 or 1, found {other}")),
    }
}

fn unknown_type(found: u32) -> Reason {
    format!("expected a value type of 0 to {F64}, found {found}")
}
