//! A planned step as flat arrays for the model. One `BatchBuffers` is refilled step after step.
//!
//! It also keeps the block table of each request, because plans bring only what is new in them: see [`kvern_core::SeqSlice`].
//! Every plan must come here, in order, also one whose step then fails. O(tokens + blocks of the step's tables).
//!
//! And what the last step sampled, for a step that was planned before that was known ([`kvern_core::LAST_SAMPLED`]).

use kvern_core::{RequestId, Sampled, StepPlan, TokenId};
use kvern_models::{ForwardBatch, StepLimits};
use std::collections::HashMap;

/// Most vectors of forgotten tables that are kept for new ones.
const SPARE_MAX: usize = 64;

/// Why a plan cannot be laid out: it goes on with what is not here, because the step before it failed or never came. The core
/// brings all of it when it repeats the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BatchError {
    #[error("request {}: expected a step that goes on with at most the {kept} blocks kept of its table, found {wanted}", request.0)]
    Table { request: RequestId, kept: usize, wanted: usize },
    #[error("request {}: expected a step that goes on with a token of the step before it, found none sampled there", request.0)]
    Token { request: RequestId },
}

/// Owner of the arrays behind a [`ForwardBatch`].
#[derive(Debug)]
pub(crate) struct BatchBuffers {
    block_size: u32,
    /// Those of a step that was planned ahead; others have theirs in the plan.
    input_ids: Vec<TokenId>,
    /// In the order of its slices; empty when it failed.
    last_sampled: Vec<(RequestId, Sampled)>,
    /// Tokens stay on the device: where they are there takes the place of what they are.
    tokens_on_device: bool,
    /// On a device: whose tokens the step that was laid out last samples, in order.
    sampling: Vec<RequestId>,
    /// Of a step that was planned ahead: places among those, by sequence.
    last_places: Vec<u32>,
    positions: Vec<u32>,
    slot_mapping: Vec<u32>,
    cu_seqlens_q: Vec<u32>,
    context_lens: Vec<u32>,
    block_tables: Vec<u32>,
    block_table_stride: usize,
    sample_rows: Vec<u32>,
    tables: HashMap<RequestId, Vec<u32>>,
    /// Emptied.
    spare: Vec<Vec<u32>>,
}

impl BatchBuffers {
    #[must_use]
    pub(crate) fn new(limits: StepLimits, block_size: u32, tokens_on_device: bool) -> Self {
        let stride = limits.context_max.div_ceil(block_size as usize);
        BatchBuffers {
            block_size,
            input_ids: Vec::with_capacity(limits.sequences_max),
            last_sampled: Vec::with_capacity(limits.sequences_max),
            tokens_on_device,
            sampling: Vec::with_capacity(limits.sequences_max),
            last_places: Vec::with_capacity(limits.sequences_max),
            positions: Vec::with_capacity(limits.tokens_max),
            slot_mapping: Vec::with_capacity(limits.tokens_max),
            cu_seqlens_q: Vec::with_capacity(limits.sequences_max + 1),
            context_lens: Vec::with_capacity(limits.sequences_max),
            block_tables: Vec::with_capacity(limits.sequences_max * stride),
            block_table_stride: 0,
            sample_rows: Vec::with_capacity(limits.sequences_max),
            tables: HashMap::new(),
            spare: Vec::with_capacity(SPARE_MAX),
        }
    }

    /// A request has ended, was preempted or moved away. One that comes again brings its whole table.
    pub(crate) fn forget(&mut self, request: RequestId) {
        let Some(mut table) = self.tables.remove(&request) else { return };
        if self.spare.len() < SPARE_MAX {
            table.clear();
            self.spare.push(table);
        }
    }

    /// Takes what is new in the tables; gives the length of the longest of the step.
    ///
    /// # Errors
    /// A slice goes on with a table that is not here: a plan did not come, or the request was forgotten too early.
    fn keep_tables(&mut self, plan: &StepPlan) -> Result<usize, BatchError> {
        let mut longest = 0;
        for slice in &plan.slices {
            let (kept, wanted) = (self.tables.get(&slice.request).map_or(0, Vec::len), slice.table_len as usize);
            if wanted > kept {
                return Err(BatchError::Table { request: slice.request, kept, wanted });
            }
            let table = self.tables.entry(slice.request).or_insert_with(|| self.spare.pop().unwrap_or_default());
            table.truncate(wanted);
            table.extend(plan.slice_blocks(slice).iter().map(|block| block.0));
            longest = longest.max(table.len());
        }
        Ok(longest)
    }

