//! Weights of both formats under one naming, safetensors files and folders of models.
#![allow(clippy::unwrap_used)]

mod common;

use common::gguf_writer::small_llama;
use common::repository::{F32Tensor, config_only, folder, llama_config, safetensors, with_header};
use kvern_kernels::{Format, RowOrder};
use kvern_models::{Checkpoint, ModelConfig, ModelFiles, Weights};
use serde_json::json;

fn open(path: &std::path::Path) -> Result<(Checkpoint, ModelConfig), String> {
    let checkpoint = ModelFiles::open(path).and_then(|files| Checkpoint::open(&files)).map_err(|e| e.to_string())?;
    let config = ModelConfig::read(&checkpoint).map_err(|error| error.to_string())?;
    Ok((checkpoint, config))
}

/// Takes every tensor that a llama without biases has.
fn take_all(weights: &mut Weights<'_>, config: &ModelConfig) -> Result<(), kvern_models::LoadError> {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads.heads * config.heads.head_dim, config.heads.kv_heads * config.heads.head_dim);
    weights.matrix("model.embed_tokens.weight", config.vocab_size, hidden)?;
    weights.vector("model.norm.weight", hidden)?;
    if !config.tie_word_embeddings {
        weights.matrix("lm_head.weight", config.vocab_size, hidden)?;
    }
    for layer in 0..config.layers {
        let name = |stem: &str| format!("model.layers.{layer}.{stem}.weight");
        weights.vector(&name("input_layernorm"), hidden)?;
        weights.vector(&name("post_attention_layernorm"), hidden)?;
        let shapes = [
            ("self_attn.q_proj", q, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, q),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ];
        for (stem, rows, cols) in shapes {
            weights.matrix(&name(stem), rows, cols)?;
        }
    }
    Ok(())
}

#[test]
fn default_model_is_taken_whole() {
    let (checkpoint, config) = open(&common::default_model()).unwrap();
    let mut weights = Weights::new(&checkpoint, &config);
    let bytes = std::fs::metadata(common::default_model()).unwrap().len();
    let total = weights.remaining_bytes();
    assert!(total < bytes && total > bytes / 10 * 9, "{total} of {bytes}");
    take_all(&mut weights, &config).unwrap();
    assert_eq!(weights.remaining_bytes(), 0);
    weights.finish().unwrap();
}

#[test]
fn llama_rows_of_gguf_are_unpermuted() {
    let (checkpoint, config) = open(&common::default_model()).unwrap();
    let mut weights = Weights::new(&checkpoint, &config);
    let order = |name: &str, rows, cols, weights: &mut Weights<'_>| weights.matrix(name, rows, cols).unwrap().row_order;
    let layer = "model.layers.3.self_attn";
    let q = order(&format!("{layer}.q_proj.weight"), 576, 576, &mut weights);
    let k = order(&format!("{layer}.k_proj.weight"), 192, 576, &mut weights);
    let v = order(&format!("{layer}.v_proj.weight"), 192, 576, &mut weights);
    let expected = (RowOrder::UnpermuteRope { heads: 9 }, RowOrder::UnpermuteRope { heads: 3 }, RowOrder::Natural);
    assert_eq!((q, k, v), expected);
    let view = weights.matrix("model.embed_tokens.weight", 49_152, 576).unwrap();
    assert_eq!((view.format, view.name, view.bytes.len()), (Format::Q8_0, "token_embd.weight", 49_152 * 576 / 32 * 34));
}

