//! Sampling parameters and limits of an answer, each in its range.

use super::{Admitted, AdmittedPrompt, GenerationDefaults, OutputRules, StreamUsage};
use crate::error::ServeError;
use crate::http::types::common::{GenerationFields, StreamOptions};
use crate::http::{HttpLimits, ServedModel};
use crate::keys::Asked;
use crate::request::SamplingParams;
use crate::text::StopMatcher;
use kvern_core::TokenId;
use std::collections::BTreeMap;

const LOGPROBS_MAX: i64 = super::LOGPROBS_MAX as i64;
const STOP_STRINGS_MAX: usize = 16;
const STOP_STRING_BYTES_MAX: usize = 1024;
const STOP_TOKENS_MAX: usize = 128;
const LOGIT_BIAS_MAX: usize = 1024;

/// All of an admitted request but its prompts.
pub(super) struct Common {
    sampling: SamplingParams,
    n: u32,
    rules: OutputRules,
    stream: Option<StreamUsage>,
    asked: Asked,
}

impl Common {
    pub(super) fn with_prompts(
        self,
        prompts: Vec<AdmittedPrompt>,
        limits: &HttpLimits,
    ) -> Result<Admitted, ServeError> {
        let choices = prompts.len() as u64 * u64::from(self.n);
        if choices > u64::from(limits.choices_max) {
            let message = format!("`n`: expected at most {} answers in all, found {choices}", limits.choices_max);
            return Err(ServeError::invalid("n", message));
        }
        let answer_max = prompts.iter().map(|prompt| prompt.max_new_tokens).min().unwrap_or(0);
        let min_tokens = self.sampling.min_tokens;
        if min_tokens > answer_max {
            let message =
                format!("`min_tokens`: expected at most the answer's limit of {answer_max}, found {min_tokens}");
            return Err(ServeError::invalid("min_tokens", message));
        }
        let Common { sampling, n, rules, stream, asked } = self;
        Ok(Admitted { prompts, sampling, n, rules, stream, asked })
    }
}

/// The largest repetition penalty.
pub(crate) const REPETITION_PENALTY_MAX: f32 = 10.0;

/// Checks everything that both generating endpoints share.
pub(super) fn admit(
    mut fields: GenerationFields,
    logprobs: Option<u32>,
    model: &ServedModel,
    choices_max: u32,
) -> Result<Common, ServeError> {
    let GenerationDefaults { temperature, top_p, top_k, min_p, repetition_penalty } = model.defaults;
    let asked = super::terms::asked(&mut fields)?;
    let stream = stream_usage(fields.stream, fields.stream_options)?;
    let n = integer("n", fields.n, 1, 1, i64::from(choices_max))? as u32;
    let stop_tokens = stop_tokens(&fields, model)?;
    let min_tokens = integer("min_tokens", fields.min_tokens, 0, 0, i64::from(u32::MAX))? as u32;
    let sampling = SamplingParams {
        temperature: number("temperature", fields.temperature, temperature, Range::closed(0.0, 2.0))?,
        top_p: number("top_p", fields.top_p, top_p, Range::above(0.0, 1.0))?,
        top_k: match integer("top_k", fields.top_k, i64::from(top_k), -1, i64::from(u32::MAX))? {
            -1 => 0,
            k => k as u32,
        },
        min_p: number("min_p", fields.min_p, min_p, Range::closed(0.0, 1.0))?,
        presence_penalty: number("presence_penalty", fields.presence_penalty, 0.0, Range::closed(-2.0, 2.0))?,
        frequency_penalty: number("frequency_penalty", fields.frequency_penalty, 0.0, Range::closed(-2.0, 2.0))?,
        repetition_penalty: number(
            "repetition_penalty",
            fields.repetition_penalty,
            repetition_penalty,
            Range::above(0.0, REPETITION_PENALTY_MAX),
        )?,
        seed: seed(fields.seed),
        stop_tokens: stop_tokens.clone(),
        min_tokens,
        logit_bias: logit_bias(&fields.logit_bias, model.vocab_size)?,
        logprobs,
    };
    check_stops(&fields.stop)?;
    let matcher = match StopMatcher::new(&fields.stop, fields.include_stop_str_in_output) {
        Ok(matcher) => (!fields.stop.is_empty()).then_some(matcher),
        Err(error) => return Err(ServeError::invalid("stop", format!("`stop`: {error}"))),
    };
    let rules = OutputRules {
        stops: fields.stop,
        include_stop: fields.include_stop_str_in_output,
        skip_special_tokens: fields.skip_special_tokens,
        min_tokens,
        logprobs: logprobs.is_some(),
        stop_tokens,
        requested_stop_tokens: fields.stop_token_ids,
        matcher,
    };
    Ok(Common { sampling, n, rules, stream, asked })
}

/// `max_tokens` under either of its names.
pub(super) fn token_count(name: &'static str, given: Option<i64>) -> Result<Option<u32>, ServeError> {
    given.map(|given| integer(name, Some(given), 1, 1, i64::from(u32::MAX)).map(|count| count as u32)).transpose()
}

