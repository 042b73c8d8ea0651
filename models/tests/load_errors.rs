//! A checkpoint whose tensors do not fit its architecture fails to load, with an error that names the tensor and the file.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use kvern_kernels::{CpuOptions, Device, Precision};
use kvern_models::{LoadFormat, LoadOptions, ModelFiles, StepLimits, load};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// Tensors by name: type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;
type Edit = fn(&mut Tensors, &mut Value);

const Q: &str = "model.layers.1.self_attn.q_proj.weight";
const DOWN: &str = "model.layers.0.mlp.down_proj.weight";

/// The error that golden `case` gives after `edit`.
fn error_after(case: &str, edit: Edit) -> String {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let read = |path: &str| std::fs::read(golden.join(path)).unwrap();
    let mut config: Value = serde_json::from_slice(&read(&format!("{case}/config.json"))).unwrap();
    let bytes = read(&format!("checkpoints/{case}.safetensors"));
    let mut tensors: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    edit(&mut tensors, &mut config);

    let repository = tempfile::tempdir().unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    std::fs::write(repository.path().join("model.safetensors"), bytes).unwrap();
    std::fs::write(repository.path().join("config.json"), config.to_string()).unwrap();

    let device = Device::cpu(CpuOptions::default()).unwrap();
    let limits = StepLimits { tokens_max: 16, sequences_max: 4, context_max: 64 };
    let options = LoadOptions { precision: Precision::AsStored, format: LoadFormat::Files, limits };
    let result = ModelFiles::open(repository.path()).and_then(|files| load(&device, &files, &options, &mut |_| {}));
    match result {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

fn check(case: &str, edit: Edit, expected: &[&str]) {
    let message = error_after(case, edit);
    for part in expected {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn the_checkpoints_load_unedited() {
    for case in ["llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3"] {
        assert_eq!(error_after(case, |_, _| ()), "", "{case}");
    }
}

#[test]
fn missing_tensors() {
    let missing = |case, edit, name| check(case, edit, &["model.safetensors", name, "missing"]);
    missing("llama", |tensors, _| drop(tensors.remove(Q)), Q);
    missing("llama", |tensors, _| drop(tensors.remove("lm_head.weight")), "lm_head.weight");
    missing("llama", |tensors, _| drop(tensors.remove("model.norm.weight")), "model.norm.weight");
    missing("llama", |_, config| config["attention_bias"] = json!(true), "self_attn.q_proj.bias");
    missing("llama", |_, config| config["mlp_bias"] = json!(true), "mlp.gate_proj.bias");
    let bias = "model.layers.1.self_attn.k_proj.bias";
    missing("qwen2", |tensors, _| drop(tensors.remove("model.layers.1.self_attn.k_proj.bias")), bias);
    let norm = "model.layers.0.self_attn.k_norm.weight";
    missing("qwen3", |tensors, _| drop(tensors.remove("model.layers.0.self_attn.k_norm.weight")), norm);
}

#[test]
fn unused_tensors() {
    let unused = |case, edit, name| check(case, edit, &["model.safetensors", name, "unused"]);
    unused(
        "llama",
        |tensors, _| {
            let down = tensors[DOWN].clone();
            tensors.insert("model.layers.2.mlp.down_proj.weight".to_owned(), down);
        },
        "model.layers.2.mlp.down_proj.weight",
    );
    unused("llama", |_, config| config["num_hidden_layers"] = json!(1), "model.layers.1.");
    unused("llama-bias", |_, config| config["attention_bias"] = json!(false), "self_attn.");
}

#[test]
fn wrong_shapes() {
    let wrong = |edit, name, expected, found| check("llama", edit, &["model.safetensors", name, expected, found]);
    let narrower: Edit = |tensors, _| {
        let (_, shape, data) = tensors.get_mut(Q).unwrap();
        shape[0] -= 1;
        data.truncate(63 * 64 * 4);
    };
    wrong(narrower, Q, "[64, 64]", "[63, 64]");
    wrong(|tensors, _| tensors.get_mut(DOWN).unwrap().1.swap(0, 1), DOWN, "[64, 96]", "[96, 64]");
    wrong(|tensors, _| tensors.get_mut(DOWN).unwrap().1 = vec![64 * 96], DOWN, "[64, 96]", "[6144]");
    let norm = "model.layers.0.input_layernorm.weight";
    wrong(
        |tensors, _| tensors.get_mut("model.layers.0.input_layernorm.weight").unwrap().1 = vec![8, 8],
        norm,
        "[64]",
        "[8, 8]",
    );
    wrong(|_, config| config["vocab_size"] = json!(127), "model.embed_tokens.weight", "[127, 64]", "[128, 64]");
    wrong(|_, config| config["head_dim"] = json!(32), "self_attn.q_proj.weight", "[128, 64]", "[64, 64]");
}

#[test]
fn wrong_types() {
    let edit: Edit = |tensors, _| tensors.get_mut(Q).unwrap().0 = Dtype::I32;
    check("llama", edit, &["model.safetensors", Q, "I32"]);
}
