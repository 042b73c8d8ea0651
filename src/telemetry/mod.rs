//! Metrics under vLLM's names, and the log.
//!
//! Owner: shared; the engine thread writes, the HTTP side renders. Every write is a few atomic operations on handles that
//! were made at start: no lock, no allocation, no name look-up. A token costs two writes.
//!
//! Names, types, labels and buckets are vLLM's (vllm/v1/metrics/loggers.py, buckets.py of release 0.33), because dashboards,
//! routers and autoscalers ask for those. A series is here only if something in Kvern moves it.

mod buckets;
mod device;
mod load;
mod log;
mod registry;
mod request;

pub(crate) use load::{ANONYMOUS, OTHERS};
pub use log::init_log;
pub use request::{RequestInfo, RequestTimeline};

use crate::engine::Outlook;
use kvern_core::{FinishReason, Refusal, Stats, TenantId, WorkerId};
use prometheus::{Encoder, Gauge, Histogram, IntCounter, IntGauge, Registry, TextEncoder};
use registry::Maker;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// `Content-Type` of [`Telemetry::render`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the metrics say about the server once and for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryInfo {
    /// The first served name.
    pub model_name: String,
    /// Most tokens of a request; token histograms reach up to it.
    pub max_model_len: u32,
    /// Tokens of a KV block.
    pub block_size: u32,
    /// KV blocks of the pool.
    pub num_blocks: u32,
    /// Bytes of the pool.
    pub kv_cache_bytes: u64,
    /// `bf16`, `f16` or `f32`.
    pub kv_dtype: &'static str,
    pub prefix_caching: bool,
    /// Names of the priority classes, the most urgent first.
    pub classes: Vec<String>,
    /// Names of the workers, in the core's order.
    pub workers: Vec<&'static str>,
}

/// All metrics of one engine.
pub struct Telemetry {
    registry: Registry,
    running: IntGauge,
    waiting: IntGauge,
    waiting_for_capacity: IntGauge,
    kv_usage: Gauge,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    preemptions: IntCounter,
    prompt_tokens: IntCounter,
    prompt_tokens_cached: IntCounter,
    generation_tokens: IntCounter,
    finished_stop: IntCounter,
    finished_length: IntCounter,
    finished_abort: IntCounter,
    finished_error: IntCounter,
    rejected_requests: IntCounter,
    rejected_tokens: IntCounter,
    iteration_tokens: Histogram,
    ttft: Histogram,
    inter_token: Histogram,
    time_per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_generation_tokens: Histogram,
    request_params_max_tokens: Histogram,
    request_params_n: Histogram,
    request_computed_tokens: Histogram,
    request_preemptions: Histogram,
    load: load::LoadGauges,
    device: device::DeviceCounters,
}

impl Telemetry {
    /// Makes every series, so that all are there, at zero, from the first scrape on.
    #[must_use]
    pub fn new(info: &TelemetryInfo) -> Telemetry {
        let maker = Maker::new(&info.model_name);
        maker.cache_config(info);
        // The second part of `waiting_by_reason`: nothing here is deferred, but the parts must add up for who sums them.
        let [waiting_for_capacity, _deferred] = maker.gauges(
            "num_requests_waiting_by_reason",
            "Waiting requests by reason.",
            "reason",
            ["capacity", "deferred"],
        );
        let [finished_stop, finished_length, finished_abort, finished_error] = maker.counters(
            "request_success",
            "Finished requests.",
            "finished_reason",
            ["stop", "length", "abort", "error"],
        );
        let [rejected_requests, rejected_tokens] = maker.rejections(["max_num_queued_reqs", "max_num_queued_tokens"]);
        let tokens = buckets::tokens(info.max_model_len);
        Telemetry {
            running: maker.gauge("num_requests_running", "Requests in execution batches."),
            waiting: maker.gauge("num_requests_waiting", "Requests that wait for capacity."),
            waiting_for_capacity,
            kv_usage: maker.fraction("kv_cache_usage_perc", "KV blocks in use, as a fraction of 1."),
            prefix_queries: maker.counter("prefix_cache_queries", "Tokens looked up in the prefix cache."),
            prefix_hits: maker.counter("prefix_cache_hits", "Tokens found in the prefix cache."),
            preemptions: maker.counter("num_preemptions", "Preemptions."),
            prompt_tokens: maker.counter("prompt_tokens", "Prompt tokens processed, cached ones included."),
            prompt_tokens_cached: maker.counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache."),
            generation_tokens: maker.counter("generation_tokens", "Tokens generated."),
            finished_stop,
            finished_length,
            finished_abort,
            finished_error,
            rejected_requests,
            rejected_tokens,
            iteration_tokens: maker.histogram("iteration_tokens_total", "Tokens per engine step.", &buckets::ITERATION),
            ttft: maker.histogram("time_to_first_token_seconds", "Arrival to first token.", &buckets::FIRST_TOKEN),
            inter_token: maker.histogram("inter_token_latency_seconds", "Gap between tokens.", &buckets::INTER_TOKEN),
            time_per_output_token: maker.histogram(
                "request_time_per_output_token_seconds",
                "Mean gap between the tokens of a request that made at least two.",
                &buckets::INTER_TOKEN,
            ),
            e2e: maker.histogram("e2e_request_latency_seconds", "Arrival to last word.", &buckets::LATENCY),
            queue: maker.histogram("request_queue_time_seconds", "Arrival to first step.", &buckets::LATENCY),
            prefill: maker.histogram("request_prefill_time_seconds", "First step to first token.", &buckets::LATENCY),
            decode: maker.histogram("request_decode_time_seconds", "First token to last token.", &buckets::LATENCY),
            inference: maker.histogram(
                "request_inference_time_seconds",
                "First step to last token.",
                &buckets::LATENCY,
            ),
            request_prompt_tokens: maker.histogram("request_prompt_tokens", "Prompt tokens per request.", &tokens),
            request_generation_tokens: maker.histogram(
                "request_generation_tokens",
                "Generated tokens per request.",
                &tokens,
            ),
            request_max_generation_tokens: maker.histogram(
                "request_max_num_generation_tokens",
                "Most generated tokens of any choice of a request.",
                &tokens,
            ),
            request_params_max_tokens: maker.histogram("request_params_max_tokens", "Requested token limits.", &tokens),
            request_params_n: maker.histogram("request_params_n", "Requested numbers of choices.", &buckets::CHOICES),
            request_computed_tokens: maker.histogram(
                "request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that were not cached.",
                &tokens,
            ),
            request_preemptions: maker.histogram(
                "request_num_preemptions",
                "Preemptions per request.",
                &buckets::PREEMPTIONS,
            ),
            load: load::LoadGauges::new(&maker, &info.classes),
            device: device::DeviceCounters::new(&maker, &info.workers),
            registry: maker.finish(),
        }
    }

