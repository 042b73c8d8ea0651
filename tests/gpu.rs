//! The server on a GPU that is the shim: the same tokens as on the CPU, memory that is accounted before it is taken, and
//! failures that everybody is told of.
#![allow(clippy::unwrap_used)]

mod support;

use kvern::config::{Config, DeviceConfig, Environment, PoolLayout, WorkerLayout};
use kvern::request::{Engine, TokenEvent};
use kvern::runtime::{self, Runtime, StartError, StartProgress};
use kvern_core::FinishReason;
use kvern_cuda_shim::device::{Call, Options, ShimDriver};
use kvern_kernels::{CpuOptions, Device, Element, GpuOptions, KvDType, Precision};
use kvern_models::{Checkpoint, ModelFiles};
use std::path::Path;
use std::sync::Arc;
use support::{
    Answer, Ask, EngineConfig, RuntimeOptions, SchedulingConfig, collect, engine, greedy, metric, options, submit,
    together, tokens,
};

const VOCAB: u32 = 128;

fn model() -> ModelFiles {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/checkpoints/llama.gguf");
    ModelFiles::open(&path).unwrap()
}

fn small() -> RuntimeOptions {
    let engine = EngineConfig {
        precision: Precision::F32,
        kv_dtype: None,
        max_model_len: Some(72),
        max_num_seqs: 6,
        max_num_batched_tokens: Some(48),
        kv_cache_memory_bytes: Some(4 << 20),
        device: DeviceConfig { memory_utilization: 1000, ..DeviceConfig::default() },
        ..engine()
    };
    RuntimeOptions { engine, ..options() }
}

fn on_cpu(options: &RuntimeOptions) -> Runtime {
    let device = Device::cpu(CpuOptions::default()).unwrap();
    runtime::start_on(device, &model(), options, &mut |_| {}).unwrap()
}

fn try_on_gpu(options: &RuntimeOptions, shim: Options) -> (Arc<ShimDriver>, Result<Runtime, StartError>) {
    let driver = ShimDriver::new(shim);
    let programmatic_launches = options.engine.device.programmatic_launches;
    let gpu = GpuOptions { programmatic_launches, ..Element::F32.into() };
    let device = Device::gpu(Arc::clone(&driver) as _, gpu).unwrap();
    let runtime = runtime::start_on(device, &model(), options, &mut |_| {});
    (driver, runtime)
}

fn on_gpu(options: &RuntimeOptions) -> (Arc<ShimDriver>, Runtime) {
    on_gpu_like(options, Options::default())
}

fn on_gpu_like(options: &RuntimeOptions, shim: Options) -> (Arc<ShimDriver>, Runtime) {
    let (driver, runtime) = try_on_gpu(options, shim);
    (driver, runtime.unwrap_or_else(|error| panic!("{error}")))
}

/// Requests of all kinds of sampling, some with a common prefix.
fn asks() -> Vec<Ask> {
    let token = |seed: u32, at: u32| (seed * 53 + at * 17 + at * at % 11) % VOCAB;
    (0..10u32)
        .map(|i| {
            let stem = if i % 3 == 0 { 16 } else { 0 };
            let own = 3 + i * 5 % 20;
            let prompt = (0..stem).map(|at| token(99, at)).chain((0..own).map(|at| token(i, at))).collect();
            let mut sampling = greedy();
            sampling.seed = u64::from(i) * 31;
            sampling.temperature = [0.0, 0.8, 1.2][i as usize % 3];
            sampling.top_p = [1.0, 0.9][i as usize / 3 % 2];
            sampling.top_k = [0, 12][i as usize % 2];
            sampling.repetition_penalty = [1.0, 1.0, 1.2][i as usize / 2 % 3];
            sampling.presence_penalty = [0.0, 0.5][i as usize / 4 % 2];
            sampling.logit_bias = if i == 4 { vec![(7, 100.0)] } else { Vec::new() };
            sampling.stop_tokens = vec![7];
            sampling.min_tokens = if i == 4 { 3 } else { 0 };
            Ask { prompt, sampling, max_new_tokens: 6 + i % 5 }
        })
        .collect()
}

fn alone() -> Vec<Answer> {
    let cpu = on_cpu(&small());
    let answers = asks().iter().map(|ask| collect(submit(&cpu.handle, ask))).collect();
    cpu.join();
    answers
}

