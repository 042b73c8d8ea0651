//! Configurations of both formats: what is read, and what is refused by name.
#![allow(clippy::unwrap_used)]

mod common;

use common::gguf_writer::{GgufWriter, Meta, small_llama};
use common::repository::{config_only, llama_config};
use kvern_models::{Architecture, Checkpoint, GenerationDefaults, ModelConfig, ModelFiles};
use serde_json::{Value, json};

fn read_at(path: &std::path::Path) -> Result<ModelConfig, String> {
    let files = ModelFiles::open(path).map_err(|error| error.to_string())?;
    let checkpoint = Checkpoint::open(&files).map_err(|error| error.to_string())?;
    ModelConfig::read(&checkpoint).map_err(|error| error.to_string())
}

fn read(config: &Value) -> Result<ModelConfig, String> {
    read_at(config_only(config).path())
}

fn read_gguf(writer: &GgufWriter) -> Result<ModelConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    writer.write(&path);
    read_at(&path)
}

/// The small llama with these keys instead.
fn with(keys: Value) -> Value {
    let mut config = llama_config();
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn family(model_type: &str, class: &str, keys: Value) -> ModelConfig {
    let mut config = with(keys);
    config["model_type"] = model_type.into();
    config["architectures"] = json!([class]);
    read(&config).unwrap()
}

#[test]
fn llama_is_read() {
    let config = read(&llama_config()).unwrap();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size, config.layers), (32, 64, 96, 2));
    assert_eq!((config.heads.heads, config.heads.kv_heads, config.heads.head_dim), (4, 2, 16));
    assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-5, 128));
    assert_eq!((config.tie_word_embeddings, config.attention_bias, config.mlp_bias), (false, false, false));
    assert_eq!((config.windows.as_slice(), config.rope.rotary_dim, config.rope.theta), (&[None, None][..], 16, 1e4));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    let config = read(&with(json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}))).unwrap();
    assert!(config.attention_bias && config.mlp_bias && config.tie_word_embeddings);
}

#[test]
fn gguf_equals_config_json() {
    // GGUF has no flag for a tied head: without tensors the head is missing, so it is tied.
    let expected = read(&with(json!({"tie_word_embeddings": true}))).unwrap();
    assert_eq!(read_gguf(&small_llama()).unwrap(), expected);
    let biases = ["blk.0.attn_q.bias", "blk.0.ffn_gate.bias", "output.weight"];
    let writer = biases.iter().fold(small_llama(), |writer, name| writer.f32(name, &[1], &[0.0]));
    let config = read_gguf(&writer).unwrap();
    assert!(config.attention_bias && config.mlp_bias && !config.tie_word_embeddings);
}

#[test]
fn default_model_is_read() {
    let config = read_at(&common::default_model()).unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (49_152, 576, 1536));
    assert_eq!((config.layers, config.max_position_embeddings), (30, 8192));
    assert_eq!((config.heads.heads, config.heads.kv_heads, config.heads.head_dim), (9, 3, 64));
    assert_eq!((config.rope.theta, config.rope.rotary_dim, config.tie_word_embeddings), (100_000.0, 64, true));
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
}

#[test]
fn windows_are_per_layer() {
    let mistral = |keys| family("mistral", "MistralForCausalLM", keys).windows;
    assert_eq!(mistral(json!({"sliding_window": null})), [None, None]);
    assert_eq!(mistral(json!({"sliding_window": 20})), [Some(20), Some(20)]);
    assert_eq!(mistral(json!({})), [Some(4096), Some(4096)]);
    let qwen2 = |keys| family("qwen2", "Qwen2ForCausalLM", keys).windows;
    assert_eq!(qwen2(json!({"sliding_window": 20, "max_window_layers": 0})), [None, None]);
    let used = json!({"use_sliding_window": true, "sliding_window": 20, "max_window_layers": 1});
    assert_eq!(qwen2(used), [None, Some(20)]);
    let types = json!({
        "use_sliding_window": true, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]
    });
    assert_eq!(qwen2(types), [Some(20), None]);
    let gguf = small_llama().meta("llama.attention.sliding_window", Meta::U32(20));
    assert_eq!(read_gguf(&gguf).unwrap().windows, [Some(20), Some(20)]);
}

