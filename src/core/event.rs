//! What goes into the core ([`Input`]) and what comes out ([`Effect`]).

use crate::{CacheSalt, Micros, RequestId, StepId, TokenId, WorkerId};

/// An input and the time at which the engine took it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed<T> {
    pub at: Micros,
    pub input: T,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    Submit(Submission),
    Cancel {
        request: RequestId,
        reason: CancelReason,
    },
    StepDone {
        worker: WorkerId,
        step: StepId,
        sampled: Vec<(RequestId, Sampled)>,
    },
    /// The step in flight failed as a whole: each of its requests ends with an error, and nothing that it computed is
    /// found again.
    StepFailed {
        worker: WorkerId,
        step: StepId,
    },
}

/// A request as the core needs it: no text, no sampling parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submission {
    pub request: RequestId,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// At least 1; `prompt.len() + max_new_tokens <= request_tokens_max`.
    pub max_new_tokens: u32,
    /// A stop token is not honoured before this many new tokens.
    pub min_new_tokens: u32,
    /// Tokens that finish the request (end of sequence among them, unless it is ignored), sorted.
    pub stop_tokens: Vec<TokenId>,
    pub salt: CacheSalt,
}

/// Why the engine withdraws a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelReason {
    /// The client closed its connection.
    ClientGone,
    /// The client did not read its stream and its channel is full.
    SlowReader,
    /// A stop string was found in the text, outside the core.
    StopString,
    /// The server gave the request up (shutdown after the drain time).
    Shutdown,
}

/// What a worker made of a slice that samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampled {
    Token(TokenId),
    /// The logits were not finite, or the worker could not sample: only this request ends.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The first step of this request is being planned; `cached_tokens` of its prompt were found in the prefix
    /// cache. Sent once per scheduling, so again after a preemption.
    Scheduled { request: RequestId, cached_tokens: u32 },
    /// The request lost its blocks and waits again; what it has said stays said.
    Preempted { request: RequestId },
    /// New token number `index` (from 0) of the request.
    Token { request: RequestId, index: u32, token: TokenId },
    /// The last word about a request.
    Finish { request: RequestId, reason: FinishReason, usage: Usage },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or a stop string ([`CancelReason::StopString`]).
    Stop,
    /// `max_new_tokens` were made.
    Length,
    Cancelled(CancelReason),
    /// The worker failed on this request.
    Error,
    /// The request can never fit the KV pool, or breaks a limit of the configuration.
    Refused(Refusal),
}

/// Why a submission was refused at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No prompt token, or no token to make.
    Empty,
    /// `waiting_max` requests wait already.
    QueueFull,
    /// More tokens than `request_tokens_max` or than the whole KV pool holds.
    TooLong,
}

/// Token counts of a finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache when the request was first scheduled.
    pub cached_tokens: u32,
    pub completion_tokens: u32,
    pub preemptions: u32,
}