#[test]
fn a_gpu_says_what_the_cpu_says() {
    let (asks, alone) = (asks(), alone());
    let split = SchedulingConfig { workers: WorkerLayout::Split, ..SchedulingConfig::default() };
    for scheduling in [SchedulingConfig::default(), split] {
        let layout = scheduling.workers;
        let (driver, runtime) = on_gpu(&RuntimeOptions { scheduling, ..small() });
        driver.clear_log();
        assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone), "{layout:?}, cold");
        assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone), "{layout:?}, with cached prefixes");
        let log = driver.log();
        assert!(log.iter().any(|line| line.starts_with("graph ")), "decode steps are captured ones");
        let allocations: Vec<_> = log.iter().filter(|line| line.starts_with("allocate")).collect();
        assert!(allocations.is_empty(), "nothing allocates after the start: {allocations:?}");
        runtime.join();
        assert_eq!(driver.refusals(), Vec::<String>::new());
    }
}

/// The split layout with so many multiprocessors for decode beside prefill.
fn divided(decode_multiprocessors: u32) -> RuntimeOptions {
    let scheduling = SchedulingConfig {
        workers: WorkerLayout::Split,
        decode_multiprocessors: Some(decode_multiprocessors),
        ..SchedulingConfig::default()
    };
    RuntimeOptions { scheduling, ..small() }
}

/// The streams of split workers with parts, as the log calls them: prefill's on the whole and on its part, and
/// decode's.
fn streams_of_parts(log: &[String]) -> [String; 4] {
    let ends = [" Normal", " Normal on p1 of 6 multiprocessors", " High", " High on p0 of 4 multiprocessors"];
    // The first one on the whole is what everything was loaded on.
    let made = |end| log.iter().rev().find_map(|line| line.strip_prefix("stream ")?.strip_suffix(end));
    ends.map(|end| made(end).unwrap_or_else(|| panic!("no stream{end} in {log:?}")).to_owned())
}

/// A worker has all of the device while it is alone at work, and a part of its own beside the other; what it says is
/// the same.
#[test]
fn split_workers_have_parts_beside_each_other_and_all_alone() {
    let (asks, alone) = (asks(), alone());
    let lone = Ask { prompt: (0..30).collect(), sampling: greedy(), max_new_tokens: 8 };
    for (seed, lazy) in [(0, false), (1, true)] {
        let shim = Options { multiprocessors: 10, seed, lazy, ..Options::default() };
        // Rounded up by the device.
        let (driver, runtime) = on_gpu_like(&divided(3), shim);
        let expected = "prefill on shim (sm_80, f32, all or 6 of 10 multiprocessors), \
                        decode on shim (sm_80, f32, all or 4 of 10 multiprocessors)";
        assert_eq!(runtime.account.device, expected);
        let streams = streams_of_parts(&driver.log());
        // What is loaded for a worker it waits for on a stream of its own.
        for own in [&streams[0], &streams[2]] {
            let end = format!(" {own}");
            assert!(driver.log().iter().any(|line| line.starts_with("wait ") && line.ends_with(&end)), "{own}");
        }
        let works = |stream: &String| {
            let is_work = |line: &&String| ["launch ", "gemm ", "graph ", "copy_"].iter().any(|w| line.starts_with(w));
            driver.log().iter().filter(is_work).any(|line| line.split(' ').any(|word| word == stream))
        };
        driver.clear_log();
        let answers: Vec<_> = (0..3).map(|_| collect(submit(&runtime.handle, &lone))).collect();
        assert!(answers.iter().all(|answer| answer.tokens.len() == 8 && answer.tokens == answers[0].tokens));
        assert_eq!(streams.each_ref().map(works), [true, false, true, false], "one at a time: {:?}", driver.log());

        driver.clear_log();
        for cached in [false, true] {
            assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone), "seed {seed}, prefixes cached: {cached}");
        }
        runtime.join();
        assert_eq!(streams.each_ref().map(works), [true; 4], "{streams:?}");
        let log = driver.log();
        let allocations: Vec<_> = log.iter().filter(|line| line.starts_with("allocate")).collect();
        assert!(allocations.is_empty(), "nothing allocates after the start: {allocations:?}");
        assert_eq!(driver.refusals(), Vec::<String>::new());
    }
}

