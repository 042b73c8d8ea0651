//! The answers of one request while they are made: token events in, text out.
//!
//! Owner: the body or the handler of one request. Dropping a [`Generation`] drops its channels, which cancels what still
//! runs. O(choices) per wake-up, O(bytes) per token; no allocation per token in the steady state.
//!
//! Invariants: text leaves in whole characters; no part of a stop string leaves unless asked for; each choice finishes once.

use super::logprobs::PendingLogprobs;
use super::state::ServedModel;
use super::types::common::{FinishReason, PromptTokensDetails, StopReason, Usage};
use crate::admission::{Admitted, OutputRules};
use crate::error::{Overload, ServeError};
use crate::keys::Charge;
use crate::request::{Request, Terms, TokenEvent, TokenRx};
use crate::text::{IncrementalDetokenizer, StopMatcher};
use kvern_core::{CancelReason, FinishReason as EngineFinish, Refusal, RequestId, TokenId, Usage as EngineUsage};
use std::sync::Arc;
use std::task::{Context, Poll};

/// All choices of one request.
pub(crate) struct Generation {
    model: Arc<ServedModel>,
    rules: OutputRules,
    choices: Vec<Choice>,
    /// Where the next poll starts, so that no choice waits for a busier one.
    next: usize,
    prompt_tokens: u32,
    choices_per_prompt: u32,
    /// What its key was charged; settled when this is dropped, whatever the reason.
    charge: Option<Charge>,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finish {
    pub(crate) reason: FinishReason,
    pub(crate) stop: Option<StopReason>,
}

/// One answer.
pub(crate) struct Choice {
    pub(crate) index: u32,
    /// Text that was not yet taken.
    pub(crate) text: String,
    /// Log-probabilities of tokens that were not yet taken.
    pub(crate) logprobs: PendingLogprobs,
    /// Set once, with the last text.
    pub(crate) finish: Option<Finish>,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    cached_tokens: u32,
    /// Prompt tokens that the engine never came to.
    uncomputed_tokens: u32,
    /// The stop token that ended it, if the client named it.
    stop_token: Option<TokenId>,
    id: RequestId,
    detokenizer: IncrementalDetokenizer,
    stops: Option<StopMatcher>,
    phase: Phase,
}

enum Phase {
    Running(TokenRx),
    /// A stop string ended the text; only the engine's last word is awaited.
    Ending(TokenRx),
    Ended,
}

impl Generation {
    /// Submits every choice, or none: the first refusal drops those before it. Returns when the engine has taken them all,
    /// which it says at once.
    pub(crate) async fn submit(
        model: Arc<ServedModel>,
        admitted: Admitted,
        external_id: &Arc<str>,
        terms: Terms,
        charge: Option<Charge>,
    ) -> Result<Self, ServeError> {
        let mut generation = Self::submit_all(model, admitted, external_id, terms)?;
        for choice in &mut generation.choices {
            let Phase::Running(receiver) = &mut choice.phase else { unreachable!("a choice starts as running") };
            match receiver.recv().await {
                Some(TokenEvent::Accepted) => {}
                Some(TokenEvent::Finished { reason: EngineFinish::Refused(refusal), .. }) => {
                    return Err(refused(refusal));
                }
                other => {
                    tracing::error!(?other, "the engine did not say whether it takes a request");
                    return Err(ServeError::EngineStopped);
                }
            }
        }
        // Before this nothing was used, and a charge that is dropped gives everything back.
        generation.charge = charge;
        Ok(generation)
    }

    fn submit_all(
        model: Arc<ServedModel>,
        admitted: Admitted,
        external_id: &Arc<str>,
        terms: Terms,
    ) -> Result<Self, ServeError> {
        let Admitted { prompts, sampling, n, rules, .. } = admitted;
        let mut choices = Vec::with_capacity(prompts.len() * n as usize);
        let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len() as u32).sum();
        for mut prompt in prompts {
            if model.log_prompts {
                let text = model.text.tokenizer.decode(&prompt.tokens, false);
                tracing::info!(target: "kvern::prompt", id = %external_id, ?text, "prompt");
            }
            let echo = prompt.echo.take().unwrap_or_default();
            let terms = Terms { shared_tokens: prompt.shared_tokens, ..terms };
            for copy in 0..n {
                let id = model.engine.next_id();
                let mut sampling = sampling.clone();
                sampling.seed = sampling.seed.wrapping_add(u64::from(copy));
                let tokens = if copy + 1 == n { std::mem::take(&mut prompt.tokens) } else { prompt.tokens.clone() };
                let prompt_tokens = tokens.len() as u32;
                let receiver = model.engine.submit(Request {
                    id,
                    external_id: Arc::clone(external_id),
                    n,
                    prompt: tokens,
                    sampling,
                    max_new_tokens: prompt.max_new_tokens,
                    terms,
                })?;
                choices.push(Choice {
                    index: choices.len() as u32,
                    text: echo.clone(),
                    logprobs: PendingLogprobs::new(echo.chars().count() as u32),
                    finish: None,
                    prompt_tokens,
                    completion_tokens: 0,
                    cached_tokens: 0,
                    uncomputed_tokens: 0,
                    stop_token: None,
                    id,
                    detokenizer: IncrementalDetokenizer::new(
                        Arc::clone(&model.text.tokenizer),
                        rules.skip_special_tokens,
                    ),
                    stops: rules.stop_matcher(),
                    phase: Phase::Running(receiver),
                });
            }
        }
        Ok(Generation { model, rules, choices, next: 0, prompt_tokens, choices_per_prompt: n, charge: None })
    }

