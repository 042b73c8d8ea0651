//! The memory of a fake device: its K/V store has in each slot a hash of the salt and the whole prefix up to that position,
//! as real K/V depend on it. A step computes from what the slots hold, and every slot that it reads is compared with the
//! oracle. Workers that share a pool share the device.

use super::Failure;
use super::client::{Client, kv, kv_of_nothing, next_token};
use super::rng::Rng;
use crate::{BlockId, InvariantId, RequestId, Sampled, SeqSlice, StepPlan};

/// In the slots of a step or a transfer that failed.
const POISON: u64 = 0xbad;

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
        plan: &StepPlan,
        clients: &mut [Client],
        rng: &mut Rng,
        failures: u32,
        sampled: &mut Vec<(RequestId, Sampled)>,
    ) -> Result<(), Failure> {
        for slice in &plan.slices {
            let client = &mut clients[slice.request.0 as usize];
            let last = self.forward(plan, slice, client)?;
            if !slice.sample {
                continue;
            }
            let fails = rng.percent(failures);
            if fails {
                client.has_failed = true;
                self.poison(plan, slice)?;
            }
            sampled.push((slice.request, if fails { Sampled::Failed } else { Sampled::Token(next_token(last)) }));
        }
        Ok(())
    }

    /// Executes a step that fails as a whole.
    pub(crate) fn fail(&mut self, plan: &StepPlan) -> Result<(), Failure> {
        plan.slices.iter().try_for_each(|slice| self.poison(plan, slice))
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

    fn poison(&mut self, plan: &StepPlan, slice: &SeqSlice) -> Result<(), Failure> {
        for position in slice.start..slice.start + plan.slice_tokens(slice).len() as u32 {
            let slot = self.slot(plan, slice, position)?;
            self.slots[slot] = POISON;
        }
        Ok(())
    }

    /// Computes one slice; gives the K/V of its last token.
    fn forward(&mut self, plan: &StepPlan, slice: &SeqSlice, client: &Client) -> Result<u64, Failure> {
        let tokens = plan.slice_tokens(slice);
        let end = slice.start + tokens.len() as u32;
        let fail = |name: &str, position: u32| Err(Failure::new(name, format!("{slice:?} at position {position}")));
        if tokens.is_empty() {
            return Err(Failure::new(InvariantId::Sch4, format!("{slice:?}")));
        }
        if slice.sample != (end == client.known()) {
            return fail("sample mark", end);
        }
        let mut before = kv_of_nothing(client.submission.salt);
        for position in 0..slice.start {
            before = self.slots[self.slot(plan, slice, position)?];
            if client.kvs.get(position as usize) != Some(&before) {
                return fail("K/V read", position);
            }
        }
        for (position, token) in (slice.start..).zip(tokens) {
            if client.tokens.get(position as usize) != Some(token) {
                return fail("input token", position);
            }
            before = kv(before, *token);
            let slot = self.slot(plan, slice, position)?;
            self.slots[slot] = before;
        }
        Ok(before)
    }

    /// Where the K/V of a position are: slot = block * block_size + offset.
    fn slot(&self, plan: &StepPlan, slice: &SeqSlice, position: u32) -> Result<usize, Failure> {
        match plan.slice_block_table(slice).get((position / self.block_size) as usize) {
            Some(block) => Ok((block.0 * self.block_size + position % self.block_size) as usize),
            None => Err(Failure::new("block table", format!("{slice:?} does not cover position {position}"))),
        }
    }
}
