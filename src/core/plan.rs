//! A step as the core plans it. One `StepPlan` is filled again and again, so that planning allocates nothing.

use crate::{BlockId, RequestId, StepId, TokenId, WorkerId};
use std::ops::Range;

/// Stands in [`StepPlan::tokens`] for a token that is not known yet: see [`SeqSlice::last_sampled`].
pub const LAST_SAMPLED: TokenId = TokenId::MAX;

/// How much of a device with several workers a step runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum DeviceShare {
    /// All of it, and others' work may be among the step's.
    #[default]
    Whole,
    /// The worker's part; only where [`crate::CoreConfig::device_parts`] says that workers have one.
    Part,
}

/// One step of one worker. Slices index into the flat `tokens` and `blocks`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    pub step: StepId,
    pub worker: WorkerId,
    /// What of the worker's device the step runs on; the step before it may have had the other.
    pub share: DeviceShare,
    pub slices: Vec<SeqSlice>,
    /// Input tokens of all slices, in the order of the slices.
    pub tokens: Vec<TokenId>,
    /// What is new in the block tables of all slices, in the order of the slices.
    pub blocks: Vec<BlockId>,
}

/// One request's share of a step: compute `tokens` at positions `start..start + tokens.len()`, reading and writing
/// K/V through its block table, which covers all of `0..start + tokens.len()`.
///
/// The worker keeps the tables, and a slice brings what is new in its own: the table is then the first `table_len` blocks of
/// the one kept for this request, and after them `blocks`.
///
/// ```text
///   kept    [7][3][9][4]        of the last slice of this request at this worker; none counts as empty
///   slice    table_len 4, blocks [8]       -> [7][3][9][4][8]
///   slice    table_len 4, blocks []        -> as it was
///   slice    table_len 0, blocks [5][6]    -> [5][6]: it started anew, came from another worker, or a step with it failed
/// ```
///
/// A worker that is lost may forget all tables; a table that no slice will name again, of a request that ended, was preempted
/// or moved away, may be forgotten, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqSlice {
    pub request: RequestId,
    /// Position of the first token of the slice.
    pub start: u32,
    /// Range of [`StepPlan::tokens`].
    pub tokens: Range<u32>,
    /// Blocks of the kept table that stay.
    pub table_len: u32,
    /// Range of [`StepPlan::blocks`].
    pub blocks: Range<u32>,
    /// Whether the last position's logits are sampled: true when the slice ends at the last known token.
    pub sample: bool,
    /// The slice's one token is what this worker's previous step sampled for this request; in `tokens` is [`LAST_SAMPLED`].
    /// Where that step sampled no token for it, or failed, the worker may compute whatever it likes, within the slice's blocks:
    /// what comes of it is dropped. Only in plans of [`crate::Engine::plan_ahead`], and there in all slices.
    pub last_sampled: bool,
}

impl StepPlan {
    /// An empty plan to be filled by [`crate::Engine::plan`].
    #[must_use]
    pub fn empty() -> Self {
        StepPlan {
            step: StepId(0),
            worker: WorkerId(0),
            share: DeviceShare::Whole,
            slices: Vec::new(),
            tokens: Vec::new(),
            blocks: Vec::new(),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.share = DeviceShare::Whole;
        self.slices.clear();
        self.tokens.clear();
        self.blocks.clear();
    }

    #[must_use]
    pub fn slice_tokens(&self, slice: &SeqSlice) -> &[TokenId] {
        &self.tokens[slice.tokens.start as usize..slice.tokens.end as usize]
    }

    #[must_use]
    pub fn slice_blocks(&self, slice: &SeqSlice) -> &[BlockId] {
        &self.blocks[slice.blocks.start as usize..slice.blocks.end as usize]
    }
}