    /// Takes over the core's counts. Only the engine thread calls this: counters move by the difference to the totals that
    /// they hold.
    pub fn on_stats(&self, stats: &Stats) {
        self.running.set(i64::from(stats.running));
        self.waiting.set(i64::from(stats.waiting));
        self.waiting_for_capacity.set(i64::from(stats.waiting));
        let total = f64::from(stats.blocks_total.max(1));
        self.kv_usage.set(f64::from(stats.blocks_live) / total);
        for (counter, total) in [
            (&self.prefix_queries, stats.prefix_queries),
            (&self.prefix_hits, stats.prefix_hits),
            (&self.preemptions, stats.preemptions),
        ] {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// Takes over what autoscaling reads; `names` are the tenants'.
    pub fn on_outlook(&self, outlook: &Outlook, names: &HashMap<TenantId, Arc<str>>) {
        self.load.set(outlook, names);
    }

    /// A step of `tokens` tokens, prefill and decode together, was run.
    pub fn on_step(&self, tokens: usize) {
        self.iteration_tokens.observe(tokens as f64);
    }

    /// What a step took of its worker's device, and how long the device waited for it although there was work.
    pub fn on_device_time(&self, worker: WorkerId, busy: Duration, idle: Duration) {
        self.device.add_time(worker, busy, idle);
    }

    /// A worker was given a step before the one before it had ended.
    pub fn on_step_ahead(&self, worker: WorkerId) {
        self.device.add_ahead(worker);
    }

    /// A request was refused at the door, before it was one.
    pub fn on_rejected(&self, refusal: Refusal) {
        match refusal {
            Refusal::QueueFull(_) => self.rejected_requests.inc(),
            Refusal::QueueTokens(_) => self.rejected_tokens.inc(),
            // Bad requests, not a lack of room: HTTP answers 400.
            Refusal::TooLong | Refusal::Empty | Refusal::UnknownTenant => {}
            // No lack of room either: it came too late, or it broke a step before.
            Refusal::Deadline(_) | Refusal::Quarantined(_) => {}
        }
    }

    /// The text that `/metrics` answers, of type [`CONTENT_TYPE`]. Reads atomics; waits for nothing that the engine holds.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = Vec::with_capacity(32 << 10);
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("every metric has a name and a value");
        String::from_utf8(text).expect("names, labels and numbers are text")
    }

    fn count_finish(&self, reason: FinishReason) {
        match reason {
            FinishReason::Refused(refusal) => self.on_rejected(refusal),
            FinishReason::Stop => self.finished_stop.inc(),
            FinishReason::Length => self.finished_length.inc(),
            FinishReason::Cancelled(kvern_core::CancelReason::StopString) => self.finished_stop.inc(),
            FinishReason::Cancelled(_) | FinishReason::Deadline => self.finished_abort.inc(),
            FinishReason::Error => self.finished_error.inc(),
        }
    }
}

#[cfg(test)]
mod tests;
