//! Random, mutated and hostile files: the readers give an error or a model, and never panic, hang, or allocate beyond a
//! multiple of the file. A second copy of a file's metadata while it is read, and growing lists, make up the multiple.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::allocation::{Counting, peak_of};
use common::gguf_writer::{GgufWriter, Meta, small_llama};
use common::repository::{F32Tensor, safetensors, with_header};
use kvern_models::{Checkpoint, LoadError, ModelConfig, ModelFiles, Weights};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that a file of one byte may take: paths, messages, tables of layers.
const BASE_BYTES: usize = 512 << 10;
const MULTIPLE: usize = 32;
/// Parsed JSON without a schema is larger; such files are bounded at 1 MiB.
const CONFIG_MULTIPLE: usize = 128;
const TIME_MAX: Duration = Duration::from_secs(30);

const HIDDEN: usize = 4;
const VOCAB: usize = 8;

/// All tensors of a llama of one layer with two heads of two, in Hugging Face's names and GGUF's, with their shapes.
fn tensors() -> Vec<(&'static str, &'static str, Vec<usize>)> {
    let square = || vec![HIDDEN, HIDDEN];
    vec![
        ("model.embed_tokens.weight", "token_embd.weight", vec![VOCAB, HIDDEN]),
        ("model.norm.weight", "output_norm.weight", vec![HIDDEN]),
        ("lm_head.weight", "output.weight", vec![VOCAB, HIDDEN]),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight", vec![HIDDEN]),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", square()),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", square()),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight", square()),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight", square()),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight", vec![HIDDEN]),
        ("model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight", square()),
        ("model.layers.0.mlp.up_proj.weight", "blk.0.ffn_up.weight", square()),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", square()),
    ]
}

fn gguf_file() -> Vec<u8> {
    let mut writer = small_llama().meta("tokenizer.ggml.tokens", Meta::strings(&["a", "b"]));
    for (key, size) in [("vocab_size", VOCAB), ("embedding_length", HIDDEN), ("feed_forward_length", HIDDEN)] {
        writer = writer.set(&format!("llama.{key}"), Meta::U32(size as u32));
    }
    for (key, size) in [("block_count", 1), ("attention.head_count", 2), ("attention.head_count_kv", 2)] {
        writer = writer.set(&format!("llama.{key}"), Meta::U32(size));
    }
    for (_, name, shape) in tensors() {
        writer.push_f32(name, &shape, &vec![0.5; shape.iter().product()]);
    }
    writer.to_bytes()
}

fn safetensors_file() -> Vec<u8> {
    let tensors = tensors();
    let with_values = |(name, _, shape): &(&'static str, &str, Vec<usize>)| -> F32Tensor<'static> {
        (*name, shape.clone(), vec![0.5; shape.iter().product()])
    };
    safetensors(&tensors.iter().map(with_values).collect::<Vec<_>>())
}

fn config() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": [1], "tie_word_embeddings": false,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    })
}

/// Everything that loading reads.
fn load(path: &Path) -> Result<(), LoadError> {
    let checkpoint = Checkpoint::open(&ModelFiles::open(path)?)?;
    let config = ModelConfig::read(&checkpoint)?;
    let mut weights = Weights::new(&checkpoint, &config);
    for (name, _, shape) in tensors() {
        match shape.as_slice() {
            [rows, cols] => drop(weights.matrix(name, *rows, *cols)?),
            [len] => drop(weights.vector(name, *len)?),
            _ => unreachable!("the tensors above are matrices and vectors"),
        }
    }
    weights.finish()
}

/// Loads, holding memory and time against the limits; says whether the model loaded.
fn bounded_load(path: &Path, file_bytes: usize, multiple: usize) -> Result<bool, String> {
    let start = Instant::now();
    let (result, peak) = peak_of(|| load(path).map_err(|error| error.to_string()));
    if peak > BASE_BYTES + multiple * file_bytes {
        return Err(format!("{peak} bytes were allocated for a file of {file_bytes}"));
    }
    if start.elapsed() > TIME_MAX {
        return Err(format!("loading took {:?}", start.elapsed()));
    }
    match result {
        Ok(()) => Ok(true),
        Err(message) if message.contains(path.to_str().unwrap()) && message.len() < 2000 => Ok(false),
        Err(message) => Err(format!("the message does not name the file, or is long: {message}")),
    }
}

