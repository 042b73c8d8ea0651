//! Starts a request that others keep out, in what they have more of than is theirs.
//!
//! Two rights, of the tenant whose turn it is:
//!
//! - to a place: where all places of a worker are taken, a tenant that has none there takes one from the tenant that has the
//!   most for its weight, and more than one: of the same or a less urgent class the youngest, which has the least to compute
//!   again;
//! - to its floor: where blocks lack, a tenant that stays within its floor takes them from those above their share, in the
//!   order of [`VictimRank`](crate::policy::VictimRank).
//!
//! Who loses its place or blocks waits again. Nothing is taken unless it is enough for the request to start at once, so every
//! claim is a start, and there is no circle: a tenant has its first place, or blocks within its floor, only once. Owner: the
//! engine, for the time of one `plan`. Complexity: O(1) while a place is free and no tenant has a floor, and, once for each
//! change, O(log tenants) where all places are taken by tenants that have others; else O(running + tenants).

use crate::fault::planted;
use crate::policy::{self, Standing};
use crate::queue::Candidate;
use crate::request::{Phase, RequestIndex};
use crate::scheduler::StepFiller;
use crate::worker::Worker;

impl StepFiller<'_> {
    /// Starts the request whose turn it is in the place or the blocks of others, if its tenant has the right to; `false` when
    /// it did so.
    pub(crate) fn claim(&mut self) -> bool {
        let has_place = self.has_place();
        if (has_place && !self.engine.tenants.has_floors()) || !self.may_start() {
            return true;
        }
        if self.engine.duty(self.id).admits_max < u32::MAX {
            return true;
        }
        let Some(candidate) = self.candidate() else { return true };
        let Some(victims) = self.losers(&candidate, has_place) else {
            // Where the tenant has places, whose turn it is may change with every token that is made.
            if !has_place && self.worker().places_of(candidate.tenant) == 0 {
                self.block();
            }
            return true;
        };
        victims.iter().for_each(|victim| self.engine.detach(*victim));
        let Ok((node, missing)) = self.find_room(candidate.index) else {
            unreachable!("{:?} was promised room", self.engine.requests[candidate.index].id)
        };
        self.start(candidate.index, node);
        self.grow(candidate.index, missing);
        self.claimed = Some(candidate.index);
        // They wait again only now: it was not their turn.
        victims.iter().for_each(|victim| self.engine.requeue(*victim, self.effects));
        false
    }

    /// Who loses its blocks so that the candidate can start; nothing when it has no right to enough of them, or needs none.
    fn losers(&mut self, candidate: &Candidate, has_place: bool) -> Option<Vec<RequestIndex>> {
        let tenant = candidate.tenant;
        let block_size = self.engine.config.block_size;
        // As if nothing of it were cached: what is might be the losers'.
        let needed = self.engine.requests[candidate.index].num_tokens().div_ceil(block_size);
        let (pool, spec) = (&self.engine.pools[self.pool], self.engine.tenants[tenant].spec);
        let live = pool.num_live_of(tenant) + pool.num_tables_of(tenant);
        let is_within = |limit: u32| u64::from(live) + u64::from(needed) <= u64::from(limit);
        if pool.num_tables_of(tenant) > 0 && !is_within(self.engine.tenants[tenant].ceiling()) {
            return None;
        }
        let mut losers = Vec::new();
        let mut free = pool.num_free();
        if !has_place {
            let crowding = self.crowding(candidate)?;
            free += self.exclusive(crowding);
            losers.push(crowding);
        }
        let on_pool = self.engine.workers.iter().filter(|worker| worker.pool() == self.pool);
        let taken: usize = on_pool.map(Worker::num_taken).sum();
        let enough = needed.saturating_add(policy::admission_headroom(taken - losers.len()));
        if free >= enough {
            return (!has_place).then_some(losers);
        }
        if !is_within(spec.floor_blocks) || planted!(self.engine, KeepShares) {
            return None;
        }
        let mut lost: Vec<_> = losers.iter().map(|index| (self.engine.requests[*index].tenant, self.exclusive(*index))).collect();
        let weights = self.engine.pools[self.pool].total_weight(&self.engine.tenants);
        for index in self.takeable(weights) {
            let (pool, tenant) = (&self.engine.pools[self.pool], self.engine.requests[index].tenant);
            let gone: u32 = lost.iter().filter(|(other, _)| *other == tenant).map(|(_, blocks)| blocks).sum();
            let left = pool.num_live_of(tenant).saturating_sub(gone);
            if losers.contains(&index) || left <= pool.share(&self.engine.tenants, tenant, weights) {
                continue;
            }
            lost.push((tenant, self.exclusive(index)));
            free += self.exclusive(index);
            losers.push(index);
            if free >= enough {
                return Some(losers);
            }
        }
        self.engine.claim_waits = true;
        None
    }

    /// The request that gives its place to a tenant that has none, if one must.
    fn crowding(&mut self, candidate: &Candidate) -> Option<RequestIndex> {
        let worker = &self.engine.workers[usize::from(self.id.0)];
        if worker.places_of(candidate.tenant) > 0 || planted!(self.engine, KeepPlaces) {
            return None;
        }
        let weights = self.engine.pools[self.pool].total_weight(&self.engine.tenants);
        let mut most: Option<((u32, u32), RequestIndex)> = None;
        let mut is_protected = false;
        for (class, _, index) in worker.iter_running() {
            let request = &self.engine.requests[index];
            let places = worker.places_of(request.tenant);
            if class < candidate.class || places < 2 {
                continue;
            }
            // A floor protects from this, too, while less than it is held.
            let (standing, ..) = self.engine.victim_rank(self.pool, weights, request);
            if standing == Standing::BelowFloor {
                is_protected = true;
                continue;
            }
            let weight = self.engine.tenants[request.tenant].weight();
            // Of equals the last in the list: the youngest of the least urgent class.
            if most.is_none_or(|(most, _)| policy::crowds_as(most, (places, weight))) {
                most = Some(((places, weight), index));
            }
        }
        self.engine.claim_waits |= is_protected && most.is_none();
        most.map(|(_, index)| index)
    }

    /// Requests that may lose their blocks for a floor, the greatest rank first.
    fn takeable(&self, weights: u64) -> Vec<RequestIndex> {
        let engine = &*self.engine;
        let rank = |index: &RequestIndex| engine.victim_rank(self.pool, weights, &engine.requests[*index]);
        let mut holders: Vec<_> = engine.holders(self.pool).collect();
        holders.sort_unstable_by_key(|index| std::cmp::Reverse(rank(index)));
        // The best of all goes on, whatever happens.
        holders.pop();
        holders.retain(|index| {
            let request = &engine.requests[*index];
            !request.in_flight && !matches!(request.phase, Phase::Moving { .. })
        });
        holders
    }

    /// Blocks that are free once this request has given back its own.
    fn exclusive(&self, index: RequestIndex) -> u32 {
        let pool = &self.engine.pools[self.pool];
        self.engine.requests[index].table.iter().filter(|block| pool.ref_count(**block) == 1).count() as u32
    }
}
