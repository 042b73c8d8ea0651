//! tokenizer.json, with tokenizer_config.json beside it, to a tokenizer.

use super::token_table::TokenTable;
use super::tokenizer::{Decoding, Parts, TokenizerError};
use kvern_core::TokenId;
use serde_json::{Value, json};
use std::path::Path;
use tokenizers::AddedToken;

/// No vocabulary has more ids than this; a file that names a larger one would make the table of tokens huge.
const VOCABULARY_MAX: usize = 1 << 24;

/// SentencePiece's space.
const SPACE_MARK: char = '\u{2581}';

pub(super) fn load(path: &Path) -> Result<Parts, TokenizerError> {
    let invalid = |reason: String| TokenizerError::Invalid { path: path.to_path_buf(), reason };
    let bytes = read(path)?;
    let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| invalid(error.to_string()))?;
    // Limits and padding stored in the file belong to training; a request's own limits apply here.
    inner.with_truncation(None).map_err(|error| invalid(error.to_string()))?.with_padding(None);
    let config = read_config(&path.with_file_name("tokenizer_config.json"))?;
    add_missing_tokens(&mut inner, &config).map_err(invalid)?;
    let decoder = serde_json::to_value(inner.get_decoder()).map_err(|error| invalid(error.to_string()))?;
    let pieces = Pieces::of(&decoder);
    let size = vocabulary_size(&inner).map_err(invalid)?;
    let table = |first| {
        let tokens = (0..size).map(|id| {
            let token = token_string(&inner, id).unwrap_or_default();
            let special = inner.get_added_vocabulary().is_special_token(&token);
            (pieces.bytes(&inner, id, &token, first), special)
        });
        TokenTable::new(tokens).map_err(|_| invalid("the tokens' text is longer than 4 GiB".into()))
    };
    let named = |key| special_token(&config, key).and_then(|token| inner.token_to_id(&token));
    Ok(Parts {
        table: table(false)?,
        first_table: if matches!(pieces, Pieces::Metaspace) { Some(table(true)?) } else { None },
        decoding: pieces.decoding(),
        bos: named("bos_token"),
        eos: named("eos_token"),
        prefix: Vec::new(),
        suffix: Vec::new(),
        inner,
    })
}

/// tokenizer_config.json as it is; `null` where there is none.
pub(super) fn read_config(path: &Path) -> Result<Value, TokenizerError> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&read(path)?)
        .map_err(|error| TokenizerError::Invalid { path: path.to_path_buf(), reason: error.to_string() })
}

/// A special token of tokenizer_config.json, stored as text or as an object with `content`.
pub(super) fn special_token(config: &Value, key: &str) -> Option<String> {
    let token = config.get(key)?;
    Some(token.as_str().or_else(|| token.get("content")?.as_str())?.to_string())
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    std::fs::read(path).map_err(|source| TokenizerError::Read { path: path.to_path_buf(), source })
}

/// Adds the tokens that only tokenizer_config.json names, in the order of their ids, as transformers does.
fn add_missing_tokens(inner: &mut tokenizers::Tokenizer, config: &Value) -> Result<(), String> {
    let Some(tokens) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let mut missing: Vec<(u32, AddedToken)> = Vec::new();
    for (id, token) in tokens {
        let id: u32 = id.parse().map_err(|_| format!("expected a token id in added_tokens_decoder, found {id:?}"))?;
        let token: AddedToken = serde_json::from_value(token.clone())
            .map_err(|error| format!("added_tokens_decoder, token {id}: {error}"))?;
        if inner.token_to_id(&token.content).is_none() {
            missing.push((id, token));
        }
    }
    missing.sort_by_key(|&(id, _)| id);
    inner.add_tokens(missing.into_iter().map(|(_, token)| token)).map_err(|error| error.to_string())?;
    Ok(())
}

fn vocabulary_size(inner: &tokenizers::Tokenizer) -> Result<TokenId, String> {
    let size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
    if size == 0 || size > VOCABULARY_MAX {
        return Err(format!("expected a vocabulary of 1 to {VOCABULARY_MAX} ids, found {size}"));
    }
    Ok(size as TokenId)
}

/// The string that the crate's decoder sees for an id.
fn token_string(inner: &tokenizers::Tokenizer, id: TokenId) -> Option<String> {
    use tokenizers::Model;
    inner.get_added_vocabulary().simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id))
}

/// How the decoder turns one token into bytes.
enum Pieces {
    ByteLevel,
    /// SentencePiece as converted by transformers: the mark is a space, `<0x0A>` a byte.
    Marked {
        byte_fallback: bool,
        leading_spaces_dropped: usize,
    },
    /// The first token loses its marks.
    Metaspace,
    /// The decoder looks at neighbours, or is not known here.
    Whole,
}

impl Pieces {
    fn of(decoder: &Value) -> Self {
        let kind = decoder.get("type").and_then(Value::as_str).unwrap_or_default();
        let mark = SPACE_MARK.to_string();
        match kind {
            "ByteLevel" => Self::ByteLevel,
            "Metaspace" if decoder["replacement"] == json!(mark) && decoder["prepend_scheme"] != "never" => {
                Self::Metaspace
            }
            "Metaspace" if decoder["replacement"] == json!(mark) => {
                Self::Marked { byte_fallback: false, leading_spaces_dropped: 0 }
            }
            "Sequence" => Self::of_sequence(decoder["decoders"].as_array().map(Vec::as_slice).unwrap_or_default()),
            _ => Self::Whole,
        }
    }

    /// `Replace(mark), ByteFallback, Fuse, Strip(left)`, the last two and the second being optional.
    fn of_sequence(decoders: &[Value]) -> Self {
        let replace = json!({"type": "Replace", "pattern": {"String": SPACE_MARK.to_string()}, "content": " "});
        let Some(mut rest) = decoders.strip_prefix(&[replace]) else { return Self::Whole };
        let byte_fallback = take(&mut rest, "ByteFallback");
        let fused = take(&mut rest, "Fuse");
        let leading_spaces_dropped = match rest {
            [] => 0,
            [strip] if fused && strip["type"] == "Strip" && strip["content"] == " " && strip["stop"] == 0 => {
                strip["start"].as_u64().unwrap_or_default() as usize
            }
            _ => return Self::Whole,
        };
        Self::Marked { byte_fallback, leading_spaces_dropped }
    }

    fn decoding(&self) -> Decoding {
        match *self {
            Self::ByteLevel | Self::Metaspace => Decoding::Bytes { leading_spaces_dropped: 0 },
            Self::Marked { leading_spaces_dropped, .. } => Decoding::Bytes { leading_spaces_dropped },
            Self::Whole => Decoding::Whole,
        }
    }

    fn bytes(&self, inner: &tokenizers::Tokenizer, id: TokenId, token: &str, first: bool) -> Vec<u8> {
        match *self {
            Self::ByteLevel => super::byte_level::to_bytes(token).unwrap_or_else(|| token.as_bytes().to_vec()),
            Self::Marked { byte_fallback, .. } => match byte_token(token) {
                Some(byte) if byte_fallback => vec![byte],
                _ => token.replace(SPACE_MARK, " ").into_bytes(),
            },
            Self::Metaspace => token.replace(SPACE_MARK, if first { "" } else { " " }).into_bytes(),
            Self::Whole => inner.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }
}

fn take(decoders: &mut &[Value], kind: &str) -> bool {
    match decoders {
        [first, rest @ ..] if first["type"] == kind => {
            *decoders = rest;
            true
        }
        _ => false,
    }
}

/// `<0x0A>` is the byte 10.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}