/// `logprobs` and `top_logprobs` of a chat request.
pub(super) fn chat_logprobs(wanted: Option<bool>, top: Option<i64>) -> Result<Option<u32>, ServeError> {
    let top = integer("top_logprobs", top, 0, 0, LOGPROBS_MAX)? as u32;
    match wanted {
        Some(true) => Ok(Some(top)),
        _ if top > 0 => {
            Err(ServeError::invalid("top_logprobs", "`top_logprobs`: expected `logprobs` to be true with it"))
        }
        _ => Ok(None),
    }
}

/// `logprobs` of a completion request.
pub(super) fn completion_logprobs(top: Option<i64>) -> Result<Option<u32>, ServeError> {
    top.map(|top| integer("logprobs", Some(top), 0, 0, LOGPROBS_MAX).map(|top| top as u32)).transpose()
}

/// A range of numbers, open or closed below.
struct Range {
    low: f32,
    high: f32,
    low_open: bool,
}

impl Range {
    fn closed(low: f32, high: f32) -> Self {
        Range { low, high, low_open: false }
    }

    fn above(low: f32, high: f32) -> Self {
        Range { low, high, low_open: true }
    }

    /// False for NaN.
    fn contains(&self, value: f32) -> bool {
        (if self.low_open { value > self.low } else { value >= self.low }) && value <= self.high
    }
}

fn number(name: &'static str, given: Option<f32>, default: f32, range: Range) -> Result<f32, ServeError> {
    let value = given.unwrap_or(default);
    if range.contains(value) {
        return Ok(value);
    }
    let bracket = if range.low_open { '(' } else { '[' };
    let message = format!("`{name}`: expected a number in {bracket}{}, {}], found {value}", range.low, range.high);
    Err(ServeError::invalid(name, message))
}

fn integer(name: &'static str, given: Option<i64>, default: i64, low: i64, high: i64) -> Result<i64, ServeError> {
    let value = given.unwrap_or(default);
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(ServeError::invalid(name, format!("`{name}`: expected an integer in [{low}, {high}], found {value}")))
}

/// The client's seed, or a random one.
fn seed(given: Option<i64>) -> u64 {
    match given {
        Some(seed) if seed != -1 => seed as u64,
        _ => crate::http::random_u128() as u64,
    }
}

fn stream_usage(stream: bool, options: Option<StreamOptions>) -> Result<Option<StreamUsage>, ServeError> {
    let Some(options) = options else { return Ok(stream.then_some(StreamUsage::Never)) };
    if !stream {
        return Err(ServeError::invalid("stream_options", "`stream_options`: expected `stream` to be true with it"));
    }
    if options.include_obfuscation == Some(true) {
        return Err(ServeError::unsupported("stream_options.include_obfuscation", ""));
    }
    let included = options.include_usage.unwrap_or(false);
    Ok(Some(match options.continuous_usage_stats {
        Some(true) if included => StreamUsage::Always,
        _ if included => StreamUsage::AtEnd,
        _ => StreamUsage::Never,
    }))
}

/// The request's stop tokens and, unless it ignores them, the model's; sorted.
fn stop_tokens(fields: &GenerationFields, model: &ServedModel) -> Result<Vec<TokenId>, ServeError> {
    let given = &fields.stop_token_ids;
    at_most("stop_token_ids", "ids", STOP_TOKENS_MAX, given.len())?;
    super::check_tokens(model, "stop_token_ids", given)?;
    let own: &[TokenId] = if fields.ignore_eos { &[] } else { &model.text.stop_tokens };
    let mut tokens = [given, own].concat();
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens)
}

fn check_stops(stops: &[String]) -> Result<(), ServeError> {
    at_most("stop", "strings", STOP_STRINGS_MAX, stops.len())?;
    match stops.iter().map(String::len).find(|&bytes| bytes > STOP_STRING_BYTES_MAX) {
        Some(bytes) => at_most("stop", "bytes in a string", STOP_STRING_BYTES_MAX, bytes),
        None => Ok(()),
    }
}

/// Token ids as JSON keys, with biases; sorted by token.
fn logit_bias(given: &BTreeMap<String, f32>, vocab_size: u32) -> Result<Vec<(TokenId, f32)>, ServeError> {
    at_most("logit_bias", "entries", LOGIT_BIAS_MAX, given.len())?;
    let mut biases = Vec::with_capacity(given.len());
    for (key, &bias) in given {
        let token = key.parse::<TokenId>().ok().filter(|&token| token < vocab_size).ok_or_else(|| {
            let found: String = key.chars().take(32).collect();
            let expected = format!("expected token ids below the vocabulary's size of {vocab_size} as keys");
            ServeError::invalid("logit_bias", format!("`logit_bias`: {expected}, found `{found}`"))
        })?;
        biases.push((token, number("logit_bias", Some(bias), 0.0, Range::closed(-100.0, 100.0))?));
    }
    biases.sort_unstable_by_key(|&(token, _)| token);
    // `"7"` and `"07"` are the same token: the later one in the order of the keys counts.
    biases.dedup_by(|later, earlier| {
        let same = later.0 == earlier.0;
        if same {
            earlier.1 = later.1;
        }
        same
    });
    Ok(biases)
}

fn at_most(name: &'static str, what: &str, limit: usize, found: usize) -> Result<(), ServeError> {
    if found <= limit {
        return Ok(());
    }
    Err(ServeError::invalid(name, format!("`{name}`: expected at most {limit} {what}, found {found}")))
}
