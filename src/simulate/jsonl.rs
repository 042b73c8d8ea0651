//! Lines of JSON: Mooncake's traces, and ours, which have more keys.
//!
//! | key | meaning |
//! |---|---|
//! | `timestamp` | arrival in milliseconds |
//! | `input_length`, `output_length` | tokens of the prompt and of the answer |
//! | `hash_ids` | an id for each 512 tokens of the prompt; equal ids are equal tokens after equal ones |
//! | `max_tokens` | tokens that the client allows; without it, as many as the answer has |
//! | `tenant` | a name; prompts are shared within one tenant only |
//! | `class` | priority class, 0 the most urgent |
//! | `prefix`, `prefix_length` | the prompt begins with so many tokens of the text that the name stands for |
//! | `public` | true where the prefix is shared by all tenants |
//! | `timeout` | seconds after which the request is stopped |
//!
//! Other keys are ignored, as public traces have some.

use super::trace::{Arrival, BLOCK_TOKENS, Content, Row, mix};
use kvern_core::Micros;
use serde::Deserialize;

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
    max_tokens: Option<u32>,
    tenant: Option<String>,
    #[serde(default)]
    class: u8,
    prefix: Option<String>,
    prefix_length: Option<u32>,
    #[serde(default)]
    public: bool,
    timeout: Option<f64>,
}

/// Times are far below this in milliseconds: 300 years.
const MILLISECONDS_MAX: f64 = 1e13;

pub(super) fn row(text: &str) -> Result<Row, String> {
    let line: Line = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if !(0.0..=MILLISECONDS_MAX).contains(&line.timestamp) {
        return Err(format!("expected a timestamp of 0 to {MILLISECONDS_MAX} ms, found {}", line.timestamp));
    }
    // The core refuses requests for nothing; public traces have a few.
    let (prompt_tokens, output_tokens) = (line.input_length.max(1), line.output_length.max(1));
    let output_tokens_max = line.max_tokens.unwrap_or(output_tokens);
    if output_tokens_max < output_tokens {
        return Err(format!(
            "expected max_tokens of at least output_length ({output_tokens}), found {output_tokens_max}"
        ));
    }
    let timeout = match line.timeout {
        Some(seconds) if !(0.0..=MILLISECONDS_MAX / 1e3).contains(&seconds) => {
            return Err(format!("expected a timeout in seconds, found {seconds}"));
        }
        timeout => timeout.map(|seconds| Micros((seconds * 1e6) as u64)),
    };
    let arrival = Arrival {
        at: Micros(0),
        prompt_tokens,
        output_tokens,
        output_tokens_max,
        content: content(line.hash_ids, line.prefix, line.prefix_length, line.input_length)?,
        shared_tokens: line.prefix_length.filter(|_| line.public).unwrap_or(0),
        tenant: line.tenant,
        class: line.class,
        timeout,
    };
    Ok(Row { at_us: (line.timestamp * 1e3) as i64, arrival })
}

fn content(
    ids: Vec<u64>,
    prefix: Option<String>,
    prefix_length: Option<u32>,
    input_length: u32,
) -> Result<Content, String> {
    match (ids.is_empty(), prefix, prefix_length) {
        (true, None, None) => Ok(Content::Unique),
        (true, Some(name), Some(tokens)) if tokens <= input_length => {
            let text = name.bytes().fold(mix(name.len() as u64), |hash, byte| mix(hash ^ u64::from(byte)));
            Ok(Content::Prefix { text, tokens })
        }
        (true, Some(_), Some(tokens)) => {
            Err(format!("expected prefix_length of at most input_length ({input_length}), found {tokens}"))
        }
        (true, ..) => Err("expected prefix and prefix_length together, found one of them".to_owned()),
        (false, None, None) => {
            let (expected, found) = (input_length.div_ceil(BLOCK_TOKENS) as usize, ids.len());
            let fits = expected == found;
            let problem = || format!("expected {expected} hash_ids for {input_length} tokens, found {found}");
            if fits { Ok(Content::Blocks(ids)) } else { Err(problem()) }
        }
        (false, ..) => Err("expected hash_ids or a prefix, found both".to_owned()),
    }
}
