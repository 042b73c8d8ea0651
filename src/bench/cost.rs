//! What a round at least reads and multiplies, to be held against the machine's limits.

use crate::config::Workload;
use kvern_models::ModelConfig;

/// Of one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Cost {
    /// Operations of the products of activations with weights, two per multiplication and addition; of a prompt's
    /// attention that is timed alone, those of its products. Everything else is not counted.
    pub(super) product_operations: f64,
    /// Bytes of weights and of cached K and V that decoding reads once a step, or of logits that sampling reads; `None`
    /// where it is not known: of prefill, and of a model with an embedding apart from its head, of which a step reads a
    /// few rows.
    pub(super) read_bytes: Option<f64>,
}

/// What is read: bytes of all weights, and of one value of K or V.
#[derive(Clone, Copy, Debug)]
pub(super) struct ReadBytes {
    pub(super) weights: usize,
    pub(super) kv_value: usize,
}

impl Cost {
    pub(super) fn of(workload: Workload, steps: u32, model: &ModelConfig, bytes: ReadBytes) -> Cost {
        let head = 2.0 * (model.hidden_size * model.vocab_size) as f64;
        let (tokens, steps) = (workload.tokens(steps) as f64, f64::from(steps));
        let layers = tokens * layer_operations(model);
        let (product_operations, read_bytes) = match workload {
            Workload::Prefill { .. } => (layers + head, None),
            Workload::Decode { streams, context } => {
                // The steps' own tokens are read too, half of them on average.
                let context = f64::from(context) + steps / 2.0;
                let kv = f64::from(streams) * kv_bytes(model, context, bytes.kv_value);
                let read = steps * (bytes.weights as f64 + kv);
                (layers + tokens * head, model.tie_word_embeddings.then_some(read))
            }
            Workload::Attention { .. } => {
                let kv = |sequence| kv_bytes(model, f64::from(workload.context(sequence)), bytes.kv_value);
                (0.0, Some(steps * (0..workload.streams()).map(kv).sum::<f64>()))
            }
            Workload::PromptAttention { tokens } => (steps * prompt_attention_operations(model, tokens), None),
            // Every logit at least once.
            Workload::Sampling { .. } => (0.0, Some(tokens * (model.vocab_size * size_of::<f32>()) as f64)),
        };
        Cost { product_operations, read_bytes }
    }
}

/// Of one token in all layers.
fn layer_operations(model: &ModelConfig) -> f64 {
    let heads = model.heads;
    let (q, kv) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let attention = model.hidden_size * (q + 2 * kv) + q * model.hidden_size;
    let feed_forward = 3 * model.hidden_size * model.intermediate_size;
    2.0 * (model.layers * (attention + feed_forward)) as f64
}

/// Products of queries with keys, and of their weights with values, of all tokens of a prompt in all layers.
fn prompt_attention_operations(model: &ModelConfig, tokens: u32) -> f64 {
    let tokens = f64::from(tokens);
    let position = 4.0 * (model.heads.heads * model.heads.head_dim) as f64;
    // Token number n sees n positions, or as many as the window has.
    let seen = |layer| {
        let window = model.window(layer).map_or(tokens, |window| tokens.min(f64::from(window)));
        window * (window + 1.0) / 2.0 + (tokens - window) * window
    };
    position * (0..model.layers).map(seen).sum::<f64>()
}

/// K and V that one token reads of a sequence of `context` tokens.
fn kv_bytes(model: &ModelConfig, context: f64, value_bytes: usize) -> f64 {
    let token = (2 * model.heads.kv_heads * model.heads.head_dim * value_bytes) as f64;
    (0..model.layers)
        .map(|layer| token * model.window(layer).map_or(context, |window| context.min(f64::from(window))))
        .sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use kvern_models::{Checkpoint, ModelFiles};
    use std::path::Path;

    /// Counted by hand: hidden 64, feed-forward 96, vocabulary 128, 2 layers, 4 heads and 2 KV heads of 16.
    #[test]
    fn of_a_small_model() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/checkpoints/llama.gguf");
        let untied = ModelConfig::read(&Checkpoint::open(&ModelFiles::open(&path).unwrap()).unwrap()).unwrap();
        let tied = ModelConfig { tie_word_embeddings: true, ..untied.clone() };
        let windowed = ModelConfig { windows: vec![None, Some(10)], ..tied.clone() };
        let bytes = ReadBytes { weights: 1000, kv_value: 2 };
        let (token, head, kv_token) = (2.0 * 61_440.0, 2.0 * 8_192.0, 128.0);
        let decode = Workload::Decode { streams: 3, context: 20 };
        let alone = Workload::Attention { groups: [(1, 20), (2, 7)] };
        let sampling = Workload::Sampling { rows: 3, kind: crate::config::Sampling::Greedy };
        let cases = [
            (Workload::Prefill { tokens: 10 }, &tied, 10.0 * token + head, None),
            (decode, &untied, 12.0 * (token + head), None),
            (decode, &tied, 12.0 * (token + head), Some(4.0 * (1000.0 + 3.0 * 2.0 * 22.0 * kv_token))),
            (sampling, &untied, 0.0, Some(12.0 * 128.0 * 4.0)),
            (alone, &windowed, 0.0, Some(4.0 * (20.0 + 10.0 + 2.0 * (7.0 + 7.0)) * kv_token)),
            (Workload::PromptAttention { tokens: 12 }, &tied, 4.0 * 256.0 * 2.0 * 78.0, None),
            (Workload::PromptAttention { tokens: 12 }, &windowed, 4.0 * 256.0 * (78.0 + 75.0), None),
            (decode, &windowed, 12.0 * (token + head), Some(4.0 * (1000.0 + 3.0 * (22.0 + 10.0) * kv_token))),
        ];
        for (workload, model, product_operations, read_bytes) in cases {
            let found = Cost::of(workload, 4, model, bytes);
            assert_eq!(found, Cost { product_operations, read_bytes }, "{workload} {:?}", model.windows);
        }
    }
}