#[test]
fn families_differ_in_defaults() {
    let qwen2 = family("qwen2", "Qwen2ForCausalLM", json!({}));
    assert!(qwen2.architecture == Architecture::Qwen2 && qwen2.attention_bias && qwen2.heads.head_dim == 16);
    let qwen3 = family("qwen3", "Qwen3ForCausalLM", json!({}));
    assert!(qwen3.architecture == Architecture::Qwen3 && !qwen3.attention_bias && qwen3.heads.head_dim == 128);
    let mistral = family("mistral", "MistralForCausalLM", json!({"head_dim": 24}));
    assert!(mistral.architecture == Architecture::Llama && mistral.heads.head_dim == 24);
}

#[test]
fn generation_defaults_are_read() {
    let dir = config_only(&llama_config());
    let text = json!({
        "eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1,
        "max_new_tokens": 100, "do_sample": true
    });
    std::fs::write(dir.path().join("generation_config.json"), text.to_string()).unwrap();
    let config = read_at(dir.path()).unwrap();
    let expected = GenerationDefaults {
        temperature: Some(0.6),
        top_p: Some(0.9),
        top_k: Some(50),
        min_p: Some(0.05),
        repetition_penalty: Some(1.1),
        max_new_tokens: Some(100),
        ..GenerationDefaults::default()
    };
    assert_eq!((config.generation, config.eos_token_ids), (expected, vec![2, 7]));

    std::fs::write(dir.path().join("generation_config.json"), r#"{"top_p": 1.5}"#).unwrap();
    let message = read_at(dir.path()).unwrap_err();
    assert!(message.contains("generation_config.json: key `top_p`: expected a number above 0"), "{message}");

    let writer = small_llama()
        .meta("general.sampling.temp", Meta::F32(0.6))
        .meta("general.sampling.top_k", Meta::I32(0))
        .meta("tokenizer.ggml.eot_token_id", Meta::U32(7));
    let config = read_gguf(&writer).unwrap();
    let expected = GenerationDefaults { temperature: Some(0.6), ..GenerationDefaults::default() };
    assert_eq!((config.generation, config.eos_token_ids), (expected, vec![2, 7]));
}

#[test]
fn unsound_configurations_are_refused_by_name() {
    let window = json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 0});
    let types = json!({"model_type": "qwen2", "architectures": [], "layer_types": ["full_attention"]});
    let unset =
        json!({"model_type": "qwen2", "architectures": [], "layer_types": ["sliding_attention", "full_attention"]});
    let nested =
        json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 2e4}}});
    let longrope = json!({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}});
    let llama3 = json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}});
    let table = [
        (
            "model_type: expected an architecture of llama, mistral, qwen2 or qwen3, found `gemma2`",
            json!({"model_type": "gemma2"}),
        ),
        ("found `qwen3_moe`", json!({"model_type": "qwen3_moe"})),
        (
            "architectures: expected LlamaForCausalLM, found `LlamaForSequenceClassification`",
            json!({"architectures": ["LlamaForSequenceClassification"]}),
        ),
        ("a mixture of 8 experts (num_local_experts)", json!({"num_local_experts": 8})),
        ("found quantization method `awq`", json!({"quantization_config": {"quant_method": "awq"}})),
        ("hidden_act: expected silu, found `gelu`", json!({"hidden_act": "gelu"})),
        ("key `hidden_size`: missing", json!({"hidden_size": null})),
        ("key `vocab_size`: expected a size of 1 to 16777216, found 0", json!({"vocab_size": 0})),
        ("key `num_hidden_layers`: expected a size of 1 to 4096", json!({"num_hidden_layers": 1_u64 << 60})),
        ("key `num_hidden_layers`: expected a whole number of at least 0, found -1", json!({"num_hidden_layers": -1})),
        ("key `hidden_size`: expected a whole number of at least 0, found `64`", json!({"hidden_size": "64"})),
        ("key `num_attention_heads`: expected a size of 1", json!({"num_attention_heads": 0})),
        (
            "key `num_key_value_heads`: expected a divisor of the 4 attention heads, found 3",
            json!({"num_key_value_heads": 3}),
        ),
        ("key `hidden_size`: expected a multiple of the 4 attention heads, found 63", json!({"hidden_size": 63})),
        ("key `head_dim`: expected an even size", json!({"head_dim": 15})),
        ("key `rms_norm_eps`: expected a finite number above 0, found 0", json!({"rms_norm_eps": 0})),
        ("key `eos_token_id`: expected a token id", json!({"eos_token_id": [2, "x"]})),
        ("key `sliding_window`: expected a window of 1", window),
        ("key `layer_types`: expected a type for each of 2 layers, found 1", types),
        ("key `layer_types`: a layer has sliding_attention", unset),
        ("key `rope_parameters.sliding_attention`: expected the same rope", nested),
        ("key `rope_scaling.rope_type`: expected default, linear", json!({"rope_scaling": {"rope_type": "mrope"}})),
        ("key `rope_scaling.factor`: missing", json!({"rope_scaling": {"type": "linear"}})),
        (
            "key `rope_scaling.factor`: expected a finite number above 0, found 0",
            json!({"rope_scaling": {"type": "linear", "factor": 0.0}}),
        ),
        ("key `rope_scaling.short_factor`: expected 8 numbers", longrope),
        ("expected a low_freq_factor below the high_freq_factor 4, found 4", llama3),
        ("key `rope_theta`: expected a finite number above 0, found -1", json!({"rope_theta": -1})),
        ("expected a base above 1, found 1", json!({"rope_theta": 1.0})),
        ("expected an even number of rotated elements up to 16, found 1", json!({"partial_rotary_factor": 0.1})),
        ("frequencies that are not finite", json!({"rope_scaling": {"type": "linear", "factor": 1e-300}})),
    ];
    for (expected, keys) in table {
        let message = read(&with(keys)).err().unwrap_or_else(|| panic!("{expected}: the configuration was accepted"));
        assert!(
            message.contains("config.json") && message.contains(expected),
            "expected `{expected}`, found `{message}`"
        );
    }
}

