//! A request as the core keeps it, and the store that holds it.
//!
//! Owner: the engine. A request lives in one cell of the store from `Submit` to `Finish`; queues hold its index. The map
//! from ids is only asked, never walked, so its order decides nothing.

use crate::kv::hash::{BlockHash, extend_hashes};
use crate::kv::{Audience, NodeId};
use crate::tenants::TenantSlot;
use crate::{
    BlockId, ClassId, CoreConfig, FinishReason, Micros, PoolId, RequestId, TokenId, TransferId, Usage, WorkerId,
};
use std::collections::HashMap;
use std::ops::{Index, IndexMut};

/// The order in which requests were submitted; the age of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrival(pub(crate) u64);

/// A cell of [`Requests`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RequestIndex(u32);

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In the waiting queue, without blocks.
    Waiting,
    /// In this worker's running list, with blocks for all its known tokens.
    Running(WorkerId),
    /// Computed by this prefill worker, with its blocks, for a decode worker to take over.
    Ready(WorkerId),
    /// Its blocks are copied from one pool to another; it holds some in both.
    Moving { from: WorkerId, to: WorkerId, transfer: TransferId },
}

/// `num_computed` chases `num_tokens`:
///
/// ```text
///   tokens  [prompt .............................][output ......]
///           |-- num_computed ------------->|-- to be computed --|
///   table   [block 0][block 1][block 2][block 3][block 4][block 5]
///           |-- num_published ----|
/// ```
///
/// What every step of a decode reads and writes comes first, in two cache lines.
#[derive(Clone, Debug)]
#[repr(C, align(128))]
pub(crate) struct Request {
    pub(crate) id: RequestId,
    /// Prompt and output.
    pub(crate) tokens: Vec<TokenId>,
    /// Tokens whose K/V are in the blocks of `table`.
    pub(crate) num_computed: u32,
    /// Blocks of `table` that the worker on which it runs was told.
    pub(crate) num_told: u32,
    /// The last of `tokens`: to read it there costs a cache miss.
    pub(crate) last_token: TokenId,
    pub(crate) class: ClassId,
    /// A planned slice has not been reported back: the device reads and writes the blocks.
    pub(crate) in_flight: bool,
    /// Loses its blocks when the slice in flight is reported back.
    pub(crate) yields: bool,
    /// In one of its worker's groups of suspects.
    pub(crate) is_suspect: bool,
    pub(crate) tenant: TenantSlot,
    pub(crate) prompt_len: u32,
    /// A bit for each stop token.
    pub(crate) stop_mask: u64,
    pub(crate) max_new_tokens: u32,
    pub(crate) min_new_tokens: u32,
    /// Blocks of `table` that lookups know, or whose content they know under another block.
    pub(crate) num_published: u32,
    /// A transfer of it failed: it is computed where it decodes.
    pub(crate) stays: bool,
    /// In the step ahead, too, of the one in flight.
    pub(crate) is_ahead: bool,
    /// It has ended and its id is free, but a step that was planned ahead is at its blocks.
    pub(crate) is_over: bool,
    /// Its last token must be known before the next is sampled.
    pub(crate) needs_tokens: bool,
    /// Of the full blocks of `tokens`; empty when prefixes are not cached.
    pub(crate) hashes: Vec<BlockHash>,
    /// To be finished when the slice in flight, or the transfer, is reported back.
    pub(crate) ending: Option<FinishReason>,
    pub(crate) table: Vec<BlockId>,
    pub(crate) phase: Phase,
    pub(crate) arrival: Arrival,
    /// The place of the last published block in the prefix tree.
    pub(crate) node: NodeId,
    /// Times that its sequence was found again when it started.
    pub(crate) found: u8,
    pub(crate) audience: Audience,
    pub(crate) deadline: Option<Micros>,
    /// Its place in the waiting queue: the blocks of its prefix that were cached when it came there.
    pub(crate) cached_blocks: u32,
    /// The blocks that it lacked when a pool could last not take it.
    pub(crate) lacking: Option<(PoolId, u32)>,
    /// Blocks of the pool that it moves to, while it moves: those that were cached there, then those that are filled.
    pub(crate) arriving: Arriving,
    /// Sorted.
    pub(crate) stop_tokens: Vec<TokenId>,
    /// Of the first scheduling.
    pub(crate) cached_tokens: Option<u32>,
    /// The most tokens that were ever computed before a preemption.
    pub(crate) num_reached: u32,
    pub(crate) preemptions: u32,
}

