//! Whole models on a GPU that is the shim: kernels run on the host, and work in a wrong order is refused.
//!
//! In F32, logits match the reference implementation's on the tiny checkpoints, whole, in chunks, and token by token by
//! captured steps. In BF16 random models match the CPU backend's, and a captured step an eager one bit by bit; so do
//! models whose weights are quantized, in F32 too.

#![allow(clippy::unwrap_used)]

mod common;
mod paged;
#[path = "gpu/quantized.rs"]
mod quantized;
#[path = "gpu/shares.rs"]
mod shares;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvern_cuda_shim::device::{Options, ShimDriver};
use kvern_kernels::{Device, Element, GpuOptions, KvCache, KvDType, Precision, PrefillKernel};
use kvern_models::{LoadFormat, LoadOptions, LoadedModel, ModelFiles, StepLimits, load};
use paged::{BLOCK_SIZE, Slice, blocks_of, cpu_options, scattered, step};
use safetensors::SafeTensors;
use serde_json::Value;

/// Largest difference of an F32 logit from the reference; logits deviate by about 1.
const TOLERANCE: f32 = 1e-4;
const BLOCKS: usize = 32;
const HOPPER: (u32, u32) = (9, 0);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A model on a device, and its cache.
struct Rig {
    driver: Option<Arc<ShimDriver>>,
    device: Device,
    loaded: LoadedModel,
    kv: KvCache,
}

impl Rig {
    /// A shim of capability 9.0 does prompts' attention by its own kernel, which is for 16 bits.
    fn gpu(files: &ModelFiles, element: Element, options: &LoadOptions, shim: Options) -> Rig {
        let driver = ShimDriver::new(shim);
        let is_hopper = shim.compute_capability == HOPPER && element != Element::F32;
        let prefill = if is_hopper { PrefillKernel::Hopper } else { PrefillKernel::Auto };
        let device = Device::gpu(Arc::clone(&driver) as _, GpuOptions { prefill, ..element.into() }).unwrap();
        Rig::on(device, Some(driver), files, options, element.into())
    }

    fn cpu(files: &ModelFiles, options: &LoadOptions) -> Rig {
        let dtype = if options.precision == Precision::F32 { KvDType::F32 } else { KvDType::BF16 };
        Rig::on(Device::cpu(cpu_options()).unwrap(), None, files, options, dtype)
    }

    fn on(
        device: Device,
        driver: Option<Arc<ShimDriver>>,
        files: &ModelFiles,
        options: &LoadOptions,
        dtype: KvDType,
    ) -> Rig {
        let loaded = load(&device, files, options, &mut |_| {}).unwrap();
        let kv = KvCache::new(&device, loaded.kv_shape(BLOCKS, BLOCK_SIZE, dtype)).unwrap();
        Rig { driver, device, loaded, kv }
    }

    fn capture(&mut self) {
        self.loaded.model.capture(&mut self.kv, &mut |_, _| {}).unwrap();
    }

