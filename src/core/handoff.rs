//! From prefill workers to decode workers, and what happens when a worker or a transfer is lost.
//!
//! ```text
//!   Running(prefill) --first token--> Ready --one pool-----------------------------> Running(decode)
//!                                       |                                              ^
//!                                       +--two pools--> Moving --TransferDone----------+
//!                                                          +-----TransferFailed--> Waiting, to be computed where it decodes
//! ```
//!
//! Workers of one pool hand over by name. Between pools the blocks that the target has not cached are copied; until that
//! is reported the request holds its blocks on both sides (HND-1). Where the target has no room, ready requests wait with
//! their blocks, the most urgent and oldest first. A lost worker's requests are computed again elsewhere. Complexity: O(1)
//! while nothing is ready; O(blocks) for each transfer; O(requests + blocks) for a lost worker.

use crate::fault::planted;
use crate::invariants::InvariantId;
use crate::request::{Arriving, Phase, RequestIndex};
use crate::worker::Worker;
use crate::{Effect, Engine, Role, TransferId, WorkerId, policy};
use std::ops::Bound;

/// Whether a pool takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Open,
    /// Its tenant has no room there, others may.
    AtCeiling,
    Full,
}

impl Engine {
    /// A prefill worker has made a request's next token: a decode worker is to make the others.
    pub(crate) fn make_ready(&mut self, worker: WorkerId, index: RequestIndex) {
        let request = &mut self.requests[index];
        self.workers[usize::from(worker.0)].stop(request);
        request.phase = Phase::Ready(worker);
        self.ready.insert((request.class, request.arrival), index);
        self.changes += 1;
    }

    /// Gives ready requests to decode workers, in order, up to the first for which none has room; those of tenants that are
    /// at their ceiling there are passed over.
    pub(crate) fn hand_off(&mut self, effects: &mut Vec<Effect>) {
        if self.ready.is_empty() || self.hand_off_blocked_at == Some(self.changes) {
            return;
        }
        let mut next = self.ready.first_key_value().map(|(key, index)| (*key, *index));
        while let Some((key, index)) = next {
            let Phase::Ready(from) = self.requests[index].phase else {
                unreachable!("SCH-2: a request is ready in one place only")
            };
            let Some(to) = self.decode_worker(from) else { break };
            if self.workers[usize::from(from.0)].spec.pool == self.workers[usize::from(to.0)].spec.pool {
                self.rename(index, to, effects);
            } else if self.start_transfer(index, from, to, effects) == Target::Full {
                break;
            }
            next = self.ready.range((Bound::Excluded(key), Bound::Unbounded)).next().map(|(key, index)| (*key, *index));
        }
        self.hand_off_blocked_at = Some(self.changes);
    }

    /// The decode worker that takes over from a prefill worker: one that reads its pool, else the one with the most room.
    fn decode_worker(&self, from: WorkerId) -> Option<WorkerId> {
        let own = self.workers[usize::from(from.0)].spec.pool;
        let running_max = policy::running_max(&self.config);
        let takes =
            |worker: &Worker| worker.is_alive && worker.spec.role == Role::Decode && worker.num_taken() < running_max;
        let open = self.workers.iter().enumerate().filter(|(_, worker)| takes(worker));
        let rank = |(at, worker): &(usize, &Worker)| {
            (
                worker.spec.pool == own,
                self.pools[worker.pool()].num_free(),
                usize::MAX - worker.num_taken(),
                usize::MAX - at,
            )
        };
        open.max_by_key(rank).map(|(at, _)| WorkerId(at as u8))
    }

    fn rename(&mut self, index: RequestIndex, to: WorkerId, effects: &mut Vec<Effect>) {
        let request = &mut self.requests[index];
        self.ready.remove(&(request.class, request.arrival));
        request.phase = Phase::Running(to);
        self.workers[usize::from(to.0)].start(index, request);
        self.changes += 1;
        effects.push(Effect::Moved { request: request.id, worker: to });
    }

    /// Reserves the target's blocks and has the others copied, if it has room.
    fn start_transfer(
        &mut self,
        index: RequestIndex,
        from: WorkerId,
        to: WorkerId,
        effects: &mut Vec<Effect>,
    ) -> Target {
        let unpins = planted!(self, UnpinSource);
        let Engine { requests, pools, workers, tenants, config, .. } = self;
        let target = &mut workers[usize::from(to.0)];
        let (at, taken) = (target.pool(), target.num_taken());
        let pool = &mut pools[at];
        let request = &mut requests[index];
        let mut table = Vec::with_capacity(request.computed_max().div_ceil(config.block_size) as usize);
        let node = pool.lookup(request.audience, &request.tokens, &request.hashes, &mut table);
        let num_published = table.len() as u32;
        let needed = request.num_computed.div_ceil(config.block_size).saturating_sub(num_published);
        let sum = needed + pool.count_free(&table);
        let live = pool.num_live_of(request.tenant);
        let is_alone = pool.num_tables_of(request.tenant) == 0;
        let is_above = !is_alone && live + sum > tenants[request.tenant].ceiling();
        if is_above {
            return Target::AtCeiling;
        }
        if pool.num_free() < sum + policy::admission_headroom(taken) {
            return Target::Full;
        }
        pool.open_table(request.tenant);
        table.iter().for_each(|block| pool.acquire(*block, request.tenant));
        let new = |_| pool.allocate(request.tenant, tenants).expect("free blocks were counted before");
        table.extend((0..needed).map(new));
        let first = num_published as usize;
        let blocks = request.table.iter().copied().zip(table.iter().copied()).skip(first).collect();
        let transfer = TransferId(self.next_transfer);
        self.next_transfer += 1;
        self.ready.remove(&(request.class, request.arrival));
        request.phase = Phase::Moving { from, to, transfer };
        request.arriving = Arriving { table, num_published, node };
        target.num_arriving += 1;
        self.transfers.insert(transfer, index);
        effects.push(Effect::Transfer { transfer, request: request.id, from, to, blocks });
        if unpins {
            let source = workers[usize::from(from.0)].pool();
            pools[source].release(&mut request.table);
        }
        Target::Open
    }

