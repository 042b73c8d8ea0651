//! Who computes a request is invisible: separate prefill and decode workers, over one KV pool or a pool each, say what one
//! worker says, and go on when one of them dies.
#![allow(clippy::unwrap_used)]

mod support;

use kvern::config::{PoolLayout, WorkerLayout};
use kvern::request::{Engine, TokenEvent};
use kvern::runtime::Runtime;
use kvern_core::FinishReason;
use support::{
    Answer, Ask, EngineConfig, RuntimeOptions, SchedulingConfig, collect, engine, greedy, metric, mixed_asks, options,
    prompt, start, submit, together, tokens,
};

const PREFILL: usize = 0;
const DECODE: usize = 1;

fn split(pools: PoolLayout, engine: EngineConfig) -> Runtime {
    let scheduling = SchedulingConfig { workers: WorkerLayout::Split, pools, ..SchedulingConfig::default() };
    start(&RuntimeOptions { engine, scheduling, ..options() })
}

fn alone() -> Vec<Answer> {
    let mixed = start(&options());
    let answers = mixed_asks().iter().map(|ask| collect(submit(&mixed.handle, ask))).collect();
    mixed.join();
    answers
}

#[test]
fn split_workers_say_what_one_says() {
    let (asks, alone) = (mixed_asks(), alone());
    for pools in [PoolLayout::Shared, PoolLayout::Apart] {
        let runtime = split(pools, engine());
        assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone), "{pools:?}, cold");
        assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone), "{pools:?}, warm");
        runtime.join();
        // 20 blocks of 16 a pool: the longest request needs 215 tokens, so some are preempted.
        let block = 2 * 30 * 16 * 3 * 64 * 2;
        let blocks = if pools == PoolLayout::Apart { 40 } else { 20 };
        let memory = EngineConfig { kv_cache_memory_bytes: Some(blocks * block), max_model_len: Some(320), ..engine() };
        let tight = split(pools, memory);
        assert_eq!(tokens(&together(&tight, &asks)), tokens(&alone), "{pools:?}, under preemption");
        assert!(metric(&tight.handle, "vllm:num_preemptions_total") > 0.0, "memory was meant to be too tight");
        tight.join();
    }
}

#[test]
fn a_worker_that_dies_loses_no_request() {
    let (asks, alone) = (mixed_asks(), alone());
    for pools in [PoolLayout::Shared, PoolLayout::Apart] {
        for dying in [PREFILL, DECODE] {
            let runtime = split(pools, engine());
            let streams: Vec<_> = asks.iter().map(|ask| submit(&runtime.handle, ask)).collect();
            let mut streams = streams.into_iter();
            // The first request has been handed over; others are on their way.
            let first = collect(streams.next().unwrap());
            runtime.kill_worker(dying);
            let answers: Vec<Answer> = std::iter::once(first).chain(streams.map(collect)).collect();
            assert_eq!(tokens(&answers), tokens(&alone), "{pools:?}, worker {dying} dies");
            assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone), "{pools:?}, without worker {dying}");
            assert!(runtime.handle.health().live);
            runtime.join();
        }
    }
}

#[test]
fn without_workers_every_stream_ends() {
    let runtime = split(PoolLayout::Shared, engine());
    let ask = Ask { prompt: prompt(1, 700), sampling: greedy(), max_new_tokens: 500 };
    let streams: Vec<_> = (0..4).map(|_| submit(&runtime.handle, &ask)).collect();
    runtime.kill_worker(PREFILL);
    runtime.kill_worker(DECODE);
    for mut stream in streams {
        let mut last = None;
        while let Some(event) = stream.blocking_recv() {
            last = Some(event);
        }
        let finished = matches!(last, Some(TokenEvent::Finished { reason: FinishReason::Length, .. }));
        assert!(!finished, "nobody was left to finish it");
    }
    runtime.join();
}
