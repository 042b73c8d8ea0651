//! Tensor entries of a GGUF file: what they say, and what their numbers mean.

use std::ops::Range;

use kvern_kernels::Format;

use super::cursor::{Cursor, Reason};

/// Most dimensions of a ggml tensor.
const DIMENSIONS_MAX: usize = 4;

/// The storage type of a tensor: the number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorType(pub u32);

impl TensorType {
    /// The format that Kvern reads it as; `None` for types that it does not have.
    #[must_use]
    pub fn format(self) -> Option<Format> {
        Some(match self.0 {
            0 => Format::F32,
            1 => Format::F16,
            2 => Format::Q4_0,
            3 => Format::Q4_1,
            6 => Format::Q5_0,
            7 => Format::Q5_1,
            8 => Format::Q8_0,
            10 => Format::Q2_K,
            11 => Format::Q3_K,
            12 => Format::Q4_K,
            13 => Format::Q5_K,
            14 => Format::Q6_K,
            30 => Format::BF16,
            _ => return None,
        })
    }

    /// The name that ggml gives the type, for messages; the numbering is that of `ggml.h`.
    #[must_use]
    pub fn name(self) -> String {
        if let Some(format) = self.format() {
            return format!("{format:?}");
        }
        let known = match self.0 {
            9 => "Q8_1",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            40 => "NVFP4",
            41 => "Q1_0",
            other => return format!("number {other}"),
        };
        known.to_owned()
    }
}

/// A tensor of a GGUF file; its data are read by [`super::Gguf::tensor_bytes`].
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Sizes as the file has them, fastest first: a matrix of `rows` by `cols` is `[cols, rows]`. None is zero, and their
    /// product fits `usize`.
    pub dims: Vec<usize>,
    pub tensor_type: TensorType,
    /// Which file of a split set holds it.
    pub(super) part: usize,
    /// Where its file holds it. Of a type that Kvern does not have the size is unknown, and the range is empty.
    pub(super) bytes: Range<usize>,
}

/// A tensor's entry before its place in the file is known, with the offset from the start of the data.
pub(super) struct TensorEntry {
    pub(super) dims: Vec<usize>,
    pub(super) tensor_type: TensorType,
    pub(super) offset: u64,
}

impl TensorEntry {
    /// Smallest entry: a name of one byte, the number of dimensions, the type, the offset.
    pub(super) const BYTES_MIN: usize = 8 + 1 + 4 + 4 + 8;

    /// What follows the name.
    pub(super) fn read(cursor: &mut Cursor<'_>) -> Result<Self, Reason> {
        let count = cursor.number::<u32>()? as usize;
        if count > DIMENSIONS_MAX {
            return Err(format!("expected at most {DIMENSIONS_MAX} dimensions, found {count}"));
        }
        let mut dims = Vec::with_capacity(count);
        let mut elements = 1_usize;
        for _ in 0..count {
            let size: u64 = cursor.number()?;
            let size = usize::try_from(size).ok().filter(|&size| size > 0);
            let size = size.ok_or("expected dimensions of at least 1 that fit the address space")?;
            elements = elements.checked_mul(size).ok_or("the product of the dimensions overflows")?;
            dims.push(size);
        }
        Ok(TensorEntry { dims, tensor_type: TensorType(cursor.number()?), offset: cursor.number()? })
    }

    /// The tensor's bytes in a file of `file_bytes` whose data start at `data_start`.
    pub(super) fn place(&self, data_start: usize, alignment: usize, file_bytes: usize) -> Result<Range<usize>, Reason> {
        let data_bytes = file_bytes.saturating_sub(data_start);
        let offset = usize::try_from(self.offset).ok().filter(|&offset| offset <= data_bytes);
        let offset = offset.ok_or_else(|| {
            format!("expected an offset within the file's {data_bytes} bytes of data, found {}", self.offset)
        })?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("expected an offset aligned to {alignment} bytes, found {offset}"));
        }
        let size = match self.tensor_type.format() {
            None => 0,
            Some(format) => self.bytes(format)?,
        };
        if size > data_bytes - offset {
            return Err(format!(
                "expected {size} bytes at offset {offset}, found {} (is the file truncated?)",
                data_bytes - offset
            ));
        }
        Ok(data_start + offset..data_start + offset + size)
    }

    fn bytes(&self, format: Format) -> Result<usize, Reason> {
        let row = self.dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(format.block_elements()) {
            return Err(format!(
                "expected rows of whole {format:?} blocks of {} elements, found rows of {row}",
                format.block_elements()
            ));
        }
        let blocks = self.dims.iter().product::<usize>() / format.block_elements();
        blocks.checked_mul(format.block_bytes()).ok_or_else(|| "its size in bytes overflows".to_owned())
    }
}
