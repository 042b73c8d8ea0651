//! Tiny random checkpoints: logits through the paged cache match the reference implementation's, and neither chunking,
//! nor a prefix hit, nor company in the batch changes a bit of them.
//!
//! `scripts/make_goldens.py` makes the checkpoints and the reference logits, and says what they hold.

#![allow(clippy::unwrap_used)]

mod paged;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kvern_kernels::{Device, KvCache, KvDType, Precision};
use kvern_models::{LoadFormat, LoadOptions, LoadedModel, ModelFiles, StepLimits, load};
use paged::{BLOCK_SIZE, Slice, blocks_of, cpu_options, scattered, step};
use safetensors::SafeTensors;
use serde_json::Value;

/// Largest difference of a logit from the reference; logits deviate by about 1.
const TOLERANCE: f32 = 1e-4;
const BLOCKS: usize = 64;
/// Tokens that both sequences begin with (`PREFIX` of the script).
const PREFIX: usize = 40;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// One case: a model, its cache and what it must compute.
struct Case {
    loaded: LoadedModel,
    kv: KvCache,
    sequences: [Vec<u32>; 2],
    /// Of each sequence, all rows.
    reference: [Vec<f32>; 2],
    vocab: usize,
}

fn load_f32(files: &ModelFiles, context_max: usize) -> LoadedModel {
    let device = Device::cpu(cpu_options()).unwrap();
    let limits = StepLimits { tokens_max: 256, sequences_max: 256, context_max };
    load(&device, files, &LoadOptions { precision: Precision::F32, format: LoadFormat::Files, limits }, &mut |_| {})
        .unwrap()
}

fn cache(loaded: &LoadedModel) -> KvCache {
    let device = Device::cpu(cpu_options()).unwrap();
    KvCache::new(&device, loaded.kv_shape(BLOCKS, BLOCK_SIZE, KvDType::F32)).unwrap()
}

impl Case {
    /// Loads `golden/<name>`, with its weights from safetensors or from GGUF.
    fn open(name: &str, gguf: bool) -> Case {
        let case = json(&folder().join(name).join("case.json"));
        let checkpoint = folder().join("checkpoints").join(case["checkpoint"].as_str().unwrap());
        let context_max = case["context_max"].as_u64().unwrap() as usize;
        let loaded = if gguf {
            load_f32(&ModelFiles::open(&checkpoint.with_extension("gguf")).unwrap(), context_max)
        } else {
            let repository = tempfile::tempdir().unwrap();
            let copy = |from: PathBuf, to| std::fs::copy(from, repository.path().join(to)).unwrap();
            copy(folder().join(name).join("config.json"), "config.json");
            copy(checkpoint.with_extension("safetensors"), "model.safetensors");
            load_f32(&ModelFiles::open(repository.path()).unwrap(), context_max)
        };

        let bytes = std::fs::read(folder().join(name).join("logits.safetensors")).unwrap();
        let logits = SafeTensors::deserialize(&bytes).unwrap();
        let values = |tensor: &str| -> Vec<f32> {
            let (words, rest) = logits.tensor(tensor).unwrap().data().as_chunks::<4>();
            assert!(rest.is_empty());
            words.iter().map(|word| f32::from_le_bytes(*word)).collect()
        };
        let vocab = logits.tensor("0").unwrap().shape()[1];
        let first = values("0");
        let second = [&first[..PREFIX * vocab], &values("1")].concat();

        let sequences: Vec<Vec<u32>> = serde_json::from_value(json(&folder().join("sequences.json"))).unwrap();
        assert_eq!(sequences[0][..PREFIX], sequences[1][..PREFIX]);
        let sequences = [0, 1].map(|i| sequences[i][..context_max].to_vec());
        Case { kv: cache(&loaded), loaded, sequences, reference: [first, second], vocab }
    }