#[test]
fn biases_follow_the_rows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let stored: Vec<f32> = (0..64).map(|i| i as f32).collect();
    small_llama().f32("blk.0.attn_q.bias", &[64], &stored).f32("blk.0.attn_v.bias", &[32], &stored[..32]).write(&path);
    let (checkpoint, config) = open(&path).unwrap();
    let mut weights = Weights::new(&checkpoint, &config);
    let q = weights.vector("model.layers.0.self_attn.q_proj.bias", 64).unwrap();
    // Of each head of 16, even stored rows come first.
    let expected: Vec<f32> = (0..4)
        .flat_map(|head| {
            let row = move |i: i32| (head * 16 + i) as f32;
            (0..8).map(move |i| row(2 * i)).chain((0..8).map(move |i| row(2 * i + 1)))
        })
        .collect();
    assert_eq!(q, expected);
    assert_eq!(weights.vector("model.layers.0.self_attn.v_proj.bias", 32).unwrap(), stored[..32]);
    weights.finish().unwrap();
}

#[test]
fn misfits_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut writer = small_llama().f32("token_embd.weight", &[32, 64], &[0.5; 32 * 64]).f32("extra", &[1], &[1.0]);
    writer.push_raw("blk.0.attn_norm.weight", &[64], 39, vec![0; 64], None);
    writer.f32("blk.0.attn_rot_embd.weight", &[8], &[1.0; 8]).write(&path);
    let (checkpoint, config) = open(&path).unwrap();
    let mut weights = Weights::new(&checkpoint, &config);
    let mut error = |name: &str, shape: [usize; 2]| weights.matrix(name, shape[0], shape[1]).unwrap_err().to_string();
    let message = error("model.embed_tokens.weight", [64, 32]);
    assert!(message.contains("model.gguf: tensor `token_embd.weight`: expected a shape of [64, 32], found [32, 64]"));
    let message = error("model.layers.0.mlp.up_proj.weight", [96, 64]);
    assert!(message.contains("missing: expected [96, 64]"), "{message}");
    let message = error("no such tensor", [1, 1]);
    assert!(message.contains("missing"), "{message}");
    let message = weights.vector("model.layers.0.input_layernorm.weight", 64).unwrap_err().to_string();
    assert!(
        message.contains("tensor `blk.0.attn_norm.weight`: expected F32") && message.contains("MXFP4"),
        "{message}"
    );
    weights.matrix("model.embed_tokens.weight", 32, 64).unwrap();
    let message = weights.matrix("model.embed_tokens.weight", 32, 64).unwrap_err().to_string();
    assert!(message.contains("taken twice"), "{message}");
    // The unsupported norm comes before `extra`; the rotation table needs no use.
    let message = weights.finish().unwrap_err().to_string();
    assert!(message.contains("tensor `blk.0.attn_norm.weight`: unused"), "{message}");
}

#[test]
fn safetensors_are_taken_by_shard() {
    let table: [F32Tensor<'_>; 2] = [
        ("model.norm.weight", vec![64], (0..64).map(|i| i as f32).collect()),
        ("model.layers.0.self_attn.q_proj.weight", vec![64, 64], vec![0.5; 64 * 64]),
    ];
    let index = json!({"metadata": {"total_size": 1}, "weight_map": {
        "model.norm.weight": "a.safetensors", "model.layers.0.self_attn.q_proj.weight": "b.safetensors"}});
    let dir = folder(&[
        ("config.json", llama_config().to_string().into_bytes()),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        ("a.safetensors", safetensors(&table[..1])),
        ("b.safetensors", safetensors(&table[1..])),
    ]);
    let (checkpoint, config) = open(dir.path()).unwrap();
    let mut weights = Weights::new(&checkpoint, &config);
    assert_eq!(weights.vector("model.norm.weight", 64).unwrap(), table[0].2);
    let view = weights.matrix("model.layers.0.self_attn.q_proj.weight", 64, 64).unwrap();
    assert_eq!((view.format, view.row_order, view.bytes.len()), (Format::F32, RowOrder::Natural, 64 * 64 * 4));
    weights.finish().unwrap();
}

