//! Log-probabilities of tokens in the two shapes of the API.

use super::types::chat::{ChatLogprobs, TokenLogprob, TopLogprob};
use super::types::completion::CompletionLogprobs;
use crate::request::TokenLogprobs;
use crate::text::Tokenizer;
use kvern_core::TokenId;
use serde_json::{Map, Number, Value};

/// Stands for minus infinity, which JSON cannot say; vLLM's choice.
const LOGPROB_MIN: f32 = -9999.0;

/// Tokens whose log-probabilities wait for the text that they belong to.
#[derive(Debug)]
pub(crate) struct PendingLogprobs {
    tokens: Vec<(TokenId, TokenLogprobs)>,
    /// Where the next token starts in the choice's text, in characters.
    offset: u32,
}

impl PendingLogprobs {
    /// The choice's text starts with `offset` characters of the prompt.
    pub(crate) fn new(offset: u32) -> Self {
        PendingLogprobs { tokens: Vec::new(), offset }
    }

    pub(crate) fn push(&mut self, token: TokenId, logprobs: TokenLogprobs) {
        self.tokens.push((token, logprobs));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Moves what waits into `content`, in the chat API's shape.
    pub(crate) fn take_chat(&mut self, tokenizer: &Tokenizer, content: &mut ChatLogprobs) {
        content.content.extend(self.tokens.drain(..).map(|(token, logprobs)| {
            TokenLogprob {
                token: tokenizer.token_text(token),
                logprob: finite(logprobs.logprob),
                bytes: tokenizer.token_bytes(token),
                top_logprobs: logprobs
                    .top
                    .iter()
                    .map(|&(token, logprob)| TopLogprob {
                        token: tokenizer.token_text(token),
                        logprob: finite(logprob),
                        bytes: tokenizer.token_bytes(token),
                    })
                    .collect(),
            }
        }));
    }

    /// Moves what waits into `lists`, in the completion API's shape.
    pub(crate) fn take_completion(&mut self, tokenizer: &Tokenizer, lists: &mut CompletionLogprobs) {
        for (token, logprobs) in self.tokens.drain(..) {
            let text = tokenizer.token_text(token);
            let mut top = Map::new();
            for &(other, logprob) in logprobs.top.iter().chain([&(token, logprobs.logprob)]) {
                // Tokens of equal text share a key; the likeliest one has it.
                top.entry(tokenizer.token_text(other)).or_insert_with(|| number(finite(logprob)));
            }
            lists.text_offset.push(self.offset);
            lists.token_logprobs.push(finite(logprobs.logprob));
            lists.top_logprobs.push(top);
            self.offset += text.chars().count() as u32;
            lists.tokens.push(text);
        }
    }
}

/// A number that JSON can say.
fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LOGPROB_MIN } else { logprob.clamp(LOGPROB_MIN, 0.0) }
}

fn number(logprob: f32) -> Value {
    Value::Number(Number::from_f64(f64::from(logprob)).expect("the number was made finite"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_json_cannot_say_is_replaced() {
        for (given, said) in [(-0.5, -0.5), (f32::NEG_INFINITY, LOGPROB_MIN), (f32::NAN, LOGPROB_MIN), (1e-9, 0.0)] {
            assert_eq!(finite(given), said, "{given}");
        }
    }
}
