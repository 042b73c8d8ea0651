//! The bookkeeping of one worker's KV pool: which blocks are free, live and published. Numbers only, no tensors.
//!
//! Layout. Block `b` of the device pool holds the K/V of `block_size` consecutive tokens of one sequence; slot =
//! `b * block_size + offset`. For every published block the pool knows what it holds:
//!
//! ```text
//!              block 0           block 1           block 2
//!   contents  [t t t t ... t]   [t t t t ... t]   [               ]   block_size tokens each, one flat array
//!   cards     {hash parent node}{hash parent node}{- - unpublished}   32 bytes each
//!   salts     [salt]            [salt]            [salt]              read for the first block below a gate only
//!   refs      [2]               [0]               [1]                 block tables that hold it
//!   owners    [tenant]          [tenant]          [tenant]            whoever took it last
//!   free      ................. [1] ..............................    in the order of reuse, see `free_lists`
//! ```
//!
//! A published block is a node of a tree: its parent is the node of the block before it, by a number that is never used
//! again, or the root. A lookup walks down from the root and takes a candidate only when its parent's number and
//! all its tokens are equal. By induction a hit's whole prefix and salt are equal, whatever the hashes say (KV-5), even
//! after a parent was evicted and its block number reused.
//!
//! The first blocks of a sequence may be public, the others belong to its salt. Where the private part begins, at the root or
//! below a public block, a block's parent is the gate of that node ([`NodeId::gate`]), and there, and only there, salts are
//! compared: below a gate everything is of the gate's salt, and what is not below one is public, whatever the salts are.
//!
//! ```text
//!   root --> [public] --> [public] --> [public, of a longer public prefix]
//!    |                        +-gate-> [salt 7] --> [salt 7]
//!    |                        +-gate-> [salt 9]
//!    +-gate-> [salt 7] --> [salt 7]
//! ```
//!
//! Life of a block: `allocate` (what it held is forgotten) -> `publish` once full -> shared by `acquire` -> `release` by each
//! holder -> free, still found by `lookup`, until `allocate` reuses it. A table is released tail first, so that of one prefix
//! the end is reused before the start; blocks with nothing to find are reused first, then those of the tenant that is
//! furthest above its share.
//!
//! Owner: the engine. Every operation is O(1) per block; choosing whose cached blocks to take is O(tenants), once for up to
//! [`PLUNDER_MAX`] blocks. Nothing allocates after construction but [`KvPool::make_tenants`].

mod free_lists;
pub(crate) mod hash;
mod index;

use crate::fault::planted;
use crate::tenants::{TenantSlot, Tenants};
use crate::{BlockId, CacheSalt, TokenId};
use free_lists::FreeLists;
use hash::BlockHash;
use index::PrefixIndex;

/// A place in the prefix tree, never used for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NodeId(u64);

impl NodeId {
    /// Above the first block of every sequence.
    pub(crate) const ROOT: NodeId = NodeId(0);
    /// Of a block that is not published.
    const NONE: NodeId = NodeId(u64::MAX);
    /// Nodes are numbered below it.
    const GATE: u64 = 1 << 63;

    /// The parent of what is private right below this node.
    fn gate(self) -> NodeId {
        NodeId(self.0 | NodeId::GATE)
    }

    fn is_gate(self) -> bool {
        self.0 & NodeId::GATE != 0
    }

    /// The node that this is, or is the gate of.
    fn inside(self) -> NodeId {
        NodeId(self.0 & !NodeId::GATE)
    }
}

/// Who shares a sequence's blocks: everybody the first `num_public`, requests of the same salt the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Audience {
    pub(crate) salt: CacheSalt,
    pub(crate) num_public: u32,
}

impl Audience {
    /// Of block number `at`: nobody's salt, or the sequence's.
    pub(crate) fn salt_of(&self, at: usize) -> Option<CacheSalt> {
        (at >= self.num_public as usize).then_some(self.salt)
    }

    /// What block number `at` has for a parent when the block before it is `node`.
    fn parent(&self, at: usize, node: NodeId) -> NodeId {
        if at == self.num_public as usize { node.gate() } else { node }
    }
}

/// Most cached blocks that are taken from one tenant before the choice is made anew.
const PLUNDER_MAX: u32 = 32;

/// In place of a block before the first.
const NO_BLOCK: u32 = u32::MAX;

