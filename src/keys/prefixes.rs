//! Prompt starts that the operator made public, as tokens of the loaded model.
//!
//! Owner: a [`super::table::Table`]; made anew with it, because only the model's tokenizer and chat template say what a text
//! is in tokens. What is shared is what several prompts with that text and different continuations have in common: the text
//! itself, the template's words around it, and nothing that a client wrote. A look-up compares the prompt with each prefix,
//! longest first: O(prefixes x their common start + tokens of the match).

use super::file::{PublicText, SharedText};
use crate::text::{RenderInput, TextModel};
use kvern_core::TokenId;
use serde_json::json;

/// What a client may go on with: letters, digits, spaces, line breaks, marks and further scripts, because a tokenizer may join
/// the end of the shared text with some of them.
const CONTINUATIONS: [&str; 9] = ["a", "Z", "7", " a", "\n", "\n\na", "{", "é", "你"];

/// The shared prefixes, longest first.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedPrefixes(Vec<Vec<TokenId>>);

impl SharedPrefixes {
    /// Says on the log what cannot be shared.
    pub(super) fn new(texts: &[SharedText], model: &TextModel) -> Self {
        let mut prefixes = Vec::with_capacity(texts.len());
        for shared in texts {
            match common_start(&shared.text, model) {
                Ok(tokens) if !tokens.is_empty() => prefixes.push(tokens),
                Ok(_) => tracing::warn!(line = shared.line, "a shared prefix has no tokens that every prompt keeps"),
                Err(error) => tracing::warn!(line = shared.line, %error, "a shared prefix cannot be used"),
            }
        }
        prefixes.sort_by_key(|tokens| std::cmp::Reverse(tokens.len()));
        SharedPrefixes(prefixes)
    }

    /// How many first tokens of a prompt are public.
    pub(super) fn shared_tokens(&self, prompt: &[TokenId]) -> u32 {
        let longest = self.0.iter().find(|prefix| prompt.starts_with(prefix));
        longest.map_or(0, |prefix| u32::try_from(prefix.len()).unwrap_or(u32::MAX))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The tokens that a prompt with this text certainly begins with.
fn common_start(text: &PublicText, model: &TextModel) -> Result<Vec<TokenId>, String> {
    let mut common: Option<Vec<TokenId>> = None;
    for continuation in CONTINUATIONS {
        let tokens = match text {
            PublicText::System(system) => {
                let template = model.template.as_ref().ok_or("the model has no chat template")?;
                let messages =
                    json!([{"role": "system", "content": system}, {"role": "user", "content": continuation}]);
                let prompt = template.render(&RenderInput::new(&messages)).map_err(|error| error.to_string())?;
                model.tokenizer.encode(&prompt, false)
            }
            PublicText::Start(start) => model.tokenizer.encode(&format!("{start}{continuation}"), true),
        };
        let tokens = tokens.map_err(|error| error.to_string())?;
        common = Some(match common {
            None => tokens,
            Some(mut common) => {
                let equal = common.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
                common.truncate(equal);
                common
            }
        });
    }
    Ok(common.unwrap_or_default())
}