/// Decode steps are captured with each share of the device, and counted so.
#[test]
fn decode_steps_are_captured_for_both_shares() {
    let totals = |options: &RuntimeOptions| {
        let mut heard = Vec::new();
        let device = Device::gpu(ShimDriver::new(Options::default()) as _, Element::F32).unwrap();
        let runtime = runtime::start_on(device, &model(), options, &mut |progress| match progress {
            StartProgress::Capture { done, total } => heard.push((done, total)),
            StartProgress::Weights(_) => {}
        });
        let runtime = runtime.unwrap_or_else(|error| panic!("{error}"));
        let row = |purpose: &str| runtime.account.table.iter().find(|(name, _)| name.starts_with(purpose)).unwrap().1;
        let reserve = row("captured steps");
        runtime.join();
        (heard, reserve)
    };
    // For 1, 2, 4 and 6 sequences.
    let split = SchedulingConfig { workers: WorkerLayout::Split, ..SchedulingConfig::default() };
    let (heard, reserve) = totals(&RuntimeOptions { scheduling: split, ..small() });
    assert_eq!(heard, (0..=4).map(|done| (done, 4)).collect::<Vec<_>>());
    let (heard, both) = totals(&divided(1));
    assert_eq!(heard, (0..=8).map(|done| (done, 8)).collect::<Vec<_>>());
    assert!(both > reserve, "{both} bytes, without parts {reserve}");
}

#[test]
fn a_division_that_cannot_be_made_is_refused() {
    let refused = |options: &RuntimeOptions, device: Device| {
        runtime::start_on(device, &model(), options, &mut |_| {}).err().unwrap().to_string()
    };
    let shim = || Device::gpu(ShimDriver::new(Options::default()) as _, Element::F32).unwrap();
    assert_eq!(refused(&divided(4), shim()), "expected 1 to 3 of the 4 multiprocessors of shim, found 4");
    let text = refused(&divided(4), Device::cpu(CpuOptions::default()).unwrap());
    assert!(text.starts_with("expected a GPU, whose multiprocessors can be divided, found cpu"), "{text}");
}

/// Launches that may begin before the one before has ended say the same, and all of a step's are such.
#[test]
fn launches_that_begin_early_say_the_same() {
    let device = DeviceConfig { programmatic_launches: true, ..small().engine.device };
    let options = RuntimeOptions { engine: EngineConfig { device, ..small().engine }, ..small() };
    let (driver, runtime) = on_gpu(&options);
    driver.clear_log();
    assert_eq!(tokens(&together(&runtime, &asks())), tokens(&alone()));
    runtime.join();
    let log = driver.log();
    let launches: Vec<_> = log.iter().filter(|line| line.starts_with("launch ")).collect();
    assert!(!launches.is_empty() && launches.iter().all(|line| line.contains(" early ")), "{launches:?}");
    assert_eq!(driver.refusals(), Vec::<String>::new());
}

/// Captured steps that were launched while the tokens of the step before were still to be waited for.
fn steps_ahead(log: &[String]) -> usize {
    let (mut awaited, mut fetching, mut ahead) = (Vec::new(), false, 0);
    for line in log {
        let mut words = line.split(' ');
        match (words.next().unwrap(), words.next().unwrap()) {
            ("copy_to_host", _) => fetching = true,
            ("record", event) if std::mem::take(&mut fetching) => awaited.push(event),
            ("synchronize", event) => awaited.retain(|other| *other != event),
            ("graph", _) if !awaited.is_empty() => ahead += 1,
            _ => {}
        }
    }
    ahead
}

/// Longer, and with nothing that needs the last token's id on the host.
fn unhindered(mut ask: Ask) -> Ask {
    ask.sampling.min_tokens = 0;
    ask.max_new_tokens += 8;
    ask
}

fn has_penalties(ask: &Ask) -> bool {
    ask.sampling.repetition_penalty != 1.0 || ask.sampling.presence_penalty != 0.0
}

