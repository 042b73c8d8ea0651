//! A request as the core keeps it, and the two places in which requests are held: the store and the waiting queue.
//!
//! Owner: the engine. A request lives in one cell of the store from `Submit` to `Finish`; queues hold its index. The map
//! from ids is only asked, never walked, so its order decides nothing.

use crate::kv::NodeId;
use crate::kv::hash::{BlockHash, BlockHasher};
use crate::{BlockId, CacheSalt, CancelReason, CoreConfig, RequestId, TokenId, Usage, WorkerId};
use std::collections::{BTreeMap, HashMap};
use std::ops::{Index, IndexMut};

/// The order in which requests were submitted; the age of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrival(pub(crate) u64);

/// A cell of [`Requests`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestIndex(u32);

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In the waiting queue, without blocks.
    Waiting,
    /// In this worker's running list, with blocks for all its known tokens.
    Running(WorkerId),
}

/// `num_computed` chases `num_tokens`:
///
/// ```text
///   tokens  [prompt .............................][output ......]
///           |-- num_computed ------------->|-- to be computed --|
///   table   [block 0][block 1][block 2][block 3][block 4][block 5]
///           |-- num_published ----|
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    pub(crate) arrival: Arrival,
    pub(crate) phase: Phase,
    /// A planned slice has not been reported back: the device reads and writes the blocks.
    pub(crate) in_flight: bool,
    /// To be finished when the slice in flight is reported back.
    pub(crate) cancelled: Option<CancelReason>,
    /// Tokens whose K/V are in the blocks of `table`.
    pub(crate) num_computed: u32,
    /// Blocks of `table` that lookups know, or whose content they know under another block.
    pub(crate) num_published: u32,
    /// The place of the last of those in the prefix tree.
    pub(crate) node: NodeId,
    /// Prompt and output.
    pub(crate) tokens: Vec<TokenId>,
    /// Of the full blocks of `tokens`; empty when prefixes are not cached.
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) table: Vec<BlockId>,
    pub(crate) salt: CacheSalt,
    pub(crate) prompt_len: u32,
    pub(crate) max_new_tokens: u32,
    pub(crate) min_new_tokens: u32,
    /// Sorted.
    pub(crate) stop_tokens: Vec<TokenId>,
    /// Of the first scheduling.
    pub(crate) cached_tokens: Option<u32>,
    pub(crate) preemptions: u32,
}

impl Request {
    pub(crate) fn num_tokens(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Known tokens that are not computed; at least 1 of a request that is not in flight.
    pub(crate) fn remaining(&self) -> u32 {
        self.num_tokens() - self.num_computed
    }

    pub(crate) fn num_new(&self) -> u32 {
        self.num_tokens() - self.prompt_len
    }

    /// Most tokens whose K/V are ever stored: the last token made is never computed.
    pub(crate) fn computed_max(&self) -> u32 {
        self.prompt_len + self.max_new_tokens - 1
    }

    /// Hashes the blocks of `tokens` that became full.
    pub(crate) fn hash_blocks(&mut self, config: &CoreConfig) {
        if config.prefix_caching {
            let hasher = BlockHasher::new(self.salt, config.hash_bits);
            hasher.extend(&mut self.hashes, &self.tokens, config.block_size);
        }
    }

    /// Makes room for all that the request may grow to, so that decoding allocates nothing.
    pub(crate) fn reserve(&mut self, config: &CoreConfig) {
        let blocks_max = (self.prompt_len + self.max_new_tokens) / config.block_size;
        self.tokens.reserve_exact(self.max_new_tokens as usize);
        self.table.reserve(self.computed_max().div_ceil(config.block_size) as usize);
        if config.prefix_caching {
            self.hashes.reserve_exact(blocks_max as usize - self.hashes.len());
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            completion_tokens: self.num_new(),
            preemptions: self.preemptions,
        }
    }
}

/// The store: a slab, with the ids beside it. O(1).
#[derive(Clone, Debug, Default)]
pub(crate) struct Requests {
    cells: Vec<Option<Request>>,
    vacant: Vec<RequestIndex>,
    by_id: HashMap<RequestId, RequestIndex>,
}

impl Requests {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn find(&self, id: RequestId) -> Option<RequestIndex> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn insert(&mut self, request: Request) -> RequestIndex {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.cells.push(None);
            RequestIndex(u32::try_from(self.cells.len() - 1).expect("requests are bounded by the queue's limit"))
        });
        let twin = self.by_id.insert(request.id, index);
        assert!(twin.is_none(), "SCH-2: {:?} is submitted twice", request.id);
        self.cells[index.0 as usize] = Some(request);
        index
    }

    pub(crate) fn remove(&mut self, index: RequestIndex) -> Request {
        let request = self.cells[index.0 as usize].take().expect("OUT-2: a finished request is finished again");
        self.by_id.remove(&request.id);
        self.vacant.push(index);
        request
    }

    pub(crate) fn get(&self, index: RequestIndex) -> Option<&Request> {
        self.cells[index.0 as usize].as_ref()
    }

    /// In no particular but a fixed order; for checks.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (RequestIndex, &Request)> {
        self.cells.iter().enumerate().filter_map(|(at, cell)| Some((RequestIndex(at as u32), cell.as_ref()?)))
    }
}

impl Index<RequestIndex> for Requests {
    type Output = Request;
    fn index(&self, index: RequestIndex) -> &Request {
        self.cells[index.0 as usize].as_ref().expect("SCH-2: a queue holds a request that is gone")
    }
}

impl IndexMut<RequestIndex> for Requests {
    fn index_mut(&mut self, index: RequestIndex) -> &mut Request {
        self.cells[index.0 as usize].as_mut().expect("SCH-2: a queue holds a request that is gone")
    }
}

/// Requests without blocks, oldest first. A preempted request is older than all that were never admitted, so its age
/// alone puts it back at the front. O(log n), cancels included.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiting {
    queue: BTreeMap<Arrival, RequestIndex>,
}

impl Waiting {
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(crate) fn oldest(&self) -> Option<RequestIndex> {
        self.queue.first_key_value().map(|(_, index)| *index)
    }

    #[cfg(test)]
    pub(crate) fn youngest(&self) -> Option<RequestIndex> {
        self.queue.last_key_value().map(|(_, index)| *index)
    }

    pub(crate) fn insert(&mut self, arrival: Arrival, index: RequestIndex) {
        self.queue.insert(arrival, index);
    }

    pub(crate) fn remove(&mut self, arrival: Arrival) {
        let index = self.queue.remove(&arrival);
        assert!(index.is_some(), "SCH-2: a waiting request is not in the queue");
    }

    /// Oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Arrival, RequestIndex)> + '_ {
        self.queue.iter().map(|(arrival, index)| (*arrival, *index))
    }
}
