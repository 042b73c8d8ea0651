//! Tokens per second of the default model beside candle-transformers' quantized llama: same file, same threads, in turns.
//!
//! `make bench` runs it; alone: `cargo bench -p kvern-models --bench forward`. Each line is one workload; a figure is the
//! median of the rounds with the slowest and the fastest. It fails if candle is ahead anywhere.

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/paged/mod.rs"]
mod paged;
#[path = "../tests/peer/mod.rs"]
mod peer;

use std::time::Instant;

use kvern_kernels::{CpuOptions, Device, KvCache, KvDType, Precision};
use kvern_models::{LoadFormat, LoadOptions, LoadedModel, ModelFiles, StepLimits, load};
use paged::{BLOCK_SIZE, Slice, blocks_of, cpu_options, scattered, step};
use peer::Peer;

const ROUNDS: usize = 5;
const CONTEXT: usize = 128;
const STREAMS_MAX: usize = 16;
const BLOCKS: usize = 1024;

/// What a round times: `tokens` at once of one sequence, or `steps` of one token for each of `streams` sequences.
enum Workload {
    Prefill { tokens: usize },
    Decode { streams: usize, steps: usize },
}

const WORKLOADS: [(&str, Workload); 4] = [
    ("prefill 512", Workload::Prefill { tokens: 512 }),
    ("decode 1", Workload::Decode { streams: 1, steps: 32 }),
    ("decode 8", Workload::Decode { streams: 8, steps: 16 }),
    ("decode 16", Workload::Decode { streams: 16, steps: 16 }),
];

/// Arbitrary ids of the vocabulary; time does not depend on them.
fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 1000 + i * 37 % 40_000).collect()
}

struct Ours {
    loaded: LoadedModel,
    kv: KvCache,
}

impl Ours {
    /// Seconds of one round.
    fn round(&mut self, workload: &Workload) -> f64 {
        let model = &mut *self.loaded.model;
        match *workload {
            Workload::Prefill { tokens } => {
                let table = scattered(1, blocks_of(tokens), BLOCKS);
                let slice = Slice { start: 0, tokens: &ids(tokens), table: &table };
                seconds(|| _ = step(model, &mut self.kv, &[slice], &[tokens as u32 - 1]))
            }
            Workload::Decode { streams, steps } => {
                let span = blocks_of(CONTEXT + steps);
                let tables = scattered(1, streams * span, BLOCKS);
                let prompt = ids(CONTEXT);
                for table in tables.chunks(span) {
                    step(model, &mut self.kv, &[Slice { start: 0, tokens: &prompt, table }], &[]);
                }
                let inputs = ids(streams);
                let rows: Vec<u32> = (0..streams as u32).collect();
                seconds(|| {
                    for made in 0..steps {
                        let slices: Vec<Slice<'_>> = inputs
                            .chunks(1)
                            .zip(tables.chunks(span))
                            .map(|(tokens, table)| Slice { start: CONTEXT + made, tokens, table })
                            .collect();
                        step(model, &mut self.kv, &slices, &rows);
                    }
                })
            }
        }
    }
}

/// Seconds of one round; `peer` is as [`peer_ready`] left it.
fn peer_round(peer: &Peer, workload: &Workload) -> f64 {
    let mut peer = peer.clone();
    match *workload {
        Workload::Prefill { tokens } => seconds(|| _ = peer.forward(&ids(tokens), 1, 0)),
        Workload::Decode { streams, steps } => {
            let inputs = ids(streams);
            seconds(|| {
                for made in 0..steps {
                    peer.forward(&inputs, streams, CONTEXT + made);
                }
            })
        }
    }
}

/// A peer with the sequences that `workload` continues in its cache.
fn peer_ready(peer: &Peer, workload: &Workload) -> Peer {
    let mut peer = peer.clone();
    if let Workload::Decode { streams, .. } = *workload {
        // One position at a time: with several streams candle takes no longer input.
        for (position, id) in ids(CONTEXT).into_iter().enumerate() {
            peer.forward(&vec![id; streams], streams, position);
        }
    }
    peer
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Median, least and most.
fn spread(mut rates: Vec<f64>) -> (f64, f64, f64) {
    rates.sort_by(f64::total_cmp);
    (rates[rates.len() / 2], rates[0], rates[rates.len() - 1])
}

fn main() {
    let path = common::default_model();
    let threads = std::thread::available_parallelism().unwrap().get();
    // SAFETY: no other thread runs yet; candle reads it once, when its pool starts.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    let peer = Peer::open(&mut std::fs::File::open(&path).unwrap());

    let device = Device::cpu(CpuOptions { threads: Some(threads), ..cpu_options() }).unwrap();
    let limits = StepLimits { tokens_max: 512, sequences_max: STREAMS_MAX, context_max: 1024 };
    let options = LoadOptions { precision: Precision::AsStored, format: LoadFormat::Files, limits };
    let loaded = load(&device, &ModelFiles::open(&path).unwrap(), &options, &mut |_| {}).unwrap();
    let kv = KvCache::new(&device, loaded.kv_shape(BLOCKS, BLOCK_SIZE, KvDType::BF16)).unwrap();
    let mut ours = Ours { loaded, kv };

    println!("SmolLM2-135M-Instruct Q4_1, context {CONTEXT}, {}; tokens/s, median (least to most)", device.describe());
    let mut behind = Vec::new();
    for (name, workload) in &WORKLOADS {
        let tokens = match *workload {
            Workload::Prefill { tokens } => tokens,
            Workload::Decode { streams, steps } => streams * steps,
        } as f64;
        let (mut our_rates, mut peer_rates) = (Vec::new(), Vec::new());
        let peer = peer_ready(&peer, workload);
        // The first round warms caches and does not count.
        for round in 0..=ROUNDS {
            let (our_rate, peer_rate) = (tokens / ours.round(workload), tokens / peer_round(&peer, workload));
            if round > 0 {
                our_rates.push(our_rate);
                peer_rates.push(peer_rate);
            }
        }
        let (rate, least, most) = spread(our_rates);
        let (peer_rate, peer_least, peer_most) = spread(peer_rates);
        println!(
            "{name:12} kvern {rate:7.1} ({least:.1} to {most:.1})   candle {peer_rate:7.1} ({peer_least:.1} to \
             {peer_most:.1})   ratio {:.2}",
            rate / peer_rate
        );
        if rate <= peer_rate {
            behind.push(*name);
        }
    }
    assert!(behind.is_empty(), "candle is ahead at {behind:?}");
}
