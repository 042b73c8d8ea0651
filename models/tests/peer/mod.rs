//! The oracle and the peer: candle-transformers' quantized llama.

#![allow(dead_code, clippy::unwrap_used)]

use std::io::{Cursor, Read, Seek};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

/// A clone shares weights and begins with the same cached sequences.
#[derive(Clone)]
pub(crate) struct Peer(ModelWeights);

impl Peer {
    /// Loads a llama GGUF. With F32 tensors all its arithmetic is F32: `QMatMul` then multiplies plain tensors.
    pub(crate) fn open(gguf: &mut (impl Read + Seek)) -> Peer {
        let content = Content::read(gguf).unwrap();
        Peer(ModelWeights::from_gguf(content, gguf, &Device::Cpu).unwrap())
    }

    /// Last logits of each of `streams` sequences, `[streams, vocab]`, after `tokens [streams, n]` at `start`. Starting
    /// at 0 forgets what came before.
    pub(crate) fn forward(&mut self, tokens: &[u32], streams: usize, start: usize) -> Vec<f32> {
        let input = Tensor::from_slice(tokens, (streams, tokens.len() / streams), &Device::Cpu).unwrap();
        self.0.forward(&input, start).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
}

/// The GGUF at `path` with its matrices dequantized and quantized to `dtype`; vectors stay F32.
pub(crate) fn requantized(path: &Path, dtype: GgmlDType) -> Cursor<Vec<u8>> {
    let mut file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let content = Content::read(&mut file).unwrap();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let tensors: Vec<QTensor> = names
        .iter()
        .map(|name| {
            let values = content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
            let dtype = if values.rank() == 1 { GgmlDType::F32 } else { dtype };
            QTensor::quantize(&values, dtype).unwrap()
        })
        .collect();
    let metadata: Vec<_> = content.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = names.iter().map(|name| name.as_str()).zip(&tensors).collect();
    let mut out = Cursor::new(Vec::new());
    gguf_file::write(&mut out, &metadata, &tensors).unwrap();
    out.set_position(0);
    out
}
