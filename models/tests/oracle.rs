//! The default model against two other implementations.
//!
//! In F32 the greedy continuation of each prompt equals llama.cpp's (`oracle/reference.json`, made by
//! `scripts/make_llamacpp_reference.py`, which states the rule for near-ties) and candle-transformers', which runs here.
//! Quantized, it is compared by log-probabilities: see [`check_quantized`].

#![allow(clippy::unwrap_used)]

mod common;
mod paged;
mod peer;

use std::path::Path;

use candle_core::quantized::GgmlDType;
use kvern_kernels::{Device, KvCache, KvDType, Precision};
use kvern_models::{LoadFormat, LoadOptions, LoadedModel, ModelFiles, StepLimits, load};
use paged::{BLOCK_SIZE, Slice, blocks_of, cpu_options, scattered, step};
use peer::{Peer, requantized};
use serde::Deserialize;

/// End of text of the default model.
const EOS: u32 = 2;
const BLOCKS: usize = 1024;
/// Most tokens per prompt that candle continues; it takes most of this test's time.
const ORACLE_TOKENS_MAX: usize = 24;

#[derive(Clone, Deserialize)]
struct Entry {
    kind: String,
    text: String,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

impl Entry {
    fn shortened(&self) -> Entry {
        let mut entry = self.clone();
        entry.tokens.truncate(ORACLE_TOKENS_MAX);
        entry
    }
}

/// Logits `[tokens, vocab]` that predict each token of a continuation.
type Rows = Vec<f32>;

fn entries() -> Vec<Entry> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/reference.json");
    let entries: Vec<Entry> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(entries.len() >= 20, "{} prompts", entries.len());
    entries
}

fn argmax(row: &[f32]) -> u32 {
    assert!(row.iter().all(|value| value.is_finite()));
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as u32
}

/// Difference of the two largest values.
fn gap(row: &[f32]) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in row {
        second = second.max(value.min(best));
        best = best.max(value);
    }
    best - second
}

/// Our model with a cache for all prompts.
struct Ours {
    loaded: LoadedModel,
    kv: KvCache,
}

impl Ours {
    fn open(path: &Path, precision: Precision, cache: KvDType) -> Ours {
        let device = Device::cpu(cpu_options()).unwrap();
        let limits = StepLimits { tokens_max: 512, sequences_max: 64, context_max: 1024 };
        let files = ModelFiles::open(path).unwrap();
        let loaded =
            load(&device, &files, &LoadOptions { precision, format: LoadFormat::Files, limits }, &mut |_| {}).unwrap();
        let kv = KvCache::new(&device, loaded.kv_shape(BLOCKS, BLOCK_SIZE, cache)).unwrap();
        Ours { loaded, kv }
    }

    /// Continues all prompts at once, greedily or (`forced`) along the reference, by as many tokens as it has.
    fn run(&mut self, entries: &[&Entry], forced: bool) -> Vec<Rows> {
        let spans: Vec<usize> = entries.iter().map(|e| blocks_of(e.prompt.len() + e.tokens.len())).collect();
        let ids = scattered(1, spans.iter().sum(), BLOCKS);
        let mut rest = &ids[..];
        let tables = spans.iter().map(|&span| rest.split_off(..span).unwrap()).collect::<Vec<_>>();

        let mut rows: Vec<Rows> = Vec::new();
        for (entry, table) in entries.iter().zip(&tables) {
            let slice = Slice { start: 0, tokens: &entry.prompt, table };
            let last = entry.prompt.len() as u32 - 1;
            rows.push(step(&mut *self.loaded.model, &mut self.kv, &[slice], &[last]).host().to_vec());
        }
        let vocab = rows[0].len();
        let longest = entries.iter().map(|entry| entry.tokens.len()).max().unwrap();
        for made in 1..longest {
            let running: Vec<usize> = (0..entries.len()).filter(|&i| entries[i].tokens.len() > made).collect();
            let inputs: Vec<u32> = running
                .iter()
                .map(|&i| if forced { entries[i].tokens[made - 1] } else { argmax(&rows[i][(made - 1) * vocab..]) })
                .collect();
            let slices: Vec<Slice<'_>> = running
                .iter()
                .zip(&inputs)
                .map(|(&i, input)| Slice {
                    start: entries[i].prompt.len() + made - 1,
                    tokens: std::slice::from_ref(input),
                    table: tables[i],
                })
                .collect();
            let all: Vec<u32> = (0..running.len() as u32).collect();
            let logits = step(&mut *self.loaded.model, &mut self.kv, &slices, &all).host();
            for (&i, row) in running.iter().zip(logits.chunks(vocab)) {
                rows[i].extend(row);
            }
        }
        rows
    }
}

/// As [`Ours::run`], one prompt after the other.
fn run_peer(peer: &mut Peer, entries: &[&Entry], forced: bool) -> Vec<Rows> {
    let continuation = |entry: &&Entry| {
        let mut row = peer.forward(&entry.prompt, 1, 0);
        let mut rows = row.clone();
        for made in 1..entry.tokens.len() {
            let input = if forced { entry.tokens[made - 1] } else { argmax(&row) };
            row = peer.forward(&[input], 1, entry.prompt.len() + made - 1);
            rows.extend(&row);
        }
        rows
    };
    entries.iter().map(continuation).collect()
}

