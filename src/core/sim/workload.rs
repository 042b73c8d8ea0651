//! Random configurations and submissions, small enough that everything rare happens often.

use super::rng::Rng;
use crate::{CacheSalt, CoreConfig, RequestId, Role, Submission, TokenId, WorkerSpec};

/// Few tokens, so that prompts meet and stop tokens come.
pub(crate) const VOCABULARY: u32 = 5;

/// What one seed runs.
pub(crate) struct Workload {
    pub(crate) config: CoreConfig,
    pub(crate) num_requests: u64,
    /// In percent of turns that may cancel, and of samples.
    pub(crate) cancels: u32,
    pub(crate) failures: u32,
    /// Long outputs from short prompts are what makes a pool run out.
    max_new_tokens: u32,
    salts: Vec<CacheSalt>,
    /// Starts that prompts share.
    stems: Vec<Vec<TokenId>>,
}

fn tokens(rng: &mut Rng, len: u32) -> Vec<TokenId> {
    (0..len).map(|_| rng.below(VOCABULARY)).collect()
}

impl Workload {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let block_size = rng.pick(&[1, 2, 3, 4, 16]);
        let num_workers = rng.pick(&[1, 1, 2, 3]);
        // Room for one to a few requests.
        let mut worker = |_| {
            let slots: u32 = rng.pick(&[30, 50, 70]) + rng.below(60);
            WorkerSpec { role: Role::Mixed, num_blocks: slots.div_ceil(block_size) }
        };
        let config = CoreConfig {
            workers: (0..num_workers).map(&mut worker).collect(),
            block_size,
            step_tokens_max: 1 + rng.pick(&[4, 12, 40]).min(rng.below(41)),
            running_max: 1 + rng.below(8),
            waiting_max: rng.pick(&[4, 30, 30]),
            request_tokens_max: 30 + rng.below(60),
            prefix_caching: rng.percent(85),
            hash_bits: rng.pick(&[128, 128, 64, 3, 3, 1]),
        };
        let stems = (0..3).map(|_| tokens(rng, 40)).collect();
        Workload {
            config,
            num_requests: u64::from(8 + rng.below(24)),
            cancels: rng.pick(&[0, 10, 40]),
            failures: rng.pick(&[0, 0, 2]),
            max_new_tokens: rng.pick(&[6, 24, 60]),
            salts: rng.pick(&[&[0][..], &[0, 1], &[0, 1 << 64, u128::MAX]]).iter().map(|x| CacheSalt(*x)).collect(),
            stems,
        }
    }

    /// Most tokens that any worker can hold for one request.
    fn tokens_max(&self) -> u32 {
        let slots = self.config.workers.iter().map(|worker| worker.num_blocks * self.config.block_size).min();
        slots.unwrap_or(0).min(self.config.request_tokens_max)
    }

    /// A random request; a few are empty or too long.
    pub(crate) fn submission(&self, rng: &mut Rng, request: RequestId) -> Submission {
        let stem = rng.below(self.stems.len() as u32) as usize;
        let shared = rng.pick(&[0, 4, 16, 16, 40]).min(rng.below(41)) as usize;
        let mut prompt = self.stems[stem][..shared].to_vec();
        let own = 1 + rng.below(6);
        prompt.extend(tokens(rng, own));
        let mut max_new_tokens = 1 + rng.below(self.max_new_tokens);
        if rng.percent(90) {
            // Mostly what fits, and often only just.
            let prompt_max = (self.tokens_max() - 1).min(prompt.len() as u32);
            prompt.truncate(prompt_max as usize);
            max_new_tokens = max_new_tokens.min(self.tokens_max() - prompt_max);
        }
        match rng.below(60) {
            0 => prompt.clear(),
            1 => max_new_tokens = 0,
            2 => max_new_tokens = u32::MAX,
            3 => prompt = tokens(rng, 90),
            _ => {}
        }
        let mut stop_tokens = if rng.percent(40) { tokens(rng, 2) } else { Vec::new() };
        stop_tokens.sort_unstable();
        Submission {
            request,
            prompt,
            max_new_tokens,
            min_new_tokens: rng.pick(&[0, 0, 3, 8]),
            stop_tokens,
            salt: rng.pick(&self.salts),
        }
    }
}
