//! Text on both sides of the tokens: tokenizer, chat template, incremental detokenizer, stop strings.
//!
//! Owner: the HTTP tasks. A [`TextModel`] is made once from a model's files and shared; an [`IncrementalDetokenizer`] and a
//! [`StopMatcher`] belong to one streamed answer.

mod byte_level;
mod chat_template;
#[cfg(test)]
mod chat_template_tests;
mod detokenizer;
mod gguf_tokenizer;
mod json_tokenizer;
mod pre_tokenizers;
mod stop;
mod template_environment;
mod template_json;
mod template_methods;
mod text_model;
mod token_table;
mod tokenizer;
#[cfg(test)]
mod tokenizer_tests;

pub use chat_template::{ChatTemplate, RenderInput, TemplateError};
pub use detokenizer::IncrementalDetokenizer;
pub use stop::{EmptyStopString, StopMatcher, StopStep};
pub use text_model::{TextModel, TextModelError};
pub use tokenizer::{Tokenizer, TokenizerError};
