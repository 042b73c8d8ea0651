//! Who computes a request is invisible: separate prefill and decode workers, over one KV pool or a pool each, say what one
//! worker says, and go on when one of them dies. So is when a step is planned: workers whose steps are planned before the
//! tokens of the last are known say the same.
#![allow(clippy::unwrap_used)]

mod support;

use kvern::config::{PoolLayout, RecordConfig, WorkerLayout};
use kvern::replay::replay;
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

/// 32 requests without penalties, as no step is planned ahead of one with them; a third of them find a stop token.
fn plain_asks() -> Vec<Ask> {
    let mut asks = mixed_asks();
    for ask in &mut asks {
        (ask.sampling.repetition_penalty, ask.sampling.frequency_penalty) = (1.0, 0.0);
    }
    let mixed = start(&options());
    let answers = together(&mixed, &asks);
    mixed.join();
    for (ask, answer) in asks.iter_mut().zip(&answers).step_by(3) {
        ask.sampling.stop_tokens = vec![answer.tokens[answer.tokens.len() / 2]];
    }
    asks
}

fn answers(asks: &[Ask]) -> Vec<Answer> {
    let mixed = start(&options());
    let answers = together(&mixed, asks);
    mixed.join();
    answers
}

/// Does with a server that plans ahead what `run` says, and checks that all of it can be repeated; gives the number of steps that
/// were planned ahead.
fn ahead(workers: WorkerLayout, pools: PoolLayout, engine: EngineConfig, run: impl Fn(&Runtime)) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ahead.rec");
    let scheduling = SchedulingConfig { workers, pools, ..SchedulingConfig::default() };
    let record = Some(RecordConfig { path: path.clone(), bytes_max: 1 << 30, prompts: false });
    let runtime = start(&RuntimeOptions { engine, scheduling, record, plan_ahead: Some(true), ..options() });
    run(&runtime);
    runtime.join();
    let outcome = replay(std::fs::File::open(&path).unwrap(), "recording").unwrap();
    assert!(outcome.is_same(), "{workers:?}, {pools:?}: {:?}", outcome.end);
    outcome.replayed.steps_ahead
}

#[test]
fn steps_ahead_say_what_steps_one_by_one_say() {
    let asks = plain_asks();
    let expected = answers(&asks);
    let stopped = expected.iter().filter(|answer| answer.reason == FinishReason::Stop).count();
    assert!(stopped >= 10, "{stopped} requests found their stop token");
    let layouts = [
        (WorkerLayout::Mixed, PoolLayout::Shared),
        (WorkerLayout::Split, PoolLayout::Shared),
        (WorkerLayout::Split, PoolLayout::Apart),
    ];
    for (workers, pools) in layouts {
        let num_ahead = ahead(workers, pools, engine(), |runtime| {
            assert_eq!(tokens(&together(runtime, &asks)), tokens(&expected), "{workers:?}, {pools:?}, cold");
            assert_eq!(tokens(&together(runtime, &asks)), tokens(&expected), "{workers:?}, {pools:?}, warm");
        });
        assert!(num_ahead > 5, "{workers:?}, {pools:?}: {num_ahead} steps ahead");
    }
    let block = 2 * 30 * 16 * 3 * 64 * 2;
    let memory = EngineConfig { kv_cache_memory_bytes: Some(20 * block), max_model_len: Some(320), ..engine() };
    ahead(WorkerLayout::Mixed, PoolLayout::Shared, memory, |runtime| {
        assert_eq!(tokens(&together(runtime, &asks)), tokens(&expected), "under preemption");
        assert!(metric(&runtime.handle, "vllm:num_preemptions_total") > 0.0, "memory was meant to be too tight");
    });
    // With penalties beside them, there is none ahead while those run.
    let mixed: Vec<Ask> = mixed_asks().into_iter().take(8).chain(asks.into_iter().skip(8)).collect();
    let expected = answers(&mixed);
    ahead(WorkerLayout::Mixed, PoolLayout::Shared, engine(), |runtime| {
        assert_eq!(tokens(&together(runtime, &mixed)), tokens(&expected), "with penalties");
    });
}

#[test]
fn steps_ahead_outlive_clients_that_leave_and_workers_that_die() {
    let asks = plain_asks();
    let expected = answers(&asks);
    let num_ahead = ahead(WorkerLayout::Split, PoolLayout::Shared, engine(), |runtime| {
        let streams: Vec<_> = asks.iter().map(|ask| submit(&runtime.handle, ask)).collect();
        let mut streams: Vec<_> = streams.into_iter().map(Some).collect();
        // Every fifth client leaves at its second token.
        for stream in streams.iter_mut().step_by(5) {
            let mut leaving = stream.take().unwrap();
            for _ in 0..3 {
                leaving.blocking_recv();
            }
        }
        runtime.kill_worker(DECODE);
        for (at, stream) in streams.into_iter().enumerate() {
            if let Some(stream) = stream {
                assert_eq!(collect(stream).tokens, expected[at].tokens, "request {at}");
            }
        }
        assert_eq!(tokens(&together(runtime, &asks)), tokens(&expected), "on the prefill worker alone");
        assert!(runtime.handle.health().live);
    });
    assert!(num_ahead > 5, "{num_ahead} steps ahead");
}
