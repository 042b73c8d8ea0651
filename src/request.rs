//! A request past admission, and the words that the engine says about it.

use kvern_core::{CacheSalt, CancelReason, ClassId, FinishReason, RequestId, TenantId, TenantSpec, TokenId, Usage};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// A validated request: plain data, tokenized.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: RequestId,
    /// What logs and answers call it: `chatcmpl-...`, or the caller's X-Request-Id.
    pub external_id: Arc<str>,
    pub prompt: Vec<TokenId>,
    pub sampling: SamplingParams,
    /// At least 1; prompt and output fit the context.
    pub max_new_tokens: u32,
    /// Choices that its caller asked for, this one among them.
    pub n: u32,
    pub terms: Terms,
}

/// On whose behalf a request runs, and what that gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Terms {
    pub tenant: TenantId,
    /// 0 is the most urgent.
    pub class: ClassId,
    /// Requests of equal salt share the cache of their prefixes; nobody else can read or time it.
    pub salt: CacheSalt,
    /// Whole blocks of this many first prompt tokens are shared by all salts: the operator made them public.
    pub shared_tokens: u32,
    /// How long after its submission the request is stopped, wherever it is.
    pub timeout: Option<Duration>,
}

/// How tokens are drawn. Every field is in range: admission checked it.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// (0, 1]
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// [0, 1]
    pub min_p: f32,
    /// [-2, 2]
    pub presence_penalty: f32,
    /// [-2, 2]
    pub frequency_penalty: f32,
    /// > 0; 1 is off.
    pub repetition_penalty: f32,
    /// With the position, the whole random state of a request.
    pub seed: u64,
    /// Tokens that finish the request: those of the request, and the model's unless `ignore_eos`. Sorted. Not sampled
    /// before `min_tokens`.
    pub stop_tokens: Vec<TokenId>,
    pub min_tokens: u32,
    /// Sorted by token; values in [-100, 100].
    pub logit_bias: Vec<(TokenId, f32)>,
    /// `Some(n)`: the log-probability of each token and of the `n` likeliest ones.
    pub logprobs: Option<u32>,
}

/// Log-probability of a token under the raw logits (before temperature, penalties and bias), as vLLM's default
/// `raw_logprobs`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub logprob: f32,
    /// Likeliest first.
    pub top: Vec<(TokenId, f32)>,
}

/// What the engine tells a request's owner.
#[derive(Clone, Debug)]
pub enum TokenEvent {
    /// The first event of a request that was taken; one that was not has only its `Finished`.
    Accepted,
    /// `Box`ed so that the common case stays small.
    Token { token: TokenId, logprobs: Option<Box<TokenLogprobs>> },
    /// The last event. A stop token that ended the request was sent as a `Token` before.
    Finished { reason: FinishReason, usage: Usage },
}

pub type TokenRx = mpsc::Receiver<TokenEvent>;

/// A tenant's settings and what metrics call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTenant {
    pub name: Arc<str>,
    pub spec: TenantSpec,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("the queue is full: {waiting} requests wait, the limit is {limit}")]
    QueueFull {
        waiting: u32,
        limit: u32,
        /// When there is room again, as far as the engine can tell.
        retry_in: Duration,
    },
    #[error("the server is draining and takes no new requests")]
    Draining,
    #[error("the engine has stopped")]
    Stopped,
}

/// The HTTP side's view of the engine. The server has one implementation; tests have a null one.
pub trait Engine: Send + Sync + 'static {
    /// Takes the request or refuses it at once; never blocks. Dropping the receiver cancels the request.
    fn submit(&self, request: Request) -> Result<TokenRx, SubmitError>;
    /// Withdraws a request early (a stop string was found); unknown ids are ignored.
    fn cancel(&self, id: RequestId, reason: CancelReason);
    /// A fresh id.
    fn next_id(&self) -> RequestId;
    fn health(&self) -> EngineHealth;
    /// Prometheus text format 0.0.4.
    fn metrics_text(&self) -> String;
    /// 0 to 1: the largest of the pressures on queue, KV cache and inter-token latency. Cheap enough for every answer.
    fn saturation(&self) -> f32;
    /// Replaces the settings of all tenants; those of a request's tenant must be there before the request. `false` when the
    /// engine is too busy to take them now: say it again.
    fn set_tenants(&self, tenants: &[NamedTenant]) -> bool;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineHealth {
    /// The model is loaded and warm.
    pub ready: bool,
    /// The engine loop made progress lately, or has nothing to do.
    pub live: bool,
    pub draining: bool,
}
