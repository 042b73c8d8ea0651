//! A tokenizer of bytes with a chat template, for tests and benchmarks without a model.

use kvern::text::TextModel;
use kvern_core::TokenId;
use serde_json::{Map, Value, json};
use std::sync::{Arc, LazyLock};

pub(crate) const IM_START: TokenId = 256;
/// Ends an answer.
pub(crate) const IM_END: TokenId = 257;
pub(crate) const VOCAB_SIZE: u32 = 258;

const TEMPLATE: &str = "{%- for message in messages -%}\
{%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}\
<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
{% endfor -%}\
{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}";

/// GPT-2's printable stand-in for each byte.
fn byte_symbol(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

/// Token `b` is byte `b`; two special tokens follow.
pub(crate) static TEXT: LazyLock<Arc<TextModel>> = LazyLock::new(|| {
    let vocab: Map<String, Value> =
        (0..=255u8).map(|byte| (byte_symbol(byte).to_string(), Value::from(byte))).collect();
    let special = |id: TokenId, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []}
    });
    let config = json!({"eos_token": "<|im_end|>", "chat_template": TEMPLATE});
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Arc::new(TextModel::from_dir(dir.path()).unwrap())
});