/// Steps are launched before the one before them has ended, whatever runs when.
#[test]
fn steps_go_ahead_of_the_host() {
    let asks: Vec<Ask> = asks().into_iter().map(unhindered).collect();
    assert_eq!(asks.iter().filter(|ask| has_penalties(ask)).count(), 4);
    let (driver, in_turns) = on_gpu(&RuntimeOptions { plan_ahead: Some(false), ..small() });
    let expected = together(&in_turns, &asks);
    in_turns.join();
    assert_eq!(steps_ahead(&driver.log()), 0);
    let lazy = |seed| Options { lazy: true, seed, ..Options::default() };
    for shim in [Options::default(), lazy(1), lazy(2)] {
        let (driver, runtime) = on_gpu_like(&small(), shim);
        driver.clear_log();
        assert_eq!(tokens(&together(&runtime, &asks)), tokens(&expected), "{shim:?}");
        runtime.join();
        assert_eq!(driver.refusals(), Vec::<String>::new());
        assert!(steps_ahead(&driver.log()) > 20, "steps are launched ahead");
    }
}

/// On the shim only work takes time, a microsecond each operation: all of it is within some step's marks, and none
/// between.
#[test]
fn all_that_a_gpu_does_is_a_steps() {
    let asks: Vec<Ask> = asks().into_iter().map(unhindered).collect();
    for plan_ahead in [Some(false), None] {
        let (driver, runtime) = on_gpu(&RuntimeOptions { plan_ahead, ..small() });
        let handle = runtime.handle.clone();
        let told = |name: &str| metric(&handle, &format!("kvern:{name}_total"));
        assert_eq!(["device_busy_seconds", "device_idle_seconds", "steps_ahead"].map(told), [0.0; 3]);
        driver.clear_log();
        together(&runtime, &asks);
        runtime.join();
        let log = driver.log();
        assert!(log.len() < 16_384, "nothing of it was dropped");
        let operations = |line: &String| match line.split(' ').next().unwrap() {
            "launch" | "gemm" | "copy_to_device" | "copy_to_host" => 1,
            "graph" => line.rsplit_once('[').unwrap().1.split(' ').next().unwrap().parse().unwrap(),
            _ => 0,
        };
        let expected: u32 = log.iter().map(operations).sum();
        assert!(expected > 500, "{expected} operations");
        let busy_us = told("device_busy_seconds") * 1e6;
        assert!((busy_us - f64::from(expected)).abs() < 1e-3, "expected {expected} us, found {busy_us}");
        assert_eq!(told("device_idle_seconds"), 0.0);
        let ahead = told("steps_ahead");
        assert!(ahead >= steps_ahead(&log) as f64 && (ahead > 20.0) == plan_ahead.is_none(), "{ahead} steps ahead");
        assert_eq!(driver.refusals(), Vec::<String>::new());
    }
}

/// Who loses its blocks computes them again; what it has seen is still on the device, or another's place by then.
#[test]
fn who_is_preempted_says_the_same() {
    let mut asks: Vec<Ask> = asks().into_iter().map(unhindered).filter(|ask| ask.prompt.len() < 24).collect();
    asks.iter_mut().for_each(|ask| ask.max_new_tokens = 45);
    assert!(asks.iter().filter(|ask| has_penalties(ask)).count() > 2);
    let cpu = on_cpu(&small());
    let alone: Vec<Answer> = asks.iter().map(|ask| collect(submit(&cpu.handle, ask))).collect();
    cpu.join();
    // Blocks of 8 KiB, one of them for nobody.
    let engine = EngineConfig { kv_cache_memory_bytes: Some(10 << 13), ..small().engine };
    let (driver, runtime) = on_gpu(&RuntimeOptions { engine, ..small() });
    assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone));
    assert!(metric(&runtime.handle, "vllm:num_preemptions_total") > 0.0);
    assert!(steps_ahead(&driver.log()) > 20, "steps are launched ahead");
    runtime.join();
    assert_eq!(driver.refusals(), Vec::<String>::new());
}

/// A request that ends while a step with it is ahead leaves its blocks to others, as any other does.
#[test]
fn who_ends_early_stays_in_the_prefix_cache() {
    let long = Ask { prompt: (0..20).collect(), sampling: greedy(), max_new_tokens: 40 };
    let mut early =
        Ask { prompt: (0..40).map(|at| (at * 7) % 60 + 30).collect(), sampling: greedy(), max_new_tokens: 30 };
    let (_, alone) = on_gpu(&small());
    let answer = collect(submit(&alone.handle, &early));
    alone.join();
    // It stops at a token that it says late enough for steps to be ahead, and not before.
    let at = (4..).find(|&at| !answer.tokens[..at].contains(&answer.tokens[at])).unwrap();
    early.sampling.stop_tokens = vec![answer.tokens[at]];
    for plan_ahead in [Some(false), None] {
        let (driver, runtime) = on_gpu(&RuntimeOptions { plan_ahead, ..small() });
        let answers = together(&runtime, &[long.clone(), early.clone()]);
        assert_eq!((answers[0].tokens.len(), answers[1].reason), (40, FinishReason::Stop));
        assert_eq!(steps_ahead(&driver.log()) > 0, plan_ahead.is_none());
        let again = collect(submit(&runtime.handle, &early));
        // Two blocks of 16; the last of 40 tokens has to be computed in any case.
        assert_eq!((again.usage.cached_tokens, &again.tokens), (32, &answers[1].tokens), "{plan_ahead:?}");
        runtime.join();
    }
}

