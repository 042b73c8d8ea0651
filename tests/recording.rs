//! What a real server decided, its scheduler decides again: under preemption, cancels, deadlines, and the loss of a worker.
#![allow(clippy::unwrap_used)]

mod support;

use kvern::config::{PoolLayout, RecordConfig, WorkerLayout};
use kvern::replay::replay;
use kvern::request::Terms;
use std::fs::File;
use std::time::Duration;
use support::{
    EngineConfig, RuntimeOptions, SchedulingConfig, collect, engine, metric, mixed_asks, options, start, submit_as,
};

#[test]
fn a_recorded_run_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let layouts = [
        (WorkerLayout::Mixed, PoolLayout::Shared, 20),
        (WorkerLayout::Split, PoolLayout::Shared, 20),
        (WorkerLayout::Split, PoolLayout::Apart, 40),
    ];
    for (at, (workers, pools, blocks)) in layouts.into_iter().enumerate() {
        let path = folder.path().join(format!("{at}.rec"));
        let block = 2 * 30 * 16 * 3 * 64 * 2;
        let memory = EngineConfig { kv_cache_memory_bytes: Some(blocks * block), max_model_len: Some(320), ..engine() };
        let runtime = start(&RuntimeOptions {
            engine: memory,
            scheduling: SchedulingConfig { workers, pools, ..SchedulingConfig::default() },
            record: Some(RecordConfig { path: path.clone(), bytes_max: 1 << 30, prompts: false }),
            ..options()
        });
        let terms = |at: usize| Terms {
            timeout: at.is_multiple_of(5).then_some(Duration::from_millis(300)),
            ..Terms::default()
        };
        let asks = mixed_asks();
        let mut streams: Vec<_> =
            asks.iter().enumerate().map(|(at, ask)| Some(submit_as(&runtime.handle, ask, terms(at)))).collect();
        // Every seventh client leaves, before or while it is served.
        streams.iter_mut().step_by(7).for_each(|stream| drop(stream.take()));
        if workers == WorkerLayout::Split {
            runtime.kill_worker(0);
        }
        for stream in streams.into_iter().flatten() {
            collect(stream);
        }
        assert!(metric(&runtime.handle, "vllm:num_preemptions_total") > 0.0, "memory was meant to be too tight");
        runtime.join();
        let outcome = replay(File::open(&path).unwrap(), "recording").unwrap();
        assert!(outcome.is_same(), "{workers:?}, {pools:?}: {:?}", outcome.end);
        assert!(outcome.replayed.compared > 100, "{workers:?}, {pools:?}: {outcome:?}");
    }
}
