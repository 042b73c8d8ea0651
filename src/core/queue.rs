//! The waiting queue: requests without blocks, in the order in which they start.
//!
//! ```text
//!   class 0 (most urgent)   tenant 3: counter 120   [longest cached prefix] ... [shortest]
//!                           tenant 0: counter 450   [longest cached prefix] ... [shortest]
//!   class 1                 tenant 0: counter  80   ...
//! ```
//!
//! The most urgent class comes first; in it the tenant whose counter is least; of its requests the one with the longest
//! cached prefix. A counter grows with every token that is computed for the tenant, prompt (what is cached is free) and output,
//! by the token's price, which is the less the more weight the tenant has; prompt tokens are charged when a request starts, and
//! given back if it ends before they were computed. A tenant that begins to wait again starts at the counter that was last
//! served, so that nobody saves up time: the virtual token counter of Sheng et al., "Fairness in Serving Large Language
//! Models" (2023).
//!
//! Nothing waits forever: after `bypasses_max` starts of other classes it is a class's turn, after `overtakes_max` starts of
//! younger requests of its class and tenant it is the oldest one's. Owner: the engine. Complexity: O(log waiting) for each
//! insertion and removal; a choice is O(log tenants) for each tenant that was charged since it was last looked at, and O(1)
//! for each that is passed over.

use crate::fault::planted;
use crate::request::{Arrival, Request, RequestIndex};
use crate::tenants::{TenantSlot, Tenants, WEIGHT_MAX};
use crate::{ClassId, CoreConfig};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// Prompt tokens to compute, and the sum of the contexts that they read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) requests: u64,
    pub(crate) tokens: u64,
    pub(crate) context: u64,
}

impl Load {
    /// Of one request whose first `start` of `end` tokens are cached.
    pub(crate) fn of(start: u32, end: u32) -> Self {
        let (start, tokens) = (u64::from(start), u64::from(end - start));
        Load { requests: 1, tokens, context: tokens * start + tokens * (tokens + 1) / 2 }
    }

    pub(crate) fn add(&mut self, other: Load) {
        self.requests += other.requests;
        self.tokens += other.tokens;
        self.context = self.context.saturating_add(other.context);
    }

    fn sub(&mut self, other: Load) {
        self.requests -= other.requests;
        self.tokens -= other.tokens;
        self.context = self.context.saturating_sub(other.context);
    }

    /// The part of it that `tokens` tokens are.
    pub(crate) fn part(self, tokens: u64) -> Load {
        if tokens >= self.tokens {
            return self;
        }
        let part = |x: u64| (u128::from(x) * u128::from(tokens) / u128::from(self.tokens)) as u64;
        Load { requests: part(self.requests), tokens, context: part(self.context) }
    }
}

/// One tenant's part of one class.
#[derive(Clone, Debug, Default)]
struct Share {
    counter: u64,
    /// Its key in the order of its class while it waits: the counter when it was put there.
    key: u64,
    by_age: BTreeMap<Arrival, (RequestIndex, Load)>,
    by_prefix: BTreeMap<(Reverse<u32>, Arrival), RequestIndex>,
    /// Starts of others than the oldest since the oldest last started.
    overtakes: u32,
    load: Load,
}

#[derive(Clone, Debug, Default)]
struct ClassQueue {
    shares: Vec<Share>,
    /// Tenants that wait, by their counters; a counter may have grown since.
    order: BTreeSet<(u64, TenantSlot)>,
    /// The largest counter that was least when it was served.
    level: u64,
    /// Starts of other classes since this one, which waits, last had its turn.
    bypassed: u32,
    load: Load,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) class: ClassId,
    pub(crate) tenant: TenantSlot,
    pub(crate) counter: u64,
    pub(crate) index: RequestIndex,
}

/// What tokens cost a tenant of this weight.
pub(crate) fn price(weight: u32, tokens: u64) -> u64 {
    tokens.saturating_mul(u64::from(WEIGHT_MAX / weight))
}

#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    classes: Vec<ClassQueue>,
    bypasses_max: u32,
    overtakes_max: u32,
    len: usize,
    #[cfg(test)]
    pub(crate) fault: Option<crate::fault::Fault>,
}

impl Waiting {
    pub(crate) fn new(config: &CoreConfig) -> Self {
        Waiting {
            classes: vec![ClassQueue::default(); config.classes.len()],
            bypasses_max: config.bypasses_max,
            overtakes_max: config.overtakes_max,
            len: 0,
            #[cfg(test)]
            fault: None,
        }
    }