    /// The next choice that has text, log-probabilities or a finish for the client; `None` once all have ended.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<&mut Choice, ServeError>>> {
        let count = self.choices.len();
        let mut ended = 0;
        let mut turn = 0;
        while turn < count {
            let at = (self.next + turn) % count;
            match self.poll_choice(at, cx) {
                Poll::Pending => turn += 1,
                Poll::Ready(Ok(Progress::Ended)) => {
                    ended += 1;
                    turn += 1;
                }
                Poll::Ready(Ok(Progress::Silent)) => {}
                Poll::Ready(Ok(Progress::Said)) => {
                    self.next = (at + 1) % count;
                    return Poll::Ready(Some(Ok(&mut self.choices[at])));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
            }
        }
        if ended == count { Poll::Ready(None) } else { Poll::Pending }
    }

    fn poll_choice(&mut self, at: usize, cx: &mut Context<'_>) -> Poll<Result<Progress, ServeError>> {
        let choice = &mut self.choices[at];
        let ending = matches!(choice.phase, Phase::Ending(_));
        let event = match &mut choice.phase {
            Phase::Ended => return Poll::Ready(Ok(Progress::Ended)),
            Phase::Running(receiver) | Phase::Ending(receiver) => std::task::ready!(receiver.poll_recv(cx)),
        };
        Poll::Ready(match (event, ending) {
            // What the engine made after the stop string is not part of the answer.
            (Some(TokenEvent::Token { .. }), true) | (Some(TokenEvent::Accepted), _) => Ok(Progress::Silent),
            (Some(TokenEvent::Finished { usage, .. }), true) => {
                choice.end(usage);
                Ok(Progress::Silent)
            }
            (None, true) => {
                choice.phase = Phase::Ended;
                Ok(Progress::Silent)
            }
            (Some(TokenEvent::Token { token, logprobs }), false) => {
                if let Some(logprobs) = logprobs {
                    choice.logprobs.push(token, *logprobs);
                }
                Ok(self.take_token(at, token))
            }
            (Some(TokenEvent::Finished { reason, usage }), false) => {
                choice.end(usage);
                self.take_finish(at, reason)
            }
            (None, false) => Err(self.closed_early()),
        })
    }

    fn take_token(&mut self, at: usize, token: TokenId) -> Progress {
        let choice = &mut self.choices[at];
        choice.completion_tokens += 1;
        if self.rules.ends_at(token) {
            choice.stop_token = Some(token).filter(|&token| self.rules.requested(token));
            if !self.rules.include_stop {
                // Its text is no part of the answer.
                return Progress::Silent;
            }
        }
        let piece = choice.detokenizer.push(token);
        let before = choice.text.len();
        if choice.completion_tokens <= self.rules.min_tokens {
            choice.text.push_str(piece);
        } else if let Some(stop) = append(&mut choice.stops, &mut choice.text, piece) {
            self.model.engine.cancel(choice.id, CancelReason::StopString);
            let stop = self.rules.stops[stop].clone();
            choice.finish = Some(Finish { reason: FinishReason::Stop, stop: Some(StopReason::Text(stop)) });
            choice.phase = match std::mem::replace(&mut choice.phase, Phase::Ended) {
                Phase::Running(receiver) => Phase::Ending(receiver),
                other => other,
            };
            return Progress::Said;
        }
        if choice.text.len() > before { Progress::Said } else { Progress::Silent }
    }

