//! GGUF models whose matrices are of several formats, or of F16, against the CPU's products of widened weights.

use half::f16;
use kvern_cuda_shim::device::Options;
use kvern_kernels::{Element, Format, Precision};
use kvern_models::{Checkpoint, LoadFormat, LoadOptions, ModelFiles, StepLimits};

use super::common::gguf_writer::{GgufWriter, Meta};
use super::paged::{Slice, scattered};
use super::{BLOCKS, Rig, TOLERANCE, check_conversation, conversation, largest_difference, tokens};

const HIDDEN: usize = 256;
const FEED_FORWARD: usize = 256;
const HEAD_DIM: usize = 64;
const KV_HEADS: usize = 2;
const VOCAB: usize = 200;
/// Largest difference of a logit in F16 from one in F32; logits go up to about 1.
const F16_TOLERANCE: f32 = 0.01;

/// A stored format: its number in files, elements and bytes of a block, and where f16 units lie and what they are, so
/// that random codes make weights of about a sixteenth, one over the root of [`HIDDEN`].
struct Blocks {
    type_number: u32,
    elements: usize,
    bytes: usize,
    units: &'static [(usize, f32)],
}

const F16: Blocks = Blocks { type_number: 1, elements: 1, bytes: 2, units: &[(0, 0.06)] };
const Q4_0: Blocks = Blocks { type_number: 2, elements: 32, bytes: 18, units: &[(0, 0.013)] };
const Q8_0: Blocks = Blocks { type_number: 8, elements: 32, bytes: 34, units: &[(0, 0.0008)] };
const Q5_K: Blocks = Blocks { type_number: 13, elements: 256, bytes: 176, units: &[(0, 0.000_12), (2, 0.001_8)] };
/// A scale of 0 to 63 times codes of 0 to 15, less a minimum of 0 to 63 of the second unit: about even.
const Q4_K: Blocks = Blocks { type_number: 12, elements: 256, bytes: 144, units: &[(0, 0.000_25), (2, 0.001_9)] };
const Q6_K: Blocks = Blocks { type_number: 14, elements: 256, bytes: 210, units: &[(208, 0.000_04)] };

struct Random(u64);

impl Random {
    /// The high bits of Knuth's MMIX generator.
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn blocks(&mut self, format: &Blocks, elements: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..elements / format.elements * format.bytes).map(|_| self.bits() as u8).collect();
        for block in bytes.chunks_mut(format.bytes) {
            // Of floats the unit is the value, with a sign.
            let factor = if format.elements == 1 { (self.bits() % 2001) as f32 / 1000.0 - 1.0 } else { 1.0 };
            for &(at, unit) in format.units {
                block[at..at + 2].copy_from_slice(&f16::from_f32(unit * factor).to_le_bytes());
            }
        }
        bytes
    }
}

/// Formats of q, k, v, o, gate, up and down, by layer.
const LAYERS: [[&Blocks; 7]; 2] =
    [[&Q4_K, &Q4_K, &Q6_K, &Q4_0, &Q8_0, &Q4_K, &Q6_K], [&Q8_0, &F16, &Q5_K, &Q4_K, &Q4_0, &Q4_0, &Q8_0]];

/// A model with these formats, by layer, and this one of its table.
fn write(path: &std::path::Path, table: &Blocks, layers: &[[&Blocks; 7]]) {
    let sizes = [
        ("vocab_size", VOCAB),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FEED_FORWARD),
        ("block_count", layers.len()),
        ("attention.head_count", HIDDEN / HEAD_DIM),
        ("attention.head_count_kv", KV_HEADS),
        ("context_length", 640),
    ];
    let mut writer = GgufWriter::new("llama").meta("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5));
    for (key, size) in sizes {
        writer = writer.meta(&format!("llama.{key}"), Meta::U32(size as u32));
    }
    writer = writer.meta("tokenizer.ggml.bos_token_id", Meta::U32(1)).meta("tokenizer.ggml.eos_token_id", Meta::U32(2));
    let mut random = Random(7);
    let mut matrix = |writer: &mut GgufWriter, name: &str, format: &Blocks, [rows, cols]: [usize; 2]| {
        writer.push_raw(name, &[rows, cols], format.type_number, random.blocks(format, rows * cols), None);
    };
    let norm: Vec<f32> = (0..HIDDEN).map(|i| 0.8 + (i % 7) as f32 * 0.1).collect();
    matrix(&mut writer, "token_embd.weight", table, [VOCAB, HIDDEN]);
    writer.push_f32("output_norm.weight", &[HIDDEN], &norm);
    for (layer, formats) in layers.iter().enumerate() {
        let kv = KV_HEADS * HEAD_DIM;
        let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
        let (wide, narrow) = ([FEED_FORWARD, HIDDEN], [HIDDEN, FEED_FORWARD]);
        let shapes = [[HIDDEN, HIDDEN], [kv, HIDDEN], [kv, HIDDEN], [HIDDEN, HIDDEN], wide, wide, narrow];
        for ((name, format), shape) in names.into_iter().zip(formats).zip(shapes) {
            matrix(&mut writer, &format!("blk.{layer}.{name}.weight"), format, shape);
        }
        for name in ["attn_norm", "ffn_norm"] {
            writer.push_f32(&format!("blk.{layer}.{name}.weight"), &[HIDDEN], &norm);
        }
    }
    writer.write(path);
}

