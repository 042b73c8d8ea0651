//! Writes small GGUF files for tests. It checks nothing, so that it can write wrong files too.

use std::path::Path;

/// A metadata value of each type of the format.
#[derive(Clone, Debug)]
pub enum Meta {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(Vec<u8>),
    /// The type number of the elements, and the elements.
    Array(u32, Vec<Meta>),
    U64(u64),
    I64(i64),
    F64(f64),
    /// A type number and the bytes of its value, whatever they are.
    Raw(u32, Vec<u8>),
}

impl Meta {
    pub fn str(text: &str) -> Meta {
        Meta::Str(text.as_bytes().to_vec())
    }

    pub fn strings(texts: &[&str]) -> Meta {
        Meta::Array(8, texts.iter().map(|text| Meta::str(text)).collect())
    }

    pub fn i32s(values: &[i32]) -> Meta {
        Meta::Array(5, values.iter().map(|&value| Meta::I32(value)).collect())
    }

    pub fn f32s(values: &[f32]) -> Meta {
        Meta::Array(6, values.iter().map(|&value| Meta::F32(value)).collect())
    }

    fn type_number(&self) -> u32 {
        match self {
            Meta::U8(_) => 0,
            Meta::I8(_) => 1,
            Meta::U16(_) => 2,
            Meta::I16(_) => 3,
            Meta::U32(_) => 4,
            Meta::I32(_) => 5,
            Meta::F32(_) => 6,
            Meta::Bool(_) => 7,
            Meta::Str(_) => 8,
            Meta::Array(..) => 9,
            Meta::U64(_) => 10,
            Meta::I64(_) => 11,
            Meta::F64(_) => 12,
            Meta::Raw(type_number, _) => *type_number,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Meta::U8(value) => out.extend(value.to_le_bytes()),
            Meta::I8(value) => out.extend(value.to_le_bytes()),
            Meta::U16(value) => out.extend(value.to_le_bytes()),
            Meta::I16(value) => out.extend(value.to_le_bytes()),
            Meta::U32(value) => out.extend(value.to_le_bytes()),
            Meta::I32(value) => out.extend(value.to_le_bytes()),
            Meta::F32(value) => out.extend(value.to_le_bytes()),
            Meta::U64(value) => out.extend(value.to_le_bytes()),
            Meta::I64(value) => out.extend(value.to_le_bytes()),
            Meta::F64(value) => out.extend(value.to_le_bytes()),
            Meta::Bool(value) => out.push((*value).into()),
            Meta::Str(bytes) => write_string(bytes, out),
            Meta::Raw(_, bytes) => out.extend(bytes),
            Meta::Array(element, values) => {
                out.extend(element.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| value.write(out));
            }
        }
    }
}

#[derive(Clone, Debug)]
struct TensorData {
    name: String,
    dims: Vec<u64>,
    type_number: u32,
    bytes: Vec<u8>,
    offset: Option<u64>,
}

/// A GGUF file in the making.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    pub version: u32,
    pub alignment: usize,
    metadata: Vec<(String, Meta)>,
    tensors: Vec<TensorData>,
}

impl GgufWriter {
    /// An empty file of version 3 for this `general.architecture`.
    pub fn new(architecture: &str) -> Self {
        let writer = GgufWriter { version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() };
        writer.meta("general.architecture", Meta::str(architecture))
    }

    pub fn meta(mut self, key: &str, value: Meta) -> Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    /// Replaces a value, or adds it.
    pub fn set(mut self, key: &str, value: Meta) -> Self {
        self.metadata.retain(|(found, _)| found != key);
        self.meta(key, value)
    }

    pub fn without(mut self, key: &str) -> Self {
        self.metadata.retain(|(found, _)| found != key);
        self
    }

    /// Adds an F32 tensor; `shape` is row-major as in Hugging Face's files: `[rows, cols]` or `[len]`.
    pub fn f32(mut self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.push_f32(name, shape, values);
        self
    }

    /// As [`Self::f32`], in place.
    pub fn push_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}: shape against values");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push_raw(name, shape, 0, bytes, None);
    }

    /// Adds a tensor of any type number with these bytes, at its natural offset or at the one given.
    pub fn push_raw(&mut self, name: &str, shape: &[usize], type_number: u32, bytes: Vec<u8>, offset: Option<u64>) {
        let dims = shape.iter().rev().map(|&size| size as u64).collect();
        self.tensors.push(TensorData { name: name.to_owned(), dims, type_number, bytes, offset });
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            write_string(key.as_bytes(), &mut out);
            out.extend(value.type_number().to_le_bytes());
            value.write(&mut out);
        }
        let mut offset = 0_usize;
        for tensor in &self.tensors {
            write_string(tensor.name.as_bytes(), &mut out);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.type_number.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset as u64).to_le_bytes());
            offset = (offset + tensor.bytes.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.bytes);
        }
        out
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.to_bytes()).unwrap();
    }
}

fn write_string(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

/// Metadata of the model of `repository::llama_config`, without tensors.
pub fn small_llama() -> GgufWriter {
    let sizes = [
        ("llama.vocab_size", 32),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 96),
        ("llama.block_count", 2),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.context_length", 128),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
    ];
    let writer = GgufWriter::new("llama").meta("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5));
    sizes.into_iter().fold(writer, |writer, (key, size)| writer.meta(key, Meta::U32(size)))
}
