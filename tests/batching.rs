//! Batching is invisible: what a request says does not depend on what else runs, on the prefix cache, or on preemption.
#![allow(clippy::unwrap_used)]

mod support;

use kvern::request::TokenEvent;
use kvern_core::{CancelReason, FinishReason};
use std::time::{Duration, Instant};
use support::{
    Answer, Ask, EngineConfig, RuntimeOptions, collect, engine, greedy, metric, mixed_asks, options, prompt, start,
    submit, together, tokens,
};

const ABORTED: &str = "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\"";

fn with(engine: EngineConfig) -> RuntimeOptions {
    RuntimeOptions { engine, ..options() }
}

#[test]
fn a_batch_says_what_each_says_alone() {
    let asks = mixed_asks();
    let uncached = start(&with(EngineConfig { prefix_caching: false, ..engine() }));
    let alone: Vec<Answer> = asks.iter().map(|a| collect(submit(&uncached.handle, a))).collect();
    for (ask, answer) in asks.iter().zip(&alone) {
        assert_eq!(answer.tokens.len() as u32, ask.max_new_tokens);
        assert_eq!(answer.usage.cached_tokens, 0);
    }
    assert_eq!(tokens(&together(&uncached, &asks)), tokens(&alone), "prefix cache off");
    uncached.join();

    let cached = start(&options());
    assert_eq!(tokens(&together(&cached, &asks)), tokens(&alone), "prefix cache on, cold");
    let warm = together(&cached, &asks);
    assert_eq!(tokens(&warm), tokens(&alone), "prefix cache on, warm");
    assert!(warm.iter().filter(|a| a.usage.cached_tokens > 0).count() > 20, "the second run hits the cache");
    cached.join();

    // 20 blocks of 16 hold 320 tokens; the longest request needs 215.
    let block = 2 * 30 * 16 * 3 * 64 * 2;
    let memory = EngineConfig { kv_cache_memory_bytes: Some(20 * block), max_model_len: Some(320), ..engine() };
    let tight = start(&with(memory));
    assert_eq!(tight.account.kv_blocks, 20);
    let preempted = together(&tight, &asks);
    assert_eq!(tokens(&preempted), tokens(&alone), "under preemption");
    assert!(metric(&tight.handle, "vllm:num_preemptions_total") > 0.0, "memory was meant to be too tight");
    tight.join();
}

/// On a CPU by the host's clock; what the start computes is not counted.
#[test]
fn a_worker_tells_how_long_it_is_at_steps_and_between_them() {
    let runtime = start(&options());
    let (handle, started) = (runtime.handle.clone(), Instant::now());
    let told = || {
        ["device_busy_seconds", "device_idle_seconds", "steps_ahead"].map(|name| {
            metric(&handle, &format!("kvern:{name}_total{{engine=\"0\",model_name=\"test\",worker=\"mixed\"}}"))
        })
    };
    assert_eq!(told(), [0.0; 3]);
    together(&runtime, &mixed_asks());
    runtime.join();
    let (wall, [busy, idle, ahead]) = (started.elapsed().as_secs_f64(), told());
    assert!(busy > 0.0 && idle > 0.0 && busy + idle <= wall, "{busy} s and {idle} s of {wall} s");
    assert_eq!(ahead, 0.0, "a CPU gains nothing by it");
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let runtime = start(&options());
    let stem = prompt(5, 1000);
    let ask =
        |tail: u64| Ask { prompt: [stem.clone(), prompt(tail, 20)].concat(), sampling: greedy(), max_new_tokens: 1 };
    let time = |a: &Ask| {
        let started = Instant::now();
        (collect(submit(&runtime.handle, a)), started.elapsed())
    };
    let (cold, cold_time) = time(&ask(1));
    let (warm, warm_time) = time(&ask(2));
    println!("TTFT of 1,020 tokens: {cold_time:?} cold, {warm_time:?} with {} cached", warm.usage.cached_tokens);
    assert_eq!((cold.usage.cached_tokens, warm.usage.cached_tokens), (0, 992), "62 whole blocks of 16 are shared");
    assert!(warm_time * 5 < cold_time, "28 of 1,020 tokens were computed, yet the time fell only to {warm_time:?}");
    runtime.join();
}