/// What a lookup compares before it reads the tokens.
#[derive(Clone, Copy, Debug)]
struct Card {
    hash: BlockHash,
    parent: NodeId,
    node: NodeId,
}

const UNPUBLISHED: Card = Card { hash: BlockHash(0), parent: NodeId::NONE, node: NodeId::NONE };

/// A full block that is about to be published.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FullBlock<'a> {
    pub(crate) block: BlockId,
    pub(crate) hash: BlockHash,
    /// Its number in its table, the node of what is before it, and who shares its sequence.
    pub(crate) at: usize,
    pub(crate) node: NodeId,
    pub(crate) audience: Audience,
    /// The block before it in its table, and what its sequence has been found to be good for: [`KvPool::found`].
    pub(crate) before: Option<BlockId>,
    pub(crate) hits: u8,
    /// `block_size` of them.
    pub(crate) tokens: &'a [TokenId],
}

/// One pool. See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct KvPool {
    block_size: u32,
    cards: Vec<Card>,
    contents: Vec<TokenId>,
    salts: Vec<CacheSalt>,
    refs: Vec<u32>,
    owners: Vec<TenantSlot>,
    /// How often each published block, or the sequence that it was published with, was found again.
    hits: Vec<u8>,
    /// The block that each published block continues, if that is still the same, and how many continue each.
    parents: Vec<u32>,
    children: Vec<u32>,
    free: FreeLists,
    index: PrefixIndex,
    next_node: u64,
    live: u32,
    /// Of `live`, by owner.
    live_of: Vec<u32>,
    /// Requests with a block table here, by tenant.
    tables_of: Vec<u32>,
    /// Blocks handed out since construction: the clock of the free lists.
    handed_out: u64,
    /// Whose cached blocks are taken at present, and how many more before it is asked again.
    plunder: (TenantSlot, u32),
    collisions: u64,
    #[cfg(test)]
    pub(crate) fault: Option<crate::fault::Fault>,
}

impl KvPool {
    /// A pool of `num_blocks` free blocks.
    pub(crate) fn new(num_blocks: u32, block_size: u32) -> Self {
        let blocks = num_blocks as usize;
        KvPool {
            block_size,
            cards: vec![UNPUBLISHED; blocks],
            contents: vec![0; blocks * block_size as usize],
            salts: vec![CacheSalt(0); blocks],
            refs: vec![0; blocks],
            owners: vec![TenantSlot::FIRST; blocks],
            hits: vec![0; blocks],
            parents: vec![NO_BLOCK; blocks],
            children: vec![0; blocks],
            free: FreeLists::full(num_blocks),
            index: PrefixIndex::new(num_blocks),
            next_node: 1,
            live: 0,
            live_of: Vec::new(),
            tables_of: Vec::new(),
            handed_out: 0,
            plunder: (TenantSlot::FIRST, 0),
            collisions: 0,
            #[cfg(test)]
            fault: None,
        }
    }

    /// Makes room for the counts of `num_tenants` tenants.
    pub(crate) fn make_tenants(&mut self, num_tenants: usize) {
        self.live_of.resize(num_tenants, 0);
        self.tables_of.resize(num_tenants, 0);
        self.free.make_tenants(num_tenants);
    }

    pub(crate) fn num_blocks(&self) -> u32 {
        self.refs.len() as u32
    }

    pub(crate) fn num_free(&self) -> u32 {
        self.free.len()
    }

    /// Blocks that a table holds.
    pub(crate) fn num_live(&self) -> u32 {
        self.live
    }

    /// Blocks of this tenant that a table holds.
    pub(crate) fn num_live_of(&self, tenant: TenantSlot) -> u32 {
        self.live_of[tenant.0 as usize]
    }

    /// Requests of this tenant that have a block table here.
    pub(crate) fn num_tables_of(&self, tenant: TenantSlot) -> u32 {
        self.tables_of[tenant.0 as usize]
    }

    /// A request of this tenant has a block table here from now on.
    pub(crate) fn open_table(&mut self, tenant: TenantSlot) {
        self.tables_of[tenant.0 as usize] += 1;
    }

    /// It has it no more.
    pub(crate) fn close_table(&mut self, tenant: TenantSlot) {
        self.tables_of[tenant.0 as usize] -= 1;
    }

    /// Free blocks of this tenant that lookups find.
    pub(crate) fn num_cached_of(&self, tenant: TenantSlot) -> u32 {
        self.free.num_cached(tenant)
    }

