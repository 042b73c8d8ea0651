use super::*;
use crate::engine::EngineLimits;
use crate::request::{Engine as _, Request, SamplingParams, Terms};
use crate::telemetry::TelemetryInfo;
use crate::worker::SequenceChange;
use kvern_core::{CoreConfig, LAST_SAMPLED, RequestId, Sampled};
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
        workers: vec!["mixed"],
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
    stuck_with(CoreConfig::mixed(8, 16))
}

fn stuck_with(config: CoreConfig) -> (EngineLoop, EngineHandle, Receiver<StepCommand>) {
    let telemetry = Arc::new(telemetry());
    let limits = EngineLimits { waiting_max: 1_000, stall_max: Duration::from_secs(60) };
    let (handle, inbox, shared) = EngineHandle::new(limits, Arc::clone(&telemetry));
    let (steps, commands) = sync_channel(2);
    let engine = EngineLoop::new(EngineParts {
        core: Core::new(config),
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

/// The step's result with this token for each slice.
fn result(command: StepCommand, token: u32) -> Message {
    let StepCommand { plan, mut changes, mut sampled, .. } = command;
    changes.clear();
    sampled.extend(plan.slices.iter().map(|slice| (slice.request, Sampled::Token(token))));
    let (busy, idle) = (Duration::from_micros(3), Duration::from_micros(2));
    let (logprobs, error) = (Vec::new(), None);
    Message::StepDone(Box::new(StepResult { plan, sampled, changes, logprobs, device_us: 1, busy, idle, error }))
}

#[test]
fn a_worker_has_two_steps_and_forgets_a_request_after_both() {
    let (mut engine, handle, commands) =
        stuck_with(CoreConfig { plan_ahead: true, running_max: 1, ..CoreConfig::mixed(8, 16) });
    let first = handle.next_id();
    let sampling = SamplingParams { stop_tokens: vec![9], ..greedy() };
    let mut events = handle.submit(Request { sampling, ..request(first, vec![1, 2]) }).expect("there is room");
    let second = handle.next_id();
    let _waits = handle.submit(request(second, vec![3, 4])).expect("there is room");
    while engine.core.stats().waiting < 2 {
        assert!(engine.take_messages());
    }
    engine.start_steps();
    let (prompt, step) = (commands.try_recv().expect("the prompt"), commands.try_recv().expect("the one ahead of it"));
    assert!(!prompt.follows, "the worker had nothing to do before");
    engine.take(result(prompt, 5));
    engine.start_steps();
    let ahead = commands.try_recv().expect("one ahead again");
    assert_eq!((&step.plan.tokens[..], &ahead.plan.tokens[..]), (&[LAST_SAMPLED][..], &[LAST_SAMPLED][..]));
    assert!(step.follows && ahead.follows);
    engine.take(result(step, 9));
    engine.start_steps();
    assert!(commands.try_recv().is_err(), "it has ended, and its place is not free yet");
    engine.take(result(ahead, 6));
    engine.start_steps();
    let next = commands.try_recv().expect("the other prompt");
    assert!(next.follows);
    assert!(matches!(next.changes[..], [
        SequenceChange::Forget(old),
        SequenceChange::Admit(new, _),
    ] if (old, new) == (first, second)));
    let mut tokens = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let crate::request::TokenEvent::Token { token, .. } = event {
            tokens.push(token);
        }
    }
    assert_eq!(tokens, [5, 9]);
}

/// A worker that was asked for when there was nothing to do has lost no time until there is.
#[test]
fn a_step_follows_the_last_one_unless_there_was_nothing_to_do() {
    let (mut engine, handle, commands) = stuck();
    let submit = |engine: &mut EngineLoop, tokens: u32| {
        let events = handle.submit(Request { max_new_tokens: tokens, ..request(handle.next_id(), vec![1, 2]) });
        assert!(engine.take_messages());
        events.expect("there is room")
    };
    let mut follows = Vec::new();
    let mut step = |engine: &mut EngineLoop| {
        engine.start_steps();
        let command = commands.try_recv().expect("a step");
        follows.push(command.follows);
        engine.take(result(command, 5));
    };
    let _first = submit(&mut engine, 2);
    step(&mut engine);
    step(&mut engine);
    // It has ended; the next one came in the same turn.
    let _second = submit(&mut engine, 1);
    step(&mut engine);
    engine.start_steps();
    assert!(commands.try_recv().is_err(), "nothing is left");
    let _third = submit(&mut engine, 2);
    step(&mut engine);
    step(&mut engine);
    assert_eq!(follows, [false, true, true, false, true]);
    let value = |name: &str| {
        let series = format!("kvern:{name}_total{{engine=\"0\",model_name=\"tiny\",worker=\"mixed\"}} ");
        let text = handle.metrics_text();
        let line = text.lines().find_map(|line| line.strip_prefix(&series)).expect("it has a series");
        line.parse::<f64>().expect("a number") * 1e6
    };
    let found = ["device_busy_seconds", "device_idle_seconds", "steps_ahead"].map(value);
    assert!(found.iter().zip([15.0, 10.0, 0.0]).all(|(found, expected)| (found - expected).abs() < 1e-6), "{found:?}");
}
