//! A mixed load: conversations with shared beginnings, documents, and long prompts; half greedy, half sampled by a seed.

use crate::prompt::{Wish, ids};
use crate::stats::Rng;

const PREFIXES: usize = 4;
const PREFIX_TOKENS: u32 = 192;
/// Part of the requests that begin as others do, and of those whose prompt is long.
const SHARED: f64 = 0.6;
const LONG: f64 = 0.1;

/// Makes requests, named by its seed.
#[derive(Debug)]
pub(crate) struct Mixture {
    rng: Rng,
    prefixes: Vec<Vec<u32>>,
}

impl Mixture {
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Rng::new(seed, stream);
        let prefixes = (0..PREFIXES).map(|_| ids(&mut rng, PREFIX_TOKENS)).collect();
        Mixture { rng, prefixes }
    }

    pub(crate) fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    pub(crate) fn wish(&mut self) -> Wish {
        let rng = &mut self.rng;
        let (mut prompt, own, output) = if rng.chance(SHARED) {
            (self.prefixes[rng.between((0, PREFIXES as u32 - 1)) as usize].clone(), (16, 96), (16, 64))
        } else if rng.chance(LONG / (1.0 - SHARED)) {
            (Vec::new(), (900, 1500), (8, 32))
        } else {
            (Vec::new(), (128, 512), (32, 96))
        };
        let own = rng.between(own);
        prompt.extend(ids(rng, own));
        let mut wish = Wish::new(prompt, rng.between(output));
        wish.seed = rng.chance(0.5).then(|| rng.next() >> 16);
        wish
    }
}
