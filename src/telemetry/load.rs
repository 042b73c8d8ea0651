//! Gauges for autoscaling, under `kvern:`; docs/metrics.md defines each.
//!
//! Tenants have series of their own in the order in which they were first named, up to [`TENANTS_MAX`]; those after share one
//! called `_other`, so that a large file of keys does not make a large exposition. O(tenants) ten times a second.

use super::registry::Maker;
use crate::engine::Outlook;
use kvern_core::{Micros, TenantId, TenantSignals};
use prometheus::{Gauge, IntCounter, IntGauge};
use std::collections::HashMap;
use std::sync::Arc;

/// Tenants with series of their own.
const TENANTS_MAX: usize = 100;
pub(crate) const OTHERS: &str = "_other";
/// Of tenant 0, which has no key of a file.
pub(crate) const ANONYMOUS: &str = "_anonymous";

pub(super) struct LoadGauges {
    queued_tokens: Gauge,
    queued_prefill: Gauge,
    predicted_ttft: Gauge,
    /// Free, cached, live, pinned.
    blocks: Vec<IntGauge>,
    saturation: Gauge,
    /// Queue, KV, ITL.
    pressures: [Gauge; 3],
    time_to_saturation: Gauge,
    desired_replicas: Gauge,
    waiting_by_class: Vec<IntGauge>,
    tenants: TenantSeries,
}

impl LoadGauges {
    pub(super) fn new(maker: &Maker<'_>, classes: &[String]) -> Self {
        let own = |name: &str, help: &str| maker.own_gauge(name, help);
        let states = ["free", "cached", "live", "pinned"];
        let classes: Vec<&str> = classes.iter().map(String::as_str).collect();
        LoadGauges {
            queued_tokens: own("queued_prompt_tokens", "Prompt tokens that wait and are not cached."),
            queued_prefill: own("queued_prefill_seconds", "Predicted time to compute the prompts that wait."),
            predicted_ttft: own("predicted_ttft_seconds", "Predicted time to first token of a new, short request."),
            blocks: maker.own_counts("kv_blocks", "KV blocks by state.", "state", &states),
            saturation: own("saturation", "The largest of the pressures, at most 1."),
            pressures: maker.own_fractions(
                "pressure",
                "How full the server is, in one respect.",
                "of",
                ["queue", "kv", "itl"],
            ),
            time_to_saturation: own(
                "time_to_saturation_seconds",
                "Until the saturation is 1 if it goes on growing; +Inf when it does not.",
            ),
            desired_replicas: own(
                "desired_replicas",
                "Replicas that this one's load would take; sum it over replicas.",
            ),
            waiting_by_class: maker.own_counts(
                "num_requests_waiting_by_class",
                "Waiting requests by priority class.",
                "class",
                &classes,
            ),
            tenants: TenantSeries::new(maker),
        }
    }

    pub(super) fn set(&self, outlook: &Outlook, names: &HashMap<TenantId, Arc<str>>) {
        let signals = &outlook.signals;
        self.queued_tokens.set(signals.queued_tokens as f64);
        self.queued_prefill.set(seconds(signals.queued_prefill));
        self.predicted_ttft.set(seconds(signals.predicted_ttft));
        let blocks = [signals.blocks_free, signals.blocks_cached, signals.blocks_live, signals.blocks_pinned];
        for (gauge, blocks) in self.blocks.iter().zip(blocks) {
            gauge.set(i64::from(blocks));
        }
        let thousandths = |value: u32| f64::from(value) / 1000.0;
        self.saturation.set(thousandths(signals.saturation));
        let pressures = [signals.queue_pressure, signals.kv_pressure, signals.itl_pressure];
        for (gauge, pressure) in self.pressures.iter().zip(pressures) {
            gauge.set(thousandths(pressure));
        }
        self.time_to_saturation.set(outlook.time_to_saturation.map_or(f64::INFINITY, seconds));
        self.desired_replicas.set(thousandths(outlook.desired_replicas));
        for (gauge, waiting) in self.waiting_by_class.iter().zip(signals.waiting) {
            gauge.set(i64::from(waiting));
        }
        self.tenants.set(&outlook.tenants, names);
    }
}

/// A prediction beyond all measure is +Inf.
fn seconds(time: Micros) -> f64 {
    if time.0 == u64::MAX { f64::INFINITY } else { time.0 as f64 / 1e6 }
}

/// Series by tenant.
struct TenantSeries {
    requests: prometheus::IntGaugeVec,
    blocks: prometheus::IntGaugeVec,
    charged: prometheus::IntCounterVec,
    refunded: prometheus::IntCounterVec,
    model_name: String,
}

impl TenantSeries {
    fn new(maker: &Maker<'_>) -> Self {
        TenantSeries {
            requests: maker.own_by_tenant("tenant_requests", "A tenant's requests by state."),
            blocks: maker.own_by_tenant("tenant_kv_blocks", "A tenant's KV blocks by state."),
            charged: maker.own_counter_by_tenant(
                "tenant_tokens_charged",
                "Tokens charged to a tenant: prompt tokens to compute, and output.",
            ),
            refunded: maker.own_counter_by_tenant(
                "tenant_tokens_refunded",
                "Of the tokens charged, those that were given back: their requests ended before they were computed.",
            ),
            model_name: maker.model_name().to_owned(),
        }
    }

    fn set(&self, tenants: &[TenantSignals], names: &HashMap<TenantId, Arc<str>>) {
        let own = tenants.len().min(TENANTS_MAX);
        for tenant in &tenants[..own] {
            let name = names.get(&tenant.tenant).map_or(ANONYMOUS, |name| name);
            self.set_one(name, tenant);
        }
        let others = tenants[own..].iter().copied().reduce(|sum, one| TenantSignals {
            tenant: one.tenant,
            waiting: sum.waiting + one.waiting,
            running: sum.running + one.running,
            blocks_live: sum.blocks_live + one.blocks_live,
            blocks_cached: sum.blocks_cached + one.blocks_cached,
            tokens_charged: sum.tokens_charged + one.tokens_charged,
            tokens_refunded: sum.tokens_refunded + one.tokens_refunded,
        });
        if let Some(others) = others {
            self.set_one(OTHERS, &others);
        }
    }

    fn set_one(&self, name: &str, tenant: &TenantSignals) {
        let labels = |state| [self.model_name.as_str(), "0", name, state];
        self.requests.with_label_values(&labels("waiting")).set(i64::from(tenant.waiting));
        self.requests.with_label_values(&labels("running")).set(i64::from(tenant.running));
        self.blocks.with_label_values(&labels("live")).set(i64::from(tenant.blocks_live));
        self.blocks.with_label_values(&labels("cached")).set(i64::from(tenant.blocks_cached));
        for (family, total) in [(&self.charged, tenant.tokens_charged), (&self.refunded, tenant.tokens_refunded)] {
            let counter: IntCounter = family.with_label_values(&[self.model_name.as_str(), "0", name]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }
}