    /// How many of `blocks` are free, and would not be after [`KvPool::acquire`].
    pub(crate) fn count_free(&self, blocks: &[BlockId]) -> u32 {
        blocks.iter().filter(|block| self.refs[block.0 as usize] == 0).count() as u32
    }

    /// Fills `table` with the longest run of published blocks that hold the start of `tokens`, and gives the last one's
    /// node. `hashes` are those of the full blocks of `tokens`. Of N tokens at most N - 1 are covered: the last one must
    /// be computed, because its logits are wanted. Takes no reference.
    pub(crate) fn lookup(
        &mut self,
        audience: Audience,
        tokens: &[TokenId],
        hashes: &[BlockHash],
        table: &mut Vec<BlockId>,
    ) -> NodeId {
        let known = if planted!(self, HitWholePrompt) { tokens.len() } else { tokens.len().saturating_sub(1) };
        let size = self.block_size as usize;
        let (mut node, mut collisions) = (NodeId::ROOT, 0);
        for (at, (block, hash)) in tokens[..known].chunks_exact(size).zip(hashes).enumerate() {
            let parent = audience.parent(at, node);
            let Some(hit) = self.find(*hash, parent, audience.salt, block, &mut collisions) else { break };
            table.push(hit);
            node = self.cards[hit.0 as usize].node;
        }
        self.collisions += collisions;
        node
    }

    /// The published block with this parent and these tokens.
    #[inline(always)]
    fn find(
        &self,
        hash: BlockHash,
        parent: NodeId,
        salt: CacheSalt,
        tokens: &[TokenId],
        collisions: &mut u64,
    ) -> Option<BlockId> {
        self.index.find(hash, |candidate| {
            let card = &self.cards[candidate.0 as usize];
            if card.hash != hash {
                return false;
            }
            let is_child = card.parent == parent || planted!(self, SkipParentCheck);
            let is_salted = !parent.is_gate()
                || self.salts[candidate.0 as usize] == salt
                || planted!(self, IgnoreSalt)
                || (parent != NodeId::ROOT.gate() && planted!(self, IgnoreInnerSalt));
            let equal = is_child
                && is_salted
                && (equal_tokens(self.contents(candidate), tokens) || planted!(self, SkipTokenCheck));
            *collisions += u64::from(!equal);
            equal
        })
    }

    /// The tokens under which a published block is found.
    fn contents(&self, block: BlockId) -> &[TokenId] {
        let size = self.block_size as usize;
        &self.contents[block.0 as usize * size..][..size]
    }

    /// How often a sequence was found again whose cached prefix is `table`, this time included: 0 where it branches off from
    /// others (a system prompt), one more than its last block where it goes on where nobody went on (a conversation's next
    /// turn). Its new blocks are as likely to be found again as those.
    pub(crate) fn found(&self, table: &[BlockId]) -> u8 {
        match table.last() {
            Some(last) if self.children[last.0 as usize] == 0 => self.hits[last.0 as usize].saturating_add(1),
            _ => 0,
        }
    }

    /// Takes a reference to a block that a lookup found; one that was free is this tenant's from now on.
    pub(crate) fn acquire(&mut self, block: BlockId, owner: TenantSlot) {
        let at = block.0 as usize;
        self.refs[at] += 1;
        self.hits[at] = self.hits[at].saturating_add(1);
        if self.refs[at] == 1 {
            self.free.remove(block);
            self.live += 1;
            self.owners[at] = owner;
            self.live_of[owner.0 as usize] += 1;
        }
        self.assert_sum();
    }

    /// Takes the block that is to be reused next, with one reference and for this tenant, and forgets what it held.
    pub(crate) fn allocate(&mut self, owner: TenantSlot, tenants: &Tenants) -> Option<BlockId> {
        if planted!(self, ReuseLive) && self.live > 0 && self.next_node.is_multiple_of(4) {
            let block = (0..self.num_blocks()).map(BlockId).find(|block| self.refs[block.0 as usize] > 0)?;
            self.refs[block.0 as usize] += 1;
            return Some(block);
        }
        let block = match self.free.pop_blank() {
            Some(block) => block,
            None => {
                let block = self.cached_to_reuse(tenants)?;
                self.free.remove(block);
                block
            }
        };
        assert!(self.refs[block.0 as usize] == 0, "KV-3: free {block:?} is in a block table");
        self.forget(block);
        self.refs[block.0 as usize] = 1;
        self.owners[block.0 as usize] = owner;
        self.handed_out += 1;
        self.live += 1;
        self.live_of[owner.0 as usize] += 1;
        self.assert_sum();
        Some(block)
    }