    fn step(&mut self, slices: &[Slice<'_>], rows: &[u32]) -> Vec<f32> {
        step(&mut *self.loaded.model, &mut self.kv, slices, rows).read(&self.device).unwrap()
    }

    /// Logits of the last rows of slices.
    fn last_rows(&mut self, slices: &[Slice<'_>]) -> Vec<f32> {
        let ends = slices.iter().scan(0, |rows, slice| {
            *rows += slice.tokens.len() as u32;
            Some(*rows - 1)
        });
        let rows: Vec<u32> = ends.collect();
        self.step(slices, &rows)
    }

    /// Greedy tokens after a prompt.
    fn greedy(&mut self, prompt: &[u32], count: usize, table: &[u32]) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        let mut start = 0;
        for _ in 0..count {
            let logits = self.last_rows(&[Slice { start, tokens: &tokens[start..], table }]);
            start = tokens.len();
            tokens.push(best(&logits));
        }
        tokens.split_off(prompt.len())
    }

    /// What the shim found wrong with the order of work, and how often work was launched as a graph.
    fn finish(self) -> usize {
        let driver = self.driver.expect("a GPU's rig");
        assert_eq!(driver.refusals(), Vec::<String>::new());
        driver.log().iter().filter(|line| line.starts_with("graph ")).count()
    }
}

fn best(logits: &[f32]) -> u32 {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

/// NaN where a value is.
fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    found.iter().zip(expected).fold(0.0, |worst: f32, (a, b)| {
        let difference = (a - b).abs();
        if difference <= worst || worst.is_nan() { worst } else { difference }
    })
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = largest_difference(found, expected);
    println!("{what}: largest difference {worst:.1e}");
    assert!(worst <= tolerance, "{what}: largest difference {worst}");
}

fn f32_options(context_max: usize, sequences_max: usize) -> LoadOptions {
    let limits = StepLimits { tokens_max: 96, sequences_max, context_max };
    LoadOptions { precision: Precision::F32, format: LoadFormat::Files, limits }
}

/// A golden case, as tests/golden.rs has it.
fn check_golden(name: &str, gguf: bool) {
    let case = json(&folder().join(name).join("case.json"));
    let context_max = case["context_max"].as_u64().unwrap() as usize;
    let checkpoint = folder().join("checkpoints").join(case["checkpoint"].as_str().unwrap());
    let repository = tempfile::tempdir().unwrap();
    let files = if gguf {
        ModelFiles::open(&checkpoint.with_extension("gguf")).unwrap()
    } else {
        let copy = |from: PathBuf, to| std::fs::copy(from, repository.path().join(to)).unwrap();
        copy(folder().join(name).join("config.json"), "config.json");
        copy(checkpoint.with_extension("safetensors"), "model.safetensors");
        ModelFiles::open(repository.path()).unwrap()
    };
    let bytes = std::fs::read(folder().join(name).join("logits.safetensors")).unwrap();
    let logits = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = logits.tensor("0").unwrap();
    let vocab = tensor.shape()[1];
    let reference: Vec<f32> = tensor.data().as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let sequences: Vec<Vec<u32>> = serde_json::from_value(json(&folder().join("sequences.json"))).unwrap();
    let tokens = &sequences[0][..context_max];
    // Logits of all rows at once.
    let mut gpu = Rig::gpu(&files, Element::F32, &f32_options(context_max, 96), Options::default());
    let table = scattered(7, blocks_of(context_max), BLOCKS);

    let all: Vec<u32> = (0..tokens.len() as u32).collect();
    let whole = gpu.step(&[Slice { start: 0, tokens, table: &table }], &all);
    assert_close(&whole, &reference, TOLERANCE, &format!("{name}, whole"));
    let cut = context_max / 2 + 1;
    gpu.last_rows(&[Slice { start: 0, tokens: &tokens[..cut], table: &table }]);
    let rest = gpu.step(&[Slice { start: cut, tokens: &tokens[cut..], table: &table }], &all[..tokens.len() - cut]);
    assert_close(&rest, &reference[cut * vocab..], TOLERANCE, &format!("{name}, second chunk"));

    assert_eq!(gpu.finish(), 0);

    let options = f32_options(context_max, 4);
    let mut gpu = Rig::gpu(&files, Element::F32, &options, Options::default());
    gpu.capture();
    gpu.last_rows(&[Slice { start: 0, tokens: &tokens[..cut], table: &table }]);
    for at in cut..context_max {
        let logits = gpu.last_rows(&[Slice { start: at, tokens: &tokens[at..=at], table: &table }]);
        assert_close(&logits, &reference[at * vocab..(at + 1) * vocab], TOLERANCE, &format!("{name}, token {at}"));
    }
    let expected = Rig::cpu(&files, &options).greedy(&tokens[..20], 30, &table);
    assert_eq!(gpu.greedy(&tokens[..20], 30, &table), expected, "{name}: greedy tokens");
    assert!(gpu.finish() >= context_max - cut + 29, "{name}: decode steps are captured ones");
}

#[test]
fn golden_models_match_the_reference() {
    for name in ["llama", "llama-tied", "llama-bias", "llama-yarn", "mistral", "qwen2", "qwen2-window", "qwen3"] {
        check_golden(name, false);
    }
    check_golden("llama", true);
}

/// Sizes that the kernels on matrix units take.
fn config(model_type: &str, window: Option<u32>) -> Value {
    serde_json::json!({
        "architectures": [if model_type == "mistral" { "MistralForCausalLM" } else { "LlamaForCausalLM" }],
        "model_type": model_type,
        "vocab_size": 200,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 640,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "rope_theta": 10000.0,
        "sliding_window": window,
    })
}

fn dummy(config: &Value) -> (tempfile::TempDir, ModelFiles, LoadOptions) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let files = ModelFiles::open_config(folder.path()).unwrap();
    let limits = StepLimits { tokens_max: 96, sequences_max: 6, context_max: 640 };
    let options = LoadOptions { precision: Precision::BF16, format: LoadFormat::Dummy { seed: 3 }, limits };
    (folder, files, options)
}

fn tokens(seed: u32, count: usize) -> Vec<u32> {
    (0..count as u32).map(|at| (at * 37 + seed * 91 + at * at % 13) % 200).collect()
}

