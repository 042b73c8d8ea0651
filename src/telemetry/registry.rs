//! Makes series with the prefix and the labels that all of them share.

use super::TelemetryInfo;
use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

/// What every sentence about a valid name rests on: names and labels are constants of this module's callers.
const VALID: &str = "names and labels are constants that the tests render";

pub(super) struct Maker<'a> {
    registry: Registry,
    model_name: &'a str,
}

/// The data-parallel rank; one engine per process.
const ENGINE: &str = "0";

impl<'a> Maker<'a> {
    pub(super) fn new(model_name: &'a str) -> Self {
        Maker { registry: Registry::new(), model_name }
    }

    pub(super) fn finish(self) -> Registry {
        self.registry
    }

    fn add<T: Collector + Clone + 'static>(&self, metric: &T) {
        self.registry.register(Box::new(metric.clone())).expect(VALID);
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> IntGauge {
        let family = IntGaugeVec::new(opts(name, help), &["model_name", "engine"]).expect(VALID);
        self.add(&family);
        family.with_label_values(&[self.model_name, ENGINE])
    }

    pub(super) fn fraction(&self, name: &str, help: &str) -> Gauge {
        let family = GaugeVec::new(opts(name, help), &["model_name", "engine"]).expect(VALID);
        self.add(&family);
        family.with_label_values(&[self.model_name, ENGINE])
    }

    /// One gauge for each value of a further label.
    pub(super) fn gauges<const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: [&str; N],
    ) -> [IntGauge; N] {
        let family = IntGaugeVec::new(opts(name, help), &["model_name", "engine", label]).expect(VALID);
        self.add(&family);
        values.map(|value| family.with_label_values(&[self.model_name, ENGINE, value]))
    }

    pub(super) fn model_name(&self) -> &'a str {
        self.model_name
    }

    /// A gauge of Kvern's own, in parts.
    pub(super) fn own_gauge(&self, name: &str, help: &str) -> Gauge {
        let family = GaugeVec::new(own(name, help), &["model_name", "engine"]).expect(VALID);
        self.add(&family);
        family.with_label_values(&[self.model_name, ENGINE])
    }

    /// As [`Maker::own_gauge`], one for each value of a further label.
    pub(super) fn own_fractions<const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: [&str; N],
    ) -> [Gauge; N] {
        let family = GaugeVec::new(own(name, help), &["model_name", "engine", label]).expect(VALID);
        self.add(&family);
        values.map(|value| family.with_label_values(&[self.model_name, ENGINE, value]))
    }

    /// Counts of Kvern's own, one for each value of a further label.
    pub(super) fn own_counts(&self, name: &str, help: &str, label: &str, values: &[&str]) -> Vec<IntGauge> {
        let family = IntGaugeVec::new(own(name, help), &["model_name", "engine", label]).expect(VALID);
        self.add(&family);
        values.iter().map(|value| family.with_label_values(&[self.model_name, ENGINE, value])).collect()
    }

    /// By tenant and state; series appear as tenants do.
    pub(super) fn own_by_tenant(&self, name: &str, help: &str) -> IntGaugeVec {
        let family = IntGaugeVec::new(own(name, help), &["model_name", "engine", "tenant", "state"]).expect(VALID);
        self.add(&family);
        family
    }

    /// By tenant; `name` is the base name.
    pub(super) fn own_counter_by_tenant(&self, name: &str, help: &str) -> IntCounterVec {
        let opts = own(&format!("{name}_total"), help);
        let family = IntCounterVec::new(opts, &["model_name", "engine", "tenant"]).expect(VALID);
        self.add(&family);
        family
    }

    /// One counter of seconds for each worker; `name` is the base name.
    pub(super) fn own_seconds_by_worker(&self, name: &str, help: &str, workers: &[&str]) -> Vec<Counter> {
        let opts = own(&format!("{name}_total"), help);
        let family = CounterVec::new(opts, &["model_name", "engine", "worker"]).expect(VALID);
        self.add(&family);
        workers.iter().map(|worker| family.with_label_values(&[self.model_name, ENGINE, worker])).collect()
    }

    /// As [`Maker::own_seconds_by_worker`], of things.
    pub(super) fn own_counts_by_worker(&self, name: &str, help: &str, workers: &[&str]) -> Vec<IntCounter> {
        let opts = own(&format!("{name}_total"), help);
        let family = IntCounterVec::new(opts, &["model_name", "engine", "worker"]).expect(VALID);
        self.add(&family);
        workers.iter().map(|worker| family.with_label_values(&[self.model_name, ENGINE, worker])).collect()
    }

    /// `name` is the base name; the exposition's `_total` is added here.
    pub(super) fn counter(&self, name: &str, help: &str) -> IntCounter {
        let family = IntCounterVec::new(total(name, help), &["model_name", "engine"]).expect(VALID);
        self.add(&family);
        family.with_label_values(&[self.model_name, ENGINE])
    }

    /// One counter for each value of a further label.
    pub(super) fn counters<const N: usize>(
        &self,
        name: &str,
        help: &str,
        label: &str,
        values: [&str; N],
    ) -> [IntCounter; N] {
        let family = IntCounterVec::new(total(name, help), &["model_name", "engine", label]).expect(VALID);
        self.add(&family);
        values.map(|value| family.with_label_values(&[self.model_name, ENGINE, value]))
    }

    /// Refusals carry no `engine`: they happen before one is chosen.
    pub(super) fn rejections<const N: usize>(&self, reasons: [&str; N]) -> [IntCounter; N] {
        let opts = total("admission_rejections", "Requests refused at the door.");
        let family = IntCounterVec::new(opts, &["model_name", "reason"]).expect(VALID);
        self.add(&family);
        reasons.map(|reason| family.with_label_values(&[self.model_name, reason]))
    }

    pub(super) fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets.to_vec());
        let family = HistogramVec::new(opts, &["model_name", "engine"]).expect(VALID);
        self.add(&family);
        family.with_label_values(&[self.model_name, ENGINE])
    }

    /// The settings of the KV cache as labels of a gauge that is always 1. Routers read `block_size` and `num_gpu_blocks`,
    /// whatever device the blocks are on.
    pub(super) fn cache_config(&self, info: &TelemetryInfo) {
        let labels: [(&str, String); 7] = [
            ("model_name", self.model_name.to_owned()),
            ("engine", ENGINE.to_owned()),
            ("block_size", info.block_size.to_string()),
            ("cache_dtype", info.kv_dtype.to_owned()),
            ("enable_prefix_caching", if info.prefix_caching { "True" } else { "False" }.to_owned()),
            ("kv_cache_memory_bytes", info.kv_cache_bytes.to_string()),
            ("num_gpu_blocks", info.num_blocks.to_string()),
        ];
        let opts = opts("cache_config_info", "Settings of the KV cache.");
        let family = IntGaugeVec::new(opts, &labels.each_ref().map(|(name, _)| *name)).expect(VALID);
        self.add(&family);
        family.with_label_values(&labels.each_ref().map(|(_, value)| value.as_str())).set(1);
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("vllm:{name}"), help)
}

fn own(name: &str, help: &str) -> Opts {
    Opts::new(format!("kvern:{name}"), help)
}

fn total(name: &str, help: &str) -> Opts {
    opts(&format!("{name}_total"), help)
}
