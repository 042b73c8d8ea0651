//! The chained block hash: a block's hash is a function of the salt, its parent's hash and its own tokens.
//!
//! The mixing step is the folded multiply of Vladimir Makarov's mum-hash and Wang Yi's wyhash: two 64-bit words, each
//! masked with a key, are multiplied to 128 bits and the halves are xored. Two lanes with different keys make 128 bits.
//! The keys come from the salt, so whoever does not know the salt cannot aim at a collision cheaply. The hash is not
//! cryptographic and need not be: it only finds candidates, which the pool then compares token by token; a forged
//! collision costs its author a cache miss. That a block's identity includes its whole prefix is vLLM's idea
//! ("automatic prefix caching").
//!
//! Complexity: one multiply per lane and pair of words, about 10 ns for a block of 16 tokens.

use super::Audience;
use crate::{CacheSalt, TokenId};

/// Hash of a full block and everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHash(pub(crate) u128);

/// What public blocks are hashed with; nothing depends on it but the hashes.
const PUBLIC_SALT: CacheSalt = CacheSalt(0);

/// Appends to `hashes` those of the full blocks of `tokens` that it lacks.
pub(crate) fn extend_hashes(
    hashes: &mut Vec<BlockHash>,
    audience: Audience,
    tokens: &[TokenId],
    (block_size, hash_bits): (u32, u32),
) {
    let num_public = audience.num_public as usize;
    if hashes.len() < num_public {
        let public = tokens.len().min(num_public * block_size as usize);
        BlockHasher::new(PUBLIC_SALT, hash_bits).extend(hashes, &tokens[..public], block_size);
    }
    if hashes.len() >= num_public {
        BlockHasher::new(audience.salt, hash_bits).extend(hashes, tokens, block_size);
    }
}

/// Of a whole prompt, in all bits: what a quarantine knows it by. A salt's own matter, public blocks or not.
pub(crate) fn prompt_hash(salt: CacheSalt, tokens: &[TokenId]) -> u128 {
    let hasher = BlockHasher::new(salt, 128);
    // The length first: zeros stand in for what the last block lacks.
    let length = hasher.block(PI_ROOT, &[tokens.len() as u32]);
    tokens.chunks(64).fold(length, |parent, block| hasher.block(parent, block))
}

/// Fractional digits of pi in hexadecimal: numbers with nothing up their sleeve.
const PI: [u64; 4] = [0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344, 0xa409_3822_299f_31d0, 0x082e_fa98_ec4e_6c89];

/// Hashes the blocks of one salt. Four words; made anew where it is needed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockHasher {
    keys: [u64; 4],
    mask: u128,
}

impl BlockHasher {
    /// A hasher that keeps the low `hash_bits` (1 to 128) bits.
    pub(crate) fn new(salt: CacheSalt, hash_bits: u32) -> Self {
        let (low, high) = halves(salt.0);
        let mut keys = [0; 4];
        let mut state = fold(low ^ PI[0], high ^ PI[1]);
        for (key, digits) in keys.iter_mut().zip(PI) {
            state = fold(state ^ low ^ digits, high.rotate_left(32) ^ PI[2]) ^ digits;
            *key = state;
        }
        BlockHasher { keys, mask: u128::MAX >> (128 - hash_bits) }
    }

    /// Appends to `hashes` those of the full blocks of `tokens` that it lacks.
    pub(crate) fn extend(&self, hashes: &mut Vec<BlockHash>, tokens: &[TokenId], block_size: u32) {
        let size = block_size as usize;
        let mut parent = hashes.last().map_or(PI_ROOT, |hash| hash.0);
        for block in tokens[hashes.len() * size..].chunks_exact(size) {
            parent = self.block(parent, block);
            hashes.push(BlockHash(parent));
        }
    }

    fn block(&self, parent: u128, tokens: &[TokenId]) -> u128 {
        let (mut a, mut b) = halves(parent);
        let mut mix = |x: u64, y: u64| {
            a = fold(x ^ a ^ self.keys[0], y ^ self.keys[1]);
            b = fold(y ^ b ^ self.keys[2], x ^ self.keys[3]);
        };
        let mut quads = tokens.chunks_exact(4);
        for quad in &mut quads {
            mix(word(quad[0], quad[1]), word(quad[2], quad[3]));
        }
        // Blocks of one pool are equally long, so that zeros after the rest cannot make two blocks alike.
        let at = |i: usize| quads.remainder().get(i).copied().unwrap_or(0);
        if !quads.remainder().is_empty() {
            mix(word(at(0), at(1)), word(at(2), 0));
        }
        // One more round ties the lanes together: a hit of one lane's zero factor must not survive in the other.
        let hash = u128::from(fold(a ^ self.keys[2], b ^ self.keys[1])) | (u128::from(a ^ b.rotate_left(29)) << 64);
        hash & self.mask
    }
}

/// What the first block of a sequence has for a parent's hash.
const PI_ROOT: u128 = (PI[2] as u128) << 64 | PI[3] as u128;

fn halves(x: u128) -> (u64, u64) {
    (x as u64, (x >> 64) as u64)
}

fn word(low: TokenId, high: TokenId) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// The folded multiply.
fn fold(x: u64, y: u64) -> u64 {
    let (low, high) = halves(u128::from(x) * u128::from(y));
    low ^ high
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn hashes(salt: u128, bits: u32, tokens: &[TokenId], block_size: u32) -> Vec<BlockHash> {
        let mut out = Vec::new();
        BlockHasher::new(CacheSalt(salt), bits).extend(&mut out, tokens, block_size);
        out
    }

    #[test]
    fn depends_on_salt_parent_and_every_token() {
        for block_size in [1, 2, 3, 4, 5, 7, 16] {
            let tokens: Vec<TokenId> = (0..block_size * 3).collect();
            let plain = hashes(0, 128, &tokens, block_size);
            assert_eq!(plain.len(), 3);
            assert!(hashes(1, 128, &tokens, block_size).iter().zip(&plain).all(|(x, y)| x != y), "salt");
            for at in 0..tokens.len() {
                let mut other = tokens.clone();
                other[at] ^= 0x100;
                let from = at / block_size as usize;
                let changed = hashes(0, 128, &other, block_size);
                for block in 0..3 {
                    assert_eq!(
                        changed[block] == plain[block],
                        block < from,
                        "size {block_size} token {at} block {block}"
                    );
                }
            }
        }
    }

    #[test]
    fn grows_block_by_block() {
        let tokens: Vec<TokenId> = (0..50).map(|i| i * 7).collect();
        let hasher = BlockHasher::new(CacheSalt(9), 128);
        let mut grown = Vec::new();
        for end in 0..=tokens.len() {
            hasher.extend(&mut grown, &tokens[..end], 4);
            assert_eq!(grown.len(), end / 4);
        }
        assert_eq!(grown, hashes(9, 128, &tokens, 4));
    }

    #[test]
    fn spreads_and_masks() {
        let all: HashSet<u128> = (0..100_000).map(|i| hashes(3, 128, &[i, 0, 0, 0], 4)[0].0).collect();
        assert_eq!(all.len(), 100_000);
        let low: HashSet<u64> = all.iter().map(|hash| *hash as u64).collect();
        let high: HashSet<u64> = all.iter().map(|hash| (hash >> 64) as u64).collect();
        assert_eq!((low.len(), high.len()), (100_000, 100_000), "each half must spread on its own");
        let few: HashSet<u128> = (0..1_000).map(|i| hashes(3, 3, &[i], 1)[0].0).collect();
        assert_eq!(few.len(), 8);
    }
}
