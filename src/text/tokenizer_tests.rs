//! Tokenizers and detokenizer against the reference implementations: llama.cpp for GGUF, `tokenizers` for tokenizer.json.
//! `scripts/make_tokenizer_reference.py` wrote the data.
#![allow(clippy::unwrap_used)]

use super::{IncrementalDetokenizer, Tokenizer};
use kvern_core::TokenId;
use kvern_models::gguf::Gguf;
use proptest::prelude::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer").join(path)
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(path)).unwrap()).unwrap()
}

fn corpus() -> Vec<String> {
    serde_json::from_value(json("corpus.json")).unwrap()
}

fn rows(value: &Value) -> Vec<Vec<TokenId>> {
    serde_json::from_value(value.clone()).unwrap()
}

fn from_gguf(path: &Path) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap()
}

/// The default model's file; `make model` brings it.
pub(super) fn default_model() -> PathBuf {
    let path = std::env::var_os("KVERN_TEST_MODEL")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("models-cache/SmolLM2-135M-Instruct.Q4_1.gguf"));
    assert!(path.exists(), "{} is missing: run `make model`", path.display());
    path
}

const GGUF_NAMES: [&str; 12] = [
    "llama-bpe",
    "qwen2",
    "qwen35",
    "smollm",
    "gpt-2",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "falcon",
    "default",
    "dbrx",
    "glm4",
];
const JSON_KINDS: [&str; 5] = ["byte_level", "spm", "metaspace", "wordpiece", "suffix"];

/// Both directions: the same ids, and the text again from the ids, at once and token by token.
///
/// `decoded` has the text for those that the vocabulary cannot express (the default model's lacks some control bytes).
fn check_gguf(name: &str, tokenizer: Tokenizer, expected: &[Vec<TokenId>], decoded: &Value) {
    let tokenizer = Arc::new(tokenizer);
    let corpus = corpus();
    assert_eq!(corpus.len(), expected.len());
    for (index, (text, ids)) in corpus.iter().zip(expected).enumerate() {
        assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{name}: {text:?}");
        let text = decoded.get(index.to_string()).map_or(text.as_str(), |decoded| decoded.as_str().unwrap());
        assert_eq!(tokenizer.decode(ids, false), text, "{name}");
        assert_eq!(stream(&tokenizer, ids, false), text, "{name}");
    }
}

fn stream(tokenizer: &Arc<Tokenizer>, ids: &[TokenId], skip_special_tokens: bool) -> String {
    let mut detokenizer = IncrementalDetokenizer::new(tokenizer.clone(), skip_special_tokens);
    let mut text = String::new();
    for &id in ids {
        text.push_str(detokenizer.push(id));
    }
    text.push_str(detokenizer.finish());
    text
}

#[test]
fn gguf_pre_tokenizers_equal_llama_cpp() {
    let expected = json("gguf/ids.json");
    for name in GGUF_NAMES {
        let tokenizer = from_gguf(&data(&format!("gguf/{name}.gguf")));
        let with_special: Vec<TokenId> = serde_json::from_value(expected[name]["with_special"].clone()).unwrap();
        assert_eq!(tokenizer.encode("Hi", true).unwrap(), with_special, "{name}");
        check_gguf(name, tokenizer, &rows(&expected[name]["ids"]), &Value::Null);
    }
}

#[test]
fn default_model_equals_llama_cpp() {
    let expected = json("smollm2.json");
    check_gguf("smollm2", from_gguf(&default_model()), &rows(&expected["ids"]), &expected["decoded"]);
}

#[test]
fn json_tokenizers_equal_the_crate_in_python() {
    let expected = json("json/ids.json");
    for kind in JSON_KINDS {
        let tokenizer = Arc::new(Tokenizer::from_json_file(&data(&format!("json/{kind}.json"))).unwrap());
        let with_special: Vec<TokenId> = serde_json::from_value(expected[kind]["with_special"].clone()).unwrap();
        assert_eq!(tokenizer.encode("Hi", true).unwrap(), with_special, "{kind}");
        let decoded: Vec<String> = serde_json::from_value(expected[kind]["decoded"].clone()).unwrap();
        for ((text, ids), decoded) in corpus().iter().zip(rows(&expected[kind]["ids"])).zip(decoded) {
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{kind}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, true), decoded, "{kind}: {text:?}");
            assert_eq!(stream(&tokenizer, &ids, true), decoded, "{kind}: {text:?}");
        }
    }
}

