//! Text to tokens and back.
//!
//! Owner: shared by all HTTP tasks behind an `Arc`; immutable. Encoding is the `tokenizers` crate's; decoding is a table of
//! each token's bytes wherever the decoder only joins them, and the crate's otherwise.

use super::detokenizer::ByteStream;
use super::token_table::TokenTable;
use kvern_core::TokenId;
use kvern_models::gguf::Gguf;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

/// Why a tokenizer could not be made, or a text not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is no tokenizer: {reason}")]
    Invalid { path: PathBuf, reason: String },
    #[error("the GGUF metadata hold no usable tokenizer: {0}")]
    Gguf(String),
    #[error("the text cannot be encoded: {0}")]
    Encode(String),
}

/// How tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoding {
    /// The text is the tokens' bytes, joined.
    Bytes {
        /// Spaces dropped at the very start of the text (SentencePiece's dummy prefix).
        leading_spaces_dropped: usize,
    },
    /// A token's text depends on its neighbours: the crate's decoder sees all tokens.
    Whole,
}

/// A vocabulary with its rules; encodes and decodes as the model's own tokenizer does.
pub struct Tokenizer {
    parts: Box<Parts>,
}

/// What a tokenizer is made of, whatever file it came from.
pub(super) struct Parts {
    pub(super) inner: tokenizers::Tokenizer,
    pub(super) table: TokenTable,
    /// Each token's bytes as the first of a text, where that makes a difference (Metaspace).
    pub(super) first_table: Option<TokenTable>,
    pub(super) decoding: Decoding,
    pub(super) bos: Option<TokenId>,
    pub(super) eos: Option<TokenId>,
    /// Tokens around every text that is encoded with special tokens, besides the crate's post-processor.
    pub(super) prefix: Vec<TokenId>,
    pub(super) suffix: Vec<TokenId>,
}

impl Tokenizer {
    /// Reads tokenizer.json and, where it lies beside it, tokenizer_config.json.
    pub fn from_json_file(path: &Path) -> Result<Self, TokenizerError> {
        super::json_tokenizer::load(path).map(|parts| Self { parts: Box::new(parts) })
    }

    /// Builds the tokenizer that a GGUF file's metadata describe.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TokenizerError> {
        super::gguf_tokenizer::load(gguf).map(|parts| Self { parts: Box::new(parts) })
    }

    /// The tokens of `text`, in which special tokens count as such (a rendered chat template holds them). `add_special`
    /// adds what the model wants around a text, such as its BOS; a rendered template has its own.
    ///
    /// Time grows as n log n of the text's length, memory linearly.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, TokenizerError> {
        // The crate panics where its regex engine gives up; for one text that is an error, not the end of the server.
        let encoded = std::panic::catch_unwind(AssertUnwindSafe(|| self.parts.inner.encode_fast(text, add_special)))
            .map_err(|_| TokenizerError::Encode("the tokenizer gave up".into()))?
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        if !add_special {
            return Ok(encoded.get_ids().to_vec());
        }
        Ok([&self.parts.prefix, encoded.get_ids(), &self.parts.suffix].concat())
    }

    /// The text of `tokens`; bytes that form no character become U+FFFD, unknown ids nothing.
    pub fn decode(&self, tokens: &[TokenId], skip_special_tokens: bool) -> String {
        let mut text = String::new();
        match self.parts.decoding {
            Decoding::Bytes { leading_spaces_dropped } => {
                let mut stream = ByteStream::new(leading_spaces_dropped);
                for &token in tokens {
                    if !(skip_special_tokens && self.is_special(token)) {
                        stream.push(self, token, &mut text);
                    }
                }
                stream.finish(&mut text);
            }
            Decoding::Whole => text = self.decode_whole(tokens, skip_special_tokens),
        }
        text
    }

    fn decode_whole(&self, tokens: &[TokenId], skip_special_tokens: bool) -> String {
        // Some of the crate's decoders cannot do without any token.
        let shown = |token| self.has_text(token) && !(skip_special_tokens && self.is_special(token));
        let tokens: Vec<TokenId> = tokens.iter().copied().filter(|&token| shown(token)).collect();
        if tokens.is_empty() {
            return String::new();
        }
        self.parts.inner.decode(&tokens, false).unwrap_or_else(|error| {
            tracing::warn!(%error, "a token sequence cannot be decoded");
            String::new()
        })
    }

    /// The bytes that a token adds inside a text, maybe a part of a character; empty for an unknown id.
    pub fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        self.parts.table.bytes(token).to_vec()
    }

    /// [`Self::token_bytes`] as text, with U+FFFD for what is no character.
    pub fn token_text(&self, token: TokenId) -> String {
        String::from_utf8_lossy(self.parts.table.bytes(token)).into_owned()
    }

    /// Ids are below this; some below may stand for nothing.
    pub fn vocab_size(&self) -> usize {
        self.parts.table.len()
    }

    /// The most bytes that one token stands for, at least 1: a text of n bytes has at least n / this tokens.
    pub fn token_bytes_max(&self) -> usize {
        self.parts.table.longest_bytes().max(1)
    }

    /// The id of a token by its exact text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.parts.inner.token_to_id(token)
    }

    /// Whether `skip_special_tokens` leaves it out.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.parts.table.is_special(token)
    }

    /// Beginning of sequence.
    pub fn bos(&self) -> Option<TokenId> {
        self.parts.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<TokenId> {
        self.parts.eos
    }

    pub(super) fn decoding(&self) -> Decoding {
        self.parts.decoding
    }

    /// The bytes of a token at its place in a text.
    pub(super) fn piece(&self, token: TokenId, first: bool) -> &[u8] {
        match &self.parts.first_table {
            Some(table) if first => table.bytes(token),
            _ => self.parts.table.bytes(token),
        }
    }

    /// Whether the vocabulary has a token of this id.
    pub(super) fn has_text(&self, token: TokenId) -> bool {
        self.parts.inner.id_to_token(token).is_some()
    }

    /// Whether the id is inside the vocabulary, holes included.
    pub(super) fn knows(&self, token: TokenId) -> bool {
        (token as usize) < self.vocab_size()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}