fn assert_greedy(entries: &[&Entry], rows: &[Rows], who: &str) {
    for (entry, rows) in entries.iter().zip(rows) {
        let vocab = rows.len() / entry.tokens.len();
        let tokens: Vec<u32> = rows.chunks(vocab).map(argmax).collect();
        let least = rows.chunks(vocab).map(gap).fold(f32::INFINITY, f32::min);
        let Entry { kind, text, prompt, .. } = entry;
        let start: String = text.chars().take(40).collect();
        println!("{who}: {kind} {start:?}: {} + {} tokens, least gap {least:.4}", prompt.len(), tokens.len());
        assert_eq!(tokens, entry.tokens, "{who} and llama.cpp differ on {start:?}");
    }
}

/// Mean absolute difference of log-probabilities over all rows and the whole vocabulary.
fn log_probability_difference(a: &[Rows], b: &[Rows], vocab: usize) -> f64 {
    let log_sum = |row: &[f32]| {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        most + row.iter().map(|&x| (x as f64 - most).exp()).sum::<f64>().ln()
    };
    let (mut sum, mut count) = (0.0, 0);
    for (a, b) in a.iter().zip(b) {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.chunks(vocab).zip(b.chunks(vocab)) {
            let shift = log_sum(a) - log_sum(b);
            sum += a.iter().zip(b).map(|(&a, &b)| (a as f64 - b as f64 - shift).abs()).sum::<f64>();
            count += vocab;
        }
    }
    sum / count as f64
}

/// Prints and bounds how far a quantized model is from F32, along the same tokens.
///
/// Weights are the same for us and candle, bit for bit, so what differs is how activations are rounded: both round each 32
/// to int8 with one scale. Two such roundings are about equally far from F32 (neither is nearer by design), so we must not
/// be further away than candle by more than a tenth; a kernel that loses precision elsewhere, or unpacks a format wrongly,
/// is.
fn check_quantized(name: &str, ours: &mut Ours, peer: &mut Peer, entries: &[&Entry], f32_rows: &[Rows]) -> f64 {
    let vocab = f32_rows[0].len() / entries[0].tokens.len();
    let our_difference = log_probability_difference(&ours.run(entries, true), f32_rows, vocab);
    let peer_difference = log_probability_difference(&run_peer(peer, entries, true), f32_rows, vocab);
    println!("{name}: mean |difference of log-probability| from F32: {our_difference:.5}, candle {peer_difference:.5}");
    assert!(our_difference <= 1.1 * peer_difference, "{name}: {our_difference} is beyond 1.1 * {peer_difference}");
    our_difference
}

/// One test, because each part takes all cores and the F32 logits serve all of them.
#[test]
fn default_model_matches_its_oracles() {
    let path = common::default_model();
    let entries = entries();
    let all: Vec<&Entry> = entries.iter().collect();
    assert!(all.iter().all(|entry| entry.tokens.iter().rev().skip(1).all(|&token| token != EOS)));

    let mut ours = Ours::open(&path, Precision::F32, KvDType::F32);
    let f32_rows = ours.run(&all, false);
    drop(ours);
    assert_greedy(&all, &f32_rows, "kvern");
    let mut oracle = Peer::open(&mut requantized(&path, GgmlDType::F32));
    let shortened: Vec<Entry> = entries.iter().map(Entry::shortened).collect();
    let shortened: Vec<&Entry> = shortened.iter().collect();
    assert_greedy(&shortened, &run_peer(&mut oracle, &shortened, false), "candle");
    drop(oracle);

    // A third of the prompts, of every kind, for the slower comparison of all logits.
    let third = |i: &usize| i.is_multiple_of(3);
    let some: Vec<&Entry> = (0..all.len()).filter(third).map(|i| all[i]).collect();
    let some_f32: Vec<Rows> = (0..all.len()).filter(third).map(|i| f32_rows[i].clone()).collect();
    drop(f32_rows);

    let mut file = std::fs::File::open(&path).unwrap();
    let mut stored = Ours::open(&path, Precision::AsStored, KvDType::F32);
    let q4_1 = check_quantized("Q4_1", &mut stored, &mut Peer::open(&mut file), &some, &some_f32);
    drop(stored);

    let mut bytes = requantized(&path, GgmlDType::Q8_0);
    let folder = tempfile::tempdir().unwrap();
    let q8_0 = folder.path().join("q8_0.gguf");
    std::fs::write(&q8_0, bytes.get_ref()).unwrap();
    let mut stored = Ours::open(&q8_0, Precision::AsStored, KvDType::F32);
    check_quantized("Q8_0", &mut stored, &mut Peer::open(&mut bytes), &some, &some_f32);
    drop(stored);

    let mut cached = Ours::open(&path, Precision::F32, KvDType::BF16);
    let vocab = some_f32[0].len() / some[0].tokens.len();
    let bf16 = log_probability_difference(&cached.run(&some, true), &some_f32, vocab);
    println!("BF16 cache: mean |difference of log-probability| from an F32 cache: {bf16:.5}");
    // BF16 keeps 8 bits of each value's own magnitude, int8 in blocks 8 bits of the largest of 32, and in every product.
    assert!(bf16 < q4_1, "a BF16 cache costs {bf16}, more than int8 activations do ({q4_1})");
}
