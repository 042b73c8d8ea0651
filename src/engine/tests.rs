use super::*;
use crate::engine::EngineLimits;
use crate::request::{Engine as _, Request, SamplingParams, Terms};
use crate::telemetry::TelemetryInfo;
use kvern_core::{CoreConfig, RequestId};
use std::sync::mpsc::sync_channel;

fn telemetry() -> Telemetry {
    Telemetry::new(&TelemetryInfo {
        model_name: "tiny".to_owned(),
        max_model_len: 64,
        block_size: 16,
        num_blocks: 8,
        kv_cache_bytes: 1,
        kv_dtype: "bf16",
        prefix_caching: true,
        classes: vec!["normal".to_owned()],
    })
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
        stop_tokens: Vec::new(),
        min_tokens: 0,
        logit_bias: Vec::new(),
        logprobs: None,
    }
}

fn request(id: RequestId, prompt: Vec<u32>) -> Request {
    Request {
        id,
        external_id: "test".into(),
        prompt,
        sampling: greedy(),
        max_new_tokens: 4,
        n: 1,
        terms: Terms::default(),
    }
}

/// An engine whose worker takes steps and never reports one.
fn stuck() -> (EngineLoop, EngineHandle, Receiver<StepCommand>) {
    let telemetry = Arc::new(telemetry());
    let limits = EngineLimits { waiting_max: 1_000, stall_max: Duration::from_secs(60) };
    let (handle, inbox, shared) = EngineHandle::new(limits, Arc::clone(&telemetry));
    let (steps, commands) = sync_channel(1);
    let engine = EngineLoop::new(EngineParts {
        core: Core::new(CoreConfig::mixed(8, 16)),
        recorder: None,
        inbox,
        workers: vec![steps],
        mover: None,
        shared,
        telemetry,
        target_saturation: 700,
    });
    (engine, handle, commands)
}

#[test]
fn no_message_is_lost_however_many_come_at_once() {
    let (mut engine, handle, _commands) = stuck();
    let submitted: Vec<_> = (0..700).map(|at| handle.submit(request(handle.next_id(), vec![at, at + 1]))).collect();
    while engine.core.stats().waiting < 700 {
        let before = engine.core.stats().waiting;
        assert!(engine.take_messages());
        assert!(engine.core.stats().waiting > before, "{before} of 700 requests came");
    }
    assert!(submitted.iter().all(Result::is_ok));
}

#[test]
fn thousands_that_leave_at_once_are_cancelled_one_after_the_other() {
    // Each level of a recursion would take some hundred bytes of this thread's stack.
    let run = || {
        let (mut engine, handle, _commands) = stuck();
        let submitted: Vec<_> =
            (0..1_000).map(|at| handle.submit(request(handle.next_id(), vec![at, at + 1]))).collect();
        while engine.core.stats().waiting < 1_000 {
            assert!(engine.take_messages());
        }
        drop(submitted);
        engine.withdraw_closed();
        assert_eq!(engine.core.stats().waiting, 0);
    };
    let thread = std::thread::Builder::new().stack_size(128 << 10).spawn(run).expect("a thread can be started");
    thread.join().expect("nobody panics");
}
