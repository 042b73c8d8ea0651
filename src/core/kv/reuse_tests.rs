//! What the order of reuse is worth: conversations of several tenants, replayed against an unlimited cache, whose blocks are the
//! working set, against a half and a quarter of that memory, and against the least-recently-used order in them.

#![allow(clippy::unwrap_used)]

use super::hash::extend_hashes;
use super::*;
use crate::sim::rng::Rng;
use crate::{TenantId, TenantSpec};

const BLOCK_SIZE: u32 = 16;
const NUM_TENANTS: u32 = 6;

/// One request of a conversation: what it says is the prompt up to `prompt` tokens, what is answered the rest.
struct Turn {
    at: u64,
    session: u32,
    prompt: u32,
    end: u32,
}

/// How a trace is made.
#[derive(Clone, Copy)]
struct Shape {
    sessions: u32,
    /// In percent: conversations of one turn, and of a turn that another one follows it in the others.
    single: u32,
    goes_on: u32,
    /// Mean time between two turns, in thousandths of the whole.
    think: u32,
}

/// Conversations start at any time; each belongs to a tenant, whose system prompt it begins with.
fn trace(seed: u64, shape: Shape) -> Vec<Turn> {
    let mut rng = Rng::new(seed);
    let mut turns = Vec::new();
    for session in 0..shape.sessions {
        let mut at = u64::from(rng.below(1_000_000));
        let mut end = SYSTEM;
        let mut goes_on = !rng.percent(shape.single);
        loop {
            let prompt = end + 32 + rng.below(400);
            end = prompt + 32 + rng.below(400);
            turns.push(Turn { at, session, prompt, end });
            if !goes_on {
                break;
            }
            // The sum of four is near enough to how people think.
            at += u64::from((0..4).map(|_| rng.below(shape.think * 500)).sum::<u32>());
            goes_on = rng.percent(shape.goes_on);
        }
    }
    turns.sort_by_key(|turn| (turn.at, turn.session));
    turns
}

/// Tokens of a tenant's system prompt.
const SYSTEM: u32 = 512;

fn tokens(session: u32, end: u32) -> Vec<TokenId> {
    let tenant = session % NUM_TENANTS;
    (0..end).map(|at| if at < SYSTEM { at ^ (tenant << 12) } else { at ^ ((session + 100) << 12) }).collect()
}

/// Prompt tokens that were found, and blocks that hold something at the end.
fn replay(turns: &[Turn], num_blocks: u32, is_lru: bool) -> (u64, u64) {
    let mut tenants = Tenants::new();
    tenants.set(&(0..NUM_TENANTS).map(|tenant| TenantSpec::new(TenantId(tenant))).collect::<Vec<_>>());
    let mut pool = KvPool::new(num_blocks, BLOCK_SIZE);
    if is_lru {
        pool.free = pool.free.lru();
    }
    pool.make_tenants(tenants.len());
    let mut found = 0;
    for turn in turns {
        let audience = Audience { salt: CacheSalt(u128::from(turn.session % NUM_TENANTS)), num_public: 0 };
        let owner = tenants.find(TenantId(turn.session % NUM_TENANTS)).unwrap();
        let tokens = tokens(turn.session, turn.end);
        let mut hashes = Vec::new();
        extend_hashes(&mut hashes, audience, &tokens, (BLOCK_SIZE, 128));
        let mut table = Vec::new();
        let mut node = pool.lookup(audience, &tokens[..turn.prompt as usize], &hashes, &mut table);
        found += table.len() as u64 * u64::from(BLOCK_SIZE);
        let hits = pool.found(&table);
        table.iter().for_each(|block| pool.acquire(*block, owner));
        let first = table.len();
        pool.choose_anew();
        for at in first..hashes.len() {
            let block = pool.allocate(owner, &tenants).unwrap();
            let before = table.last().copied();
            let tokens = &tokens[at * BLOCK_SIZE as usize..][..BLOCK_SIZE as usize];
            node = pool.publish(FullBlock { block, hash: hashes[at], at, node, audience, before, hits, tokens });
            table.push(block);
        }
        pool.release(&mut table);
    }
    (found, u64::from(num_blocks) - pool.num_blank())
}

#[test]
fn half_the_memory_is_nearly_as_good_as_all() {
    let shapes = [
        Shape { sessions: 900, single: 50, goes_on: 85, think: 60 },
        Shape { sessions: 900, single: 70, goes_on: 85, think: 60 },
        Shape { sessions: 900, single: 80, goes_on: 90, think: 60 },
        Shape { sessions: 900, single: 60, goes_on: 80, think: 200 },
    ];
    let mut sums = [0, 0];
    for (seed, shape) in (1..).zip(shapes) {
        let turns = trace(seed, shape);
        let (unlimited, used) = replay(&turns, 1 << 18, false);
        for part in [2, 4] {
            let (ours, _) = replay(&turns, used as u32 / part, false);
            let (lru, _) = replay(&turns, used as u32 / part, true);
            let [ours, lru] = [ours, lru].map(|found| found * 1000 / unlimited);
            println!("{} turns, 1/{part} of {used} blocks: {ours} thousandths of all hits, LRU {lru}", turns.len());
            if part == 2 {
                assert!(ours >= 950, "expected 950 thousandths with half the memory, found {ours}");
            } else {
                assert!(ours >= lru, "expected {lru} thousandths or more with a quarter, found {ours}");
                sums = [sums[0] + ours, sums[1] + lru];
            }
        }
    }
    assert!(sums[0] >= sums[1] + 100, "expected 25 thousandths more than LRU on average, found {sums:?}");
}
