//! The memory of a fake device: its K/V store has in each slot a hash of the salt and the whole prefix up to that position,
//! as real K/V depend on it. A step computes from what the slots hold, and every slot that it reads is compared with the
//! oracle. Workers that share a pool share the device; each has block tables of its own, put together from what the plans said
//! was new in them.

use super::Failure;
use super::client::{Client, KV_OF_NOTHING, next_token};
use super::rng::Rng;
use crate::{BlockId, InvariantId, LAST_SAMPLED, RequestId, Sampled, SeqSlice, StepPlan, TokenId};
use std::collections::HashMap;

/// In the slots of a step or a transfer that failed.
const POISON: u64 = 0xbad;

/// What a worker keeps from plan to plan.
#[derive(Default)]
pub(crate) struct Tables {
    tables: HashMap<RequestId, Vec<BlockId>>,
}

/// A step on its way, and the tables of its slices as they were when it was planned.
pub(crate) struct Step {
    pub(crate) plan: StepPlan,
    pub(crate) tables: Tables,
}

/// What a worker's last step sampled; nothing where it failed.
#[derive(Default)]
pub(crate) struct LastSampled(HashMap<RequestId, TokenId>);

impl LastSampled {
    /// A step was executed.
    pub(crate) fn note(&mut self, sampled: &[(RequestId, Sampled)]) {
        let tokens = sampled.iter().filter_map(|(request, result)| match result {
            Sampled::Token(token) => Some((*request, *token)),
            Sampled::Failed => None,
        });
        self.0 = tokens.collect();
    }

    /// What a slice computes.
    fn inputs(&self, plan: &StepPlan, slice: &SeqSlice) -> Vec<TokenId> {
        let known = plan.slice_tokens(slice);
        if !slice.last_sampled {
            return known.to_vec();
        }
        assert!(known == [LAST_SAMPLED] && slice.sample, "a slice ahead computes the one token that is not known");
        vec![self.0.get(&slice.request).copied().unwrap_or(LAST_SAMPLED)]
    }
}

impl Tables {
    /// A plan comes in.
    pub(crate) fn take(&mut self, plan: &StepPlan) -> Result<(), Failure> {
        for slice in &plan.slices {
            let table = self.tables.entry(slice.request).or_default();
            if table.len() < slice.table_len as usize {
                return Err(Failure::new("block table", format!("{slice:?} goes on with {} blocks", table.len())));
            }
            table.truncate(slice.table_len as usize);
            table.extend_from_slice(plan.slice_blocks(slice));
        }
        Ok(())
    }

    pub(crate) fn forget(&mut self, request: RequestId) {
        self.tables.remove(&request);
    }

    pub(crate) fn forget_all(&mut self) {
        self.tables.clear();
    }

    /// As they are for the slices of a plan.
    pub(crate) fn of_plan(&self, plan: &StepPlan) -> Tables {
        let tables = plan.slices.iter().map(|slice| (slice.request, self.of(slice).to_vec()));
        Tables { tables: tables.collect() }
    }

    pub(crate) fn of(&self, slice: &SeqSlice) -> &[BlockId] {
        self.tables.get(&slice.request).map_or(&[], Vec::as_slice)
    }
}

pub(crate) struct Device {
    block_size: u32,
    slots: Vec<u64>,
}

impl Device {
    pub(crate) fn new(num_blocks: u32, block_size: u32) -> Self {
        Device { block_size, slots: vec![0; (num_blocks * block_size) as usize] }
    }

    /// Executes a step; `failures` percent of its samples fail.
    pub(crate) fn run(
        &mut self,
        Step { plan, tables }: &Step,
        last_sampled: &LastSampled,
        clients: &mut [Client],
        (rng, failures): (&mut Rng, u32),
        sampled: &mut Vec<(RequestId, Sampled)>,
    ) -> Result<(), Failure> {
        for slice in &plan.slices {
            let client = &mut clients[slice.request.0 as usize];
            if client.has_failed {
                // It ended with the step before this one, which was planned ahead: there is nothing to read.
                self.poison(tables.of(slice), slice)?;
                sampled.push((slice.request, Sampled::Token(0)));
                continue;
            }
            let last = self.forward(&last_sampled.inputs(plan, slice), tables.of(slice), slice, client)?;
            client.num_reached = client.num_reached.max(slice.start + slice.tokens.len() as u32);
            if !slice.sample {
                continue;
            }
            let fails = rng.percent(failures);
            if fails {
                client.has_failed = true;
                self.poison(tables.of(slice), slice)?;
            }
            sampled.push((slice.request, if fails { Sampled::Failed } else { Sampled::Token(next_token(last)) }));
        }
        Ok(())
    }

    /// Executes a step that fails as a whole.
    pub(crate) fn fail(&mut self, plan: &StepPlan, tables: &Tables) -> Result<(), Failure> {
        plan.slices.iter().try_for_each(|slice| self.poison(tables.of(slice), slice))
    }

    /// Loses everything.
    pub(crate) fn wipe(&mut self) {
        self.slots.fill(POISON);
    }

    /// What is in a block, to be copied.
    pub(crate) fn read(&self, block: BlockId) -> Vec<u64> {
        let start = (block.0 * self.block_size) as usize;
        self.slots[start..start + self.block_size as usize].to_vec()
    }

    pub(crate) fn write(&mut self, block: BlockId, content: Option<&[u64]>) {
        let start = (block.0 * self.block_size) as usize;
        let slots = &mut self.slots[start..start + self.block_size as usize];
        match content {
            Some(content) => slots.copy_from_slice(content),
            None => slots.fill(POISON),
        }
    }

    fn poison(&mut self, table: &[BlockId], slice: &SeqSlice) -> Result<(), Failure> {
        for position in slice.start..slice.start + slice.tokens.len() as u32 {
            let slot = self.slot(table, slice, position)?;
            self.slots[slot] = POISON;
        }
        Ok(())
    }

    /// Computes one slice; gives the K/V of its last token.
    fn forward(
        &mut self,
        tokens: &[TokenId],
        table: &[BlockId],
        slice: &SeqSlice,
        client: &Client,
    ) -> Result<u64, Failure> {
        let end = slice.start + tokens.len() as u32;
        let fail = |name: &str, position: u32| Err(Failure::new(name, format!("{slice:?} at position {position}")));
        if tokens.is_empty() {
            return Err(Failure::new(InvariantId::Sch4, format!("{slice:?}")));
        }
        // What the step before made of one that is finished was not told.
        if slice.sample != (end == client.known()) && !client.is_finished {
            return fail("sample mark", end);
        }
        let mut before = KV_OF_NOTHING;
        for position in 0..slice.start {
            before = self.slots[self.slot(table, slice, position)?];
            if client.kvs.get(position as usize) != Some(&before) {
                return fail("K/V read", position);
            }
        }
        for (position, token) in (slice.start..).zip(tokens) {
            if client.tokens.get(position as usize) != Some(token) {
                return fail("input token", position);
            }
            before = client.kv(before, position as usize, *token);
            let slot = self.slot(table, slice, position)?;
            self.slots[slot] = before;
        }
        Ok(before)
    }

    /// Where the K/V of a position are: slot = block * block_size + offset.
    fn slot(&self, table: &[BlockId], slice: &SeqSlice, position: u32) -> Result<usize, Failure> {
        match table.get((position / self.block_size) as usize) {
            Some(block) => Ok((block.0 * self.block_size + position % self.block_size) as usize),
            None => Err(Failure::new("block table", format!("{slice:?} does not cover position {position}"))),
        }
    }
}
