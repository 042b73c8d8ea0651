//! What must always hold: one enum, and one check of everything.
//!
//! [`Engine::check`] walks all state, O(blocks + tokens), for tests. What can be seen in O(1), or in what a call touches
//! anyway, is asserted in release at the place where it would break; those messages begin with the invariant's name too.
//! SCH-5 is asserted by `plan`; the OUT invariants are about what has left the core, so whoever takes the effects checks
//! them, as the simulator does.

use crate::request::{Phase, Request, RequestIndex};
use crate::worker::Worker;
use crate::{BlockId, Engine, WorkerId};
use std::collections::HashMap;
use std::fmt;

/// An invariant of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InvariantId {
    /// Free + live blocks = all blocks of the pool.
    Kv1,
    /// A block's reference count is the number of block tables that hold it.
    Kv2,
    /// No live block is free; the blocks of a slice in flight are live.
    Kv3,
    /// A published block is full and is never rewritten.
    Kv4,
    /// Two requests share a block only if all tokens up to its end, and their salts, are equal.
    Kv5,
    /// The tokens of a step are within its budget.
    Sch1,
    /// Each request is in exactly one place.
    Sch2,
    /// Computed tokens <= known tokens.
    Sch3,
    /// No slice is empty.
    Sch4,
    /// If anything can run, something does.
    Sch5,
    /// The tokens of a request are sent in order, each once.
    Out1,
    /// Each request is finished once.
    Out2,
}

impl fmt::Display for InvariantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InvariantId::Kv1 => "KV-1",
            InvariantId::Kv2 => "KV-2",
            InvariantId::Kv3 => "KV-3",
            InvariantId::Kv4 => "KV-4",
            InvariantId::Kv5 => "KV-5",
            InvariantId::Sch1 => "SCH-1",
            InvariantId::Sch2 => "SCH-2",
            InvariantId::Sch3 => "SCH-3",
            InvariantId::Sch4 => "SCH-4",
            InvariantId::Sch5 => "SCH-5",
            InvariantId::Out1 => "OUT-1",
            InvariantId::Out2 => "OUT-2",
        })
    }
}

/// The first invariant that does not hold, and where.
type Check = Result<(), (InvariantId, String)>;

/// `Err` with the invariant and the words, unless `holds`.
fn ensure(holds: bool, id: InvariantId, words: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err((id, words())) }
}

impl Engine {
    /// Checks every invariant that the engine's state can show; O(blocks + tokens), for tests.
    ///
    /// # Errors
    /// The first invariant that is broken, and where.
    pub fn check(&self) -> Result<(), (InvariantId, String)> {
        self.check_places()?;
        for (_, request) in self.requests.iter() {
            self.check_request(request)?;
        }
        for (at, worker) in self.workers.iter().enumerate() {
            let id = WorkerId(at as u8);
            self.check_step(worker)?;
            self.check_blocks(id, worker)?;
            self.check_sharing(id)?;
        }
        Ok(())
    }

    /// SCH-2.
    fn check_places(&self) -> Check {
        let sch2 = |holds, words: &str| ensure(holds, InvariantId::Sch2, || words.to_owned());
        let mut places = 0;
        for (arrival, index) in self.waiting.iter() {
            let request = self.requests.get(index);
            let fits = request.is_some_and(|r| r.phase == Phase::Waiting && r.arrival == arrival);
            sch2(fits, "the waiting queue and a request's phase disagree")?;
            places += 1;
        }
        for (at, worker) in self.workers.iter().enumerate() {
            let phase = Phase::Running(WorkerId(at as u8));
            for (arrival, index) in worker.iter_running() {
                let request = self.requests.get(index);
                let fits = request.is_some_and(|r| r.phase == phase && r.arrival == arrival);
                sch2(fits, "a worker's running list and a request's phase disagree")?;
                places += 1;
            }
            let ages = worker.iter_running().map(|(arrival, _)| arrival);
            sch2(ages.is_sorted_by(|a, b| a < b), "a running list is out of order or holds a request twice")?;
        }
        // Each place was a request's only possible one (its phase and its age), so equal counts mean one place for each.
        sch2(places == self.requests.len(), "a request is in no place")?;
        sch2(self.requests.iter().count() == places, "the store's ids and cells disagree")
    }

    fn check_request(&self, request: &Request) -> Check {
        let Request { id, num_computed, table, phase, in_flight, .. } = request;
        let known = request.num_tokens();
        ensure(*num_computed <= known, InvariantId::Sch3, || {
            format!("{id:?} computed {num_computed} of {known} tokens")
        })?;
        let has_blocks = *phase != Phase::Waiting || (table.is_empty() && *num_computed == 0 && !in_flight);
        ensure(has_blocks, InvariantId::Sch2, || format!("{id:?} waits but holds blocks or is in flight"))?;
        let covered = table.len() as u32 >= num_computed.div_ceil(self.config.block_size);
        ensure(covered, InvariantId::Kv2, || format!("{id:?} computed {num_computed} tokens in {} blocks", table.len()))
    }