    /// Whose cached blocks are taken is chosen anew.
    pub(crate) fn choose_anew(&mut self) {
        self.plunder.1 = 0;
    }

    /// The cached block that goes next: of the tenant furthest above its share; where none is above, the oldest, and those
    /// of tenants below their floor last.
    fn cached_to_reuse(&mut self, tenants: &Tenants) -> Option<BlockId> {
        if self.plunder.1 == 0 || self.free.num_cached(self.plunder.0) == 0 {
            let mut choice: Option<((bool, u32, u64), TenantSlot)> = None;
            let weights = self.total_weight(tenants);
            for (slot, tenant) in tenants.iter() {
                let Some((age, _)) = self.free.oldest(slot) else { continue };
                let held = self.num_live_of(slot) + self.num_cached_of(slot);
                let above = held.saturating_sub(self.share(tenants, slot, weights));
                // The least key goes: nobody's floor, the most above the share, the oldest.
                let key = (held <= tenant.spec.floor_blocks, u32::MAX - above, age);
                if choice.is_none_or(|(least, _)| key < least) {
                    choice = Some((key, slot));
                }
            }
            let ((_, below, _), slot) = choice?;
            self.plunder = (slot, (u32::MAX - below).clamp(1, PLUNDER_MAX));
        }
        self.plunder.1 -= 1;
        let slot = if planted!(self, EvictFirstTenant) {
            tenants.iter().map(|(slot, _)| slot).find(|slot| self.free.num_cached(*slot) > 0)?
        } else {
            self.plunder.0
        };
        self.free.oldest(slot).map(|(_, block)| block)
    }

    /// The weights of all tenants that hold something here or have requests. O(tenants).
    pub(crate) fn total_weight(&self, tenants: &Tenants) -> u64 {
        let is_active = |slot| self.num_live_of(slot) + self.num_cached_of(slot) > 0 || tenants[slot].requests > 0;
        tenants.iter().filter(|(slot, _)| is_active(*slot)).map(|(_, tenant)| u64::from(tenant.weight())).sum()
    }

    /// A tenant's share of the blocks: its part by weight, and at least its floor.
    pub(crate) fn share(&self, tenants: &Tenants, slot: TenantSlot, total_weight: u64) -> u32 {
        let tenant = &tenants[slot];
        let part = u64::from(self.num_blocks()) * u64::from(tenant.weight()) / total_weight.max(1);
        (part as u32).max(tenant.spec.floor_blocks)
    }

    /// Gives back one reference to each block of a table, tail first, and empties the table.
    pub(crate) fn release(&mut self, table: &mut Vec<BlockId>) {
        for block in table.drain(..).rev() {
            let refs = &mut self.refs[block.0 as usize];
            assert!(*refs > 0, "KV-2: {block:?} is released but in no block table");
            *refs -= 1;
            if *refs > 0 {
                continue;
            }
            self.live -= 1;
            let (owner, hits) = (self.owners[block.0 as usize], self.hits[block.0 as usize]);
            self.live_of[owner.0 as usize] -= 1;
            if self.cards[block.0 as usize].node == NodeId::NONE {
                self.free.push_blank(block);
            } else {
                self.free.push_cached(block, owner, hits, self.handed_out);
            }
        }
        self.assert_sum();
    }

    /// Makes a full block findable and gives its node. When its content is published already, by a request that computed
    /// it at the same time, the block stays private and the node is that of the published one.
    pub(crate) fn publish(&mut self, full: FullBlock<'_>) -> NodeId {
        let FullBlock { block, hash, at, node: before_it, audience, before, hits, tokens } = full;
        let (parent, salt) = (audience.parent(at, before_it), audience.salt);
        assert!(tokens.len() == self.block_size as usize, "KV-4: {block:?} is published with {} tokens", tokens.len());
        assert!(self.refs[block.0 as usize] > 0, "KV-4: free {block:?} is published");
        assert!(self.cards[block.0 as usize].node == NodeId::NONE, "KV-4: {block:?} is published twice");
        let mut collisions = 0;
        let twin = self.find(hash, parent, salt, tokens, &mut collisions);
        self.collisions += collisions;
        if let Some(twin) = twin {
            return self.cards[twin.0 as usize].node;
        }
        let node = NodeId(self.next_node);
        self.next_node += 1;
        let size = self.block_size as usize;
        self.contents[block.0 as usize * size..][..size].copy_from_slice(tokens);
        self.salts[block.0 as usize] = salt;
        self.cards[block.0 as usize] = Card { hash, parent, node };
        self.hits[block.0 as usize] = hits;
        // The block before may be private, with the same content published under another: then nobody is its child.
        let before = before.filter(|before| self.cards[before.0 as usize].node == before_it);
        self.parents[block.0 as usize] = before.map_or(NO_BLOCK, |before| before.0);
        if let Some(before) = before {
            self.children[before.0 as usize] += 1;
        }
        self.children[block.0 as usize] = 0;
        self.index.insert(hash, block);
        node
    }

