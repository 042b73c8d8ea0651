//! The free blocks of a pool: those with nothing to find in them, and for each tenant those that a lookup still finds, in
//! the order in which they will be reused.
//!
//! ```text
//!   blank                reused before all others
//!   tenant 0   level 0   [released long ago] ... [released just now]     of a sequence that was never found again
//!              level 1   [released long ago] ... [released just now]     of one that was
//!   tenant 1   level 0   ...
//! ```
//!
//! A sequence that was found again is likely to be found once more, so its blocks count as released later than they were: by
//! half of the pool's turnover ([`BONUS`]). That keeps the conversations that go on over those that asked once, which the
//! least-recently-used order cannot tell apart, and is the idea of 2Q (Johnson and Shasha, 1994) and of the frequency term of
//! GDSF (Cherkasova, 1998), here in whole numbers and with each step O(levels). What it is worth is in `reuse_tests.rs`.
//!
//! Doubly linked lists threaded through one array, so that a block anywhere can be taken out again when a prefix hit
//! revives it. Nothing allocates after construction but [`FreeLists::make_tenants`].

use crate::BlockId;
use crate::tenants::TenantSlot;

/// No neighbour.
const END: u32 = u32::MAX;
/// Not on a list.
const OFF: u32 = u32::MAX - 1;
/// In place of a tenant: on the blank list.
const BLANK: u32 = u32::MAX;

/// How often a sequence was found again, up to this many times less one, is told apart.
const LEVELS: usize = 2;
/// By how many eighths of the pool's turnover a block of each level counts as released later than it was.
const BONUS: [u64; LEVELS] = [0, 4];

#[derive(Clone, Copy, Debug)]
struct Cell {
    prev: u32,
    next: u32,
    tenant: u32,
    level: u8,
    /// Blocks handed out by the pool before this one was released.
    stamp: u64,
}

#[derive(Clone, Copy, Debug)]
struct List {
    front: u32,
    back: u32,
}

const EMPTY: List = List { front: END, back: END };

/// Of one tenant.
#[derive(Clone, Debug)]
struct Cached {
    levels: [List; LEVELS],
    len: u32,
}

/// Owned by one pool.
#[derive(Clone, Debug)]
pub(crate) struct FreeLists {
    cells: Vec<Cell>,
    blank: List,
    cached: Vec<Cached>,
    len: u32,
    /// Of each level, in blocks handed out.
    bonus: [u64; LEVELS],
}

impl FreeLists {
    /// All of `num_blocks` blocks, blank and in order.
    pub(crate) fn full(num_blocks: u32) -> Self {
        let cell = Cell { prev: OFF, next: OFF, tenant: BLANK, level: 0, stamp: 0 };
        let cells = vec![cell; num_blocks as usize];
        let bonus = BONUS.map(|eighths| u64::from(num_blocks) * eighths / 8);
        let mut lists = FreeLists { cells, blank: EMPTY, cached: Vec::new(), len: 0, bonus };
        for block in (0..num_blocks).rev() {
            lists.push_blank(BlockId(block));
        }
        lists
    }

    /// The least recently used goes first, to compare with.
    #[cfg(test)]
    pub(crate) fn lru(self) -> Self {
        FreeLists { bonus: [0; LEVELS], ..self }
    }

