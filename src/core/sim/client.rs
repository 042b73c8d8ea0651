//! The other end of the effects: what each client must get, and whether it does.
//!
//! The oracle is a run of the request alone with unlimited memory: the next token is a function of the salt and the whole
//! prefix, as a model's would be, and is computed here without any of the core's code.

use super::Failure;
use super::rng::mix;
use super::workload::VOCABULARY;
use crate::{
    CacheSalt, CancelReason, CoreConfig, Effect, FinishReason, InvariantId, Micros, RequestId, Submission, TokenId,
    Usage,
};

/// Before the first token.
pub(crate) const KV_OF_NOTHING: u64 = 0x5a17;

/// Tokens in the public blocks of a prompt.
fn num_public(submission: &Submission, block_size: u32) -> usize {
    let shared = submission.prompt.len().min(submission.shared_tokens as usize);
    shared / block_size as usize * block_size as usize
}

/// What the model samples after a token with these K/V.
pub(crate) fn next_token(kv: u64) -> TokenId {
    (kv >> 7) as u32 % VOCABULARY
}

/// One request as its client sees it.
pub(crate) struct Client {
    pub(crate) submission: Submission,
    /// Tokens from which on the salt matters.
    num_public: usize,
    /// Prompt and output of the run alone, and the K/V at each position.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) kvs: Vec<u64>,
    /// How the run alone ends.
    alone: FinishReason,
    pub(crate) emitted: u32,
    pub(crate) is_waiting: bool,
    ending: Option<FinishReason>,
    /// The deadline passes with the input that is being applied: it may end so, or as it would have.
    is_due: bool,
    pub(crate) has_failed: bool,
    /// It makes every step fail.
    pub(crate) is_poisoned: bool,
    pub(crate) is_finished: bool,
    cached_tokens: Option<u32>,
    pub(crate) preemptions: u32,
    /// The most tokens that were ever computed.
    pub(crate) num_reached: u32,
}

impl Client {
    /// Runs the request alone; one that was refused is already finished.
    pub(crate) fn new(submission: Submission, refused: bool, block_size: u32) -> Self {
        let mut tokens = submission.prompt.clone();
        let num_public = num_public(&submission, block_size);
        let mut before = KV_OF_NOTHING;
        let mut kvs: Vec<u64> = Vec::new();
        let mut alone = refused.then_some(FinishReason::Length);
        let mut new = 0;
        for at in 0.. {
            if alone.is_some() {
                break;
            }
            before = kv(submission.salt, num_public, before, at, tokens[at]);
            kvs.push(before);
            if at + 1 == tokens.len() {
                let token = next_token(before);
                tokens.push(token);
                new += 1;
                if new >= submission.min_new_tokens && submission.stop_tokens.contains(&token) {
                    alone = Some(FinishReason::Stop);
                } else if new == submission.max_new_tokens {
                    alone = Some(FinishReason::Length);
                }
            }
        }
        Client {
            is_waiting: !refused,
            submission,
            num_public,
            tokens,
            kvs,
            alone: alone.expect("the loop ends with a reason"),
            emitted: 0,
            ending: None,
            is_due: false,
            has_failed: false,
            is_poisoned: false,
            is_finished: refused,
            cached_tokens: None,
            preemptions: 0,
            num_reached: 0,
        }
    }

    /// What stands for the K/V of a token: like the real ones it depends on everything before, and beyond the public blocks on
    /// the salt. `before` is that of the token before it, or [`KV_OF_NOTHING`].
    pub(crate) fn kv(&self, before: u64, at: usize, token: TokenId) -> u64 {
        kv(self.submission.salt, self.num_public, before, at, token)
    }

    /// Prompt tokens that its tenant was charged for and that were never computed.
    pub(crate) fn num_uncharged(&self) -> u32 {
        self.cached_tokens.map_or(0, |cached| self.prompt_len() - self.num_reached.clamp(cached, self.prompt_len()))
    }

    pub(crate) fn prompt_len(&self) -> u32 {
        self.submission.prompt.len() as u32
    }

    /// Tokens that the core knows of this request.
    pub(crate) fn known(&self) -> u32 {
        self.prompt_len() + self.emitted
    }