#[test]
fn likeliest_tokens_are_the_cpus() {
    let ask = |logprobs| Ask {
        prompt: vec![5, 80, 33, 2],
        sampling: kvern::request::SamplingParams { logprobs, ..greedy() },
        max_new_tokens: 5,
    };
    let read = |runtime: &Runtime, ask: &Ask| {
        let mut events = submit(&runtime.handle, ask);
        let mut found = Vec::new();
        while let Some(event) = events.blocking_recv() {
            if let TokenEvent::Token { token, logprobs } = event {
                found.push((token, logprobs));
            }
        }
        found
    };
    let cpu = on_cpu(&small());
    let (_, gpu) = on_gpu(&small());
    for wanted in [Some(0), Some(4), Some(20), None] {
        let (expected, found) = (read(&cpu, &ask(wanted)), read(&gpu, &ask(wanted)));
        assert_eq!(found.len(), 5);
        for ((token, logprobs), (expected_token, expected)) in found.iter().zip(&expected) {
            assert_eq!(token, expected_token);
            assert_eq!(logprobs.is_some(), wanted.is_some());
            let (Some(found), Some(expected)) = (logprobs, expected) else { continue };
            assert!((found.logprob - expected.logprob).abs() < 1e-4);
            assert_eq!(found.top.len(), expected.top.len());
            for (found, expected) in found.top.iter().zip(&expected.top) {
                assert!(found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-4, "{found:?} {expected:?}");
            }
        }
    }
    cpu.join();
    gpu.join();
}

#[test]
fn a_step_that_fails_is_repeated() {
    let (asks, alone) = (asks(), alone());
    let (driver, runtime) = on_gpu(&small());
    driver.fail(Call::Launch, 40, "planted", false);
    driver.fail(Call::LaunchGraph, 5, "planted", false);
    assert_eq!(tokens(&together(&runtime, &asks)), tokens(&alone));
    assert!(runtime.handle.health().live);
    runtime.join();
    assert_eq!(driver.refusals(), Vec::<String>::new());
}

/// Whichever mark of a step fails, or wait for one: what steps under way leave behind is not taken for another's.
#[test]
fn marks_and_waits_that_fail_are_their_steps_failures() {
    let asks: Vec<Ask> = asks().into_iter().map(unhindered).take(5).collect();
    let (_, right) = on_gpu(&small());
    let expected = together(&right, &asks);
    right.join();
    let mut marked = std::collections::BTreeSet::new();
    let marks = (30..37).map(|nth| (Call::Record, nth));
    for (call, nth) in marks.chain([20, 21, 22].map(|nth| (Call::Synchronize, nth))) {
        let (driver, runtime) = on_gpu(&small());
        driver.clear_log();
        driver.fail(call, nth, "planted", false);
        assert_eq!(tokens(&together(&runtime, &asks)), tokens(&expected), "{call:?} {nth}");
        runtime.join();
        let log = driver.log();
        let at = log.iter().position(|line| line.contains("planted")).unwrap_or_else(|| panic!("no {call:?} {nth}"));
        marked.insert((call.name(), log[at - 1].split(' ').next().unwrap().to_owned()));
        assert_eq!(driver.refusals(), Vec::<String>::new());
    }
    // As many marks as a step has failed, each of another kind: after copies to and from the device, and after other
    // marks.
    let kinds = marked.iter().filter(|(call, _)| *call == Call::Record.name()).count();
    assert!(kinds > 2, "marks and waits that failed came after {marked:?}");
}

