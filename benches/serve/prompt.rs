//! Requests as bytes: prompts are token ids, so that lengths are exact and differ by seed, not by text.

use crate::client::Asked;
use crate::stats::Rng;
use std::fmt::Write;
use std::time::Duration;

/// Ids that are text to every vocabulary of some size, away from its control tokens.
const IDS: (u32, u32) = (300, 20_000);

/// Least and most, both included.
pub(crate) type Span = (u32, u32);

/// Lengths of requests, drawn evenly.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) prompt: Span,
    pub(crate) output: Span,
}

impl Shape {
    pub(crate) const fn exact(prompt: u32, output: u32) -> Self {
        Shape { prompt: (prompt, prompt), output: (output, output) }
    }

    /// A request with a prompt of its own.
    pub(crate) fn wish(&self, rng: &mut Rng) -> Wish {
        let tokens = rng.between(self.prompt);
        Wish::new(ids(rng, tokens), rng.between(self.output))
    }
}

pub(crate) fn ids(rng: &mut Rng, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|_| rng.between(IDS)).collect()
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) prompt: Vec<u32>,
    /// Exactly this many are made.
    pub(crate) new_tokens: u32,
    /// Temperature 0.8 with this seed; greedy without.
    pub(crate) seed: Option<u64>,
    /// The request's `timeout`, seconds.
    pub(crate) timeout_s: Option<f64>,
    pub(crate) key: Option<String>,
    pub(crate) pause: Duration,
    pub(crate) leave_after: Option<usize>,
    pub(crate) keep_text: bool,
}

impl Wish {
    pub(crate) fn new(prompt: Vec<u32>, new_tokens: u32) -> Self {
        Wish {
            prompt,
            new_tokens,
            seed: None,
            timeout_s: None,
            key: None,
            pause: Duration::ZERO,
            leave_after: None,
            keep_text: false,
        }
    }

    pub(crate) fn of(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    /// Tokens of prompt and answer.
    pub(crate) fn tokens(&self) -> u64 {
        self.prompt.len() as u64 + u64::from(self.new_tokens)
    }

    pub(crate) fn asked(&self, tag: u32) -> Asked {
        let mut body = String::with_capacity(self.prompt.len() * 6 + 300);
        body.push_str(r#"{"model":"bench","prompt":["#);
        for (at, id) in self.prompt.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(body, "{comma}{id}").expect("memory takes it");
        }
        let tokens = self.new_tokens;
        write!(body, r#"],"max_tokens":{tokens},"min_tokens":{tokens},"ignore_eos":true,"skip_special_tokens":false"#)
            .expect("memory takes it");
        match self.seed {
            Some(seed) => write!(body, r#","temperature":0.8,"seed":{seed}"#),
            None => write!(body, r#","temperature":0"#),
        }
        .expect("memory takes it");
        if let Some(timeout) = self.timeout_s {
            write!(body, r#","timeout":{timeout}"#).expect("memory takes it");
        }
        body.push_str(r#","stream":true,"stream_options":{"include_usage":true}}"#);
        let bearer = self.key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let length = body.len();
        let bytes = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{bearer}\
             content-length: {length}\r\n\r\n{body}"
        );
        Asked {
            tag,
            bytes: bytes.into_bytes(),
            pause: self.pause,
            leave_after: self.leave_after,
            keep_text: self.keep_text,
        }
    }
}
