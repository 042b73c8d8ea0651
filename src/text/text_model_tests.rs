//! Loading a model's text side from directories and GGUF files, good and bad.
#![allow(clippy::unwrap_used)]

use super::tokenizer_tests::default_model;
use super::{RenderInput, TextModel, Tokenizer};
use kvern_models::gguf::Gguf;
use serde_json::{Map, Value, json};
use std::path::Path;

fn tokenizer_json() -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer/json/byte_level.json")).unwrap()
}

/// A model directory with these files besides tokenizer.json.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

fn prompt(model: &TextModel, tools: Option<&Value>) -> String {
    let messages = json!([]);
    model.template.as_ref().unwrap().render(&RenderInput { tools, ..RenderInput::new(&messages) }).unwrap()
}

#[test]
fn the_default_model() {
    let model = TextModel::from_gguf(&Gguf::open(&default_model()).unwrap()).unwrap();
    assert_eq!(model.tokenizer.vocab_size(), 49_152);
    assert_eq!((model.tokenizer.bos(), model.tokenizer.eos()), (Some(1), Some(2)));
    // <|endoftext|> and <|im_end|>
    assert_eq!(model.stop_tokens, [0, 2]);
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let prompt = model.template.unwrap().render(&RenderInput::new(&messages)).unwrap();
    let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(prompt, expected);
    assert_eq!(model.tokenizer.encode("Hi", true).unwrap(), model.tokenizer.encode("Hi", false).unwrap());
}

#[test]
fn a_directory_without_anything_else() {
    let model = TextModel::from_dir(directory(&[]).path()).unwrap();
    assert!(model.template.is_none());
    assert!(model.stop_tokens.is_empty());
}

#[test]
fn stop_tokens_come_from_all_files() {
    let dir = directory(&[
        ("config.json", r#"{"eos_token_id": 7}"#),
        ("generation_config.json", r#"{"eos_token_id": [9, 7, 3]}"#),
        ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}"#),
    ]);
    let model = TextModel::from_dir(dir.path()).unwrap();
    let eos = model.tokenizer.token_id("</s>").unwrap();
    assert_eq!(model.tokenizer.eos(), Some(eos));
    assert_eq!(model.stop_tokens, [3, 7, 9, eos]);
}

#[test]
fn template_precedence() {
    let tools = json!([]);
    let config = (
        "tokenizer_config.json",
        r#"{"chat_template": [{"name": "default", "template": "list {{ bos_token }}"},
            {"name": "tool_use", "template": "list tools"}], "bos_token": "<s>"}"#,
    );
    let plain = ("tokenizer_config.json", r#"{"chat_template": "field {{ eos_token }}"}"#);
    let file = ("chat_template.jinja", "file");
    let additional = ("additional_chat_templates/tool_use.jinja", "additional");
    type Files<'a> = &'a [(&'a str, &'a str)];
    let cases: &[(Files<'_>, &str, &str)] = &[
        (&[config], "list <s>", "list tools"),
        (&[plain], "field ", "field "),
        (&[plain, file], "file", "file"),
        (&[config, file, additional], "file", "additional"),
    ];
    for (files, default, tool_use) in cases {
        let model = TextModel::from_dir(directory(files).path()).unwrap();
        assert_eq!(prompt(&model, None), *default);
        assert_eq!(prompt(&model, Some(&tools)), *tool_use);
    }
}

#[test]
fn tokens_that_only_the_config_names_are_added() {
    let config = r#"{"added_tokens_decoder": {"900": {"content": "<|new|>", "special": true, "normalized": false,
        "lstrip": false, "rstrip": false, "single_word": false}}}"#;
    let model = TextModel::from_dir(directory(&[("tokenizer_config.json", config)]).path()).unwrap();
    let ids = model.tokenizer.encode("<|new|>", false).unwrap();
    assert_eq!(ids.len(), 1);
    assert!(model.tokenizer.is_special(ids[0]));
}