#[test]
fn a_lost_gpu_ends_every_stream_and_the_engine() {
    let (driver, mut runtime) = on_gpu(&small());
    driver.fail(Call::Synchronize, 4, "planted: an illegal address", true);
    let ask = Ask { prompt: vec![1; 20], sampling: greedy(), max_new_tokens: 40 };
    let streams: Vec<_> = (0..4).map(|_| submit(&runtime.handle, &ask)).collect();
    for mut stream in streams {
        let mut last = None;
        while let Some(event) = stream.blocking_recv() {
            last = Some(event);
        }
        let finished = matches!(last, Some(TokenEvent::Finished { reason: FinishReason::Length, .. }));
        assert!(!finished, "the GPU was lost before");
    }
    let (_, never) = tokio::sync::oneshot::channel();
    std::mem::replace(&mut runtime.ended, never).blocking_recv().unwrap();
    assert!(!runtime.handle.health().live, "an orchestrator shall start the process anew");
    runtime.join();
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_taken() {
    let shim = |memory_bytes| Options { memory_bytes, ..Options::default() };
    let engine = EngineConfig { kv_cache_memory_bytes: None, ..small().engine };
    let options = RuntimeOptions { engine, ..small() };
    // What the device itself takes, and the reserve, leave nothing.
    let (driver, runtime) = try_on_gpu(&options, shim(200 << 20));
    let Err(StartError::DoesNotFit { model_len: 72, table, hint }) = runtime else { panic!("it fits") };
    assert!(table.contains("weights") && table.contains("the KV cache"), "{table}");
    assert_eq!(hint, "no context would fit beside the weights: use a smaller or a quantized model");
    let weights_taken = driver.log().iter().any(|line| line.contains("copy_to_device"));
    assert!(!weights_taken, "nothing was loaded");

    let asked = |bytes| {
        let engine = EngineConfig { kv_cache_memory_bytes: Some(bytes), ..small().engine };
        try_on_gpu(&RuntimeOptions { engine, ..small() }, shim(400 << 20)).1.err().map(|error| error.to_string())
    };
    let text = asked(1 << 30).unwrap();
    assert!(text.contains("--kv-cache-memory-bytes 1073741824 is more than the"), "{text}");
    let would_fit =
        "with what is left, --max-model-len 72 would fit with --max-num-seqs 6 and --max-num-batched-tokens";
    assert!(text.contains(would_fit), "{text}");
    let text = asked(1 << 14).unwrap();
    assert!(text.starts_with("the KV cache gets") && text.contains("raise --kv-cache-memory-bytes"), "{text}");

    let (_, runtime) = try_on_gpu(&options, shim(400 << 20));
    let runtime = runtime.unwrap_or_else(|error| panic!("{error}"));
    let account = runtime.account.clone();
    let kv = account.table.iter().find(|(purpose, _)| purpose == "the KV cache").unwrap().1;
    assert!(kv > 1 << 20 && account.kv_bytes < kv, "{account:?}");
    // 16 bits for each token of the vocabulary and each running request.
    let seen = account.table.iter().find(|(purpose, _)| purpose == "seen tokens of penalties").unwrap().1;
    assert_eq!(seen, 6 * u64::from(VOCAB) * 2);
    let all: u64 = account.table.iter().map(|(_, bytes)| bytes).sum();
    assert!(all <= 400 << 20, "{account:?}");
    runtime.join();
}

/// A folder with a model whose weights are made on the device, of sizes that the kernels for 16 bits take.
fn made_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "hidden_act": "silu",
        "vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2
    }"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

/// A server of these flags, on a GPU that computes in what they ask for.
fn serve_made(flags: &[&str]) -> (Arc<ShimDriver>, Result<Runtime, StartError>) {
    let folder = made_model();
    let files = ModelFiles::open_config(folder.path()).unwrap();
    let usual = ["--max-model-len=72", "--max-num-seqs=6", "--max-num-batched-tokens=48", "--load-format=dummy"];
    let memory = ["--kv-cache-memory-bytes=4MiB", "--memory-utilization=1"];
    let argv = [&["kvern", "serve"], &usual[..], &memory[..], flags].concat().into_iter().map(Into::into).collect();
    let engine = Config::resolve(argv, &Environment::default()).unwrap().engine;
    let driver = ShimDriver::new(Options::default());
    let stored = Checkpoint::open(&files).unwrap().stored_format();
    let element = kvern::device::element(engine.precision, stored);
    let device = Device::gpu(Arc::clone(&driver) as _, element).unwrap();
    let runtime = runtime::start_on(device, &files, &RuntimeOptions { engine, ..options() }, &mut |_| {});
    (driver, runtime)
}

