//! Speed of the text side: detokenizing, stop strings and encoding, with the default model's vocabulary.
//!
//! `cargo bench --bench text`; needs `make model`.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use kvern::text::{IncrementalDetokenizer, StopMatcher, Tokenizer};
use kvern_models::gguf::Gguf;
use std::path::Path;
use std::sync::Arc;

const TEXT: &str = "The scheduler fills one step: it chases each request's tokens, 128 at a time. Größe, 東京, 😀!\n";

fn main() {
    divan::main();
}

fn tokenizer() -> Arc<Tokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models-cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    let gguf = Gguf::open(&path).expect("run `make model` first");
    Arc::new(Tokenizer::from_gguf(&gguf).expect("the default model has a tokenizer"))
}

#[divan::bench]
fn detokenize(bencher: Bencher<'_, '_>) {
    let tokenizer = tokenizer();
    let tokens = tokenizer.encode(&TEXT.repeat(40), false).expect("the text can be encoded");
    let mut detokenizer = IncrementalDetokenizer::new(tokenizer, true);
    bencher.counter(ItemsCount::new(tokens.len())).bench_local(|| {
        for &token in &tokens {
            divan::black_box(detokenizer.push(token));
        }
    });
}

#[divan::bench]
fn match_stop_strings(bencher: Bencher<'_, '_>) {
    let mut matcher = StopMatcher::new(&["\n\n", "###", "</answer>", "token limit"], false).expect("none is empty");
    let pieces: Vec<&str> = TEXT.split_inclusive(' ').collect();
    bencher.counter(ItemsCount::new(pieces.len())).bench_local(|| {
        for piece in &pieces {
            divan::black_box(matcher.push(piece));
        }
    });
}

#[divan::bench]
fn encode(bencher: Bencher<'_, '_>) {
    let tokenizer = tokenizer();
    let text = TEXT.repeat(40);
    bencher.counter(BytesCount::new(text.len())).bench_local(|| tokenizer.encode(&text, false));
}