    /// SCH-1, SCH-4, and the in-flight marks.
    fn check_step(&self, worker: &Worker) -> Check {
        let mut sum = 0;
        for slice in &worker.planned {
            let Some(request) = self.requests.get(slice.index) else {
                return Err((InvariantId::Kv3, "a request is gone while the device is at it".to_owned()));
            };
            ensure(slice.num_tokens > 0, InvariantId::Sch4, || format!("{:?} has an empty slice", request.id))?;
            let end = request.num_computed + slice.num_tokens;
            ensure(end <= request.num_tokens(), InvariantId::Sch3, || {
                format!("{:?} computes unknown tokens", request.id)
            })?;
            let covered = request.table.len() as u32 >= end.div_ceil(self.config.block_size);
            ensure(covered, InvariantId::Kv3, || format!("{:?} computes outside of its blocks", request.id))?;
            ensure(request.in_flight, InvariantId::Sch2, || format!("{:?} is planned but not in flight", request.id))?;
            sum += slice.num_tokens;
        }
        let budget = self.config.step_tokens_max;
        ensure(sum <= budget, InvariantId::Sch1, || format!("{sum} tokens in a step of {budget}"))?;
        let in_flight = worker.iter_running().filter(|(_, index)| self.requests[*index].in_flight).count();
        let consistent = in_flight == worker.planned.len() && worker.step.is_some() != worker.planned.is_empty();
        ensure(consistent, InvariantId::Sch2, || "the step and the in-flight marks disagree".to_owned())
    }

    /// KV-1 to KV-4 of one pool.
    fn check_blocks(&self, id: WorkerId, worker: &Worker) -> Check {
        let pool = &worker.pool;
        let num_blocks = pool.num_blocks();
        let listed: Vec<BlockId> = pool.free_blocks().collect();
        let sum = pool.num_free() + pool.num_live();
        let complete = sum == num_blocks && listed.len() as u32 == pool.num_free();
        ensure(complete, InvariantId::Kv1, || format!("{id:?} has {sum} of {num_blocks} blocks"))?;
        let mut holders = vec![0; num_blocks as usize];
        for (_, index) in worker.iter_running() {
            self.requests[index].table.iter().for_each(|block| holders[block.0 as usize] += 1);
        }
        for block in (0..num_blocks).map(BlockId) {
            let (count, refs) = (holders[block.0 as usize], pool.ref_count(block));
            ensure(count == refs, InvariantId::Kv2, || format!("{block:?} has count {refs} and is in {count} tables"))?;
            let apart = pool.is_free(block) == (refs == 0);
            ensure(apart, InvariantId::Kv3, || {
                format!("{block:?} has count {refs} and free is {}", pool.is_free(block))
            })?;
        }
        ensure(pool.index_is_exact(), InvariantId::Kv4, || format!("{id:?}: index and published blocks disagree"))
    }

    /// KV-4 and KV-5: every holder of a block agrees with all others, and with what it is published under.
    fn check_sharing(&self, id: WorkerId) -> Check {
        let worker = &self.workers[usize::from(id.0)];
        let size = self.config.block_size as usize;
        let mut first_holder: HashMap<BlockId, (RequestIndex, usize)> = HashMap::new();
        for (_, index) in worker.iter_running() {
            let request = &self.requests[index];
            for (at, block) in request.table.iter().enumerate() {
                let end = (at + 1) * size;
                if let Some(published) = worker.pool.published(*block) {
                    let full = request.num_computed as usize >= end;
                    ensure(full, InvariantId::Kv4, || {
                        format!("{block:?} is published but {:?} still fills it", request.id)
                    })?;
                    let same = published == &request.tokens[at * size..end];
                    ensure(same, InvariantId::Kv5, || format!("{block:?} is not what {:?} takes it for", request.id))?;
                }
                let (first, place) = *first_holder.entry(*block).or_insert((index, at));
                let other = &self.requests[first];
                let alone = first == index && place == at;
                let equal = place == at
                    && other.salt == request.salt
                    && request.tokens.len() >= end
                    && other.tokens.len() >= end
                    && other.tokens[..end] == request.tokens[..end];
                ensure(alone || equal, InvariantId::Kv5, || {
                    format!("{:?} and {:?} share {block:?} and differ before its end", other.id, request.id)
                })?;
            }
        }
        Ok(())
    }
}
