//! Tokens to text, one token at a time.
//!
//! Owner: the task that streams one answer. A token may hold a part of a character, so bytes are kept until they form
//! whole characters; what can never become one leaves as U+FFFD, as in `String::from_utf8_lossy`.
//!
//! O(bytes of the token) per token and no allocation in the steady state, where the tokenizer's decoder joins the bytes of
//! its tokens (byte-level BPE, SentencePiece). Other decoders (WordPiece, BPE with word suffixes) decode a short window of
//! tokens with and without the new one, as vLLM and TGI do.
//!
//! Invariant: all that was emitted, `finish` included, is [`Tokenizer::decode`] of all tokens.

use super::tokenizer::{Decoding, Tokenizer};
use kvern_core::TokenId;
use std::sync::Arc;

/// A window of this many tokens that has not become text is emitted as it is, so that a window stays short.
const WINDOW_TOKENS_MAX: usize = 16;

/// Decodes one answer as it grows.
#[derive(Clone, Debug)]
pub struct IncrementalDetokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    /// The text of the last call.
    out: String,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    Bytes(ByteStream),
    Window(Window),
}

impl IncrementalDetokenizer {
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let state = match tokenizer.decoding() {
            Decoding::Bytes { leading_spaces_dropped } => State::Bytes(ByteStream::new(leading_spaces_dropped)),
            Decoding::Whole => State::Window(Window::default()),
        };
        Self { tokenizer, skip_special_tokens, out: String::new(), state }
    }

    /// Takes one token and returns the text that is now certain: whole characters, often one token late.
    pub fn push(&mut self, token: TokenId) -> &str {
        self.out.clear();
        if !(self.skip_special_tokens && self.tokenizer.is_special(token)) {
            match &mut self.state {
                State::Bytes(stream) => stream.push(&self.tokenizer, token, &mut self.out),
                State::Window(window) => window.push(&self.tokenizer, token, &mut self.out),
            }
        }
        &self.out
    }

    /// The answer ended: what remains, with U+FFFD for a character that was cut.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        match &mut self.state {
            State::Bytes(stream) => stream.finish(&mut self.out),
            State::Window(window) => window.finish(&self.tokenizer, &mut self.out),
        }
        &self.out
    }
}

/// Bytes to characters.
#[derive(Clone, Debug)]
pub(super) struct ByteStream {
    /// At most 3 bytes between calls: the start of a character.
    pending: Vec<u8>,
    /// Spaces at the very start that are still to be dropped.
    leading_spaces: usize,
    at_first_token: bool,
}

impl ByteStream {
    pub(super) fn new(leading_spaces: usize) -> Self {
        Self { pending: Vec::new(), leading_spaces, at_first_token: true }
    }

    /// Appends the text that the token makes certain.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, out: &mut String) {
        let mut bytes = tokenizer.piece(token, self.at_first_token);
        if self.leading_spaces > 0 && tokenizer.knows(token) {
            let spaces = bytes.iter().take(self.leading_spaces).take_while(|&&byte| byte == b' ').count();
            self.leading_spaces = if spaces == bytes.len() { self.leading_spaces - spaces } else { 0 };
            bytes = &bytes[spaces..];
        }
        self.at_first_token &= !tokenizer.knows(token);
        if self.pending.is_empty()
            && let Ok(text) = std::str::from_utf8(bytes)
        {
            out.push_str(text);
            return;
        }
        self.pending.extend_from_slice(bytes);
        let kept = append_whole_characters(&self.pending, out);
        self.pending.drain(..kept);
    }

    pub(super) fn finish(&mut self, out: &mut String) {
        out.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
    }
}

/// Appends all but a character that may yet be completed; returns the number of bytes used.
fn append_whole_characters(bytes: &[u8], out: &mut String) -> usize {
    let mut used = 0;
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        let at_end = used + invalid.len() == bytes.len();
        let may_be_completed = at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if invalid.is_empty() || may_be_completed {
            break;
        }
        out.push(char::REPLACEMENT_CHARACTER);
        used += invalid.len();
    }
    used
}

/// For decoders that look at a token's neighbours.
#[derive(Clone, Debug, Default)]
struct Window {
    /// Emitted tokens that give the later ones their context, then tokens not yet emitted.
    tokens: Vec<TokenId>,
    /// How many of `tokens` were emitted.
    emitted: usize,
}

impl Window {
    fn push(&mut self, tokenizer: &Tokenizer, token: TokenId, out: &mut String) {
        if !tokenizer.has_text(token) {
            return;
        }
        self.tokens.push(token);
        let text = tokenizer.decode(&self.tokens, false);
        let before = tokenizer.decode(&self.tokens[..self.emitted], false);
        // A token without text of its own stays in the window: it may separate its neighbours.
        let grew = text.len() > before.len() && !text.ends_with(char::REPLACEMENT_CHARACTER);
        if grew || self.tokens.len() - self.emitted >= WINDOW_TOKENS_MAX {
            self.emit(&before, &text, out);
        }
    }

    fn finish(&mut self, tokenizer: &Tokenizer, out: &mut String) {
        let text = tokenizer.decode(&self.tokens, false);
        let before = tokenizer.decode(&self.tokens[..self.emitted], false);
        self.emit(&before, &text, out);
    }

    fn emit(&mut self, before: &str, text: &str, out: &mut String) {
        out.push_str(text.strip_prefix(before).unwrap_or_default());
        self.tokens.drain(..self.emitted);
        self.emitted = self.tokens.len();
    }
}