    /// Logits of all rows of a step.
    fn step(&mut self, slices: &[Slice<'_>]) -> Vec<f32> {
        let rows: usize = slices.iter().map(|slice| slice.tokens.len()).sum();
        let sample_rows: Vec<u32> = (0..rows as u32).collect();
        step(&mut *self.loaded.model, &mut self.kv, slices, &sample_rows).host().to_vec()
    }

    /// Logits of a whole sequence, computed in chunks that end at `ends`.
    fn chunked(&mut self, sequence: usize, table: &[u32], ends: impl IntoIterator<Item = usize>) -> Vec<f32> {
        let tokens = self.sequences[sequence].clone();
        let mut logits = Vec::new();
        let mut start = 0;
        for end in ends {
            logits.extend(self.step(&[Slice { start, tokens: &tokens[start..end], table }]));
            start = end;
        }
        logits
    }
}

fn assert_close(found: &[f32], reference: &[f32], what: &str) {
    assert_eq!(found.len(), reference.len(), "{what}");
    let differences = found.iter().zip(reference).map(|(a, b)| (a - b).abs());
    // `max` would drop a NaN.
    let worst = differences.fold(0.0, |worst: f32, d| if d <= worst { worst } else { d });
    println!("{what}: largest difference {worst:.1e}");
    assert!(worst <= TOLERANCE, "{what}: largest difference {worst}");
}

fn assert_same_bits(found: &[f32], expected: &[f32], vocab: usize, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differing = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(at) = differing {
        panic!("{what}: row {}, logit {}: {} instead of {}", at / vocab, at % vocab, found[at], expected[at]);
    }
}

fn check(name: &str) {
    let mut case = Case::open(name, false);
    let (length, vocab) = (case.sequences[0].len(), case.vocab);
    let blocks = blocks_of(length);

    let alone = [0, 1].map(|i| {
        let table = scattered(i as u64, blocks, BLOCKS);
        let logits = case.chunked(i, &table, [length]);
        assert_close(&logits, &case.reference[i], &format!("{name}, sequence {i}"));
        logits
    });
    for boundary in 1..length {
        let table = scattered(100 + boundary as u64, blocks, BLOCKS);
        let logits = case.chunked(0, &table, [boundary, length]);
        assert_same_bits(&logits, &alone[0], vocab, &format!("{name}, two chunks, cut at {boundary}"));
    }
    let table = scattered(200, blocks, BLOCKS);
    let logits = case.chunked(0, &table, 1..=length);
    assert_same_bits(&logits, &alone[0], vocab, &format!("{name}, one token at a time"));

    check_prefix_hit(name, &mut case, &alone);
    check_ragged(name, &mut case, &alone);
}

/// The second sequence reuses the blocks that the first one computed for their common prefix.
fn check_prefix_hit(name: &str, case: &mut Case, alone: &[Vec<f32>; 2]) {
    let (length, vocab) = (case.sequences[0].len(), case.vocab);
    let (blocks, shared) = (blocks_of(length), PREFIX / BLOCK_SIZE);
    let ids = scattered(300, 2 * blocks - shared, BLOCKS);
    case.chunked(0, &ids[..blocks], [length]);
    let table = [&ids[..shared], &ids[blocks..]].concat();
    let second = case.sequences[1].clone();
    let start = shared * BLOCK_SIZE;
    let logits = case.step(&[Slice { start, tokens: &second[start..], table: &table }]);
    assert_same_bits(&logits, &alone[1][start * vocab..], vocab, &format!("{name}, prefix hit"));
}

/// One step with a decode, a short prompt, a chunk after a prefix hit and a whole prompt, in tables of random blocks.
fn check_ragged(name: &str, case: &mut Case, alone: &[Vec<f32>; 2]) {
    let (length, vocab) = (case.sequences[0].len(), case.vocab);
    let blocks = blocks_of(length);
    let [first, second] = case.sequences.clone();
    for seed in 0..8 {
        let ids = scattered(400 + seed, 4 * blocks, BLOCKS);
        let tables: Vec<&[u32]> = ids.chunks(blocks).collect();
        let decoded = length - 1 - 3 * seed as usize;
        case.chunked(0, tables[0], [decoded]);
        let shared = [&tables[0][..1], tables[2]].concat();
        let parts = [(0, decoded, decoded + 1, tables[0]), (1, 0, 5 + seed as usize, tables[1])];
        let parts = [parts[0], parts[1], (1, BLOCK_SIZE, 39, &shared[..]), (0, 0, length, tables[3])];
        let slices = parts.map(|(sequence, start, end, table)| {
            let tokens = if sequence == 0 { &first } else { &second };
            Slice { start, tokens: &tokens[start..end], table }
        });
        let expected: Vec<f32> = parts
            .iter()
            .flat_map(|&(sequence, start, end, _)| alone[sequence][start * vocab..end * vocab].iter().copied())
            .collect();
        let logits = case.step(&slices);
        assert_same_bits(&logits, &expected, vocab, &format!("{name}, ragged batch {seed}"));

        // The same step again, sampling only each slice's last row, as an engine does.
        let mut rows = 0;
        let last_rows = slices.map(|slice| {
            rows += slice.tokens.len();
            rows as u32 - 1
        });
        let sampled = step(&mut *case.loaded.model, &mut case.kv, &slices, &last_rows).host().to_vec();
        let expected = last_rows.map(|row| &expected[row as usize * vocab..][..vocab]).concat();
        assert_same_bits(&sampled, &expected, vocab, &format!("{name}, ragged batch {seed}, last rows"));
    }
}

macro_rules! cases {
    ($($function:ident: $name:literal,)+) => {
        const CASES: &[&str] = &[$($name),+];
        $(#[test] fn $function() { check($name); })+
    };
}

cases! {
    llama: "llama",
    llama_linear: "llama-linear",
    llama_dynamic: "llama-dynamic",
    llama_llama3: "llama-llama3",
    llama_yarn: "llama-yarn",
    llama_yarn_mscale: "llama-yarn-mscale",
    llama_longrope: "llama-longrope",
    llama_longrope_short: "llama-longrope-short",
    llama_tied: "llama-tied",
    llama_bias: "llama-bias",
    mistral: "mistral",
    mistral_full: "mistral-full",
    qwen2: "qwen2",
    qwen2_window: "qwen2-window",
    qwen3: "qwen3",
}

#[test]
fn every_folder_is_a_case() {
    let folders = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let folders: BTreeSet<String> = folders
        .filter(|path| path.join("case.json").exists())
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(folders, CASES.iter().map(|name| (*name).to_owned()).collect());
}

/// GGUF holds the same weights under other names, and llama's q and k in another order of rows.
#[test]
fn gguf_equals_safetensors() {
    for name in ["llama", "qwen2", "qwen3"] {
        let mut logits = [true, false].map(|gguf| {
            let mut case = Case::open(name, gguf);
            let length = case.sequences[0].len();
            let table = scattered(1, blocks_of(length), BLOCKS);
            (case.chunked(0, &table, [length]), case)
        });
        let [(gguf, case), (safetensors, _)] = &mut logits;
        assert_close(gguf, &case.reference[0], &format!("{name} from GGUF"));
        assert_same_bits(gguf, safetensors, case.vocab, &format!("{name} from GGUF"));
    }
}