#[test]
fn broken_files_are_named() {
    let cases: &[(&str, &str, &str)] = &[
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is no tokenizer"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {}}}"#, "expected a token id"),
        ("chat_template.jinja", "{% if %}", "the chat template is broken"),
        ("config.json", "nonsense", "config.json"),
    ];
    for (name, text, expected) in cases {
        let error = TextModel::from_dir(directory(&[(name, text)]).path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(TextModel::from_dir(empty.path()).unwrap_err().to_string().contains("cannot read"));
}

/// A GGUF file of metadata only (format version 3, ggml's docs/gguf.md).
fn gguf(metadata: &Map<String, Value>) -> Gguf {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    for (key, value) in metadata {
        text(&mut bytes, key);
        match value {
            Value::String(value) => {
                bytes.extend(8u32.to_le_bytes());
                text(&mut bytes, value);
            }
            Value::Bool(value) => {
                bytes.extend(7u32.to_le_bytes());
                bytes.push(u8::from(*value));
            }
            Value::Number(value) => {
                bytes.extend(4u32.to_le_bytes());
                bytes.extend((value.as_u64().unwrap() as u32).to_le_bytes());
            }
            Value::Array(items) => {
                bytes.extend(9u32.to_le_bytes());
                let of_text = items.iter().all(Value::is_string);
                bytes.extend(if of_text { 8u32 } else { 5u32 }.to_le_bytes());
                bytes.extend((items.len() as u64).to_le_bytes());
                for item in items {
                    match item {
                        Value::String(item) => text(&mut bytes, item),
                        item => bytes.extend((item.as_i64().unwrap() as i32).to_le_bytes()),
                    }
                }
            }
            other => panic!("no GGUF type for {other}"),
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path()).unwrap()
}

/// Three tokens and one merge, with these fields changed; `null` removes one.
fn small(changes: Value) -> Gguf {
    let mut metadata = json!({
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>", "<|end|>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
    });
    let metadata = metadata.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        metadata.insert(key.clone(), value.clone());
    }
    metadata.retain(|_, value| !value.is_null());
    gguf(metadata)
}

#[test]
fn a_small_gguf() {
    let changes = json!({
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": true,
        "tokenizer.ggml.add_eos_token": true,
        "tokenizer.chat_template": "default {{ bos_token }}",
        "tokenizer.chat_template.tool_use": "tools",
    });
    let model = TextModel::from_gguf(&small(changes)).unwrap();
    assert_eq!(model.tokenizer.encode("abb<|im_end|>", true).unwrap(), [0, 2, 1, 3, 1]);
    // The name of an end token counts more than its stored type; a stop token may be named or known.
    assert!(model.tokenizer.is_special(3));
    assert_eq!(model.stop_tokens, [1, 3, 4]);
    assert_eq!(prompt(&model, None), "default a");
    assert_eq!(prompt(&model, Some(&json!([]))), "tools");
}

#[test]
fn bad_gguf_tokenizers_are_refused() {
    let cases = [
        (json!({"tokenizer.ggml.model": null}), "expected tokenizer.ggml.model gpt2"),
        (json!({"tokenizer.ggml.model": "llama"}), "found \"llama\""),
        (json!({"tokenizer.ggml.pre": "mystery"}), "found \"mystery\""),
        (json!({"tokenizer.ggml.pre": "mystery"}), "llama-bpe"),
        (json!({"tokenizer.ggml.tokens": null}), "tokenizer.ggml.tokens"),
        (json!({"tokenizer.ggml.tokens": []}), "tokenizer.ggml.tokens"),
        (json!({"tokenizer.ggml.tokens": [1, 2]}), "tokenizer.ggml.tokens"),
        (json!({"tokenizer.ggml.tokens": ["a", "b", "ab", "a", "c"]}), "tokens 0 and 3 are both \"a\""),
        (json!({"tokenizer.ggml.token_type": [1]}), "expected 5 entries"),
        (json!({"tokenizer.ggml.token_type": "x"}), "expected integers"),
        (json!({"tokenizer.ggml.merges": null}), "tokenizer.ggml.merges"),
        (json!({"tokenizer.ggml.merges": ["ab"]}), "merge 0: expected two tokens"),
        (json!({"tokenizer.ggml.merges": ["é"]}), "merge 0: expected two tokens"),
        (json!({"tokenizer.ggml.merges": [""]}), "merge 0: expected two tokens"),
        (json!({"tokenizer.ggml.merges": ["a c"]}), "\"c\" is not in the vocabulary"),
        (json!({"tokenizer.ggml.merges": ["b a"]}), "\"ba\" is not in the vocabulary"),
        (json!({"tokenizer.ggml.add_bos_token": true}), "add_bos_token is set"),
        (json!({"tokenizer.ggml.add_bos_token": true, "tokenizer.ggml.bos_token_id": 99}), "add_bos_token is set"),
        (json!({"tokenizer.ggml.add_space_prefix": true}), "add_space_prefix"),
    ];
    for (changes, expected) in cases {
        let error = Tokenizer::from_gguf(&small(changes.clone())).unwrap_err().to_string();
        assert!(error.contains(expected), "{changes}: {error}");
    }
}