/// One change of a file.
#[derive(Clone, Debug)]
enum Edit {
    Byte(u8),
    /// A count, a size or an offset that readers trust at their peril.
    Number(u64),
    Remove(usize),
    Repeat(usize),
    Truncate,
}

fn edits() -> impl Strategy<Value = Vec<(prop::sample::Index, Edit)>> {
    let numbers =
        prop::sample::select(vec![0, 1, 2, 31, 255, 1 << 16, 1 << 31, u64::MAX >> 1, u64::MAX - 31, u64::MAX]);
    let edit = prop_oneof![
        4 => any::<u8>().prop_map(Edit::Byte),
        4 => numbers.prop_map(Edit::Number),
        1 => (1_usize..64).prop_map(Edit::Remove),
        1 => (1_usize..64).prop_map(Edit::Repeat),
        1 => Just(Edit::Truncate),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), edit), 1..6)
}

fn edited(mut file: Vec<u8>, edits: &[(prop::sample::Index, Edit)]) -> Vec<u8> {
    for (at, edit) in edits {
        if file.is_empty() {
            break;
        }
        let at = at.index(file.len());
        let end = |length: usize| (at + length).min(file.len());
        match edit {
            Edit::Byte(byte) => file[at] = *byte,
            Edit::Number(number) => {
                let end = end(8);
                file[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Edit::Remove(length) => drop(file.drain(at..end(*length))),
            Edit::Repeat(length) => {
                let part = file[at..end(*length)].to_vec();
                file.splice(at..at, part);
            }
            Edit::Truncate => file.truncate(at),
        }
    }
    file
}

/// The small model as a folder of safetensors, with one of its files replaced.
fn repository(dir: &Path, replaced: &str, bytes: &[u8]) {
    // With an index, the file of weights is a shard.
    let weights = if replaced == "model.safetensors.index.json" { "a.safetensors" } else { "model.safetensors" };
    std::fs::write(dir.join("config.json"), config().to_string()).unwrap();
    std::fs::write(dir.join(weights), safetensors_file()).unwrap();
    std::fs::write(dir.join(replaced), bytes).unwrap();
}

fn check_gguf(bytes: &[u8]) -> Result<bool, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    bounded_load(&path, bytes.len(), MULTIPLE)
}

fn check_repository(replaced: &str, bytes: &[u8], multiple: usize) -> Result<bool, String> {
    let dir = tempfile::tempdir().unwrap();
    repository(dir.path(), replaced, bytes);
    bounded_load(dir.path(), bytes.len(), multiple)
}

fn index_json() -> Vec<u8> {
    let weight_map: serde_json::Map<String, Value> =
        tensors().iter().map(|(name, ..)| ((*name).to_owned(), "a.safetensors".into())).collect();
    json!({ "weight_map": weight_map }).to_string().into_bytes()
}

#[test]
fn the_unedited_files_load() {
    assert_eq!(check_gguf(&gguf_file()), Ok(true));
    assert_eq!(check_repository("model.safetensors", &safetensors_file(), MULTIPLE), Ok(true));
    assert_eq!(check_repository("config.json", config().to_string().as_bytes(), CONFIG_MULTIPLE), Ok(true));
    assert_eq!(check_repository("model.safetensors.index.json", &index_json(), MULTIPLE), Ok(true));
    assert_eq!(check_repository("generation_config.json", b"{\"top_p\": 0.5}", CONFIG_MULTIPLE), Ok(true));
}

fn outcome(result: Result<bool, String>) -> Result<(), TestCaseError> {
    result.map(drop).map_err(TestCaseError::fail)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn edited_gguf(edits in edits()) {
        outcome(check_gguf(&edited(gguf_file(), &edits)))?;
    }

    #[test]
    fn random_gguf(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        outcome(check_gguf(&[b"GGUF\x03\0\0\0".as_slice(), &bytes].concat()))?;
    }

    #[test]
    fn edited_safetensors(edits in edits()) {
        outcome(check_repository("model.safetensors", &edited(safetensors_file(), &edits), MULTIPLE))?;
    }

    #[test]
    fn edited_index(edits in edits()) {
        outcome(check_repository("model.safetensors.index.json", &edited(index_json(), &edits), MULTIPLE))?;
    }

    #[test]
    fn edited_config_text(edits in edits()) {
        let text = edited(config().to_string().into_bytes(), &edits);
        outcome(check_repository("config.json", &text, CONFIG_MULTIPLE))?;
    }

    #[test]
    fn edited_config_values(edits in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4)) {
        let mut config = config();
        for (at, value) in edits {
            let keys = CONFIG_KEYS[at.index(CONFIG_KEYS.len())];
            match keys.split_once('.') {
                Some((outer, inner)) if config[outer].is_object() => config[outer][inner] = value,
                Some(_) => {}
                None => config[keys] = value,
            }
        }
        outcome(check_repository("config.json", config.to_string().as_bytes(), CONFIG_MULTIPLE))?;
    }
}

