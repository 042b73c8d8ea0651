//! Who the requests belong to, and what was set for them.
//!
//! Owner: the engine. A tenant has one slot from its first mention to the end; there are as many as the operator named.
//! The map from ids is only asked, never walked.

use crate::{TenantId, TenantSpec};
use std::collections::HashMap;
use std::ops::{Index, IndexMut};

/// A cell of [`Tenants`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TenantSlot(pub(crate) u32);

impl TenantSlot {
    /// Of tenant 0, which always exists.
    pub(crate) const FIRST: TenantSlot = TenantSlot(0);
}

/// The largest weight: with it a token still costs a whole unit of the fair-share counter.
pub(crate) const WEIGHT_MAX: u32 = 1 << 16;

#[derive(Clone, Debug)]
pub(crate) struct Tenant {
    pub(crate) spec: TenantSpec,
    /// Named by the last settings; nothing new is taken from others.
    pub(crate) is_listed: bool,
    /// Requests in the core, wherever they are, and how many of them wait.
    pub(crate) requests: u32,
    pub(crate) waiting: u32,
    /// What it has to compute, as the step that is being filled, or was last, found it.
    pub(crate) demand: Demand,
    /// Tokens charged since start: prompt tokens to compute, and output.
    pub(crate) charged: u64,
    /// Of these, prompt tokens of requests that ended before they were computed.
    pub(crate) refunded: u64,
}

/// What a tenant has to compute, when a step is filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// The number of the plan that looked.
    pub(crate) plan: u64,
    /// Uncomputed tokens of its prefills on the worker, and of what the step took from the queue.
    pub(crate) running: u64,
    /// All its uncomputed tokens, those that wait included, did not fit into a step when the plan began.
    pub(crate) is_busy: bool,
}

impl Tenant {
    fn new(spec: TenantSpec) -> Self {
        Tenant { spec, is_listed: true, requests: 0, waiting: 0, demand: Demand::default(), charged: 0, refunded: 0 }
    }

    pub(crate) fn weight(&self) -> u32 {
        self.spec.weight.clamp(1, WEIGHT_MAX)
    }

    pub(crate) fn ceiling(&self) -> u32 {
        self.spec.ceiling_blocks.unwrap_or(u32::MAX)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Tenants {
    cells: Vec<Tenant>,
    by_id: HashMap<TenantId, TenantSlot>,
    /// Whether any tenant has one.
    has_ceilings: bool,
    has_floors: bool,
}

impl Tenants {
    /// Tenant 0 alone.
    pub(crate) fn new() -> Self {
        let spec = TenantSpec::new(TenantId::default());
        let by_id = HashMap::from([(spec.tenant, TenantSlot::FIRST)]);
        Tenants { cells: vec![Tenant::new(spec)], by_id, has_ceilings: false, has_floors: false }
    }

    pub(crate) fn len(&self) -> usize {
        self.cells.len()
    }

    pub(crate) fn has_ceilings(&self) -> bool {
        self.has_ceilings
    }

    pub(crate) fn has_floors(&self) -> bool {
        self.has_floors
    }

    /// The slot of a tenant that requests are taken from.
    pub(crate) fn find_listed(&self, id: TenantId) -> Option<TenantSlot> {
        self.by_id.get(&id).copied().filter(|slot| self[*slot].is_listed)
    }

    pub(crate) fn find(&self, id: TenantId) -> Option<TenantSlot> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (TenantSlot, &Tenant)> {
        self.cells.iter().enumerate().map(|(at, tenant)| (TenantSlot(at as u32), tenant))
    }

    /// Takes over new settings for all.
    pub(crate) fn set(&mut self, specs: &[TenantSpec]) {
        self.cells.iter_mut().for_each(|tenant| tenant.is_listed = false);
        self.cells[0] = Tenant { spec: TenantSpec::new(TenantId::default()), is_listed: true, ..self.cells[0].clone() };
        for spec in specs {
            match self.by_id.get(&spec.tenant) {
                Some(slot) => {
                    let tenant = &mut self.cells[slot.0 as usize];
                    tenant.spec = *spec;
                    tenant.is_listed = true;
                }
                None => {
                    let slot = TenantSlot(self.cells.len() as u32);
                    self.by_id.insert(spec.tenant, slot);
                    self.cells.push(Tenant::new(*spec));
                }
            }
        }
        self.has_floors = self.cells.iter().any(|tenant| tenant.spec.floor_blocks > 0);
        self.has_ceilings = self.cells.iter().any(|tenant| tenant.spec.ceiling_blocks.is_some());
    }
}

impl Index<TenantSlot> for Tenants {
    type Output = Tenant;
    fn index(&self, slot: TenantSlot) -> &Tenant {
        &self.cells[slot.0 as usize]
    }
}

impl IndexMut<TenantSlot> for Tenants {
    fn index_mut(&mut self, slot: TenantSlot) -> &mut Tenant {
        &mut self.cells[slot.0 as usize]
    }
}