    /// What the step that was last laid out has sampled. One that fails says nothing.
    pub(crate) fn note(&mut self, sampled: &[(RequestId, Sampled)]) {
        self.last_sampled.clear();
        self.last_sampled.extend_from_slice(sampled);
    }

    /// The step that was last laid out has failed: nothing can go on with what it sampled.
    pub(crate) fn forget_sampled(&mut self) {
        self.last_sampled.clear();
        self.sampling.clear();
    }

    /// Says where the tokens of a step are that was planned before they were known; `false` for any other.
    ///
    /// # Errors
    /// The step before samples nothing for one of the slices: it failed, and so does this one, and what goes on with it.
    fn place(&mut self, plan: &StepPlan) -> Result<bool, BatchError> {
        let placed = self.place_last(plan);
        self.sampling.clear();
        if placed.is_ok() {
            self.sampling.extend(plan.slices.iter().filter(|slice| slice.sample).map(|slice| slice.request));
        }
        placed
    }

    fn place_last(&mut self, plan: &StepPlan) -> Result<bool, BatchError> {
        self.input_ids.clear();
        self.last_places.clear();
        if !is_ahead(plan) {
            return Ok(false);
        }
        // The slices of both steps are in the same order.
        let mut last = self.sampling.iter().enumerate();
        for slice in &plan.slices {
            let place = last.find(|(_, request)| **request == slice.request);
            let (place, _) = place.ok_or(BatchError::Token { request: slice.request })?;
            self.last_places.push(place as u32);
            // The device has its own.
            self.input_ids.push(0);
        }
        Ok(true)
    }

    /// Fills in the tokens of a step that was planned before they were known; `false` for any other. Afterwards nothing is
    /// there to go on with, until the step has sampled.
    ///
    /// # Errors
    /// The step before has sampled nothing for one of the slices: it failed, and so does this one.
    fn resolve(&mut self, plan: &StepPlan) -> Result<bool, BatchError> {
        self.input_ids.clear();
        // The slices of both steps are in the same order.
        let mut last = self.last_sampled.drain(..);
        if !is_ahead(plan) {
            return Ok(false);
        }
        for slice in &plan.slices {
            let token = match last.find(|(request, _)| *request == slice.request) {
                Some((_, Sampled::Token(token))) => token,
                // The request has ended; nobody asks for what comes of it.
                Some((_, Sampled::Failed)) => 0,
                None => return Err(BatchError::Token { request: slice.request }),
            };
            self.input_ids.push(token);
        }
        Ok(true)
    }

    /// Lays out `plan`. Block tables are padded with block 0 to the longest of the step; padding is never read.
    ///
    /// # Errors
    /// The plan goes on with what is not here. Such a step fails, as do those that go on with it.
    pub(crate) fn fill<'a>(&'a mut self, plan: &'a StepPlan) -> Result<ForwardBatch<'a>, BatchError> {
        self.positions.clear();
        self.slot_mapping.clear();
        self.cu_seqlens_q.clear();
        self.context_lens.clear();
        self.block_tables.clear();
        self.sample_rows.clear();
        // First, so that a step that fails at its tables leaves nothing to go on with either.
        let is_ahead = if self.tokens_on_device { self.place(plan) } else { self.resolve(plan) };
        let longest = self.keep_tables(plan);
        if longest.is_err() {
            self.forget_sampled();
        }
        let (is_ahead, longest) = (is_ahead?, longest?);
        self.block_table_stride = longest;
        self.cu_seqlens_q.push(0);
        for slice in &plan.slices {
            let table = &self.tables[&slice.request];
            let end = slice.start + slice.tokens.len() as u32;
            for position in slice.start..end {
                let block = table[(position / self.block_size) as usize];
                self.positions.push(position);
                self.slot_mapping.push(block * self.block_size + position % self.block_size);
            }
            let rows = self.positions.len() as u32;
            self.cu_seqlens_q.push(rows);
            self.context_lens.push(end);
            let row_start = self.block_tables.len();
            self.block_tables.extend_from_slice(table);
            self.block_tables.resize(row_start + self.block_table_stride, 0);
            if slice.sample {
                self.sample_rows.push(rows - 1);
            }
        }
        Ok(ForwardBatch {
            input_ids: if is_ahead { &self.input_ids } else { &plan.tokens },
            positions: &self.positions,
            slot_mapping: &self.slot_mapping,
            cu_seqlens_q: &self.cu_seqlens_q,
            context_lens: &self.context_lens,
            block_tables: &self.block_tables,
            block_table_stride: self.block_table_stride,
            sample_rows: &self.sample_rows,
            last_sampled: &self.last_places,
        })
    }
}

