//! A running engine over the default model, and requests on it, for the server tests.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

pub use kvern::config::SchedulingConfig;
pub use kvern::config::{DeviceChoice, DeviceConfig, EngineConfig};
use kvern::request::{Engine, Request, SamplingParams, Terms, TokenEvent, TokenRx};
pub use kvern::runtime::RuntimeOptions;
use kvern::runtime::{self, Runtime};
use kvern_core::{FinishReason, TokenId, Usage};
use kvern_kernels::{CpuIsa, CpuOptions, Precision};
use kvern_models::ModelFiles;
use std::path::PathBuf;

/// The default model's file; a test that needs it fails without it.
pub fn model_path() -> PathBuf {
    let default = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models-cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("KVERN_TEST_MODEL").map_or_else(default, PathBuf::from);
    assert!(path.exists(), "{} is missing: run `make model`", path.display());
    path
}

/// The device's options: the best level of the machine, or the one that `KVERN_CPU_ISA` forces, as it does the server's.
pub fn cpu_options() -> CpuOptions {
    let isa = std::env::var("KVERN_CPU_ISA").ok().map(|isa| match isa.as_str() {
        "scalar" => CpuIsa::Scalar,
        "avx2" => CpuIsa::Avx2,
        "avx512" => CpuIsa::Avx512,
        "amx" => CpuIsa::Amx,
        _ => panic!("KVERN_CPU_ISA: expected scalar, avx2, avx512 or amx, found {isa:?}"),
    });
    CpuOptions { isa, ..CpuOptions::default() }
}

pub fn options() -> RuntimeOptions {
    RuntimeOptions {
        engine: engine(),
        scheduling: SchedulingConfig::default(),
        served_model_name: "test".to_owned(),
        record: None,
        plan_ahead: None,
    }
}

/// The default settings of a small server.
pub fn engine() -> EngineConfig {
    EngineConfig {
        cpu: cpu_options(),
        precision: Precision::AsStored,
        kv_dtype: None,
        max_model_len: Some(2048),
        max_num_seqs: 32,
        max_num_batched_tokens: Some(256),
        device: DeviceConfig { choice: DeviceChoice::Cpu, ..DeviceConfig::default() },
        block_size: 16,
        kv_cache_memory_bytes: None,
        prefix_caching: true,
        max_num_queued_reqs: 256,
    }
}

pub fn start(options: &RuntimeOptions) -> Runtime {
    let files = ModelFiles::open(&model_path()).unwrap();
    runtime::start(&files, options, &mut |_| {}).unwrap()
}

/// Greedy, without stop tokens.
pub fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
        stop_tokens: vec![],
        min_tokens: 0,
        logit_bias: vec![],
        logprobs: None,
    }
}

/// What a request is made of.
#[derive(Clone)]
pub struct Ask {
    pub prompt: Vec<TokenId>,
    pub sampling: SamplingParams,
    pub max_new_tokens: u32,
}

/// 32 requests of mixed lengths, seeds and parameters; some share a prefix.
pub fn mixed_asks() -> Vec<Ask> {
    let stem = prompt(1000, 90);
    (0..32u64)
        .map(|i| {
            let own = prompt(i, 3 + (i as usize * 29) % 120);
            let prompt = if i % 4 == 0 { [&stem[..60 + i as usize], &own].concat() } else { own };
            let mut sampling = greedy();
            sampling.seed = i * 31;
            sampling.temperature = [0.0, 0.8, 1.0, 1.3][i as usize % 4];
            sampling.top_p = [1.0, 0.9][i as usize / 4 % 2];
            sampling.top_k = [0, 0, 40][i as usize % 3];
            sampling.repetition_penalty = [1.0, 1.15][i as usize / 2 % 2];
            sampling.frequency_penalty = [0.0, 0.0, 0.4][i as usize % 3];
            Ask { prompt, sampling, max_new_tokens: 8 + (i as u32 * 7) % 25 }
        })
        .collect()
}

/// The answers to requests that are all sent at once.
pub fn together(runtime: &Runtime, asks: &[Ask]) -> Vec<Answer> {
    let streams: Vec<_> = asks.iter().map(|a| submit(&runtime.handle, a)).collect();
    streams.into_iter().map(collect).collect()
}

/// The tokens of each answer.
pub fn tokens(answers: &[Answer]) -> Vec<&[u32]> {
    answers.iter().map(|a| a.tokens.as_slice()).collect()
}

#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub tokens: Vec<TokenId>,
    pub reason: FinishReason,
    pub usage: Usage,
}

pub fn submit(engine: &impl Engine, ask: &Ask) -> TokenRx {
    submit_as(engine, ask, Terms::default())
}

pub fn submit_as(engine: &impl Engine, ask: &Ask, terms: Terms) -> TokenRx {
    let id = engine.next_id();
    let request = Request {
        id,
        external_id: format!("test-{}", id.0).into(),
        prompt: ask.prompt.clone(),
        sampling: ask.sampling.clone(),
        max_new_tokens: ask.max_new_tokens,
        n: 1,
        terms,
    };
    engine.submit(request).unwrap()
}

/// Reads a stream to its end; must not be called on an async thread.
pub fn collect(mut events: TokenRx) -> Answer {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("the stream ends with Finished") {
            TokenEvent::Accepted => {}
            TokenEvent::Token { token, .. } => tokens.push(token),
            TokenEvent::Finished { reason, usage } => return Answer { tokens, reason, usage },
        }
    }
}

/// Token ids that look like text to the model's tokenizer but need none: deterministic and varied.
pub fn prompt(seed: u64, length: usize) -> Vec<TokenId> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % 20_000) as TokenId + 300
    };
    (0..length).map(|_| next()).collect()
}

/// The value of a metric's first sample whose line starts with `name`.
pub fn metric(engine: &impl Engine, name: &str) -> f64 {
    let text = engine.metrics_text();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no metric {name} in {text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}