#[test]
fn special_tokens_are_known_and_skipped() {
    let tokenizer = Arc::new(from_gguf(&data("gguf/gpt-2.gguf")));
    let ids = tokenizer.encode("<|im_start|>a<think>b<|im_end|>", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "a<think>b");
    assert_eq!(stream(&tokenizer, &ids, true), "a<think>b");
    assert!(tokenizer.is_special(ids[0]) && Some(ids[0]) == tokenizer.bos());
    let think = tokenizer.token_id("<think>").unwrap();
    assert!(!tokenizer.is_special(think));
    assert_eq!(tokenizer.token_bytes(think), b"<think>");
    // An unused token stands for nothing; neither does an id outside.
    assert_eq!(tokenizer.token_bytes(tokenizer.token_id("<unused0>").unwrap()), b"");
    assert_eq!(tokenizer.token_text(u32::MAX), "");
    assert_eq!(tokenizer.decode(&[u32::MAX], false), "");
    assert!(!tokenizer.is_special(u32::MAX));
}

#[test]
fn characters_are_whole() {
    let tokenizer = Arc::new(from_gguf(&default_model()));
    for text in ["😀👨‍👩‍👧‍👦", "日本語のテキスト", "สวัสดี", "𝔘𝔫𝔦"] {
        let mut detokenizer = IncrementalDetokenizer::new(tokenizer.clone(), true);
        let mut seen = String::new();
        for id in tokenizer.encode(text, false).unwrap() {
            seen.push_str(detokenizer.push(id));
            assert!(text.starts_with(&seen), "{seen:?} of {text:?}");
        }
        assert_eq!(seen, text);
        assert_eq!(detokenizer.finish(), "");
    }
}

#[test]
fn a_cut_character_leaves_at_the_end() {
    let tokenizer = Arc::new(from_gguf(&default_model()));
    let ids = tokenizer.encode("a😀", false).unwrap();
    let cut = &ids[..ids.len() - 1];
    let mut detokenizer = IncrementalDetokenizer::new(tokenizer.clone(), true);
    let text: String = cut.iter().map(|&id| detokenizer.push(id).to_string()).collect();
    assert_eq!(text, "a");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(tokenizer.decode(cut, true), "a\u{fffd}");
}

/// Ten times the text may take about ten times as long; quadratic work would take a hundred times. In between is room
/// for a busy machine.
#[test]
fn hostile_texts_are_linear() {
    let units = [
        "a",
        "A",
        " ",
        "\n",
        "\t ",
        "😀",
        "<",
        "<|im_start|>",
        "1",
        "'",
        "a ",
        "aA",
        "\u{301}",
        "\u{0}",
        "é",
        " \n",
        "!",
        "\u{3000}",
    ];
    let tokenizers = ["qwen2", "tekken"].map(|name| from_gguf(&data(&format!("gguf/{name}.gguf"))));
    for tokenizer in tokenizers {
        for unit in units {
            let time = |bytes: usize| {
                let text = unit.repeat(bytes / unit.len());
                let start = Instant::now();
                let ids = tokenizer.encode(&text, false).unwrap();
                let spent = start.elapsed();
                assert_eq!(tokenizer.decode(&ids, false), text);
                spent
            };
            let small = time(20_000);
            let large = time(200_000);
            let bound = small * 40 + Duration::from_millis(400);
            assert!(large < bound, "{unit:?}: {small:?} for 20 kB, {large:?} for 200 kB");
        }
    }
}

#[test]
fn a_megabyte_of_one_character_is_no_trouble() {
    let tokenizer = from_gguf(&default_model());
    for unit in ["a", " ", "\n", "😀"] {
        let text = unit.repeat(1_000_000 / unit.len());
        let start = Instant::now();
        let ids = tokenizer.encode(&text, false).unwrap();
        assert!(start.elapsed() < Duration::from_secs(20), "{unit:?} took {:?}", start.elapsed());
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any ids at all, in any order: what streams is what decodes at once.
    #[test]
    fn streaming_equals_decoding(
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        skip in any::<bool>(),
        kind in 0..JSON_KINDS.len() + 1,
    ) {
        let tokenizer = Arc::new(match JSON_KINDS.get(kind) {
            Some(kind) => Tokenizer::from_json_file(&data(&format!("json/{kind}.json"))).unwrap(),
            None => from_gguf(&data("gguf/qwen2.gguf")),
        });
        let ids: Vec<TokenId> = picks.iter().map(|pick| pick.index(tokenizer.vocab_size() + 2) as TokenId).collect();
        prop_assert_eq!(stream(&tokenizer, &ids, skip), tokenizer.decode(&ids, skip));
    }

    #[test]
    fn any_text_comes_back(text in "\\PC*|[ \n\t\r'a-zA-Z0-9😀é日\u{301}]*") {
        let tokenizer = from_gguf(&data("gguf/llama-bpe.gguf"));
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids, false), text);
    }
}