const CONFIG_KEYS: [&str; 32] = [
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "eos_token_id",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "quantization_config",
    "partial_rotary_factor",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_scaling.rope_type",
    "rope_scaling.factor",
    "rope_scaling.original_max_position_embeddings",
    "rope_scaling.beta_fast",
    "rope_scaling.beta_slow",
    "rope_scaling.mscale",
    "rope_scaling.mscale_all_dim",
    "rope_scaling.low_freq_factor",
    "rope_scaling.high_freq_factor",
    "rope_scaling.short_factor",
];

fn value() -> impl Strategy<Value = Value> {
    let kinds = ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "mistral", "qwen2", "qwen3"];
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop::sample::select(kinds.to_vec()).prop_map(Value::from),
        (0_u64..9).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec![1e-320, 1e300, 0.25, 1.5, -1.0]).prop_map(Value::from),
        prop::collection::vec(any::<f32>(), 0..4).prop_map(|list| json!(list)),
        Just(json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [0.5]})),
        Just(json!({"full_attention": {"rope_theta": 1e4}, "sliding_attention": null})),
        Just(json!(["full_attention"])),
    ]
}

/// Files of about a megabyte that are all overhead.
#[test]
fn bombs_take_a_multiple_of_their_size() {
    let meta = |value: Meta| GgufWriter::new("llama").meta("bomb", value).to_bytes();
    let array = |element: u32, count: u64, bytes: Vec<u8>| {
        Meta::Raw(9, [element.to_le_bytes().as_slice(), &count.to_le_bytes(), &bytes].concat())
    };
    let count = 1 << 17;
    let empty_array = [0_u32.to_le_bytes().as_slice(), &0_u64.to_le_bytes()].concat();
    let mut entries = GgufWriter::new("llama");
    let mut tensors = GgufWriter::new("llama");
    for i in 0..60_000 {
        entries = entries.meta(&i.to_string(), Meta::U8(1));
        tensors.push_raw(&i.to_string(), &[], 99, vec![], Some(0));
    }
    let ggufs = [
        ("empty strings", meta(array(8, count, vec![0; 8 << 17]))),
        ("empty arrays", meta(array(9, count, empty_array.repeat(1 << 17)))),
        ("entries", entries.to_bytes()),
        ("tensors", tensors.to_bytes()),
    ];
    for (name, bytes) in &ggufs {
        assert_eq!(check_gguf(bytes), Ok(false), "{name}, {} bytes", bytes.len());
    }

    let entry = |i: usize| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let header = format!("{{{}}}", (0..20_000).map(entry).collect::<Vec<_>>().join(","));
    let shape = format!(r#"{{"t":{{"dtype":"F32","shape":[{}1]}}}}"#, "1,".repeat(1 << 19));
    let deep = format!(r#"{{"__metadata__":{}"#, "[".repeat(1 << 20));
    for (name, header) in [("entries", header), ("shape", shape), ("nesting", deep)] {
        assert_eq!(check_repository("model.safetensors", &with_header(&header, 0), MULTIPLE), Ok(false), "{name}");
    }
    let map = (0..50_000).map(|i| format!(r#""{i}":"a.safetensors""#)).collect::<Vec<_>>().join(",");
    let index = format!(r#"{{"weight_map":{{{map}}}}}"#);
    assert_eq!(check_repository("model.safetensors.index.json", index.as_bytes(), MULTIPLE), Ok(false));
    let list = format!("{{\"layer_types\":[{}0]}}", "0,".repeat(500_000));
    let nested = "[".repeat(1 << 19);
    let long = format!("{{\"a\":\"{}\"}}", "x".repeat(8 << 20));
    for (name, text) in [("list", list), ("nesting", nested), ("long", long)] {
        assert_eq!(check_repository("config.json", text.as_bytes(), CONFIG_MULTIPLE), Ok(false), "{name}");
    }
}