    /// Takes a cancel that the core was just given.
    pub(crate) fn cancel(&mut self, reason: CancelReason) {
        if !self.is_finished {
            self.ending.get_or_insert(match reason {
                CancelReason::StopString => FinishReason::Stop,
                reason => FinishReason::Cancelled(reason),
            });
        }
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// It was never scheduled.
    pub(crate) fn is_fresh(&self) -> bool {
        self.cached_tokens.is_none()
    }

    /// The core is about to be told this time.
    pub(crate) fn before(&mut self, now: Micros) {
        let deadline = self.submission.deadline;
        self.is_due = !self.is_finished && self.ending.is_none() && deadline.is_some_and(|deadline| deadline <= now);
    }

    /// The core was told; whether the request is past its deadline.
    pub(crate) fn after(&mut self) -> bool {
        let is_due = std::mem::take(&mut self.is_due) && !self.is_finished;
        if is_due {
            self.ending.get_or_insert(FinishReason::Deadline);
        }
        is_due
    }

    /// Checks one effect about this request against the oracle.
    pub(crate) fn take(&mut self, effect: &Effect, config: &CoreConfig) -> Result<(), Failure> {
        let broken = |id: InvariantId| Err(Failure::new(id, format!("{effect:?}")));
        let check =
            |holds: bool, name: &str| if holds { Ok(()) } else { Err(Failure::new(name, format!("{effect:?}"))) };
        if self.is_finished {
            return broken(InvariantId::Out2);
        }
        match *effect {
            Effect::Scheduled { cached_tokens, .. } => {
                check(self.is_waiting, "schedule")?;
                check(
                    cached_tokens < self.known() && cached_tokens.is_multiple_of(config.block_size),
                    "cached tokens",
                )?;
                check(config.prefix_caching || cached_tokens == 0, "cached tokens")?;
                self.is_waiting = false;
                self.cached_tokens.get_or_insert(cached_tokens);
                // What is found after a preemption is computed, whoever did it.
                self.num_reached = self.num_reached.max(cached_tokens);
            }
            Effect::Preempted { .. } => {
                check(!self.is_waiting, "schedule")?;
                self.is_waiting = true;
                self.preemptions += 1;
            }
            Effect::Moved { .. } | Effect::Transfer { .. } => check(!self.is_waiting, "schedule")?,
            Effect::Token { index, token, .. } => {
                if index != self.emitted {
                    return broken(InvariantId::Out1);
                }
                check(self.ending.is_none(), "cancel")?;
                check(self.tokens.get(self.known() as usize) == Some(&token), "output")?;
                self.emitted += 1;
            }
            Effect::Finish { reason, usage, .. } => {
                let is_due = self.is_due && reason == FinishReason::Deadline;
                check(is_due || reason == self.expected_reason(), "finish reason")?;
                let is_whole = self.known() as usize == self.tokens.len();
                check(is_due || is_whole || reason != self.alone || self.ending.is_some(), "output")?;
                let expected = Usage { uncomputed_tokens: usage.uncomputed_tokens, ..self.expected_usage() };
                check(usage == expected && self.may_lack(usage.uncomputed_tokens), "usage")?;
                self.is_finished = true;
                self.is_waiting = false;
            }
        }
        Ok(())
    }

    fn expected_reason(&self) -> FinishReason {
        match self.ending {
            Some(reason) => reason,
            None if self.has_failed => FinishReason::Error,
            None => self.alone,
        }
    }

    /// Whether so much of the prompt may never have been computed: none of one that has said a token, all of one that never
    /// started.
    fn may_lack(&self, uncomputed_tokens: u32) -> bool {
        match self.cached_tokens {
            None => uncomputed_tokens == self.prompt_len(),
            Some(_) if self.emitted > 0 => uncomputed_tokens == 0,
            Some(cached) => uncomputed_tokens <= self.prompt_len() - cached,
        }
    }

    fn expected_usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len(),
            cached_tokens: self.cached_tokens.unwrap_or(0),
            uncomputed_tokens: 0,
            completion_tokens: self.emitted,
            preemptions: self.preemptions,
        }
    }
}

fn kv(salt: CacheSalt, num_public: usize, before: u64, at: usize, token: TokenId) -> u64 {
    let before = if at == num_public { mix(mix(before, salt.0 as u64), (salt.0 >> 64) as u64) } else { before };
    mix(before, u64::from(token) + 1)
}

/// The request that an effect is about.
pub(crate) fn request_of(effect: &Effect) -> RequestId {
    match *effect {
        Effect::Scheduled { request, .. }
        | Effect::Preempted { request }
        | Effect::Moved { request, .. }
        | Effect::Transfer { request, .. }
        | Effect::Token { request, .. }
        | Effect::Finish { request, .. } => request,
    }
}
