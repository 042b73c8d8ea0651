//! The prefix index: from a block's hash to the blocks published under it.
//!
//! Open addressing with linear probing; a cell is a block's number, and the hash that it stands under lives with the
//! block. Deletion shifts the followers back, so there are no tombstones and the load never exceeds a quarter. Equal hashes
//! stand side by side: whoever looks one up says which candidate it means, so a collision costs a probe and nothing
//! else. Complexity: O(1) expected; nothing allocates after construction.

use super::hash::BlockHash;
use crate::BlockId;

const EMPTY: u32 = u32::MAX;

/// Owned by one pool. The hash of a block is passed in by a closure, because the pool keeps it.
#[derive(Clone, Debug)]
pub(crate) struct PrefixIndex {
    cells: Vec<u32>,
    len: u32,
}

impl PrefixIndex {
    /// An index with room for `num_blocks` blocks.
    pub(crate) fn new(num_blocks: u32) -> Self {
        let cells = (num_blocks as usize * 4).next_power_of_two();
        PrefixIndex { cells: vec![EMPTY; cells], len: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// The cell in which a hash would stand if it were alone.
    fn home(&self, hash: BlockHash) -> usize {
        hash.0 as usize & (self.cells.len() - 1)
    }

    fn after(&self, cell: usize) -> usize {
        (cell + 1) & (self.cells.len() - 1)
    }

    /// What stands in the home of a hash.
    pub(crate) fn touch(&self, hash: BlockHash) -> u32 {
        self.cells[self.home(hash)]
    }

    /// The first block near `hash` that `is_it` accepts.
    #[inline(always)]
    pub(crate) fn find(&self, hash: BlockHash, mut is_it: impl FnMut(BlockId) -> bool) -> Option<BlockId> {
        let mut cell = self.home(hash);
        while self.cells[cell] != EMPTY {
            let block = BlockId(self.cells[cell]);
            if is_it(block) {
                return Some(block);
            }
            cell = self.after(cell);
        }
        None
    }

    pub(crate) fn insert(&mut self, hash: BlockHash, block: BlockId) {
        assert!((self.len as usize) * 4 < self.cells.len(), "KV-4: more published blocks than blocks");
        let mut cell = self.home(hash);
        while self.cells[cell] != EMPTY {
            cell = self.after(cell);
        }
        self.cells[cell] = block.0;
        self.len += 1;
    }

    /// Takes `block` out; it must be in.
    pub(crate) fn remove(&mut self, hash: BlockHash, block: BlockId, hash_of: impl Fn(BlockId) -> BlockHash) {
        let mut hole = self.home(hash);
        while self.cells[hole] != block.0 {
            assert!(self.cells[hole] != EMPTY, "KV-4: published {block:?} is not in the prefix index");
            hole = self.after(hole);
        }
        // A follower may move into the hole unless its home lies behind the hole, on the way to it.
        let mut cell = self.after(hole);
        while self.cells[cell] != EMPTY {
            let home = self.home(hash_of(BlockId(self.cells[cell])));
            let mask = self.cells.len() - 1;
            if cell.wrapping_sub(home) & mask >= cell.wrapping_sub(hole) & mask {
                self.cells[hole] = self.cells[cell];
                hole = cell;
            }
            cell = self.after(cell);
        }
        self.cells[hole] = EMPTY;
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// After any inserts and removals, exactly the blocks that are in are found, however the hashes crowd.
        #[test]
        fn finds_what_is_in(
            hashes in prop::collection::vec(0u128..40, 1..30),
            ops in prop::collection::vec(0usize..30, 0..150),
        ) {
            let mut index = PrefixIndex::new(hashes.len() as u32);
            let mut is_in = vec![false; hashes.len()];
            for at in ops {
                let at = at % hashes.len();
                let block = BlockId(at as u32);
                if is_in[at] {
                    index.remove(BlockHash(hashes[at]), block, |b| BlockHash(hashes[b.0 as usize]));
                } else {
                    index.insert(BlockHash(hashes[at]), block);
                }
                is_in[at] ^= true;
                for (other, known) in is_in.iter().enumerate() {
                    let found = index.find(BlockHash(hashes[other]), |b| b.0 as usize == other);
                    prop_assert_eq!(found.is_some(), *known);
                }
                prop_assert_eq!(index.len() as usize, is_in.iter().filter(|x| **x).count());
            }
        }
    }
}