    /// Makes room for the shares of `num_tenants` tenants.
    pub(crate) fn make_tenants(&mut self, num_tenants: usize) {
        self.classes.iter_mut().for_each(|class| class.shares.resize_with(num_tenants, Share::default));
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What waits in a class.
    pub(crate) fn load(&self, class: ClassId) -> Load {
        self.classes[usize::from(class.0)].load
    }

    /// What waits in all classes.
    pub(crate) fn total_load(&self) -> Load {
        let mut total = Load::default();
        self.classes.iter().for_each(|class| total.add(class.load));
        total
    }

    /// Takes a request that waits; its `cached_blocks` say how much of its prefix is cached.
    pub(crate) fn insert(&mut self, request: &Request, index: RequestIndex, block_size: u32) {
        let class = &mut self.classes[usize::from(request.class.0)];
        let share = &mut class.shares[request.tenant.0 as usize];
        let cached = request.cached_blocks.saturating_mul(block_size).min(request.num_tokens() - 1);
        let load = Load::of(cached, request.num_tokens());
        if share.by_age.is_empty() {
            share.counter = share.counter.max(class.level);
            if planted!(self, SaveUpTime) {
                share.counter = 0;
            }
            share.key = share.counter;
            class.order.insert((share.key, request.tenant));
        }
        share.by_age.insert(request.arrival, (index, load));
        share.by_prefix.insert((Reverse(request.cached_blocks), request.arrival), index);
        share.load.add(load);
        class.load.add(load);
        self.len += 1;
    }

    /// Takes a request out that does not start.
    pub(crate) fn remove(&mut self, request: &Request) {
        let class = &mut self.classes[usize::from(request.class.0)];
        let share = &mut class.shares[request.tenant.0 as usize];
        let is_oldest = share.by_age.first_key_value().is_some_and(|(age, _)| *age == request.arrival);
        if is_oldest {
            share.overtakes = 0;
        }
        let (_, load) = share.by_age.remove(&request.arrival).expect("SCH-2: a waiting request is not in the queue");
        share.by_prefix.remove(&(Reverse(request.cached_blocks), request.arrival));
        share.load.sub(load);
        class.load.sub(load);
        if share.by_age.is_empty() {
            class.order.remove(&(share.key, request.tenant));
        }
        if class.load.requests == 0 {
            class.bypassed = 0;
        }
        self.len -= 1;
    }

    /// Takes a request out that starts, and counts whom it passes.
    pub(crate) fn start(&mut self, request: &Request) {
        let at = usize::from(request.class.0);
        let class = &mut self.classes[at];
        let share = &mut class.shares[request.tenant.0 as usize];
        class.level = class.level.max(share.counter);
        let is_oldest = share.by_age.first_key_value().is_some_and(|(age, _)| *age == request.arrival);
        let overtakes = if is_oldest { 0 } else { share.overtakes + 1 };
        self.remove(request);
        self.classes[at].shares[request.tenant.0 as usize].overtakes = overtakes;
        for (other, class) in self.classes.iter_mut().enumerate() {
            class.bypassed = if other == at || class.load.requests == 0 { 0 } else { class.bypassed + 1 };
        }
    }

    /// Charges tokens that are computed for a tenant.
    pub(crate) fn charge(&mut self, class: ClassId, tenant: TenantSlot, weight: u32, tokens: u64) {
        let share = &mut self.classes[usize::from(class.0)].shares[tenant.0 as usize];
        if !planted!(self, ChargeNobody) {
            share.counter = share.counter.saturating_add(price(weight, tokens));
        }
    }

    /// Gives back what tokens were charged that are not computed after all.
    pub(crate) fn refund(&mut self, class: ClassId, tenant: TenantSlot, weight: u32, tokens: u64) {
        let class = &mut self.classes[usize::from(class.0)];
        let share = &mut class.shares[tenant.0 as usize];
        share.counter = share.counter.saturating_sub(price(weight, tokens));
        if share.key > share.counter {
            // A key above its counter would let others go first.
            if class.order.remove(&(share.key, tenant)) {
                class.order.insert((share.counter, tenant));
            }
            share.key = share.counter;
        }
    }

    /// Prompt tokens that wait of a tenant, in all classes.
    pub(crate) fn tokens_of(&self, tenant: TenantSlot) -> u64 {
        self.classes.iter().map(|class| class.shares[tenant.0 as usize].load.tokens).sum()
    }

    pub(crate) fn counter(&self, class: ClassId, tenant: TenantSlot) -> u64 {
        self.classes[usize::from(class.0)].shares[tenant.0 as usize].counter
    }

    /// Whose turn it is among those that `may_start`, which is asked once for each tenant and class at most.
    pub(crate) fn next(&mut self, may_start: impl Fn(TenantSlot, RequestIndex) -> bool) -> Option<Candidate> {
        let most = self.classes.iter().map(|class| class.bypassed).max().unwrap_or(0);
        if most >= self.bypasses_max && !planted!(self, StarveClasses) {
            let due = self.classes.iter().position(|class| class.bypassed == most).expect("the most is one of them");
            if let Some(candidate) = self.next_of(due, &may_start) {
                return Some(candidate);
            }
        }
        (0..self.classes.len()).find_map(|class| self.next_of(class, &may_start))
    }

    fn next_of(&mut self, at: usize, may_start: &impl Fn(TenantSlot, RequestIndex) -> bool) -> Option<Candidate> {
        let class = &mut self.classes[at];
        let mut from = (0, TenantSlot(0));
        while let Some((key, tenant)) = class.order.range(from..).next().copied() {
            let share = &mut class.shares[tenant.0 as usize];
            if share.counter != key {
                class.order.remove(&(key, tenant));
                share.key = share.counter;
                class.order.insert((share.key, tenant));
                continue;
            }
            let is_due = share.overtakes >= self.overtakes_max && !planted!(self, StarveOldest);
            let oldest = share.by_age.first_key_value().map(|(_, (index, _))| *index);
            let longest = share.by_prefix.first_key_value().map(|(_, index)| *index);
            let youngest = share.by_age.last_key_value().map(|(_, (index, _))| *index);
            let head = if planted!(self, AdmitYoungest) {
                youngest
            } else if is_due {
                oldest
            } else {
                longest
            };
            let index = head.expect("SCH-2: a tenant without requests is in the order of its class");
            if may_start(tenant, index) {
                return Some(Candidate { class: ClassId(at as u8), tenant, counter: key, index });
            }
            from = (key, TenantSlot(tenant.0 + 1));
        }
        None
    }

    /// What starts before a new request of `tokens` tokens would, as if tokens were served one by one.
    pub(crate) fn load_before(&self, class: ClassId, tenant: TenantSlot, tokens: u64, tenants: &Tenants) -> Load {
        let mut before = Load::default();
        self.classes[..usize::from(class.0)].iter().for_each(|class| before.add(class.load));
        let class = &self.classes[usize::from(class.0)];
        let unit = |slot: TenantSlot| price(tenants[slot].weight(), 1);
        let own = &class.shares[tenant.0 as usize];
        let counter = if own.by_age.is_empty() { own.counter.max(class.level) } else { own.counter };
        let end = counter.saturating_add((own.load.tokens + tokens).saturating_mul(unit(tenant)));
        for (_, other) in &class.order {
            let share = &class.shares[other.0 as usize];
            if *other == tenant {
                before.add(share.load);
            } else if share.counter < end {
                // The tenant that is served last of all may get one whole request more, but so may we.
                before.add(share.load.part((end - share.counter) / unit(*other)));
            }
        }
        before
    }

    /// In the order of classes and tenants, oldest first; for checks and lists.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (ClassId, TenantSlot, Arrival, RequestIndex)> + '_ {
        self.classes.iter().enumerate().flat_map(|(class, queue)| {
            queue.shares.iter().enumerate().flat_map(move |(tenant, share)| {
                let place = (ClassId(class as u8), TenantSlot(tenant as u32));
                share.by_age.iter().map(move |(arrival, (index, _))| (place.0, place.1, *arrival, *index))
            })
        })
    }

    /// Whether the sums, the orders and the lengths agree; for checks.
    pub(crate) fn is_consistent(&self) -> bool {
        let mut len = 0;
        let consistent = self.classes.iter().all(|class| {
            let mut load = Load::default();
            let shares = class.shares.iter().enumerate().all(|(at, share)| {
                let mut own = Load::default();
                share.by_age.values().for_each(|(_, load)| own.add(*load));
                load.add(own);
                len += share.by_age.len();
                let listed = class.order.contains(&(share.key, TenantSlot(at as u32)));
                own == share.load
                    && share.by_prefix.len() == share.by_age.len()
                    && listed != share.by_age.is_empty()
                    && share.key <= share.counter
            });
            shares && load == class.load
        });
        consistent && len == self.len
    }
}
