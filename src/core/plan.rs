//! A step as the core plans it. One `StepPlan` is filled again and again, so that planning allocates nothing.

use crate::{BlockId, RequestId, StepId, TokenId, WorkerId};
use std::ops::Range;

/// One step of one worker. Slices index into the flat `tokens` and `block_tables`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    pub step: StepId,
    pub worker: WorkerId,
    pub slices: Vec<SeqSlice>,
    /// Input tokens of all slices, in the order of the slices.
    pub tokens: Vec<TokenId>,
    /// Block tables of all slices, in the order of the slices.
    pub block_tables: Vec<BlockId>,
}

/// One request's share of a step: compute `tokens` at positions `start..start + tokens.len()`, reading and writing
/// K/V through its block table, which covers all of `0..start + tokens.len()`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeqSlice {
    pub request: RequestId,
    /// Position of the first token of the slice.
    pub start: u32,
    /// Range of [`StepPlan::tokens`].
    pub tokens: Range<u32>,
    /// Range of [`StepPlan::block_tables`].
    pub block_table: Range<u32>,
    /// Whether the last position's logits are sampled: true when the slice ends at the last known token.
    pub sample: bool,
}

impl StepPlan {
    /// An empty plan to be filled by [`crate::Engine::plan`].
    #[must_use]
    pub fn empty() -> Self {
        StepPlan {
            step: StepId(0),
            worker: WorkerId(0),
            slices: Vec::new(),
            tokens: Vec::new(),
            block_tables: Vec::new(),
        }
    }

    #[must_use]
    pub fn slice_tokens(&self, slice: &SeqSlice) -> &[TokenId] {
        &self.tokens[slice.tokens.start as usize..slice.tokens.end as usize]
    }

    #[must_use]
    pub fn slice_block_table(&self, slice: &SeqSlice) -> &[BlockId] {
        &self.block_tables[slice.block_table.start as usize..slice.block_table.end as usize]
    }
}
