//! Who may start: the rules of the waiting queue once more, kept by searching lists, and from nothing but the effects.

use super::{Failure, check};
use crate::{CoreConfig, InvariantId, RequestId, TenantId, TenantSpec};
use std::collections::HashMap;

struct Entry {
    request: RequestId,
    class: usize,
    tenant: TenantId,
    /// Requests of its class and tenant that were older when it came, or came after it and are older.
    older: u64,
    /// Younger ones of its class and tenant that started before it.
    overtaken: u64,
}

/// The waiting requests, and what each tenant was charged.
pub(crate) struct Ledger {
    bypasses_max: u64,
    overtakes_max: u64,
    waiting: Vec<Entry>,
    counters: HashMap<(usize, TenantId), u64>,
    levels: Vec<u64>,
    bypassed: Vec<u64>,
    weights: HashMap<TenantId, u32>,
    /// Tenants at their ceiling are passed over, and the order of the others says nothing.
    has_ceilings: bool,
}

impl Ledger {
    pub(crate) fn new(config: &CoreConfig) -> Self {
        Ledger {
            bypasses_max: u64::from(config.bypasses_max),
            overtakes_max: u64::from(config.overtakes_max),
            waiting: Vec::new(),
            counters: HashMap::new(),
            levels: vec![0; config.classes.len()],
            bypassed: vec![0; config.classes.len()],
            weights: HashMap::new(),
            has_ceilings: false,
        }
    }

    pub(crate) fn set_tenants(&mut self, specs: &[TenantSpec]) {
        self.weights.insert(TenantId(0), 1);
        self.weights.extend(specs.iter().map(|spec| (spec.tenant, spec.weight.max(1))));
        self.has_ceilings |= specs.iter().any(|spec| spec.ceiling_blocks.is_some());
    }

    fn counter(&mut self, class: usize, tenant: TenantId) -> &mut u64 {
        self.counters.entry((class, tenant)).or_default()
    }

    pub(crate) fn insert(&mut self, request: RequestId, class: usize, tenant: TenantId) {
        let level = self.levels[class];
        if !self.waiting.iter().any(|entry| (entry.class, entry.tenant) == (class, tenant)) {
            let counter = self.counter(class, tenant);
            *counter = level.max(*counter);
        }
        let own = self.waiting.iter_mut().filter(|entry| (entry.class, entry.tenant) == (class, tenant));
        let mut older = 0;
        for entry in own {
            if entry.request < request { older += 1 } else { entry.older += 1 }
        }
        self.waiting.push(Entry { request, class, tenant, older, overtaken: 0 });
    }

    pub(crate) fn charge(&mut self, class: usize, tenant: TenantId, tokens: u32) {
        let weight = self.weights.get(&tenant).copied().unwrap_or(1);
        *self.counter(class, tenant) += u64::from(tokens) * u64::from(65_536 / weight);
    }

    /// Prompt tokens are given back that were not computed.
    pub(crate) fn refund(&mut self, class: usize, tenant: TenantId, tokens: u32) {
        let weight = self.weights.get(&tenant).copied().unwrap_or(1);
        let counter = self.counter(class, tenant);
        *counter = counter.saturating_sub(u64::from(tokens) * u64::from(65_536 / weight));
    }

    /// A request that waits ends.
    pub(crate) fn remove(&mut self, request: RequestId) {
        self.waiting.retain(|entry| entry.request != request);
        self.forget_bypasses();
    }

    fn forget_bypasses(&mut self) {
        for class in 0..self.bypassed.len() {
            if !self.waiting.iter().any(|entry| entry.class == class) {
                self.bypassed[class] = 0;
            }
        }
    }

    /// A request starts: it must be its turn.
    pub(crate) fn start(&mut self, request: RequestId) -> Result<(), Failure> {
        let at = self.waiting.iter().position(|entry| entry.request == request);
        let Some(at) = at else {
            return Err(Failure::new("schedule", format!("{request:?} starts but does not wait")));
        };
        let Entry { class, tenant, .. } = self.waiting.swap_remove(at);
        let counter = *self.counter(class, tenant);
        self.levels[class] = self.levels[class].max(counter);
        let is_turn = self.bypassed[class] >= self.bypasses_max;
        for at in 0..self.waiting.len() {
            let (other_class, other_tenant) = (self.waiting[at].class, self.waiting[at].tenant);
            let other = *self.counter(other_class, other_tenant);
            let entry = &mut self.waiting[at];
            if (entry.class, entry.tenant) == (class, tenant) && entry.request < request {
                entry.overtaken += 1;
                let bound = self.overtakes_max * (entry.older + 1);
                check(entry.overtaken <= bound, InvariantId::Wait1, || {
                    format!("{:?} was overtaken {} times, {} were older", entry.request, entry.overtaken, entry.older)
                })?;
            }
            if self.has_ceilings {
                continue;
            }
            check(entry.class != class || counter <= other, "fair share", || {
                format!("{request:?} of {tenant:?} at {counter} starts before one of {other_tenant:?} at {other}")
            })?;
            check(entry.class >= class || is_turn, "class order", || {
                format!("{request:?} of class {class} starts before one of class {other_class}")
            })?;
        }
        let num_classes = self.bypassed.len() as u64;
        for other in 0..self.bypassed.len() {
            self.bypassed[other] = if other == class { 0 } else { self.bypassed[other] + 1 };
        }
        self.forget_bypasses();
        let most = self.bypassed.iter().max().copied().unwrap_or(0);
        check(self.has_ceilings || most < self.bypasses_max + num_classes, InvariantId::Wait1, || {
            format!("a class was passed over {most} times")
        })
    }
}
