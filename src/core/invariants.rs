//! What must always hold: one enum, and one check of everything.
//!
//! [`Engine::check`] walks all state, O(blocks + tokens), for tests. What can be seen in O(1), or in what a call touches
//! anyway, is asserted in release at the place where it would break; those messages begin with the invariant's name too.
//! SCH-5 is asserted by `plan`; the OUT invariants are about what has left the core, so whoever takes the effects checks
//! them, as the simulator does.

use crate::request::{Phase, Request, RequestIndex};
use crate::worker::Worker;
use crate::{BlockId, Engine, WorkerId};
use std::fmt;

/// An invariant of the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InvariantId {
    /// Free + live blocks = all blocks of the pool.
    Kv1,
    /// A block's reference count is the number of block tables that hold it.
    Kv2,
    /// No live block is free; the blocks of a slice in flight, or ahead of it, are live.
    Kv3,
    /// A published block is full and is never rewritten.
    Kv4,
    /// Two requests share a block only if all tokens up to its end are equal, and it is public for both, or private to equal
    /// salts.
    Kv5,
    /// The tokens of a step are within its budget.
    Sch1,
    /// Each request is in exactly one place.
    Sch2,
    /// Computed tokens <= known tokens; a step ahead computes the one token after them.
    Sch3,
    /// No slice is empty.
    Sch4,
    /// If anything can run, something does.
    Sch5,
    /// Blocks stay pinned on both sides of a transfer.
    Hnd1,
    /// No tenant below its floor is preempted by one above its share.
    Ten1,
    /// No tenant's running requests hold more blocks of a pool than its ceiling, but for one request alone.
    Ten2,
    /// No request waits longer than its bound, counted in the starts of others.
    Wait1,
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
            InvariantId::Hnd1 => "HND-1",
            InvariantId::Ten1 => "TEN-1",
            InvariantId::Ten2 => "TEN-2",
            InvariantId::Wait1 => "WAIT-1",
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
        self.workers.iter().try_for_each(|worker| self.check_step(worker))?;
        for pool in 0..self.pools.len() {
            self.check_blocks(pool)?;
            self.check_sharing(pool)?;
        }
        Ok(())
    }

    /// SCH-2.
    fn check_places(&self) -> Check {
        let sch2 = |holds, words: &str| ensure(holds, InvariantId::Sch2, || words.to_owned());
        let mut places = 0;
        for (class, tenant, arrival, index) in self.waiting.iter() {
            let fits = self
                .requests
                .get(index)
                .is_some_and(|r| (r.phase, r.class, r.tenant, r.arrival) == (Phase::Waiting, class, tenant, arrival));
            sch2(fits, "the waiting queue and a request disagree")?;
            places += 1;
        }
        sch2(self.waiting.is_consistent(), "the waiting queue's orders and sums disagree")?;
        for (at, worker) in self.workers.iter().enumerate() {
            let phase = Phase::Running(WorkerId(at as u8));
            for (class, arrival, index) in worker.iter_running() {
                let request = self.requests.get(index);
                let fits = request.is_some_and(|r| (r.phase, r.class, r.arrival) == (phase, class, arrival));
                sch2(fits && worker.is_alive, "a worker's running list and a request's phase disagree")?;
                places += 1;
            }
            let ages = worker.iter_running().map(|(class, arrival, _)| (class, arrival));
            sch2(ages.is_sorted_by(|a, b| a < b), "a running list is out of order or holds a request twice")?;
            let to_here = |r: &Request| matches!(r.phase, Phase::Moving { to, .. } if usize::from(to.0) == at);
            let arriving = self.requests.iter().filter(|(_, request)| to_here(request)).count();
            sch2(arriving == worker.num_arriving as usize, "a worker's count of arriving requests is wrong")?;
        }
        for ((class, arrival), index) in &self.ready {
            let request = self.requests.get(*index);
            let fits = request.is_some_and(|r| {
                matches!(r.phase, Phase::Ready(_)) && (r.class, r.arrival) == (*class, *arrival) && r.remaining() == 1
            });
            sch2(fits, "the ready requests and a request's phase disagree")?;
        }
        for (id, index) in &self.transfers {
            let is_of = |phase| matches!(phase, Phase::Moving { transfer, .. } if transfer == *id);
            let fits = self.requests.get(*index).is_some_and(|request| is_of(request.phase) && !request.in_flight);
            ensure(fits, InvariantId::Hnd1, || format!("{id:?} is of a request that does not move"))?;
        }
        places += self.ready.len() + self.transfers.len();
        // Each place was a request's only possible one, so equal counts mean one place for each.
        sch2(places == self.requests.len(), "a request is in no place")?;
        let with_ids = self.requests.iter().filter(|(_, request)| !request.is_over).count();
        sch2(self.requests.iter().count() == places, "the store's count and cells disagree")?;
        sch2(self.requests.num_ids() == with_ids, "the store's ids and cells disagree")?;
        self.check_tenants()
    }

    /// The counts of requests by tenant, and the deadlines.
    fn check_tenants(&self) -> Check {
        let sch2 = |holds, words: &str| ensure(holds, InvariantId::Sch2, || words.to_owned());
        for (slot, tenant) in self.tenants.iter() {
            let own = || self.requests.iter().filter(|(_, request)| request.tenant == slot && !request.is_over);
            let waiting = own().filter(|(_, request)| request.phase == Phase::Waiting).count();
            let agrees = own().count() == tenant.requests as usize && waiting == tenant.waiting as usize;
            sch2(agrees, "a tenant's counts of requests are wrong")?;
        }
        let with_deadline = self.requests.iter().filter(|(_, request)| request.deadline.is_some()).count();
        sch2(with_deadline == self.deadlines.len(), "the deadlines and the requests disagree")
    }

    fn check_request(&self, request: &Request) -> Check {
        let Request { id, num_computed, table, phase, in_flight, arriving, .. } = request;
        let known = request.num_tokens();
        ensure(*num_computed <= known, InvariantId::Sch3, || {
            format!("{id:?} computed {num_computed} of {known} tokens")
        })?;
        let is_at_rest = !request.is_ahead && !request.is_over;
        ensure(is_at_rest || *in_flight, InvariantId::Sch2, || format!("{id:?} is in a step ahead but not in flight"))?;
        let has_blocks = *phase != Phase::Waiting || (table.is_empty() && *num_computed == 0 && !in_flight);
        ensure(has_blocks, InvariantId::Sch2, || format!("{id:?} waits but holds blocks or is in flight"))?;
        let needed = num_computed.div_ceil(self.config.block_size);
        let (id_of_lack, reserved) = match phase {
            Phase::Moving { .. } => (InvariantId::Hnd1, arriving.table.len() as u32 >= needed),
            _ => (InvariantId::Kv2, arriving.table.is_empty()),
        };
        let covered = table.len() as u32 >= needed && reserved;
        ensure(covered, id_of_lack, || format!("{id:?} computed {num_computed} tokens in {} blocks", table.len()))
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
            // What the step before sampled for one that is over was not taken, if it was cancelled.
            ensure(end <= request.num_tokens() + u32::from(request.is_over), InvariantId::Sch3, || {
                format!("{:?} computes unknown tokens", request.id)
            })?;
            let covered = request.table.len() as u32 >= end.div_ceil(self.config.block_size);
            ensure(covered, InvariantId::Kv3, || format!("{:?} computes outside of its blocks", request.id))?;
            ensure(request.in_flight, InvariantId::Sch2, || format!("{:?} is planned but not in flight", request.id))?;
            sum += slice.num_tokens;
        }
        let budget = self.config.step_tokens_max;
        ensure(sum <= budget, InvariantId::Sch1, || format!("{sum} tokens in a step of {budget}"))?;
        let in_flight = worker.iter_running().filter(|(_, _, index)| self.requests[*index].in_flight).count();
        let consistent = in_flight == worker.planned.len() && worker.step.is_some() != worker.planned.is_empty();
        ensure(consistent, InvariantId::Sch2, || "the step and the in-flight marks disagree".to_owned())?;
        self.check_ahead(worker)
    }

    /// The step ahead: some of those for which a token is sampled, each with that one.
    fn check_ahead(&self, worker: &Worker) -> Check {
        let ahead = &worker.ahead;
        let is_there = ahead.step.is_some() || worker.has_failed;
        let order = (worker.step.is_some() || !is_there) && is_there != ahead.planned.is_empty();
        let order = order
            && !(ahead.step.is_some() && worker.has_failed)
            && ahead.step.is_none_or(|step| worker.step < Some(step));
        ensure(order, InvariantId::Sch2, || format!("{:?} is ahead of {:?}", ahead.step, worker.step))?;
        let marked = worker.iter_running().filter(|(_, _, index)| self.requests[*index].is_ahead).count();
        ensure(marked == ahead.planned.len(), InvariantId::Sch2, || {
            "the step ahead and its marks disagree".to_owned()
        })?;
        for slice in &ahead.planned {
            let request = &self.requests[slice.index];
            let before = worker.planned.iter().find(|before| before.index == slice.index);
            let is_end = before.is_some_and(|before| before.sample && before.num_tokens == request.remaining());
            let fits = is_end && request.is_ahead && !request.is_over && slice.num_tokens == 1;
            ensure(fits, InvariantId::Sch3, || format!("{:?} is ahead of unknown tokens", request.id))?;
            let covered = request.table.len() as u32 >= (request.num_tokens() + 1).div_ceil(self.config.block_size);
            ensure(covered, InvariantId::Kv3, || format!("{:?} is ahead outside of its blocks", request.id))?;
        }
        Ok(())
    }

    /// The block tables that a request has in a pool: one, or, where both sides of its transfer are there, two.
    fn tables<'a>(&'a self, pool: usize, request: &'a Request) -> impl Iterator<Item = &'a Vec<BlockId>> {
        let pool_of = |id: WorkerId| self.workers[usize::from(id.0)].pool();
        let (here, there) = match request.phase {
            Phase::Waiting => (None, None),
            Phase::Running(at) | Phase::Ready(at) => (Some(pool_of(at)), None),
            Phase::Moving { from, to, .. } => (Some(pool_of(from)), Some(pool_of(to))),
        };
        let here = Some(&request.table).filter(|_| here == Some(pool));
        here.into_iter().chain(Some(&request.arriving.table).filter(|_| there == Some(pool)))
    }

    /// KV-1 to KV-4 of one pool, and its counts by tenant.
    fn check_blocks(&self, at: usize) -> Check {
        let pool = &self.pools[at];
        let num_blocks = pool.num_blocks();
        let listed: Vec<BlockId> = pool.free_blocks().collect();
        let sum = pool.num_free() + pool.num_live();
        let complete = sum == num_blocks && listed.len() as u32 == pool.num_free();
        ensure(complete, InvariantId::Kv1, || format!("pool {at} has {sum} of {num_blocks} blocks"))?;
        let mut holders = vec![0; num_blocks as usize];
        for (_, request) in self.requests.iter() {
            let blocks = self.tables(at, request).flatten();
            blocks.for_each(|block| holders[block.0 as usize] += 1);
        }
        let mut held = vec![(0, 0); self.tenants.len()];
        for block in (0..num_blocks).map(BlockId) {
            let (live, cached) = &mut held[pool.owner(block).0 as usize];
            *live += u32::from(pool.ref_count(block) > 0);
            *cached += u32::from(pool.is_free(block) && pool.published(block).is_some());
        }
        for ((slot, _), held) in self.tenants.iter().zip(held) {
            let counted = (pool.num_live_of(slot), pool.num_cached_of(slot));
            ensure(counted == held, InvariantId::Kv1, || {
                format!("pool {at}: {slot:?} has {held:?} live and cached blocks, counted {counted:?}")
            })?;
        }
        for (slot, _) in self.tenants.iter() {
            let own = self.requests.iter().filter(|(_, request)| request.tenant == slot);
            let count = own.map(|(_, request)| self.tables(at, request).count() as u32).sum();
            let counted = pool.num_tables_of(slot);
            ensure(counted == count, InvariantId::Kv2, || format!("{slot:?} has {count} tables, counted {counted}"))?;
        }
        for block in (0..num_blocks).map(BlockId) {
            let (count, refs) = (holders[block.0 as usize], pool.ref_count(block));
            ensure(count == refs, InvariantId::Kv2, || format!("{block:?} has count {refs} and is in {count} tables"))?;
            let apart = pool.is_free(block) == (refs == 0);
            ensure(apart, InvariantId::Kv3, || {
                format!("{block:?} has count {refs} and free is {}", pool.is_free(block))
            })?;
        }
        ensure(pool.index_is_exact(), InvariantId::Kv4, || format!("pool {at}: index and published blocks disagree"))
    }

    /// KV-4 and KV-5: every holder of a block agrees with all others, and with what it is published under.
    fn check_sharing(&self, pool: usize) -> Check {
        let size = self.config.block_size as usize;
        let mut first_holder = vec![None; self.pools[pool].num_blocks() as usize];
        for (index, request) in self.requests.iter() {
            for table in self.tables(pool, request) {
                self.check_table(pool, (index, table), size, &mut first_holder)?;
            }
        }
        Ok(())
    }

    /// One table's part of that.
    fn check_table(
        &self,
        pool: usize,
        (index, table): (RequestIndex, &[BlockId]),
        size: usize,
        first_holder: &mut [Option<(RequestIndex, usize)>],
    ) -> Check {
        let request = &self.requests[index];
        for (at, block) in table.iter().enumerate() {
            let end = (at + 1) * size;
            if let Some(published) = self.pools[pool].published(*block) {
                let full = request.num_computed as usize >= end;
                ensure(full, InvariantId::Kv4, || {
                    format!("{block:?} is published but {:?} still fills it", request.id)
                })?;
                let same = published == &request.tokens[at * size..end];
                ensure(same, InvariantId::Kv5, || format!("{block:?} is not what {:?} takes it for", request.id))?;
            }
            let (first, place) = *first_holder[block.0 as usize].get_or_insert((index, at));
            let other = &self.requests[first];
            let alone = first == index && place == at;
            let equal = place == at
                && other.audience.salt_of(at) == request.audience.salt_of(at)
                && request.tokens.len() >= end
                && other.tokens.len() >= end
                && other.tokens[..end] == request.tokens[..end];
            ensure(alone || equal, InvariantId::Kv5, || {
                format!("{:?} and {:?} share {block:?} and differ before its end", other.id, request.id)
            })?;
        }
        Ok(())
    }
}