#[test]
fn a_client_that_goes_away_frees_its_blocks() {
    let runtime = start(&options());
    let long = Ask { prompt: prompt(1, 700), sampling: greedy(), max_new_tokens: 1000 };
    // One leaves while it prefills, one while it decodes.
    let prefilling = submit(&runtime.handle, &long);
    drop(prefilling);
    let mut decoding = submit(&runtime.handle, &Ask { prompt: prompt(2, 20), ..long.clone() });
    assert!(matches!(decoding.blocking_recv(), Some(TokenEvent::Accepted)));
    assert!(matches!(decoding.blocking_recv(), Some(TokenEvent::Token { .. })));
    drop(decoding);
    let short = Ask { prompt: prompt(3, 5), sampling: greedy(), max_new_tokens: 3 };
    assert_eq!(collect(submit(&runtime.handle, &short)).reason, FinishReason::Length);
    let deadline = Instant::now() + Duration::from_secs(20);
    while metric(&runtime.handle, "vllm:num_requests_running") + metric(&runtime.handle, "vllm:kv_cache_usage_perc")
        > 0.0
    {
        assert!(Instant::now() < deadline, "blocks are still held");
        std::thread::yield_now();
    }
    assert_eq!(metric(&runtime.handle, ABORTED), 2.0);
    runtime.join();
}

#[test]
fn a_slow_reader_is_cancelled_with_bounded_memory() {
    let runtime = start(&options());
    let mut events = submit(&runtime.handle, &Ask { prompt: prompt(1, 4), sampling: greedy(), max_new_tokens: 1500 });
    // Nothing is read until the engine has given up. A steady reader passes the time: 1,200 tokens take longer than the
    // slow one's 1,024, as both get one a step.
    let steady = Ask { prompt: prompt(2, 4), sampling: greedy(), max_new_tokens: 1200 };
    assert_eq!(collect(submit(&runtime.handle, &steady)).tokens.len(), 1200);
    assert_eq!(metric(&runtime.handle, ABORTED), 1.0, "the slow reader was never cancelled");
    let mut held = 0;
    while events.blocking_recv().is_some() {
        held += 1;
    }
    assert_eq!(held, 1024, "as many events as the channel holds");
    runtime.join();
}

#[test]
fn draining_finishes_what_runs_and_takes_nothing_new() {
    use kvern::request::{Engine, SubmitError};
    let runtime = start(&options());
    let ask = Ask { prompt: prompt(1, 30), sampling: greedy(), max_new_tokens: 30 };
    let running = submit(&runtime.handle, &ask);
    runtime.handle.drain();
    let refused = runtime.handle.submit(kvern::request::Request {
        id: runtime.handle.next_id(),
        external_id: "late".into(),
        prompt: ask.prompt.clone(),
        sampling: ask.sampling.clone(),
        max_new_tokens: 1,
        n: 1,
        terms: kvern::request::Terms::default(),
    });
    assert_eq!(refused.unwrap_err(), SubmitError::Draining);
    assert_eq!(collect(running).tokens.len(), 30);
    runtime.join();
}

#[test]
fn aborting_tells_every_stream() {
    let runtime = start(&options());
    let asks: Vec<_> =
        (0..4).map(|i| Ask { prompt: prompt(i, 40), sampling: greedy(), max_new_tokens: 1900 }).collect();
    let streams: Vec<_> = asks.iter().map(|a| submit(&runtime.handle, a)).collect();
    runtime.handle.drain();
    runtime.handle.abort();
    for stream in streams {
        assert_eq!(collect(stream).reason, FinishReason::Cancelled(CancelReason::Shutdown));
    }
    runtime.join();
}
