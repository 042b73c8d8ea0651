#![allow(clippy::unwrap_used)]

use super::hash::extend_hashes;
use super::*;
use proptest::prelude::*;

const BLOCK_SIZE: u32 = 2;

/// A pool of one tenant.
fn pool(num_blocks: u32, block_size: u32) -> KvPool {
    let mut pool = KvPool::new(num_blocks, block_size);
    pool.make_tenants(1);
    pool
}

/// A sequence that holds blocks, as a request would.
#[derive(Clone, Debug)]
struct Holder {
    audience: Audience,
    tokens: Vec<TokenId>,
    table: Vec<BlockId>,
}

/// Everything private to this salt.
fn private(salt: u128) -> Audience {
    Audience { salt: CacheSalt(salt), num_public: 0 }
}

/// What a test does to the pool.
#[derive(Clone, Debug)]
enum Op {
    /// Look a sequence up, take what is found, allocate and publish the rest; nothing when it does not fit.
    Hold { salt: u128, num_public: u32, tokens: Vec<TokenId> },
    /// Give a sequence's blocks back.
    Release(prop::sample::Index),
    /// Make a sequence's blocks unfindable.
    Forget(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    // Two tokens and two salts: nearly everything shares a prefix with something.
    let hold = (0u128..2, 0u32..4, prop::collection::vec(0u32..2, 1..12)).prop_map(|(salt, public, tokens)| {
        let num_public = public.min(tokens.len() as u32 / BLOCK_SIZE);
        Op::Hold { salt, num_public, tokens }
    });
    prop_oneof![
        4 => hold,
        3 => any::<prop::sample::Index>().prop_map(Op::Release),
        1 => any::<prop::sample::Index>().prop_map(Op::Forget),
    ]
}

fn hashes(holder: &Holder, hash_bits: u32) -> Vec<BlockHash> {
    let mut hashes = Vec::new();
    extend_hashes(&mut hashes, holder.audience, &holder.tokens, (BLOCK_SIZE, hash_bits));
    hashes
}

/// Gives the blocks that were found, if the sequence fits.
fn hold(pool: &mut KvPool, holder: &mut Holder, hash_bits: u32) -> Option<usize> {
    let hashes = hashes(holder, hash_bits);
    let mut node = pool.lookup(holder.audience, &holder.tokens, &hashes, &mut holder.table);
    let hits = holder.table.len();
    let needed = holder.tokens.len().div_ceil(BLOCK_SIZE as usize) - hits;
    if (pool.num_free() as usize) < needed + pool.count_free(&holder.table) as usize {
        holder.table.clear();
        return None;
    }
    let found = pool.found(&holder.table);
    holder.table.iter().for_each(|block| pool.acquire(*block, TenantSlot::FIRST));
    holder.table.extend((0..needed).map(|_| pool.allocate(TenantSlot::FIRST, &Tenants::new()).unwrap()));
    for (at, hash) in hashes.iter().copied().enumerate().skip(hits) {
        let tokens = &holder.tokens[at * BLOCK_SIZE as usize..][..BLOCK_SIZE as usize];
        let (block, audience) = (holder.table[at], holder.audience);
        let before = at.checked_sub(1).map(|before| holder.table[before]);
        node = pool.publish(FullBlock { block, hash, at, node, audience, before, hits: found, tokens });
    }
    Some(hits)
}

/// What the pool says of itself agrees with who holds what.
fn check(pool: &KvPool, holders: &[Holder]) {
    assert!(pool.index_is_exact());
    assert_eq!(pool.num_free() + pool.num_live(), pool.num_blocks());
    assert_eq!(pool.free_blocks().count() as u32, pool.num_free());
    for block in (0..pool.num_blocks()).map(BlockId) {
        let count = holders.iter().flat_map(|holder| &holder.table).filter(|held| **held == block).count() as u32;
        assert_eq!(pool.ref_count(block), count, "{block:?}");
        assert_eq!(pool.is_free(block), count == 0, "{block:?}");
    }
    for (a, b) in holders.iter().flat_map(|a| holders.iter().map(move |b| (a, b))) {
        for (at, _) in a.table.iter().enumerate().filter(|(at, block)| b.table.get(*at) == Some(block)) {
            let end = (at + 1) * BLOCK_SIZE as usize;
            let same_salt = a.audience.salt_of(at) == b.audience.salt_of(at);
            let same = std::ptr::eq(a, b) || (same_salt && a.tokens[..end] == b.tokens[..end]);
            assert!(same, "{a:?} and {b:?} share block {at}");
        }
    }
}

proptest! {
    /// Whatever is held, released and forgotten, with whatever collisions: counts agree, and only equal prefixes are shared.
    #[test]
    fn shares_only_what_is_equal(num_blocks in 1u32..16, hash_bits in prop::sample::select(vec![1, 2, 128]),
                                 ops in prop::collection::vec(op(), 0..60)) {
        let mut pool = pool(num_blocks, BLOCK_SIZE);
        let mut holders: Vec<Holder> = Vec::new();
        for op in ops {
            match op {
                Op::Hold { salt, num_public, tokens } => {
                    let audience = Audience { num_public, ..private(salt) };
                    let mut holder = Holder { audience, tokens, table: Vec::new() };
                    if hold(&mut pool, &mut holder, hash_bits).is_some() {
                        holders.push(holder);
                    }
                }
                Op::Release(at) if !holders.is_empty() => {
                    let mut holder = holders.swap_remove(at.index(holders.len()));
                    pool.release(&mut holder.table);
                }
                Op::Forget(at) if !holders.is_empty() => {
                    holders[at.index(holders.len())].table.iter().for_each(|block| pool.forget(*block));
                }
                Op::Release(_) | Op::Forget(_) => {}
            }
            check(&pool, &holders);
        }
        for holder in &mut holders {
            pool.release(&mut holder.table);
        }
        prop_assert_eq!(pool.num_free(), num_blocks);
    }

    /// What was held and given back is found again, all but its last token, as long as nothing else took the blocks.
    #[test]
    fn finds_what_was_freed(tokens in prop::collection::vec(any::<u32>(), 1..40), hash_bits in prop::sample::select(vec![1, 128])) {
        let mut pool = pool(20, BLOCK_SIZE);
        let mut holder = Holder { audience: private(7), tokens, table: Vec::new() };
        prop_assert_eq!(hold(&mut pool, &mut holder, hash_bits), Some(0));
        pool.release(&mut holder.table);
        let expected = (holder.tokens.len() - 1) / BLOCK_SIZE as usize;
        prop_assert_eq!(hold(&mut pool, &mut holder, hash_bits), Some(expected));
        let mut stranger = Holder { audience: private(8), table: Vec::new(), ..holder.clone() };
        prop_assert_eq!(pool.lookup(stranger.audience, &stranger.tokens, &hashes(&stranger, hash_bits), &mut stranger.table), NodeId::ROOT);
        prop_assert!(stranger.table.is_empty(), "another salt finds nothing");
    }
}

fn sequence(tokens: &[TokenId]) -> Holder {
    Holder { audience: private(0), tokens: tokens.to_vec(), table: Vec::new() }
}

#[test]
fn strangers_share_what_is_public_and_nothing_after_it() {
    // Salts 0 and 1 (0 is also what public blocks are hashed with), one block public, then others' views of the same tokens.
    let tokens = [1, 1, 2, 2, 3, 3, 4];
    let found = |first: Audience, second: Audience, hash_bits| {
        let mut pool = pool(20, BLOCK_SIZE);
        let mut holder = Holder { audience: first, tokens: tokens.to_vec(), table: Vec::new() };
        hold(&mut pool, &mut holder, hash_bits).unwrap();
        let mut other = Holder { audience: second, tokens: tokens.to_vec(), table: Vec::new() };
        hold(&mut pool, &mut other, hash_bits).unwrap()
    };
    let with = |salt, num_public| Audience { num_public, ..private(salt) };
    for hash_bits in [1, 128] {
        let table = [
            (with(0, 1), with(1, 1), 1),
            (with(1, 1), with(0, 1), 1),
            (with(1, 1), with(1, 1), 3),
            (with(0, 3), with(1, 1), 1),
            (with(0, 1), with(1, 3), 1),
            (with(0, 3), with(1, 3), 3),
            (with(0, 0), with(0, 1), 0),
            (with(0, 1), with(0, 0), 0),
            (with(1, 0), with(0, 0), 0),
        ];
        for (first, second, expected) in table {
            assert_eq!(found(first, second, hash_bits), expected, "{first:?} then {second:?}, {hash_bits} bits");
        }
    }
}

#[test]
fn the_end_of_the_oldest_prefix_is_reused_first() {
    let mut pool = pool(6, BLOCK_SIZE);
    let (mut old, mut new) = (sequence(&[1, 1, 2, 2, 3]), sequence(&[4, 4, 5, 5, 6]));
    hold(&mut pool, &mut old, 128).unwrap();
    hold(&mut pool, &mut new, 128).unwrap();
    let (o, n) = (old.table.clone(), new.table.clone());
    pool.release(&mut old.table);
    pool.release(&mut new.table);
    // Partial blocks hold nothing to find; then the older prefix goes, its end before its start.
    let order: Vec<_> = pool.free_blocks().collect();
    assert_eq!(order, [n[2], o[2], o[1], o[0], n[1], n[0]]);
    let reused: Vec<_> = (0..3).map(|_| pool.allocate(TenantSlot::FIRST, &Tenants::new()).unwrap()).collect();
    assert_eq!(reused, [n[2], o[2], o[1]]);
    // The start of the old prefix is still found, its end is not.
    let mut again = sequence(&[1, 1, 2, 2, 3]);
    pool.lookup(again.audience, &again.tokens, &hashes(&again, 128), &mut again.table);
    assert_eq!(again.table, [o[0]]);
}

#[test]
fn a_child_does_not_outlive_its_parent_under_a_stranger() {
    // With one hash bit everything collides. `b` follows `a`; `a`'s block is then reused for `x`. Only the parent's number,
    // which is never used again, tells a lookup of `x b` that the `b` it meets is not its own.
    let mut pool = pool(3, BLOCK_SIZE);
    let mut first = sequence(&[1, 1]);
    hold(&mut pool, &mut first, 1).unwrap();
    let hashes_ab = hashes(&sequence(&[1, 1, 2, 2]), 1);
    let own = [
        pool.allocate(TenantSlot::FIRST, &Tenants::new()).unwrap(),
        pool.allocate(TenantSlot::FIRST, &Tenants::new()).unwrap(),
    ];
    let block = |at: usize, node, tokens| FullBlock {
        block: own[at],
        hash: hashes_ab[at],
        at,
        node,
        audience: private(0),
        before: None,
        hits: 0,
        tokens,
    };
    // A second request computed the same two blocks: its first stays private, its second becomes a child of the first's.
    let node = pool.publish(block(0, NodeId::ROOT, &[1, 1]));
    assert!(pool.published(own[0]).is_none());
    pool.publish(block(1, node, &[2, 2]));
    let a = first.table[0];
    pool.release(&mut first.table);
    assert_eq!(pool.allocate(TenantSlot::FIRST, &Tenants::new()), Some(a));
    let x = |b| FullBlock {
        block: a,
        hash: hashes(&sequence(&[b, b]), 1)[0],
        at: 0,
        node: NodeId::ROOT,
        audience: private(0),
        before: None,
        hits: 0,
        tokens: &[9, 9],
    };
    pool.publish(x(9));
    for other in 0..64 {
        let mut table = Vec::new();
        let mut stranger = hashes(&sequence(&[9, 9, 2, 2, 0]), 1);
        stranger[1] = BlockHash(other % 2);
        pool.lookup(private(0), &[9, 9, 2, 2, 0], &stranger, &mut table);
        assert_eq!(table, [a]);
    }
}

#[test]
fn a_block_table_is_released_once() {
    let mut pool = pool(2, BLOCK_SIZE);
    let block = pool.allocate(TenantSlot::FIRST, &Tenants::new()).unwrap();
    pool.release(&mut vec![block]);
    let again = std::panic::catch_unwind(move || pool.release(&mut vec![block]));
    let message = *again.unwrap_err().downcast::<String>().unwrap();
    assert!(message.starts_with("KV-2"), "{message}");
}