#[test]
fn unsound_metadata_are_refused_by_name() {
    let long = || small_llama().meta("llama.rope.scaling.type", Meta::str("longrope"));
    let table = [
        (
            "general.architecture: expected an architecture of llama, mistral, qwen2 or qwen3, found `mamba`",
            GgufWriter::new("mamba"),
        ),
        ("key `general.architecture`: missing", small_llama().without("general.architecture")),
        ("key `llama.block_count`: missing", small_llama().without("llama.block_count")),
        ("key `llama.block_count`: expected a whole number", small_llama().set("llama.block_count", Meta::str("2"))),
        ("key `llama.block_count`: expected a size of 1", small_llama().set("llama.block_count", Meta::U64(u64::MAX))),
        (
            "key `llama.attention.head_count`: expected the same number in every layer",
            small_llama().set("llama.attention.head_count", Meta::i32s(&[4, 2])),
        ),
        (
            "key `llama.attention.head_count`: expected a size of 1",
            small_llama().set("llama.attention.head_count", Meta::i32s(&[])),
        ),
        (
            "key `llama.attention.head_count_kv`: expected a divisor",
            small_llama().set("llama.attention.head_count_kv", Meta::U32(3)),
        ),
        (
            "key `llama.attention.value_length`: expected the length 16 of keys, found 8",
            small_llama().meta("llama.attention.value_length", Meta::U32(8)),
        ),
        ("key `llama.vocab_size`: missing", small_llama().without("llama.vocab_size")),
        ("llama.expert_count: expected none", small_llama().meta("llama.expert_count", Meta::U32(8))),
        (
            "key `llama.rope.dimension_count`: expected a size of 1 to 16",
            small_llama().meta("llama.rope.dimension_count", Meta::U32(18)),
        ),
        ("key `llama.rope.scaling.type`: expected none", small_llama().meta("llama.rope.scaling.type", Meta::str("x"))),
        ("tensor `rope_factors_short.weight`: missing", long()),
        (
            "tensor `rope_factors_short.weight`: expected F32 of [8], found F32 of [7]",
            long().f32("rope_factors_short.weight", &[7], &[1.0; 7]),
        ),
        (
            "tensor `rope_freqs.weight`: expected finite divisors above 0, found 0",
            small_llama().f32("rope_freqs.weight", &[8], &[0.0; 8]),
        ),
    ];
    for (expected, writer) in table {
        let message = read_gguf(&writer).err().unwrap_or_else(|| panic!("{expected}: the metadata were accepted"));
        assert!(
            message.contains("model.gguf") && message.contains(expected),
            "expected `{expected}`, found `{message}`"
        );
    }
}
