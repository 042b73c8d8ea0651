//! The free list: which blocks no request holds, in the order in which they will be reused.
//!
//! ```text
//!   front: reused next                                  back: reused last
//!   [never held, or nothing to find in it] ... [oldest freed prefix] ... [newest]
//! ```
//!
//! A doubly linked list threaded through one array, so that a block anywhere in it can be taken out again when a prefix
//! hit revives it. Every operation is O(1); nothing allocates after construction.

use crate::BlockId;

/// No neighbour.
const END: u32 = u32::MAX;
/// Not on the list.
const OFF: u32 = u32::MAX - 1;

#[derive(Clone, Copy, Debug)]
struct Link {
    prev: u32,
    next: u32,
}

/// Owned by one pool.
#[derive(Clone, Debug)]
pub(crate) struct FreeList {
    links: Vec<Link>,
    front: u32,
    back: u32,
    len: u32,
}

impl FreeList {
    /// All of `num_blocks` blocks, in order.
    pub(crate) fn full(num_blocks: u32) -> Self {
        let link = Link { prev: OFF, next: OFF };
        let mut list = FreeList { links: vec![link; num_blocks as usize], front: END, back: END, len: 0 };
        for block in 0..num_blocks {
            list.push_back(BlockId(block));
        }
        list
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.links[block.0 as usize].prev != OFF
    }

    pub(crate) fn push_back(&mut self, block: BlockId) {
        assert!(!self.contains(block), "KV-3: {block:?} is freed but is on the free list already");
        self.links[block.0 as usize] = Link { prev: self.back, next: END };
        match self.back {
            END => self.front = block.0,
            back => self.links[back as usize].next = block.0,
        }
        self.back = block.0;
        self.len += 1;
    }

    pub(crate) fn push_front(&mut self, block: BlockId) {
        assert!(!self.contains(block), "KV-3: {block:?} is freed but is on the free list already");
        self.links[block.0 as usize] = Link { prev: END, next: self.front };
        match self.front {
            END => self.back = block.0,
            front => self.links[front as usize].prev = block.0,
        }
        self.front = block.0;
        self.len += 1;
    }

    pub(crate) fn pop_front(&mut self) -> Option<BlockId> {
        if self.front == END {
            return None;
        }
        let block = BlockId(self.front);
        self.remove(block);
        Some(block)
    }

    pub(crate) fn remove(&mut self, block: BlockId) {
        let Link { prev, next } = self.links[block.0 as usize];
        assert!(prev != OFF, "KV-3: {block:?} is taken but is not on the free list");
        match prev {
            END => self.front = next,
            prev => self.links[prev as usize].next = next,
        }
        match next {
            END => self.back = prev,
            next => self.links[next as usize].prev = prev,
        }
        self.links[block.0 as usize] = Link { prev: OFF, next: OFF };
        self.len -= 1;
    }

    /// Front to back; for checks.
    pub(crate) fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        let first = (self.front != END).then_some(self.front);
        // `take` ends the walk even when a broken list runs in a circle.
        std::iter::successors(first, |at| Some(self.links[*at as usize].next).filter(|next| *next != END))
            .take(self.links.len() + 1)
            .map(BlockId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        /// The list behaves as a deque that can lose any element.
        #[test]
        fn is_a_deque_with_removal(num_blocks in 1u32..20, ops in prop::collection::vec((0u8..4, 0u32..20), 0..200)) {
            let mut list = FreeList::full(num_blocks);
            let mut model: VecDeque<BlockId> = (0..num_blocks).map(BlockId).collect();
            for (op, at) in ops {
                let block = BlockId(at % num_blocks);
                let on = model.contains(&block);
                match op {
                    0 => prop_assert_eq!(list.pop_front(), model.pop_front()),
                    1 if !on => { list.push_back(block); model.push_back(block) }
                    2 if !on => { list.push_front(block); model.push_front(block) }
                    3 if on => { list.remove(block); model.retain(|other| *other != block) }
                    _ => {}
                }
                prop_assert_eq!(list.iter().collect::<VecDeque<_>>(), model.clone());
                prop_assert_eq!(list.len() as usize, model.len());
                prop_assert!((0..num_blocks).all(|b| list.contains(BlockId(b)) == model.contains(&BlockId(b))));
            }
        }
    }
}