    /// The blocks are there: the request decodes.
    pub(crate) fn transfer_done(&mut self, transfer: TransferId, effects: &mut Vec<Effect>) {
        let Some(index) = self.transfers.get(&transfer).copied() else { return };
        if let Some(reason) = self.requests[index].ending {
            self.finish(index, reason, effects);
            return;
        }
        self.transfers.remove(&transfer);
        let request = &mut self.requests[index];
        let Phase::Moving { from, to, .. } = request.phase else {
            unreachable!("{}: {transfer:?} of a request that does not move", InvariantId::Hnd1)
        };
        let source = self.workers[usize::from(from.0)].pool();
        self.pools[source].release(&mut request.table);
        self.pools[source].close_table(request.tenant);
        let arriving = std::mem::replace(&mut request.arriving, Arriving::NONE);
        (request.table, request.num_published, request.node) = (arriving.table, arriving.num_published, arriving.node);
        request.phase = Phase::Running(to);
        let target = &mut self.workers[usize::from(to.0)];
        target.num_arriving -= 1;
        target.start(index, request);
        self.changes += 1;
        effects.push(Effect::Moved { request: request.id, worker: to });
    }

    /// The blocks are not there: the request is computed again, and not handed over.
    pub(crate) fn transfer_failed(&mut self, transfer: TransferId, effects: &mut Vec<Effect>) {
        let Some(index) = self.transfers.get(&transfer).copied() else { return };
        self.requests[index].stays = true;
        match self.requests[index].ending {
            Some(reason) => self.finish(index, reason, effects),
            None => self.preempt(index, effects),
        }
    }

    /// Everything on or between this worker and others starts anew.
    pub(crate) fn worker_lost(&mut self, id: WorkerId, effects: &mut Vec<Effect>) {
        let state = &mut self.workers[usize::from(id.0)];
        assert!(state.is_alive, "{id:?} is lost twice");
        state.is_alive = false;
        state.is_stalled = false;
        state.backlog = 0;
        state.drop_steps();
        let pool = state.pool();
        let is_here = |phase: Phase| match phase {
            Phase::Waiting => false,
            Phase::Running(at) | Phase::Ready(at) => at == id,
            Phase::Moving { from, to, .. } => from == id || to == id,
        };
        let here = self.requests.iter().filter(|(_, request)| is_here(request.phase));
        let mut here: Vec<_> = here.map(|(index, request)| (request.arrival, index)).collect();
        here.sort_unstable();
        for (_, index) in here {
            let request = &mut self.requests[index];
            request.in_flight = false;
            request.is_ahead = false;
            request.is_suspect = false;
            match request.ending {
                _ if request.is_over => self.land_over(index, false),
                Some(reason) => self.finish(index, reason, effects),
                None => self.preempt(index, effects),
            }
        }
        if !self.workers.iter().any(|worker| worker.is_alive && worker.pool() == pool) && !planted!(self, KeepLostPool)
        {
            self.pools[pool].forget_all();
        }
        self.take_back(effects);
        self.changes += 1;
    }

    /// Where no decode worker is left, prefill workers go on with what they were to hand over, as far as they may.
    fn take_back(&mut self, effects: &mut Vec<Effect>) {
        if self.workers.iter().any(|worker| worker.is_alive && worker.spec.role == Role::Decode) {
            return;
        }
        while let Some((key, index)) = self.ready.first_key_value().map(|(key, index)| (*key, *index)) {
            let request = &mut self.requests[index];
            let Phase::Ready(from) = request.phase else { unreachable!("SCH-2: a request is ready in one place only") };
            let worker = &mut self.workers[usize::from(from.0)];
            if worker.num_taken() < policy::running_max(&self.config) {
                self.ready.remove(&key);
                request.phase = Phase::Running(from);
                worker.start(index, request);
            } else {
                self.preempt(index, effects);
            }
        }
    }

    /// A lost worker works again.
    pub(crate) fn worker_back(&mut self, id: WorkerId) {
        let state = &mut self.workers[usize::from(id.0)];
        assert!(!state.is_alive, "{id:?} comes back but was not lost");
        state.is_alive = true;
        self.changes += 1;
    }
}