/// Prompts of more than 8 rows widen the weights for the product, steps of fewer read the blocks. On an F32 device both
/// are the values that the CPU widens at load, and what is left is the order of sums; on a BF16 one activations, and
/// the weights of large products, are rounded to 8 bits of mantissa, on an F16 one to 11.
#[test]
fn quantized_models_match_the_cpus() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write(&path, &Q6_K, &LAYERS);
    let files = ModelFiles::open(&path).unwrap();
    let limits = StepLimits { tokens_max: 96, sequences_max: 6, context_max: 640 };
    let options = |precision| LoadOptions { precision, format: LoadFormat::Files, limits };
    let expected = conversation(&mut Rig::cpu(&files, &options(Precision::F32)));
    let spread = expected.iter().flatten().fold(0.0, |most: f32, logit| most.max(logit.abs()));
    println!("logits up to {spread}");
    for (element, tolerance) in [(Element::F32, TOLERANCE), (Element::BF16, 0.15), (Element::F16, 0.02)] {
        check_conversation(&files, element, &options(Precision::AsStored), &expected, tolerance);
    }
}

/// A model that is stored in F16, in F16: weights, activations, K and V. The CPU multiplies the same weights with activations of
/// F32, K and V in F32 too; what is left is the rounding of activations, K and V to 11 bits of mantissa after each op. Where
/// they are rounded to BF16 instead, the difference is several times as large.
#[test]
fn models_of_f16_match_the_cpus() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write(&path, &F16, &[[&F16; 7]; 2]);
    let files = ModelFiles::open(&path).unwrap();
    assert_eq!(Checkpoint::open(&files).unwrap().stored_format(), Some(Format::F16));
    let limits = StepLimits { tokens_max: 96, sequences_max: 6, context_max: 640 };
    let options = |precision| LoadOptions { precision, format: LoadFormat::Files, limits };
    let expected = conversation(&mut Rig::cpu(&files, &options(Precision::F32)));
    check_conversation(&files, Element::F16, &options(Precision::AsStored), &expected, F16_TOLERANCE);
    // Precision::F16 loads the same.
    let asked =
        |element, precision| conversation(&mut Rig::gpu(&files, element, &options(precision), Options::default()));
    let found = asked(Element::F16, Precision::F16);
    assert!(found == asked(Element::F16, Precision::AsStored));
    let off = |found: &[Vec<f32>]| {
        found
            .iter()
            .zip(&expected)
            .fold(0.0, |worst: f32, (found, expected)| worst.max(largest_difference(found, expected)))
    };
    let (f16, bf16) = (off(&found), off(&asked(Element::BF16, Precision::BF16)));
    println!("f16 is off by up to {f16}, bf16 by {bf16}");
    assert!(4.0 * f16 < bf16, "{f16} {bf16}");
    // The same weights on a CPU, which has no F16 cache.
    let cpu = conversation(&mut Rig::cpu(&files, &options(Precision::F16)));
    assert!(off(&cpu) <= 0.1, "{}", off(&cpu));
}

/// An activation beyond the range of F16 gives logits that are not finite, which the sampler reports: never a number that is
/// wrong.
#[test]
fn beyond_the_range_of_f16_nothing_is_finite() {
    const HUGE: Blocks = Blocks { type_number: 1, elements: 1, bytes: 2, units: &[(0, 30_000.0)] };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let layer = [&F16, &F16, &F16, &F16, &HUGE, &HUGE, &HUGE];
    write(&path, &F16, &[layer; 2]);
    let files = ModelFiles::open(&path).unwrap();
    let limits = StepLimits { tokens_max: 96, sequences_max: 6, context_max: 640 };
    let options = LoadOptions { precision: Precision::AsStored, format: LoadFormat::Files, limits };
    let prompt = Slice { start: 0, tokens: &tokens(1, 9), table: &scattered(5, 2, BLOCKS) };
    let logits = Rig::gpu(&files, Element::F16, &options, Options::default()).last_rows(&[prompt]);
    assert!(logits.iter().all(|logit| logit.is_nan()), "{logits:?}");
}
