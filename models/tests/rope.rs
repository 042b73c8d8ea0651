//! RoPE frequencies against those that transformers computes; `scripts/make_rope_reference.py` makes the table.
#![allow(clippy::unwrap_used)]

mod common;

use common::gguf_writer::{GgufWriter, Meta};
use common::repository::{config_only, llama_config};
use kvern_models::rope::RopeFrequencies;
use kvern_models::{Checkpoint, ModelConfig, ModelFiles};
use serde_json::Value;

/// Powers of two math libraries differ in the last bits of an f32.
const TOLERANCE: f32 = 5e-7;

fn read(path: &std::path::Path) -> ModelConfig {
    let checkpoint = Checkpoint::open(&ModelFiles::open(path).unwrap()).unwrap();
    ModelConfig::read(&checkpoint).unwrap()
}

fn assert_close(found: &RopeFrequencies, inv_freq: &[f32], scale: f32, what: &str) {
    assert_eq!(found.inv_freq.len(), inv_freq.len(), "{what}");
    for (i, (a, b)) in found.inv_freq.iter().zip(inv_freq).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * b, "{what}, frequency {i}: found {a}, expected {b}");
    }
    assert!((found.scale - scale).abs() <= TOLERANCE * scale, "{what}: scale {}, expected {scale}", found.scale);
}

#[test]
fn every_scaling_matches_transformers() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rope_reference.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(cases.len(), 17);
    for case in cases {
        let mut config = llama_config();
        for (key, value) in case["config"].as_object().unwrap() {
            config[key] = value.clone();
        }
        config["num_key_value_heads"] = 8.into();
        let context_max = case["context_max"].as_u64().unwrap() as usize;
        let found = read(config_only(&config).path()).rope.frequencies(context_max);
        let inv_freq: Vec<f32> = serde_json::from_value(case["inv_freq"].clone()).unwrap();
        let scale = case["scale"].as_f64().unwrap() as f32;
        assert_close(&found, &inv_freq, scale, case["name"].as_str().unwrap());
    }
}

/// The same scalings in GGUF's keys and tensors.
#[test]
fn gguf_scalings_match_those_of_config_json() {
    let llama3 = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32
    });
    let factors = |step: f32| (0..8).map(|i| 1.0 + step * i as f32).collect::<Vec<f32>>();
    let longrope = serde_json::json!({
        "rope_type": "longrope", "short_factor": factors(0.5), "long_factor": factors(2.0),
        "original_max_position_embeddings": 32, "attention_factor": 1.25
    });
    let frequencies = |scaling: &Value, context: usize| {
        let mut config = llama_config();
        config["rope_scaling"] = scaling.clone();
        read(config_only(&config).path()).rope.frequencies(context)
    };
    let plain = frequencies(&Value::Null, 128);
    let stretched = frequencies(&llama3, 128);
    let divisors: Vec<f32> = plain.inv_freq.iter().zip(&stretched.inv_freq).map(|(a, b)| a / b).collect();
    let yarn = serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    let linear = serde_json::json!({"rope_type": "linear", "factor": 4.0});

    let text = |kind: &str| ("llama.rope.scaling.type", Meta::str(kind));
    let factor = ("llama.rope.scaling.factor", Meta::F32(4.0));
    let original = ("llama.rope.scaling.original_context_length", Meta::U32(32));
    let attention = ("llama.rope.scaling.attn_factor", Meta::F32(1.25));
    let (short, long) = (("rope_factors_short.weight", factors(0.5)), ("rope_factors_long.weight", factors(2.0)));
    type Case<'a> = (Value, usize, Vec<(&'a str, Meta)>, Vec<(&'a str, Vec<f32>)>);
    let table: Vec<Case<'_>> = vec![
        (Value::Null, 128, vec![text("none")], vec![]),
        (llama3, 128, vec![], vec![("rope_freqs.weight", divisors)]),
        (linear.clone(), 128, vec![text("linear"), factor.clone()], vec![]),
        (linear, 128, vec![("llama.rope.scale_linear", Meta::F32(4.0))], vec![]),
        (yarn, 128, vec![text("yarn"), factor, original.clone()], vec![]),
        (
            longrope.clone(),
            32,
            vec![text("longrope"), original.clone(), attention.clone()],
            vec![short.clone(), long.clone()],
        ),
        (longrope, 33, vec![text("longrope"), original, attention], vec![short, long]),
    ];
    for (scaling, context, metadata, tensors) in table {
        let mut writer = common::gguf_writer::small_llama();
        for (key, value) in metadata {
            writer = writer.meta(key, value);
        }
        for (name, values) in tensors {
            writer = writer.f32(name, &[values.len()], &values);
        }
        let found = gguf_frequencies(&writer, context);
        let expected = frequencies(&scaling, context);
        assert_close(&found, &expected.inv_freq, expected.scale, &format!("{scaling} at {context}"));
    }
}

fn gguf_frequencies(writer: &GgufWriter, context: usize) -> RopeFrequencies {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    writer.write(&path);
    read(&path).rope.frequencies(context)
}