/// The bit of a stop token in [`Request::stop_mask`].
pub(crate) fn stop_bit(token: TokenId) -> u64 {
    1 << (token % 64)
}

/// The other side of a transfer.
#[derive(Clone, Debug)]
pub(crate) struct Arriving {
    pub(crate) table: Vec<BlockId>,
    /// Blocks of `table` that were cached there, and the last one's node.
    pub(crate) num_published: u32,
    pub(crate) node: NodeId,
}

impl Arriving {
    pub(crate) const NONE: Arriving = Arriving { table: Vec::new(), num_published: 0, node: NodeId::ROOT };
}

impl Request {
    pub(crate) fn num_tokens(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Known tokens that are not computed; at least 1 of a request that is not in flight.
    pub(crate) fn remaining(&self) -> u32 {
        self.num_tokens() - self.num_computed
    }

    /// Blocks that the table lacks for all known tokens. Without a division where none lacks, as nearly always.
    pub(crate) fn blocks_missing(&self, block_size: u32) -> u32 {
        let num_blocks = self.table.len() as u32;
        let covered = u64::from(num_blocks) * u64::from(block_size);
        if covered >= u64::from(self.num_tokens()) { 0 } else { self.num_tokens().div_ceil(block_size) - num_blocks }
    }

    /// Whether a token is a stop token. Most tokens are told apart without a look at the list.
    pub(crate) fn stops_at(&self, token: TokenId) -> bool {
        self.stop_mask & stop_bit(token) != 0 && self.stop_tokens.binary_search(&token).is_ok()
    }

    pub(crate) fn num_new(&self) -> u32 {
        self.num_tokens() - self.prompt_len
    }

    /// Whether the blocks that its worker was told cover all known tokens.
    pub(crate) fn is_told(&self, block_size: u32) -> bool {
        u64::from(self.num_told) * u64::from(block_size) >= u64::from(self.num_tokens())
    }

    /// Takes a token that was made.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        self.last_token = token;
    }

    /// Prompt tokens that its tenant was charged for when it first started.
    pub(crate) fn num_charged(&self) -> u32 {
        self.cached_tokens.map_or(0, |cached| self.prompt_len - cached)
    }

    /// Those of them that were never computed: nothing is owed for them.
    pub(crate) fn num_uncharged(&self) -> u32 {
        let reached = self.num_reached.max(self.num_computed);
        self.cached_tokens.map_or(0, |cached| self.prompt_len - reached.clamp(cached, self.prompt_len))
    }

    /// Most tokens whose K/V are ever stored: the last token made is never computed.
    pub(crate) fn computed_max(&self) -> u32 {
        self.prompt_len + self.max_new_tokens - 1
    }

    /// Hashes the blocks of `tokens` that became full.
    pub(crate) fn hash_blocks(&mut self, config: &CoreConfig) {
        if config.prefix_caching {
            let shape = (config.block_size, config.hash_bits);
            extend_hashes(&mut self.hashes, self.audience, &self.tokens, shape);
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
            uncomputed_tokens: if self.cached_tokens.is_some() { self.num_uncharged() } else { self.prompt_len },
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
    /// Those that are over, but in flight, among them.
    pub(crate) fn len(&self) -> usize {
        self.cells.len() - self.vacant.len()
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

    pub(crate) fn remove(&mut self, index: RequestIndex) {
        let request = self.cells[index.0 as usize].take().expect("OUT-2: a finished request is finished again");
        if !request.is_over {
            self.by_id.remove(&request.id);
        }
        self.vacant.push(index);
    }

    /// A request has ended, and its cell is still needed.
    pub(crate) fn retire(&mut self, index: RequestIndex) {
        let request = self.cells[index.0 as usize].as_mut().expect("OUT-2: a finished request is finished again");
        assert!(!request.is_over, "OUT-2: {:?} is finished again", request.id);
        request.is_over = true;
        request.deadline = None;
        self.by_id.remove(&request.id);
    }

    /// Ids in use.
    pub(crate) fn num_ids(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn get(&self, index: RequestIndex) -> Option<&Request> {
        self.cells[index.0 as usize].as_ref()
    }

    pub(crate) fn get_mut(&mut self, index: RequestIndex) -> Option<&mut Request> {
        self.cells[index.0 as usize].as_mut()
    }

    /// In no particular but a fixed order.
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
