//! Recordings without what was said: other tokens and salts, with all the equalities that the core can see.
//!
//! The pseudonym of a token is 31 bits of a keyed pseudorandom function of the salt and of all tokens up to and with it, so
//! that equal prefixes under equal salts stay equal and nothing else can be learnt without the key:
//!
//! ```text
//!   chain   f(salt) --token 0--> f(.., token 0) --token 1--> f(.., token 1) --> ...
//!   recorded                     its low 31 bits             its low 31 bits
//! ```
//!
//! The core compares tokens in two places only. Blocks of one place in the prefix tree are compared token by token, and
//! prompts by their hash: both follow the prefix. And a sampled token is looked for in the request's stop tokens: one that
//! ends its request becomes [`STOP`], which alone is the recorded stop set and no other token's pseudonym. A stop token that
//! comes before `min_new_tokens` does not end the request and may come to stand in a published block: it is a token like any
//! other. The one that ends the request is computed by a step ahead at most, of which nothing is published, so it is in none.
//!
//! Tokens of public blocks do not depend on the salt. The one equality that is lost is that of two prompts under one salt of
//! which different numbers of blocks are public: a quarantine takes them for one.
//!
//! Two different tokens after equal prefixes get the same pseudonym with a chance of 2^-31; a replay is misled by it only where
//! they are the last ones of two blocks.
//!
//! Owner: the encoder. Memory: a few words for each request that lives. O(1) a token.

use crate::{CacheSalt, Effect, Input, RequestId, Sampled, Submission, Timed, TokenId};
use std::collections::HashMap;

/// A pseudorandom function of two words under a key that is made for one recording and kept nowhere.
pub type Prf = Box<dyn Fn(u64, u64) -> u64 + Send>;

/// Stands for the sampled token that ends its request: above all 31-bit numbers.
const STOP: TokenId = 1 << 31;

/// First words of chains, which else are random: of the tokens, and of the two halves of a salt.
const CHAIN: u64 = 0;
const SALT_LOW: u64 = 1;
const SALT_HIGH: u64 = 2;

/// A request's tokens so far.
#[derive(Debug)]
struct Chain {
    state: u64,
    num_new: u32,
    min_new_tokens: u32,
    stop_tokens: Vec<TokenId>,
}

/// The pseudonyms of one recording.
pub struct Pseudonyms {
    prf: Prf,
    block_size: u32,
    /// Of the requests that live.
    chains: HashMap<RequestId, Chain>,
}

impl Pseudonyms {
    /// For a core with blocks of `block_size` tokens.
    #[must_use]
    pub fn new(prf: Prf, block_size: u32) -> Self {
        Pseudonyms { prf, block_size, chains: HashMap::new() }
    }

    /// What is recorded for a submission.
    pub(super) fn submission(&mut self, submission: &Submission) -> Submission {
        // The whole blocks among them are found under every salt.
        let num_shared = submission.prompt.len().min(submission.shared_tokens as usize);
        let num_public = num_shared - num_shared % self.block_size as usize;
        let mut chain = Chain {
            state: CHAIN,
            num_new: 0,
            min_new_tokens: submission.min_new_tokens,
            stop_tokens: submission.stop_tokens.clone(),
        };
        let (public, own) = submission.prompt.split_at(num_public);
        let mut prompt = Vec::with_capacity(submission.prompt.len());
        prompt.extend(public.iter().map(|token| next(&self.prf, &mut chain.state, *token)));
        chain.state = self.salted(chain.state, submission.salt);
        prompt.extend(own.iter().map(|token| next(&self.prf, &mut chain.state, *token)));
        self.chains.insert(submission.request, chain);
        let low = self.salted(SALT_LOW, submission.salt);
        let high = self.salted(SALT_HIGH, submission.salt);
        Submission {
            prompt,
            stop_tokens: if submission.stop_tokens.is_empty() { Vec::new() } else { vec![STOP] },
            salt: CacheSalt(u128::from(high) << 64 | u128::from(low)),
            ..*submission
        }
    }

    /// Replaces sampled tokens.
    pub(super) fn sampled(&mut self, sampled: &mut [(RequestId, Sampled)]) {
        for (request, result) in sampled {
            let Sampled::Token(token) = result else { continue };
            let Some(chain) = self.chains.get_mut(request) else {
                // Of a request that ended before the step that was planned ahead of its end; a real token is never written.
                *token = 0;
                continue;
            };
            let pseudonym = next(&self.prf, &mut chain.state, *token);
            chain.num_new += 1;
            let ends = chain.num_new >= chain.min_new_tokens && chain.stop_tokens.contains(token);
            *token = if ends { STOP } else { pseudonym };
        }
    }

    /// Forgets what has ended.
    pub(super) fn effect(&mut self, effect: &Effect) {
        if let Effect::Finish { request, .. } = effect {
            self.chains.remove(request);
        }
    }

    fn salted(&self, state: u64, salt: CacheSalt) -> u64 {
        (self.prf)((self.prf)(state, salt.0 as u64), (salt.0 >> 64) as u64)
    }
}

/// Goes on by one token; gives its pseudonym.
fn next(prf: &Prf, state: &mut u64, token: TokenId) -> TokenId {
    *state = prf(*state, token.into());
    *state as TokenId & (STOP - 1)
}

