//! The stored formats against candle-core, an implementation that is not ours, over random blocks.

#![allow(clippy::unwrap_used)]

mod support;

use std::borrow::Cow;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use kvern_kernels::{Format, dequantize};
use support::{FORMATS, Random, scale_offsets};

fn candle_type(format: Format) -> GgmlDType {
    match format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::BF16 => GgmlDType::BF16,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q5_0 => GgmlDType::Q5_0,
        Format::Q5_1 => GgmlDType::Q5_1,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q2_K => GgmlDType::Q2K,
        Format::Q3_K => GgmlDType::Q3K,
        Format::Q4_K => GgmlDType::Q4K,
        Format::Q5_K => GgmlDType::Q5K,
        Format::Q6_K => GgmlDType::Q6K,
    }
}

/// Bit for bit over 512 blocks each: random codes, with scales that are ordinary, zero, subnormal and the largest finite.
#[test]
fn dequantize_equals_candle() {
    for format in FORMATS {
        let (elements, block) = (512 * format.block_elements(), format.block_bytes());
        let mut random = Random(7);
        let mut bytes = random.weights(format, elements);
        let extremes = [0x0000u16, 0x8000, 0x0001, 0x83ff, 0x7bff, 0xfbff, 0x3c00];
        for (i, block) in bytes.chunks_exact_mut(block).enumerate().filter(|(i, _)| i % 4 == 0) {
            for (j, &at) in scale_offsets(format).iter().enumerate() {
                block[at..at + 2].copy_from_slice(&extremes[(i / 4 + j) % extremes.len()].to_le_bytes());
            }
        }
        let mut found = vec![f32::NAN; elements];
        dequantize(format, &bytes, &mut found).unwrap();
        let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, candle_type(format)).unwrap();
        let tensor = QTensor::new(storage, (1, elements)).unwrap().dequantize(&Device::Cpu).unwrap();
        let expected = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!(found == expected, "{format:?} element {i}: {found:?}, candle has {expected:?}");
        }
    }
}