    /// Makes a block unfindable, if it is published: its content is about to be overwritten, or is not to be trusted.
    pub(crate) fn forget(&mut self, block: BlockId) {
        let card = self.cards[block.0 as usize];
        if card.node == NodeId::NONE || planted!(self, KeepStaleHash) {
            return;
        }
        let cards = &self.cards;
        self.index.remove(card.hash, block, |other| cards[other.0 as usize].hash);
        self.cards[block.0 as usize] = UNPUBLISHED;
        // A parent that was forgotten, or published anew, has another node.
        let parent = self.parents[block.0 as usize];
        if parent != NO_BLOCK && self.cards[parent as usize].node == card.parent.inside() {
            self.children[parent as usize] -= 1;
        }
    }

    /// Makes everything unfindable: the memory behind the pool is lost. No table may hold a block. O(blocks).
    pub(crate) fn forget_all(&mut self) {
        assert!(self.live == 0, "KV-3: a lost pool has {} live blocks", self.live);
        for block in (0..self.num_blocks()).map(BlockId) {
            if self.cards[block.0 as usize].node != NodeId::NONE {
                self.forget(block);
                self.free.remove(block);
                self.free.push_blank(block);
            }
        }
    }

    /// KV-1, in O(1), at the end of each change.
    fn assert_sum(&self) {
        assert!(
            self.free.len() + self.live == self.num_blocks(),
            "KV-1: {} free and {} live blocks of {}",
            self.free.len(),
            self.live,
            self.num_blocks()
        );
    }
}

/// Whether two blocks are equal. Those of the usual size are compared in line and without a branch for each token: a call
/// to the library's compare would cost more than the compare.
#[inline]
fn equal_tokens(a: &[TokenId], b: &[TokenId]) -> bool {
    match (<&[TokenId; 16]>::try_from(a), <&[TokenId; 16]>::try_from(b)) {
        (Ok(a), Ok(b)) => (0..16).fold(0, |difference, at| difference | (a[at] ^ b[at])) == 0,
        _ => a == b,
    }
}

/// For the full check; see `invariants.rs`.
impl KvPool {
    #[cfg(test)]
    fn num_blank(&self) -> u64 {
        (0..self.num_blocks()).map(BlockId).filter(|block| self.published(*block).is_none()).count() as u64
    }

    pub(crate) fn ref_count(&self, block: BlockId) -> u32 {
        self.refs[block.0 as usize]
    }

    pub(crate) fn is_free(&self, block: BlockId) -> bool {
        self.free.contains(block)
    }

    /// In the order of [`FreeLists::iter`].
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.free.iter()
    }

    /// What a published block is found under.
    pub(crate) fn published(&self, block: BlockId) -> Option<&[TokenId]> {
        (self.cards[block.0 as usize].node != NodeId::NONE).then(|| self.contents(block))
    }

    /// Whether the index has exactly the published blocks.
    pub(crate) fn index_is_exact(&self) -> bool {
        let mut published = (0..self.num_blocks()).map(BlockId).filter(|block| self.published(*block).is_some());
        let count = published.clone().count() as u32;
        count == self.index.len()
            && published.all(|block| {
                let hash = self.cards[block.0 as usize].hash;
                self.index.find(hash, |other| other == block).is_some()
            })
    }

    pub(crate) fn owner(&self, block: BlockId) -> TenantSlot {
        self.owners[block.0 as usize]
    }

    /// Candidates of equal hash and different content that lookups met.
    pub(crate) fn collisions(&self) -> u64 {
        self.collisions
    }
}

#[cfg(test)]
mod reuse_tests;
#[cfg(test)]
mod tests;
