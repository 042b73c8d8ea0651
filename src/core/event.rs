//! What goes into the core ([`Input`]) and what comes out ([`Effect`]).

use crate::{BlockId, CacheSalt, ClassId, Micros, RequestId, StepId, TenantId, TokenId, TransferId, WorkerId};

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
        /// What the step took on the device; 0 when it was not measured.
        device_us: u64,
        sampled: Vec<(RequestId, Sampled)>,
    },
    /// The step in flight failed as a whole. Its requests repeat it in halves, until the one that makes it fail is alone and
    /// ends with an error. A step that was planned ahead of it is still reported, one way or the other, and counts for nothing;
    /// then only the failed one is repeated.
    StepFailed {
        worker: WorkerId,
        step: StepId,
    },
    /// Replaces the settings of all tenants. Those that are not listed keep theirs for what they have in the core, and
    /// nothing more is taken from them; tenant 0 falls back to the default. Of two entries for one tenant the last counts.
    SetTenants(Vec<TenantSpec>),
    /// Time passes and nothing else: requests past their deadline end.
    Tick,
    /// The blocks of a transfer have arrived.
    TransferDone {
        transfer: TransferId,
    },
    /// They have not, and nothing reads or writes the blocks of either side any more. The request is computed again.
    TransferFailed {
        transfer: TransferId,
    },
    /// The worker reports no more, and neither it nor a transfer from or to it touches its pool any more. Its requests are
    /// computed again elsewhere; its pool is empty when no other worker shares it.
    WorkerLost {
        worker: WorkerId,
    },
    /// A lost worker takes steps again.
    WorkerBack {
        worker: WorkerId,
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
    /// Whoever lays out a step has to know the tokens before the one that it samples, by more than the logits, so that no step can
    /// be planned ahead of them: see [`crate::Engine::plan_ahead`].
    pub needs_tokens: bool,
    /// Whose prefix cache it uses beyond its public blocks.
    pub salt: CacheSalt,
    /// The whole blocks within this many of the first prompt tokens are public: requests of any salt that say so of the same
    /// tokens share them. More than the prompt counts as all of it.
    pub shared_tokens: u32,
    pub tenant: TenantId,
    /// A class that does not exist counts as the last.
    pub class: ClassId,
    /// When the request is stopped wherever it is, on the clock of [`Timed::at`].
    pub deadline: Option<Micros>,
}

/// A tenant's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TenantSpec {
    pub tenant: TenantId,
    /// Its part of what the tenants of a class share, in proportion to the others'; 0 counts as 1, more than 65,536 as that.
    pub weight: u32,
    /// Blocks of each pool that nobody above its own share takes from it.
    pub floor_blocks: u32,
    /// Most blocks of each pool that its running requests hold; one request alone may exceed it only when it was taken
    /// before the ceiling was lowered.
    pub ceiling_blocks: Option<u32>,
}

impl TenantSpec {
    /// Weight 1, no floor, no ceiling.
    #[must_use]
    pub fn new(tenant: TenantId) -> Self {
        TenantSpec { tenant, weight: 1, floor_blocks: 0, ceiling_blocks: None }
    }
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
    /// The first step of this request is being planned, for this worker; `cached_tokens` of its known tokens were found in
    /// the prefix cache. Sent once per scheduling, so again after a preemption.
    Scheduled { request: RequestId, worker: WorkerId, cached_tokens: u32 },
    /// The request lost its blocks and waits again; what it has said stays said.
    Preempted { request: RequestId },
    /// Further steps of this request are planned for this worker.
    Moved { request: RequestId, worker: WorkerId },
    /// Copy each first block of `from`'s pool to the second of `to`'s, then say [`Input::TransferDone`] or
    /// [`Input::TransferFailed`]. Until then neither side's blocks change.
    Transfer { transfer: TransferId, request: RequestId, from: WorkerId, to: WorkerId, blocks: Vec<(BlockId, BlockId)> },
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
    /// The deadline passed first.
    Deadline,
    /// The worker failed on this request.
    Error,
    /// The request can never fit the KV pool, breaks a limit of the configuration, or would wait too long.
    Refused(Refusal),
}

/// Why a submission was refused at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No prompt token, or no token to make.
    Empty,
    /// More tokens than `request_tokens_max`, than the smallest KV pool holds, or than the tenant's ceiling.
    TooLong,
    /// The tenant is not 0 and not in the last [`Input::SetTenants`].
    UnknownTenant,
    /// `waiting_max` requests wait already.
    QueueFull(Backoff),
    /// More prompt tokens than `queue_tokens_max` would wait.
    QueueTokens(Backoff),
    /// It would end after its deadline, if its output is as long as others' lately, or the first token is predicted for after
    /// what the class is promised.
    Deadline(Backoff),
    /// The same prompt made a step fail a short while ago.
    Quarantined(Backoff),
}

/// What a refused client is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Backoff {
    /// After this time the same request is expected to be taken.
    pub retry_in: Micros,
    /// Requests that wait.
    pub queue_depth: u32,
}

/// Token counts of a finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache when the request was first scheduled.
    pub cached_tokens: u32,
    /// Prompt tokens that were neither found nor computed before the request ended.
    pub uncomputed_tokens: u32,
    pub completion_tokens: u32,
    pub preemptions: u32,
}
