//! Text on both sides of the tokens: tokenizer, chat template, incremental detokenizer, stop strings.
