//! GGUF metadata to a tokenizer that agrees with llama.cpp's.
//!
//! Byte-level BPE (`tokenizer.ggml.model` = gpt2) only. SentencePiece vocabularies (llama) are refused: they merge by score
//! with ties by position, which the merge list of the `tokenizers` crate cannot express. WordPiece and Unigram are refused
//! too.

use super::pre_tokenizers::{self, PreTokenizer};
use super::token_table::TokenTable;
use super::tokenizer::{Decoding, Parts, TokenizerError};
use kvern_core::TokenId;
use kvern_models::gguf::{Gguf, Value};
use std::collections::HashMap;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// Tokens that end an answer wherever they are in a vocabulary; files often name only one of them as `eos_token_id`.
/// (llama.cpp's list; it treats them as control tokens whatever their stored type, and so does this.)
const END_OF_ANSWER: [&str; 19] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

/// The kinds of tokens in `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    /// Special: matched in text, left out of decoded text when special tokens are skipped.
    Control,
    /// Matched in text before BPE, and shown.
    UserDefined,
    /// Padding of the vocabulary; stands for nothing.
    Unused,
}

pub(super) fn load(gguf: &Gguf) -> Result<Parts, TokenizerError> {
    build(gguf).map_err(TokenizerError::Gguf)
}

/// The tokens that end an answer: those the file names, and the usual ones by their text.
pub(super) fn stop_tokens(gguf: &Gguf, token_id: impl Fn(&str) -> Option<TokenId>) -> Vec<TokenId> {
    let named = ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(|key| id(gguf, key));
    // In the harmony format <|end|> closes a part of an answer, not the answer.
    let parts_end = token_id("<|return|>").is_some() && token_id("<|call|>").is_some();
    let usual = END_OF_ANSWER.into_iter().filter(|&token| !(parts_end && token == "<|end|>")).filter_map(token_id);
    named.chain(usual).collect()
}

/// `tokenizer.ggml.<key>` as a token id.
pub(super) fn id(gguf: &Gguf, key: &str) -> Option<TokenId> {
    TokenId::try_from(field(gguf, key)?.as_u64()?).ok()
}

fn field<'a>(gguf: &'a Gguf, key: &str) -> Option<&'a Value> {
    gguf.metadata(&format!("tokenizer.ggml.{key}"))
}

fn build(gguf: &Gguf) -> Result<Parts, String> {
    let text = |key| field(gguf, key).and_then(Value::as_str);
    match text("model") {
        Some("gpt2") => {}
        Some(model) => return Err(format!("expected tokenizer.ggml.model gpt2 (byte-level BPE), found {model:?}")),
        None => return Err("expected tokenizer.ggml.model gpt2 (byte-level BPE), found none".into()),
    }
    let name = text("pre").unwrap_or("default");
    let pre_tokenizer = pre_tokenizers::find(name)
        .map_err(|known| format!("expected tokenizer.ggml.pre to be one of {known}; found {name:?}"))?;
    if field(gguf, "add_space_prefix").and_then(Value::as_bool) == Some(true) {
        return Err("expected tokenizer.ggml.add_space_prefix to be false for byte-level BPE, found true".into());
    }
    let tokens = tokens(gguf)?;
    let kinds = kinds(gguf, &tokens)?;
    let inner = tokenizer(gguf, &tokens, &kinds, pre_tokenizer)?;
    let bytes = |token: &str, kind| match kind {
        Kind::Unused => Vec::new(),
        Kind::Normal => super::byte_level::to_bytes(token).unwrap_or_else(|| token.as_bytes().to_vec()),
        Kind::Control | Kind::UserDefined => token.as_bytes().to_vec(),
    };
    let entries = tokens.iter().zip(&kinds).map(|(token, &kind)| (bytes(token, kind), kind == Kind::Control));
    let (bos, eos) = (id(gguf, "bos_token_id"), id(gguf, "eos_token_id"));
    let around = |key: &str, token: Option<TokenId>, default: bool| -> Result<Vec<TokenId>, String> {
        let wanted = field(gguf, key).and_then(Value::as_bool).unwrap_or(default);
        match token {
            _ if !wanted => Ok(Vec::new()),
            Some(token) if (token as usize) < tokens.len() => Ok(vec![token]),
            _ => Err(format!("tokenizer.ggml.{key} is set, but there is no such token")),
        }
    };
    Ok(Parts {
        table: TokenTable::new(entries).map_err(|_| "the tokens' text is longer than 4 GiB".to_string())?,
        first_table: None,
        decoding: Decoding::Bytes { leading_spaces_dropped: 0 },
        prefix: around("add_bos_token", bos, pre_tokenizer.add_bos)?,
        suffix: around("add_eos_token", eos, false)?,
        bos,
        eos,
        inner,
    })
}