/// Whether it was planned before the tokens that it goes on with were known.
fn is_ahead(plan: &StepPlan) -> bool {
    plan.slices.iter().any(|slice| slice.last_sampled)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use kvern_core::{BlockId, SeqSlice, StepId, WorkerId};

    const LIMITS: StepLimits = StepLimits { tokens_max: 8, sequences_max: 4, context_max: 16 };

    /// A slice of `tokens` tokens from `start` that goes on with `table_len` blocks and brings `blocks`.
    struct Part<'a> {
        request: u64,
        start: u32,
        tokens: u32,
        table_len: u32,
        blocks: &'a [u32],
    }

    /// Slices that end with one token are sampled.
    fn plan(parts: &[Part<'_>]) -> StepPlan {
        let mut plan = StepPlan { step: StepId(3), worker: WorkerId(0), ..StepPlan::empty() };
        for part in parts {
            let (token, block) = (plan.tokens.len() as u32, plan.blocks.len() as u32);
            plan.tokens.extend(part.start..part.start + part.tokens);
            plan.blocks.extend(part.blocks.iter().map(|block| BlockId(*block)));
            plan.slices.push(SeqSlice {
                request: RequestId(part.request),
                start: part.start,
                tokens: token..token + part.tokens,
                table_len: part.table_len,
                blocks: block..block + part.blocks.len() as u32,
                sample: part.tokens == 1,
                last_sampled: false,
            });
        }
        plan
    }

    #[test]
    fn lays_out_a_decode_and_a_chunk() {
        let plan = plan(&[
            Part { request: 1, start: 5, tokens: 1, table_len: 0, blocks: &[7, 3] },
            Part { request: 2, start: 2, tokens: 3, table_len: 0, blocks: &[4, 9] },
        ]);
        let mut buffers = BatchBuffers::new(LIMITS, 4, false);
        let batch = buffers.fill(&plan).unwrap();
        assert_eq!(batch.positions, [5, 2, 3, 4]);
        assert_eq!(batch.slot_mapping, [3 * 4 + 1, 4 * 4 + 2, 4 * 4 + 3, 9 * 4]);
        assert_eq!(batch.cu_seqlens_q, [0, 1, 4]);
        assert_eq!(batch.context_lens, [6, 5]);
        assert_eq!(batch.block_tables, [7, 3, 4, 9]);
        assert_eq!((batch.block_table_stride, batch.sample_rows), (2, &[0u32][..]));
    }

    #[test]
    fn keeps_tables_from_plan_to_plan() {
        let mut buffers = BatchBuffers::new(LIMITS, 4, false);
        let mut check = |parts: &[Part<'_>], expected: &[u32]| {
            assert_eq!(buffers.fill(&plan(parts)).unwrap().block_tables, expected);
        };
        let part = |request, start, table_len, blocks| Part { request, start, tokens: 1, table_len, blocks };
        check(&[part(1, 3, 0, &[7]), part(2, 6, 0, &[4, 9])], &[7, 0, 4, 9]);
        // One grows, the other goes on as it was.
        check(&[part(1, 4, 1, &[3]), part(2, 7, 2, &[])], &[7, 3, 4, 9]);
        // One that started anew; the other, which is not in the step, keeps its table.
        check(&[part(2, 1, 0, &[5])], &[5]);
        check(&[part(1, 5, 2, &[]), part(2, 4, 1, &[6])], &[7, 3, 5, 6]);
    }

    #[test]
    fn forgets_a_table() {
        let mut buffers = BatchBuffers::new(LIMITS, 4, false);
        let first = [Part { request: 1, start: 3, tokens: 1, table_len: 0, blocks: &[7] }];
        buffers.fill(&plan(&first)).unwrap();
        buffers.forget(RequestId(1));
        buffers.forget(RequestId(2));
        assert!(buffers.tables.is_empty());
        let goes_on = plan(&[Part { request: 1, start: 4, tokens: 1, table_len: 1, blocks: &[3] }]);
        let error = buffers.fill(&goes_on).err().unwrap();
        assert_eq!(error, BatchError::Table { request: RequestId(1), kept: 0, wanted: 1 });
        let text = "request 1: expected a step that goes on with at most the 0 blocks kept of its table, found 1";
        assert_eq!(error.to_string(), text);
        assert!(buffers.tables.is_empty(), "a table that is not here is not begun in its middle");
        // The next plan brings it whole.
        assert_eq!(buffers.fill(&plan(&first)).unwrap().block_tables, [7]);
    }

    #[test]
    fn goes_on_with_what_was_sampled() {
        let mut buffers = BatchBuffers::new(LIMITS, 4, false);
        let first = |request, blocks| Part { request, start: 2, tokens: 1, table_len: 0, blocks };
        let ahead = |requests: &[u64]| {
            let part = |request: &u64| Part { request: *request, start: 3, tokens: 1, table_len: 1, blocks: &[] };
            let mut plan = plan(&requests.iter().map(part).collect::<Vec<_>>());
            plan.slices.iter_mut().for_each(|slice| slice.last_sampled = true);
            plan.tokens.fill(kvern_core::LAST_SAMPLED);
            plan
        };
        let known = plan(&[first(1, &[7]), first(2, &[4]), first(3, &[9])]);
        assert_eq!(buffers.fill(&known).unwrap().input_ids, [2, 2, 2]);
        let sampled = |request, result| (RequestId(request), result);
        buffers.note(&[sampled(1, Sampled::Token(11)), sampled(2, Sampled::Failed), sampled(3, Sampled::Token(13))]);
        assert_eq!(buffers.fill(&ahead(&[2, 3])).unwrap().input_ids, [0, 13]);
        // That step says nothing, so it has failed: what was sampled two steps ago is not what goes on.
        let error = buffers.fill(&ahead(&[3])).err().unwrap();
        assert_eq!(error, BatchError::Token { request: RequestId(3) });
        let text =
            "request 3: expected a step that goes on with a token of the step before it, found none sampled there";
        assert_eq!(error.to_string(), text);
        assert_eq!(buffers.fill(&known).unwrap().input_ids, [2, 2, 2]);
    }

    #[test]
    fn goes_on_with_what_the_device_has_sampled() {
        let mut buffers = BatchBuffers::new(LIMITS, 4, true);
        let first = |request, blocks| Part { request, start: 2, tokens: 1, table_len: 0, blocks };
        let ahead = |requests: &[u64], start| {
            let part = |request: &u64| Part { request: *request, start, tokens: 1, table_len: 1, blocks: &[] };
            let mut plan = plan(&requests.iter().map(part).collect::<Vec<_>>());
            plan.slices.iter_mut().for_each(|slice| slice.last_sampled = true);
            plan.tokens.fill(kvern_core::LAST_SAMPLED);
            plan
        };
        let known = plan(&[first(1, &[7]), first(2, &[4]), first(3, &[9])]);
        assert!(buffers.fill(&known).unwrap().last_sampled.is_empty());
        let plan = ahead(&[2, 3], 3);
        let batch = buffers.fill(&plan).unwrap();
        assert_eq!((batch.input_ids, batch.last_sampled), (&[0, 0][..], &[1, 2][..]));
        // Places are those of the step just before.
        assert_eq!(buffers.fill(&ahead(&[3], 3)).unwrap().last_sampled, [1]);
        buffers.forget_sampled();
        let token = BatchError::Token { request: RequestId(3) };
        assert_eq!(buffers.fill(&ahead(&[3], 3)).err(), Some(token), "nothing goes on after a step that failed");
        assert_eq!(buffers.fill(&ahead(&[3], 3)).err(), Some(token), "nor after one that could not be laid out");
        assert!(buffers.fill(&known).unwrap().last_sampled.is_empty());
    }
}