/// Log-probabilities of the likeliest first tokens of an answer, falling.
fn likeliest(runtime: &Runtime, ask: &Ask) -> Vec<f32> {
    let sampling = kvern::request::SamplingParams { logprobs: Some(20), ..greedy() };
    let mut events = submit(&runtime.handle, &Ask { sampling, max_new_tokens: 1, ..ask.clone() });
    while let Some(event) = events.blocking_recv() {
        if let TokenEvent::Token { logprobs: Some(logprobs), .. } = event {
            return logprobs.top.iter().map(|(_, logprob)| *logprob).collect();
        }
    }
    panic!("an answer has a token")
}

/// `--dtype float16`: weights, activations, K and V in F16. Answers do not depend on who else is in a step, and the likeliest
/// tokens' log-probabilities are those of F32 but for the rounding to 11 bits of mantissa after each op.
#[test]
fn float16_is_what_computes() {
    const TOLERANCE: f32 = 0.01;
    let asks = asks();
    let start = |flags: &[&str]| {
        let (driver, runtime) = serve_made(flags);
        (driver, runtime.unwrap_or_else(|error| panic!("{error}")))
    };
    let (_, exact) = start(&["--dtype", "float32"]);
    let expected: Vec<Vec<f32>> = asks.iter().map(|ask| likeliest(&exact, ask)).collect();
    let exact_account = exact.account.clone();
    exact.join();

    let (driver, half) = start(&["--dtype", "float16"]);
    let account = &half.account;
    assert_eq!(account.kv_dtype, KvDType::F16);
    assert!(account.device.ends_with("f16)"), "{}", account.device);
    // Two blocks in the place of one; a block more is there in both.
    assert_eq!(account.kv_blocks + 1, 2 * (exact_account.kv_blocks + 1));
    assert_eq!(account.weight_bytes * 2, exact_account.weight_bytes);
    let kv_row = |account: &runtime::MemoryAccount| {
        account.table.iter().find(|(purpose, _)| purpose == "the KV cache").unwrap().1
    };
    assert_eq!(kv_row(account), kv_row(&exact_account));
    let metrics = half.handle.metrics_text();
    assert!(metrics.contains("cache_dtype=\"f16\""), "{metrics}");

    driver.clear_log();
    let alone: Vec<Answer> = asks.iter().map(|ask| collect(submit(&half.handle, ask))).collect();
    assert_eq!(tokens(&together(&half, &asks)), tokens(&alone));
    let log = driver.log();
    assert!(log.iter().any(|line| line.starts_with("graph ")), "decode steps are captured ones");
    let mut worst = 0.0f32;
    for (ask, expected) in asks.iter().zip(&expected) {
        let found = likeliest(&half, ask);
        assert_eq!(found.len(), 20);
        worst = found.iter().zip(expected).fold(worst, |worst, (found, expected)| worst.max((found - expected).abs()));
    }
    println!("log-probabilities are off by up to {worst}");
    assert!(worst > 0.0 && worst <= TOLERANCE, "{worst}");
    half.join();
    assert_eq!(driver.refusals(), Vec::<String>::new());
}

/// The cache has the type of the device; another one is refused before anything is taken.
#[test]
fn a_cache_of_another_type_is_refused() {
    for (dtype, cache, usual) in [("half", "bf16", "f16"), ("auto", "float16", "bf16"), ("f32", "bf16", "f32")] {
        let (driver, runtime) = serve_made(&["--dtype", dtype, "--kv-cache-dtype", cache]);
        let error = runtime.err().unwrap().to_string();
        let expected = format!("--kv-cache-dtype: expected auto or {usual} on a GPU");
        assert!(error.starts_with(&expected), "{error}");
        assert!(!driver.log().iter().any(|line| line.contains("copy_to_device")), "nothing was loaded");
    }
}

#[test]
fn pools_apart_are_for_workers_apart() {
    let scheduling =
        SchedulingConfig { workers: WorkerLayout::Split, pools: PoolLayout::Apart, ..SchedulingConfig::default() };
    let (_, runtime) = try_on_gpu(&RuntimeOptions { scheduling, ..small() }, Options::default());
    let error = runtime.err().unwrap().to_string();
    assert!(error.starts_with("--kv-pools apart needs"), "{error}");
}