/// The two inputs that hold tokens, with other ones; `None` for the rest. Sampled tokens that do not count are left out: they
/// do not lengthen any request.
pub(super) fn disguised(
    pseudonyms: &mut Pseudonyms,
    input: &Timed<Input>,
    counts: bool,
    scratch: &mut Vec<(RequestId, Sampled)>,
) -> Option<Timed<Input>> {
    let disguised = match &input.input {
        Input::Submit(submission) => Input::Submit(pseudonyms.submission(submission)),
        Input::StepDone { worker, step, device_us, sampled } => {
            let mut other = std::mem::take(scratch);
            other.clear();
            other.extend_from_slice(sampled);
            if counts {
                pseudonyms.sampled(&mut other);
            } else {
                other.iter_mut().for_each(|(_, result)| *result = Sampled::Failed);
            }
            Input::StepDone { worker: *worker, step: *step, device_us: *device_us, sampled: other }
        }
        _ => return None,
    };
    Some(Timed { at: input.at, input: disguised })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClassId, FinishReason, TenantId, Usage};
    use std::hash::{DefaultHasher, Hasher};

    fn pseudonyms() -> Pseudonyms {
        let prf = |a: u64, b: u64| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(a);
            hasher.write_u64(b);
            hasher.finish()
        };
        Pseudonyms::new(Box::new(prf), 16)
    }

    fn submission(request: u64, prompt: &[TokenId], salt: u128) -> Submission {
        Submission {
            request: RequestId(request),
            prompt: prompt.to_vec(),
            max_new_tokens: 9,
            min_new_tokens: 2,
            needs_tokens: false,
            stop_tokens: vec![7, 8],
            salt: CacheSalt(salt),
            shared_tokens: 0,
            tenant: TenantId(3),
            class: ClassId(1),
            deadline: None,
        }
    }

    #[test]
    fn equal_prefixes_stay_equal_and_nothing_else_is() {
        let mut pseudonyms = pseudonyms();
        let [a, b, c] = [(&[1, 2, 3, 1, 2, 3], 5), (&[1, 2, 3, 9, 2, 3], 5), (&[1, 2, 3, 1, 2, 3], 6)]
            .map(|(prompt, salt)| pseudonyms.submission(&submission(salt as u64 + u64::from(prompt[3]), prompt, salt)));
        assert_eq!(a.prompt[..3], b.prompt[..3]);
        for at in 3..6 {
            assert_ne!(a.prompt[at], b.prompt[at], "after the prefixes part");
        }
        for at in 0..6 {
            assert_ne!(a.prompt[at], c.prompt[at], "another salt");
        }
        assert_ne!(a.prompt[..3], a.prompt[3..], "equal tokens at another place");
        assert_eq!((a.salt == b.salt, a.salt == c.salt), (true, false));
        assert!(a.salt != CacheSalt(5) && a.prompt.iter().all(|token| *token < STOP && *token > 100));
        assert_eq!(a.stop_tokens, [STOP]);
        assert_eq!((a.tenant, a.class, a.max_new_tokens, a.min_new_tokens), (TenantId(3), ClassId(1), 9, 2));
    }

    #[test]
    fn public_blocks_are_alike_under_all_salts() {
        let mut pseudonyms = pseudonyms();
        let prompt: Vec<TokenId> = (0..50).collect();
        let mut with = |request, shared_tokens, salt| {
            let submission = Submission { shared_tokens, ..submission(request, &prompt, salt) };
            pseudonyms.submission(&submission).prompt
        };
        let (a, b, c, d) = (with(1, 40, 1), with(2, 47, 2), with(3, 32, 1), with(4, 1_000, 3));
        let alike = |a: &[TokenId], b: &[TokenId]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        assert_eq!((alike(&a, &b), alike(&a, &c), alike(&a, &d), alike(&b, &d)), (32, 50, 32, 32));
        let e = with(5, 1_000, 4);
        assert_eq!(alike(&d, &e), 48);
    }

    #[test]
    fn output_goes_on_where_the_prompt_ends_and_only_the_last_stop_token_is_one() {
        let mut pseudonyms = pseudonyms();
        pseudonyms.submission(&submission(1, &[1, 2], 0));
        let mut outputs = Vec::new();
        // A stop token before `min_new_tokens`, one that is none, one that ends the request.
        for token in [7, 4, 8] {
            let mut sampled = [(RequestId(1), Sampled::Token(token)), (RequestId(1), Sampled::Failed)];
            pseudonyms.sampled(&mut sampled);
            assert_eq!(sampled[1].1, Sampled::Failed);
            let Sampled::Token(other) = sampled[0].1 else { panic!("a token stays one") };
            outputs.push(other);
        }
        let again = pseudonyms.submission(&submission(2, &[1, 2, 7, 4, 8], 0)).prompt;
        assert_eq!(outputs, [again[2], again[3], STOP]);
        assert_eq!(pseudonyms.chains.len(), 2);
        let (reason, usage) = (FinishReason::Stop, Usage::default());
        pseudonyms.effect(&Effect::Finish { request: RequestId(1), reason, usage });
        pseudonyms.effect(&Effect::Preempted { request: RequestId(2) });
        assert_eq!(pseudonyms.chains.len(), 1);
    }
}
