//! All that the server must know of a model's text, from the files that the model came in.

use super::chat_template::{ChatTemplate, TemplateError};
use super::gguf_tokenizer;
use super::json_tokenizer::{read_config, special_token};
use super::tokenizer::{Tokenizer, TokenizerError};
use kvern_core::TokenId;
use kvern_models::gguf::Gguf;
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// Special tokens that templates know by name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The same in GGUF metadata, after `tokenizer.ggml.`.
const GGUF_SPECIAL_TOKENS: [(&str, &str); 7] = [
    ("bos_token", "bos_token_id"),
    ("eos_token", "eos_token_id"),
    ("unk_token", "unknown_token_id"),
    ("sep_token", "seperator_token_id"),
    ("pad_token", "padding_token_id"),
    ("cls_token", "cls_token_id"),
    ("mask_token", "mask_token_id"),
];

/// A model's tokenizer, its chat template and the tokens that end its answers.
#[derive(Debug)]
pub struct TextModel {
    pub tokenizer: Arc<Tokenizer>,
    /// `None` for a model that was not made for chat.
    pub template: Option<ChatTemplate>,
    /// Sorted: the end-of-sequence tokens of config.json, generation_config.json and the tokenizer, or of GGUF metadata.
    pub stop_tokens: Vec<TokenId>,
}

/// Why a model's text side could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TextModelError {
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
}

impl TextModel {
    /// Loads tokenizer.json, tokenizer_config.json, config.json, generation_config.json, chat_template.jinja and
    /// additional_chat_templates/ of a model directory; all but the first may be missing.
    pub fn from_dir(dir: &Path) -> Result<Self, TextModelError> {
        let tokenizer = Tokenizer::from_json_file(&dir.join("tokenizer.json"))?;
        let config = read_config(&dir.join("tokenizer_config.json"))?;
        let mut stop_tokens: Vec<TokenId> = tokenizer.eos().into_iter().collect();
        for file in ["config.json", "generation_config.json"] {
            stop_tokens.extend(eos_ids(&read_config(&dir.join(file))?));
        }
        let sources = template_sources(dir, &config)?;
        let special_tokens: Map<String, Value> = SPECIAL_TOKENS
            .iter()
            .filter_map(|key| Some((key.to_string(), special_token(&config, key)?.into())))
            .collect();
        Self::new(tokenizer, &sources, special_tokens, stop_tokens)
    }

    /// Takes everything from the metadata of a GGUF file.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextModelError> {
        let tokenizer = Tokenizer::from_gguf(gguf)?;
        let stop_tokens = gguf_tokenizer::stop_tokens(gguf, |token| tokenizer.token_id(token));
        const TEMPLATE: &str = "tokenizer.chat_template";
        let sources: Vec<(String, String)> = gguf
            .keys()
            .filter_map(|key| {
                let name = key.strip_prefix(TEMPLATE)?;
                let name = if name.is_empty() { "default" } else { name.strip_prefix('.')? };
                Some((name.to_string(), gguf.metadata(key)?.as_str()?.to_string()))
            })
            .collect();
        let special_tokens: Map<String, Value> = GGUF_SPECIAL_TOKENS
            .iter()
            .filter_map(|(name, key)| {
                let id = gguf_tokenizer::id(gguf, key)?;
                Some((name.to_string(), tokenizer.token_text(id).into()))
            })
            .collect();
        Self::new(tokenizer, &sources, special_tokens, stop_tokens)
    }

    fn new(
        tokenizer: Tokenizer,
        sources: &[(String, String)],
        special_tokens: Map<String, Value>,
        mut stop_tokens: Vec<TokenId>,
    ) -> Result<Self, TextModelError> {
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let template = match sources {
            [] => None,
            sources => Some(ChatTemplate::new(sources, special_tokens)?),
        };
        Ok(Self { tokenizer: Arc::new(tokenizer), template, stop_tokens })
    }
}

/// `eos_token_id` is a number or a list of them.
fn eos_ids(config: &Value) -> Vec<TokenId> {
    let id = |value: &Value| value.as_u64().and_then(|id| TokenId::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Templates by name. Files win over the field of tokenizer_config.json.
fn template_sources(dir: &Path, config: &Value) -> Result<Vec<(String, String)>, TokenizerError> {
    let mut sources = Vec::new();
    if let Some(text) = read_text(&dir.join("chat_template.jinja"))? {
        sources.push(("default".to_string(), text));
    }
    let mut additional: Vec<_> = match std::fs::read_dir(dir.join("additional_chat_templates")) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(_) => Vec::new(),
    };
    additional.sort();
    for path in additional.iter().filter(|path| path.extension().is_some_and(|extension| extension == "jinja")) {
        if let (Some(name), Some(text)) = (path.file_stem().and_then(|name| name.to_str()), read_text(path)?) {
            sources.push((name.to_string(), text));
        }
    }
    if !sources.is_empty() {
        return Ok(sources);
    }
    match config.get("chat_template") {
        Some(Value::String(text)) => sources.push(("default".to_string(), text.clone())),
        Some(Value::Array(named)) => sources.extend(named.iter().filter_map(|entry| {
            Some((entry.get("name")?.as_str()?.to_string(), entry.get("template")?.as_str()?.to_string()))
        })),
        _ => {}
    }
    Ok(sources)
}

fn read_text(path: &Path) -> Result<Option<String>, TokenizerError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { path: path.to_path_buf(), source }),
    }
}