/// Logits of: a prompt in chunks, a step that mixes a decode with chunks, decodes of three sequences at once, a chunk
/// of few rows.
fn conversation(rig: &mut Rig) -> Vec<Vec<f32>> {
    let ids = scattered(11, 30, BLOCKS);
    let (long, short, third) = (&ids[..20], &ids[20..25], &ids[25..30]);
    let [a, b, c] = [tokens(1, 300), tokens(2, 70), tokens(3, 70)];
    let mut logits = Vec::new();
    for start in (0..270).step_by(90) {
        logits.push(rig.last_rows(&[Slice { start, tokens: &a[start..start + 90], table: long }]));
    }
    logits.push(rig.last_rows(&[
        Slice { start: 270, tokens: &a[270..271], table: long },
        Slice { start: 0, tokens: &b[..33], table: short },
        Slice { start: 0, tokens: &c[..40], table: third },
    ]));
    for turn in 0..6 {
        logits.push(rig.last_rows(&[
            Slice { start: 271 + turn, tokens: &a[271 + turn..272 + turn], table: long },
            Slice { start: 33 + turn, tokens: &b[33 + turn..34 + turn], table: short },
            Slice { start: 40 + turn, tokens: &c[40 + turn..41 + turn], table: third },
        ]));
    }
    logits.push(rig.last_rows(&[Slice { start: 46, tokens: &c[46..51], table: third }]));
    logits
}

/// The conversation, eager and captured, against logits of the CPU.
fn check_conversation(
    files: &ModelFiles,
    element: Element,
    options: &LoadOptions,
    expected: &[Vec<f32>],
    tolerance: f32,
) {
    for compute_capability in [(8, 0), HOPPER] {
        let shim = Options { compute_capability, ..Options::default() };
        check_conversation_on(files, element, options, (expected, tolerance), shim);
    }
}

fn check_conversation_on(
    files: &ModelFiles,
    element: Element,
    options: &LoadOptions,
    (expected, tolerance): (&[Vec<f32>], f32),
    shim: Options,
) {
    let mut eager = Rig::gpu(files, element, options, shim);
    let eager_logits = conversation(&mut eager);
    assert_eq!(eager_logits.len(), expected.len());
    for (step, (found, expected)) in eager_logits.iter().zip(expected).enumerate() {
        assert_close(found, expected, tolerance, &format!("{element} step {step}"));
    }
    assert_eq!(eager.finish(), 0);
    for (seed, lazy) in [(0, false), (1, true)] {
        let mut captured = Rig::gpu(files, element, options, Options { seed, lazy, ..shim });
        captured.capture();
        let logits = conversation(&mut captured);
        assert!(logits == eager_logits, "{element}, seed {seed}: captured steps differ from eager ones");
        assert!(captured.finish() >= 6);
    }
}

/// Activations are rounded to 8 bits of mantissa after each op on the GPU, and kept in F32 on the CPU.
#[test]
fn captured_steps_are_eager_ones_and_the_cpus() {
    let (_folder, files, options) = dummy(&config("llama", None));
    let expected = conversation(&mut Rig::cpu(&files, &options));
    check_conversation(&files, Element::BF16, &options, &expected, 0.1);
}

#[test]
fn windows_bite() {
    let (_folder, files, options) = dummy(&config("mistral", Some(100)));
    let expected = conversation(&mut Rig::cpu(&files, &options));
    check_conversation(&files, Element::BF16, &options, &expected, 0.1);
    // The same weights see more without a window, from the second chunk on.
    let (_folder, files, options) = dummy(&config("mistral", None));
    let unbounded = conversation(&mut Rig::cpu(&files, &options));
    assert!(unbounded[0] == expected[0]);
    let changes: Vec<f32> = (1..4).map(|step| largest_difference(&unbounded[step], &expected[step])).collect();
    assert!(changes.iter().all(|change| *change > 0.2), "{changes:?}");
}

#[test]
fn what_is_counted_is_what_is_taken() {
    for (compute_capability, prefill) in [((8, 0), PrefillKernel::Portable), (HOPPER, PrefillKernel::Hopper)] {
        let driver = ShimDriver::new(Options { compute_capability, ..Options::default() });
        check_count(&Device::gpu(driver, GpuOptions { prefill, ..Element::BF16.into() }).unwrap());
    }
    let driver = ShimDriver::new(Options::default());
    let error = Device::gpu(driver, GpuOptions { prefill: PrefillKernel::Hopper, ..Element::BF16.into() })
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "expected compute capability 9.0, and activations in bf16 or f16, for attention by wgmma, found compute \
         capability 8.0"
    );
}

fn check_count(device: &Device) {
    let (_folder, files, options) = dummy(&config("llama", None));
    let counting = device.counting().unwrap().unwrap();
    let before = device.free_bytes().unwrap().unwrap();
    let build = |device: &Device| {
        let loaded = load(device, &files, &options, &mut |_| {}).unwrap();
        let kv = KvCache::new(device, loaded.kv_shape(BLOCKS, BLOCK_SIZE, KvDType::BF16)).unwrap();
        (loaded, kv)
    };
    let start = counting.allocations().unwrap().total();
    let _counted = build(&counting);
    let counted = counting.allocations().unwrap().total() - start;
    let _taken = build(device);
    let taken = before - device.free_bytes().unwrap().unwrap();
    // The count is of whole units of 512 bytes.
    assert!(counted >= taken && counted <= taken + taken / 50, "counted {counted}, taken {taken}");
}