    /// Makes room for the lists of `num_tenants` tenants.
    pub(crate) fn make_tenants(&mut self, num_tenants: usize) {
        self.cached.resize(num_tenants, Cached { levels: [EMPTY; LEVELS], len: 0 });
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn num_cached(&self, tenant: TenantSlot) -> u32 {
        self.cached[tenant.0 as usize].len
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.cells[block.0 as usize].prev != OFF
    }

    /// Takes a block with nothing to find in it; it is reused next.
    pub(crate) fn push_blank(&mut self, block: BlockId) {
        self.assert_off(block);
        let next = self.blank.front;
        self.cells[block.0 as usize] = Cell { prev: END, next, tenant: BLANK, level: 0, stamp: 0 };
        match next {
            END => self.blank.back = block.0,
            next => self.cells[next as usize].prev = block.0,
        }
        self.blank.front = block.0;
        self.len += 1;
    }

    /// Takes a block that lookups find; of its tenant and level it is reused last. `hits` is how often it was found again.
    pub(crate) fn push_cached(&mut self, block: BlockId, tenant: TenantSlot, hits: u8, stamp: u64) {
        self.assert_off(block);
        let level = hits.min(LEVELS as u8 - 1);
        let list = self.cached[tenant.0 as usize].levels[usize::from(level)];
        self.cells[block.0 as usize] = Cell { prev: list.back, next: END, tenant: tenant.0, level, stamp };
        match list.back {
            END => self.cached[tenant.0 as usize].levels[usize::from(level)].front = block.0,
            back => self.cells[back as usize].next = block.0,
        }
        self.cached[tenant.0 as usize].levels[usize::from(level)].back = block.0;
        self.cached[tenant.0 as usize].len += 1;
        self.len += 1;
    }

    pub(crate) fn pop_blank(&mut self) -> Option<BlockId> {
        let block = Some(self.blank.front).filter(|front| *front != END).map(BlockId)?;
        self.remove(block);
        Some(block)
    }

    /// The tenant's block that is to be reused next, and when it counts as released.
    pub(crate) fn oldest(&self, tenant: TenantSlot) -> Option<(u64, BlockId)> {
        let mut oldest: Option<(u64, BlockId)> = None;
        for (level, list) in self.cached[tenant.0 as usize].levels.iter().enumerate() {
            if list.front == END {
                continue;
            }
            let age = self.cells[list.front as usize].stamp + self.bonus[level];
            // On a tie the lower level goes first: of one prefix it is the end.
            if oldest.is_none_or(|(least, _)| age < least) {
                oldest = Some((age, BlockId(list.front)));
            }
        }
        oldest
    }

    pub(crate) fn remove(&mut self, block: BlockId) {
        let Cell { prev, next, tenant, level, .. } = self.cells[block.0 as usize];
        assert!(prev != OFF, "KV-3: {block:?} is taken but is not on a free list");
        let list = match tenant {
            BLANK => &mut self.blank,
            tenant => {
                let cached = &mut self.cached[tenant as usize];
                cached.len -= 1;
                &mut cached.levels[usize::from(level)]
            }
        };
        match prev {
            END => list.front = next,
            prev => self.cells[prev as usize].next = next,
        }
        match next {
            END => list.back = prev,
            next => self.cells[next as usize].prev = prev,
        }
        self.cells[block.0 as usize].prev = OFF;
        self.len -= 1;
    }

    /// Blank blocks, then each tenant's, each list from its front; for checks.
    pub(crate) fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        let lists = self.cached.iter().flat_map(|cached| cached.levels.iter());
        std::iter::once(&self.blank).chain(lists).flat_map(|list| {
            let first = (list.front != END).then_some(list.front);
            // `take` ends the walk even when a broken list runs in a circle.
            std::iter::successors(first, |at| Some(self.cells[*at as usize].next).filter(|next| *next != END))
                .take(self.cells.len() + 1)
                .map(BlockId)
        })
    }

    fn assert_off(&self, block: BlockId) {
        assert!(!self.contains(block), "KV-3: {block:?} is freed but is on a free list already");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Free blocks as a list of (tenant, level, age), in the order of their release; blanks have no tenant.
    type Model = Vec<(BlockId, Option<(u32, u64)>)>;

    fn oldest(model: &Model, tenant: u32) -> Option<BlockId> {
        let own = model.iter().filter_map(|(block, place)| place.filter(|p| p.0 == tenant).map(|p| (p.1, *block)));
        own.min_by_key(|(age, _)| *age).map(|(_, block)| block)
    }

    proptest! {
        /// The lists behave as one list that is searched for the block that counts as released first.
        #[test]
        fn gives_the_oldest(num_blocks in 1u32..20, ops in prop::collection::vec((0u8..4, 0u32..20, 0u32..2, 0u8..6), 0..200)) {
            let mut lists = FreeLists::full(num_blocks);
            lists.make_tenants(2);
            let mut model: Model = (0..num_blocks).map(|block| (BlockId(block), None)).collect();
            for (stamp, (op, at, tenant, hits)) in (0..).zip(ops) {
                let block = BlockId(at % num_blocks);
                let on = model.iter().any(|(other, _)| *other == block);
                match op {
                    0 if !on => { lists.push_blank(block); model.push((block, None)) }
                    1 if !on => {
                        // Ages that never tie: which of a tie goes first is the levels' own rule.
                        let stamp = stamp * 1_000;
                        let level = usize::from(hits).min(LEVELS - 1);
                        lists.push_cached(block, TenantSlot(tenant), hits, stamp + level as u64);
                        let age = stamp + level as u64 + lists.bonus[level];
                        model.push((block, Some((tenant, age))));
                    }
                    2 if on => { lists.remove(block); model.retain(|(other, _)| *other != block) }
                    3 => {
                        let blank = lists.pop_blank();
                        prop_assert_eq!(blank.is_some(), model.iter().any(|(_, place)| place.is_none()));
                        model.retain(|(other, _)| Some(*other) != blank);
                    }
                    _ => {}
                }
                for tenant in 0..2 {
                    prop_assert_eq!(lists.oldest(TenantSlot(tenant)).map(|(_, block)| block), oldest(&model, tenant));
                    let count = model.iter().filter(|(_, place)| place.is_some_and(|place| place.0 == tenant)).count();
                    prop_assert_eq!(lists.num_cached(TenantSlot(tenant)) as usize, count);
                }
                prop_assert_eq!(lists.len() as usize, model.len());
                prop_assert_eq!(lists.iter().count(), model.len());
                prop_assert!((0..num_blocks).all(|b| lists.contains(BlockId(b)) == model.iter().any(|(other, _)| other.0 == b)));
            }
        }
    }
}