    fn take_finish(&mut self, at: usize, reason: EngineFinish) -> Result<Progress, ServeError> {
        let reason = match reason {
            EngineFinish::Stop => FinishReason::Stop,
            EngineFinish::Length => FinishReason::Length,
            EngineFinish::Error => return Err(ServeError::GenerationFailed),
            EngineFinish::Deadline => return Err(ServeError::DeadlinePassed),
            EngineFinish::Refused(refusal) => return Err(refused(refusal)),
            EngineFinish::Cancelled(CancelReason::SlowReader) => return Err(ServeError::SlowReader),
            EngineFinish::Cancelled(CancelReason::Shutdown) => return Err(ServeError::Shutdown),
            EngineFinish::Cancelled(CancelReason::ClientGone | CancelReason::StopString) => {
                tracing::error!(?reason, "the engine ended a request as nobody asked it to");
                return Err(ServeError::Internal);
            }
        };
        let choice = &mut self.choices[at];
        let piece = choice.detokenizer.finish();
        let finish = match append(&mut choice.stops, &mut choice.text, piece) {
            Some(stop) => {
                Finish { reason: FinishReason::Stop, stop: Some(StopReason::Text(self.rules.stops[stop].clone())) }
            }
            None => Finish { reason, stop: choice.stop_token.map(StopReason::Token) },
        };
        if let Some(stops) = &mut choice.stops {
            choice.text.push_str(stops.finish());
        }
        choice.finish = Some(finish);
        Ok(Progress::Said)
    }

    /// The channel closed without a last word: the engine gave up on a full channel, or is gone.
    fn closed_early(&self) -> ServeError {
        if self.model.engine.health().live { ServeError::SlowReader } else { ServeError::EngineStopped }
    }

    pub(crate) fn choices_mut(&mut self) -> &mut [Choice] {
        &mut self.choices
    }

    /// Waits until every choice has ended, handing each piece of progress to `take`.
    pub(crate) async fn run(&mut self, mut take: impl FnMut(&mut Choice)) -> Result<(), ServeError> {
        std::future::poll_fn(|cx| {
            loop {
                match std::task::ready!(self.poll_next(cx)) {
                    None => return Poll::Ready(Ok(())),
                    Some(Ok(choice)) => take(choice),
                    Some(Err(error)) => return Poll::Ready(Err(error)),
                }
            }
        })
        .await
    }

    /// Counts of the whole request: each prompt once, every choice's tokens.
    pub(crate) fn usage(&self) -> Usage {
        let completion = self.choices.iter().map(|choice| choice.completion_tokens).sum();
        // The copies of a prompt find what its first choice computed; only that one's hits tell about the past.
        let firsts = self.choices.iter().step_by(self.choices_per_prompt as usize);
        let cached_tokens = firsts.map(|choice| choice.cached_tokens).sum();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: completion,
            total_tokens: self.prompt_tokens + completion,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens }),
        }
    }
}

/// Settles the charge: prompt tokens that were computed, each prompt once, and all tokens made.
impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(charge) = self.charge.take() {
            let usage = self.usage();
            let cached = usage.prompt_tokens_details.map_or(0, |details| details.cached_tokens);
            let lacking = |choices: &[Choice]| choices.iter().map(|choice| choice.uncomputed_tokens).min().unwrap_or(0);
            let uncomputed: u32 = self.choices.chunks(self.choices_per_prompt as usize).map(lacking).sum();
            charge.settle(u64::from(usage.total_tokens.saturating_sub(cached).saturating_sub(uncomputed)));
        }
    }
}

fn refused(refusal: Refusal) -> ServeError {
    let overloaded = |why, backoff: kvern_core::Backoff| ServeError::Overloaded { why, backoff: backoff.into() };
    match refusal {
        Refusal::QueueFull(backoff) => overloaded(Overload::Queue, backoff),
        Refusal::QueueTokens(backoff) => overloaded(Overload::QueueTokens, backoff),
        Refusal::Deadline(backoff) => overloaded(Overload::Deadline, backoff),
        Refusal::Quarantined(backoff) => ServeError::Quarantined { backoff: backoff.into() },
        Refusal::TooLong => ServeError::TooLongForCache,
        Refusal::Empty | Refusal::UnknownTenant => {
            tracing::error!(?refusal, "the engine refused what admission had checked");
            ServeError::Internal
        }
    }
}

/// What a choice's event was for the client.
enum Progress {
    /// Nothing yet: a part of a character, or what may become a stop string.
    Silent,
    Said,
    Ended,
}

/// Appends the text that is certainly no part of a stop string; the index of the stop string that `piece` completed.
fn append(stops: &mut Option<StopMatcher>, text: &mut String, piece: &str) -> Option<usize> {
    let Some(stops) = stops else {
        text.push_str(piece);
        return None;
    };
    let step = stops.push(piece);
    text.push_str(step.text);
    step.matched
}

impl Choice {
    /// Counts so far, for streams that carry the usage in every chunk.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details: None,
        }
    }

    fn end(&mut self, usage: EngineUsage) {
        self.cached_tokens = usage.cached_tokens;
        self.uncomputed_tokens = usage.uncomputed_tokens;
        self.phase = Phase::Ended;
    }
}