#[test]
fn tied_heads_may_be_in_the_file() {
    for (tied, fits) in [(true, true), (false, false)] {
        let mut config = llama_config();
        config["tie_word_embeddings"] = tied.into();
        let tensors = safetensors(&[("lm_head.weight", vec![1], vec![0.0])]);
        let dir = folder(&[("config.json", config.to_string().into_bytes()), ("model.safetensors", tensors)]);
        let (checkpoint, config) = open(dir.path()).unwrap();
        assert_eq!(Weights::new(&checkpoint, &config).finish().is_ok(), fits, "tied: {tied}");
    }
}

#[test]
fn unsound_safetensors_are_refused_by_name() {
    let entry = |rest: &str| format!(r#"{{"t":{{{rest}}}}}"#);
    let huge = r#""dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]"#;
    let overflow = r#""dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]"#;
    let dims = format!(r#""dtype":"F32","shape":[{}1],"data_offsets":[0,4]"#, "1,".repeat(1000));
    let f32_one = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("expected 8 bytes of its length, found 2", vec![1, 2]),
        ("expected a length of at most", u64::MAX.to_le_bytes().to_vec()),
        ("expected 100 bytes, found 0", 100_u64.to_le_bytes().to_vec()),
        ("in the safetensors header: ", with_header("{", 0)),
        ("in the safetensors header: ", with_header(&"[".repeat(100_000), 0)),
        ("tensor `t`", with_header(&entry(r#""dtype":"F31","shape":[],"data_offsets":[0,4]"#), 4)),
        ("tensor `t`", with_header(&entry(r#""dtype":"F32","shape":[-1],"data_offsets":[0,4]"#), 4)),
        ("tensor `t`: invalid length", with_header(&entry(&dims), 4)),
        ("tensor `t`: missing field `shape`", with_header(&entry(r#""dtype":"F32","data_offsets":[0,4]"#), 4)),
        ("tensor `t`: the file has it twice", with_header(&format!(r#"{{"t":{f32_one},"t":{f32_one}}}"#), 4)),
        ("tensor `t`: expected offsets within the file's 4 bytes", with_header(&entry(huge), 4)),
        ("tensor `t`: the product of the shape overflows", with_header(&entry(overflow), 4)),
        (
            "tensor `t`: expected offsets within",
            with_header(&entry(r#""dtype":"F32","shape":[1],"data_offsets":[4,0]"#), 4),
        ),
        (
            "tensor `t`: expected 8 bytes for F32 [2], found 4",
            with_header(&entry(r#""dtype":"F32","shape":[2],"data_offsets":[0,4]"#), 4),
        ),
        ("tensor `u`: its data overlap those of `t`", with_header(&format!(r#"{{"t":{f32_one},"u":{f32_one}}}"#), 4)),
    ];
    for (expected, bytes) in table {
        let dir = folder(&[("config.json", llama_config().to_string().into_bytes()), ("model.safetensors", bytes)]);
        let message = open(dir.path()).err().unwrap_or_else(|| panic!("{expected}: the file was accepted"));
        assert!(
            message.contains("model.safetensors") && message.contains(expected),
            "expected `{expected}`, found `{message}`"
        );
    }
}

#[test]
fn unsound_indexes_are_refused_by_name() {
    let weight_map = |map: serde_json::Value| json!({ "weight_map": map }).to_string();
    let table = [
        (
            "expected the name of a .safetensors file, found `../x.safetensors`",
            weight_map(json!({"t": "../x.safetensors"})),
        ),
        ("found `/etc/x.safetensors`", weight_map(json!({"t": "/etc/x.safetensors"}))),
        ("found `sub/x.safetensors`", weight_map(json!({"t": "sub/x.safetensors"}))),
        ("found `config.json`", weight_map(json!({"t": "config.json"}))),
        ("missing.safetensors: No such file", weight_map(json!({"t": "missing.safetensors"}))),
        ("a.safetensors: tensor `t`: the index places it in no file", weight_map(json!({"u": "a.safetensors"}))),
        (
            "a.safetensors: tensor `u`: missing, and the index names it",
            weight_map(json!({"t": "a.safetensors", "u": "a.safetensors"})),
        ),
        ("expected JSON: missing field `weight_map`", "{}".to_owned()),
    ];
    for (expected, index) in table {
        let dir = folder(&[
            ("config.json", llama_config().to_string().into_bytes()),
            ("model.safetensors.index.json", index.into_bytes()),
            ("a.safetensors", safetensors(&[("t", vec![1], vec![0.0])])),
        ]);
        let message = open(dir.path()).err().unwrap_or_else(|| panic!("{expected}: the index was accepted"));
        assert!(message.contains(expected), "expected `{expected}`, found `{message}`");
    }
}

#[test]
fn models_are_found() {
    let find = |dir: &tempfile::TempDir| ModelFiles::open(dir.path()).map_err(|error| error.to_string());
    let repository = config_only(&llama_config());
    assert_eq!(find(&repository), Ok(ModelFiles::SafeTensors { dir: repository.path().to_owned() }));
    let one = folder(&[("m.gguf", vec![]), ("README.md", vec![])]);
    assert_eq!(find(&one), Ok(ModelFiles::Gguf(one.path().join("m.gguf"))));
    let set = folder(&[("m-00001-of-00002.gguf", vec![]), ("m-00002-of-00002.gguf", vec![])]);
    assert_eq!(find(&set), Ok(ModelFiles::Gguf(set.path().join("m-00001-of-00002.gguf"))));
    let two = folder(&[("a.gguf", vec![]), ("b.gguf", vec![])]);
    assert!(
        find(&two).unwrap_err().contains("expected one .gguf file, found `a.gguf`, `b.gguf`; name the one to load")
    );
    let none = folder(&[("config.json", vec![]), ("pytorch_model.bin", vec![])]);
    assert!(find(&none).unwrap_err().contains("found `config.json`, `pytorch_model.bin`"));
    let file = ModelFiles::open(&none.path().join("config.json")).unwrap_err().to_string();
    assert!(file.contains("config.json: expected a .gguf file"), "{file}");
    let absent = ModelFiles::open(&none.path().join("absent")).unwrap_err().to_string();
    assert!(absent.contains("absent: No such file"), "{absent}");
}

/// By the bytes: norms and biases have other formats than the matrices.
#[test]
fn the_format_of_most_bytes() {
    let format = |files: &ModelFiles| Checkpoint::open(files).unwrap().stored_format();
    let stored = |path: &std::path::Path| format(&ModelFiles::open(path).unwrap());
    // Q4_1, but for the table.
    assert_eq!(stored(&common::default_model()), Some(Format::Q4_1));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    small_llama().write(&path);
    assert_eq!(stored(&path), None);
    small_llama().f32("blk.0.attn_q.bias", &[2], &[1.0, 2.0]).write(&path);
    assert_eq!(stored(&path), Some(Format::F32));

    let entry = |name: &str, dtype: &str, count: usize, start: usize, bytes: usize| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[{start},{}]}}"#, start + bytes)
    };
    let tensors = [
        entry("a", "F16", 6, 0, 12),
        entry("b", "F32", 2, 12, 8),
        entry("c", "BF16", 4, 20, 8),
        // Of a type that is never read.
        entry("d", "U8", 100, 28, 100),
        entry("e", "BF16", 3, 128, 6),
    ];
    let of = |tensors: &[String], bytes| {
        let file = with_header(&format!("{{{}}}", tensors.join(",")), bytes);
        let config = llama_config().to_string().into_bytes();
        stored(folder(&[("config.json", config), ("model.safetensors", file)]).path())
    };
    assert_eq!(of(&tensors[..4], 128), Some(Format::F16));
    assert_eq!(of(&tensors, 134), Some(Format::BF16));
    assert_eq!(of(&[entry("d", "U8", 100, 0, 100)], 100), None);
    assert_eq!(format(&ModelFiles::ConfigOnly { dir: dir.path().to_owned() }), None);
}
