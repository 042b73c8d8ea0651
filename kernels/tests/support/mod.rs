//! What the tests of this package share: a seeded generator, devices of every level, random matrices in every format.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use kvern_kernels::{CpuIsa, CpuOptions, Device, Format, MatrixView, RowOrder, Tensor};

pub const FORMATS: [Format; 13] = [
    Format::F32,
    Format::F16,
    Format::BF16,
    Format::Q4_0,
    Format::Q4_1,
    Format::Q5_0,
    Format::Q5_1,
    Format::Q8_0,
    Format::Q2_K,
    Format::Q3_K,
    Format::Q4_K,
    Format::Q5_K,
    Format::Q6_K,
];

/// SplitMix64 (Steele et al., 2014).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// In -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }

    /// Stored bytes of `elements` random, finite weights: random codes, scales of ordinary size.
    pub fn weights(&mut self, format: Format, elements: usize) -> Vec<u8> {
        let (block, bytes) = (format.block_elements(), format.block_bytes());
        let mut out: Vec<u8> = (0..elements / block * bytes).map(|_| self.bits() as u8).collect();
        for block in out.chunks_exact_mut(bytes) {
            let small = half::f16::from_f32(self.unit() / 8.0).to_le_bytes();
            match format {
                Format::F32 => block.copy_from_slice(&self.unit().to_le_bytes()),
                Format::F16 => block.copy_from_slice(&half::f16::from_f32(self.unit()).to_le_bytes()),
                Format::BF16 => block.copy_from_slice(&half::bf16::from_f32(self.unit()).to_le_bytes()),
                _ => scale_offsets(format).iter().for_each(|&at| block[at..at + 2].copy_from_slice(&small)),
            }
        }
        out
    }
}

/// Where the f16 scales lie in a block.
pub fn scale_offsets(format: Format) -> &'static [usize] {
    match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        Format::Q6_K => &[208],
        Format::F32 | Format::F16 | Format::BF16 => &[],
    }
}

pub fn view(format: Format, rows: usize, cols: usize, bytes: &[u8]) -> MatrixView<'_> {
    MatrixView { name: "test", format, rows, cols, bytes, row_order: RowOrder::Natural }
}

/// A device of each level that this machine has, with different numbers of threads.
pub fn devices() -> Vec<Device> {
    let levels = [(CpuIsa::Scalar, 2), (CpuIsa::Avx2, 3), (CpuIsa::Avx512, 1), (CpuIsa::Avx512, 4), (CpuIsa::Amx, 2)];
    let devices: Vec<Device> = levels
        .iter()
        .filter_map(|&(isa, threads)| Device::cpu(CpuOptions { threads: Some(threads), isa: Some(isa) }).ok())
        .collect();
    assert!(!devices.is_empty(), "every machine has the scalar level");
    devices
}

/// An output full of NaN: whatever an op forgets to write shows.
pub fn poisoned(device: &Device, capacity: usize, cols: usize) -> Tensor {
    Tensor::from_f32(device, cols, &vec![f32::NAN; capacity * cols]).unwrap()
}

#[track_caller]
pub fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: value {i} is {found:?}, expected {expected:?}");
    }
}