fn tokens(gguf: &Gguf) -> Result<Vec<String>, String> {
    let tokens = field(gguf, "tokens").and_then(Value::as_strings).filter(|tokens| !tokens.is_empty());
    let tokens = tokens.ok_or("expected a list of strings as tokenizer.ggml.tokens, found none")?;
    // llama.cpp's name for a token without text, which nothing encodes to.
    let named = |(id, token): (usize, &String)| if token.is_empty() { format!("[EMPTY_{id}]") } else { token.clone() };
    Ok(tokens.iter().enumerate().map(named).collect())
}

fn kinds(gguf: &Gguf, tokens: &[String]) -> Result<Vec<Kind>, String> {
    let types = match field(gguf, "token_type") {
        None => vec![1; tokens.len()],
        Some(types) => types.as_ints().ok_or("expected integers as tokenizer.ggml.token_type")?,
    };
    if types.len() != tokens.len() {
        return Err(format!("expected {} entries in tokenizer.ggml.token_type, found {}", tokens.len(), types.len()));
    }
    let kind = |(token, kind): (&String, i64)| match kind {
        _ if END_OF_ANSWER.contains(&token.as_str()) => Kind::Control,
        2 | 3 => Kind::Control,
        4 => Kind::UserDefined,
        5 => Kind::Unused,
        _ => Kind::Normal,
    };
    Ok(tokens.iter().zip(types).map(kind).collect())
}

fn tokenizer(
    gguf: &Gguf,
    tokens: &[String],
    kinds: &[Kind],
    pre_tokenizer: &PreTokenizer,
) -> Result<tokenizers::Tokenizer, String> {
    let mut vocabulary: HashMap<String, TokenId> = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        if let Some(first) = vocabulary.insert(token.clone(), id as TokenId) {
            return Err(format!("tokens {first} and {id} are both {token:?}"));
        }
    }
    let merges = merges(gguf, &vocabulary)?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .ignore_merges(pre_tokenizer.ignore_merges)
        .build()
        .map_err(|error| error.to_string())?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(sequence(pre_tokenizer)?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let added = tokens.iter().zip(kinds).filter(|&(_, &kind)| kind == Kind::Control || kind == Kind::UserDefined);
    let added = added.map(|(token, &kind)| AddedToken::from(token.as_str(), kind == Kind::Control).normalized(false));
    tokenizer.add_tokens(added.collect::<Vec<_>>()).map_err(|error| error.to_string())?;
    Ok(tokenizer)
}

fn sequence(pre_tokenizer: &PreTokenizer) -> Result<PreTokenizerWrapper, String> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for expression in pre_tokenizer.expressions {
        let pattern = SplitPattern::Regex((*expression).to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|error| error.to_string())?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(steps).into())
}

/// The merges in order, checked here so that an error names the merge.
fn merges(gguf: &Gguf, vocabulary: &HashMap<String, TokenId>) -> Result<Vec<(String, String)>, String> {
    let merges = field(gguf, "merges").and_then(Value::as_strings);
    let merges = merges.ok_or("expected a list of strings as tokenizer.ggml.merges, found none")?;
    let mut pairs = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        // The first character may be a space itself.
        let after_first = merge.chars().next().map_or(0, char::len_utf8);
        let space = merge[after_first..].find(' ').map(|at| at + after_first);
        let Some((left, right)) = space.map(|at| (&merge[..at], &merge[at + 1..])) else {
            return Err(format!("merge {rank}: expected two tokens and a space between, found {merge:?}"));
        };
        for token in [left, right, &format!("{left}{right}")] {
            if !vocabulary.contains_key(token) {
                return Err(format!("merge {rank} ({merge:?}): {token:?} is not in the vocabulary"));
            }
        }
        pairs.push((left.to_string(), right.to_string()));
    }
    Ok(pairs)
}
