#![allow(clippy::unwrap_used)]

use super::*;
use kvern_core::{Backoff, CancelReason, Micros, RequestId, Usage};
use std::collections::BTreeMap;

fn telemetry() -> Telemetry {
    Telemetry::new(&TelemetryInfo {
        model_name: "tiny \"model\"\\".to_owned(),
        max_model_len: 300,
        block_size: 16,
        num_blocks: 64,
        kv_cache_bytes: 4096,
        kv_dtype: "bf16",
        prefix_caching: true,
        classes: ["high", "low"].map(str::to_owned).to_vec(),
        workers: vec!["prefill", "decode"],
    })
}

/// The labels that nearly all series carry.
const COMMON: &str = r#"model_name="tiny \"model\"\\",engine="0""#;

/// An exposition, parsed: types by family and values by series.
struct Parsed {
    types: BTreeMap<String, String>,
    values: BTreeMap<String, f64>,
}

fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed { types: BTreeMap::new(), values: BTreeMap::new() };
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            parsed.types.insert(name.to_owned(), kind.to_owned());
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap();
            let mut labels = split_labels(labels.strip_suffix('}').unwrap());
            labels.sort();
            let series = format!("{name}{{{}}}", labels.join(","));
            assert!(parsed.values.insert(series, value.parse().unwrap()).is_none(), "{line} stands twice");
        }
    }
    parsed
}

/// `a="x",b="y,z"` at the commas between labels.
fn split_labels(text: &str) -> Vec<String> {
    let (mut labels, mut quoted, mut escaped) = (vec![String::new()], false, false);
    for c in text.chars() {
        match c {
            ',' if !quoted => labels.push(String::new()),
            _ => {
                quoted ^= c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                labels.last_mut().unwrap().push(c);
            }
        }
    }
    labels
}

impl Parsed {
    /// `name` with the common labels and `more`.
    fn value(&self, name: &str, more: &str) -> f64 {
        self.series(&format!("vllm:{name}"), more)
    }

    fn series(&self, name: &str, more: &str) -> f64 {
        let mut labels = split_labels(COMMON);
        labels.extend(if more.is_empty() { vec![] } else { split_labels(more) });
        labels.sort();
        let series = format!("{name}{{{}}}", labels.join(","));
        *self.values.get(&series).unwrap_or_else(|| panic!("no series {series}"))
    }
}

#[test]
fn names_types_labels_and_buckets() {
    let latency = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680";
    let gaps = "0.0005 0.001 0.002 0.003 0.005 0.0075 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 \
                20 40 80";
    let first = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560";
    let tokens = "1 2 5 10 20 50 100 200";
    let plain = "model_name engine";
    let expected: [(&str, &str, &str, &str); 33] = [
        ("num_requests_running", "gauge", plain, ""),
        ("num_requests_waiting", "gauge", plain, ""),
        ("num_requests_waiting_by_reason", "gauge", "model_name engine reason", ""),
        ("kv_cache_usage_perc", "gauge", plain, ""),
        (
            "cache_config_info",
            "gauge",
            "model_name engine block_size cache_dtype enable_prefix_caching kv_cache_memory_bytes num_gpu_blocks",
            "",
        ),
        ("prefix_cache_queries_total", "counter", plain, ""),
        ("prefix_cache_hits_total", "counter", plain, ""),
        ("num_preemptions_total", "counter", plain, ""),
        ("prompt_tokens_total", "counter", plain, ""),
        ("prompt_tokens_cached_total", "counter", plain, ""),
        ("generation_tokens_total", "counter", plain, ""),
        ("request_success_total", "counter", "model_name engine finished_reason", ""),
        ("admission_rejections_total", "counter", "model_name reason", ""),
        ("iteration_tokens_total", "histogram", plain, "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"),
        ("time_to_first_token_seconds", "histogram", plain, first),
        ("inter_token_latency_seconds", "histogram", plain, gaps),
        ("request_time_per_output_token_seconds", "histogram", plain, gaps),
        ("e2e_request_latency_seconds", "histogram", plain, latency),
        ("request_queue_time_seconds", "histogram", plain, latency),
        ("request_prefill_time_seconds", "histogram", plain, latency),
        ("request_decode_time_seconds", "histogram", plain, latency),
        ("request_inference_time_seconds", "histogram", plain, latency),
        ("request_prompt_tokens", "histogram", plain, tokens),
        ("request_generation_tokens", "histogram", plain, tokens),
        ("request_max_num_generation_tokens", "histogram", plain, tokens),
        ("request_params_max_tokens", "histogram", plain, tokens),
        ("request_params_n", "histogram", plain, "1 2 5 10 20"),
        ("request_prefill_kv_computed_tokens", "histogram", plain, tokens),
        ("request_num_preemptions", "histogram", plain, "1 2 3 4 5 10 20"),
        // Not families, but listed so that a lost suffix is seen.
        ("time_to_first_token_seconds_sum", "", plain, ""),
        ("time_to_first_token_seconds_count", "", plain, ""),
        ("iteration_tokens_total_sum", "", plain, ""),
        ("iteration_tokens_total_count", "", plain, ""),
    ];
    let mut parsed = parse(&telemetry().render());
    parsed.types.retain(|name, _| name.starts_with("vllm:"));
    let families = expected.iter().filter(|(_, kind, ..)| !kind.is_empty());
    let expected_types: BTreeMap<String, String> =
        families.map(|(name, kind, ..)| (format!("vllm:{name}"), (*kind).to_owned())).collect();
    assert_eq!(parsed.types, expected_types);
    for (name, kind, labels, buckets) in expected {
        let sample = if kind == "histogram" { format!("vllm:{name}_bucket{{") } else { format!("vllm:{name}{{") };
        let series: Vec<&String> = parsed.values.keys().filter(|series| series.starts_with(&sample)).collect();
        assert!(!series.is_empty(), "{name} has no series");
        let mut bounds = Vec::new();
        for one in series {
            let pairs = split_labels(one[sample.len()..].strip_suffix('}').unwrap());
            let pairs: BTreeMap<&str, &str> = pairs.iter().map(|pair| pair.split_once('=').unwrap()).collect();
            let mut names: Vec<&str> = pairs.keys().copied().filter(|name| *name != "le").collect();
            let mut expected: Vec<&str> = labels.split(' ').collect();
            names.sort_unstable();
            expected.sort_unstable();
            assert_eq!(names, expected, "{one}");
            bounds.extend(pairs.get("le").and_then(|bound| bound.trim_matches('"').parse::<f64>().ok()));
        }
        bounds.retain(|bound| bound.is_finite());
        bounds.sort_by(f64::total_cmp);
        let expected: Vec<f64> = buckets.split_whitespace().map(|bound| bound.parse().unwrap()).collect();
        assert_eq!(bounds, expected, "{name}");
    }
    let by_reason = ["stop", "length", "abort", "error"].map(|reason| format!("finished_reason=\"{reason}\""));
    for reason in &by_reason {
        assert_eq!(parsed.value("request_success_total", reason), 0.0);
    }
    let cache = "block_size=\"16\",cache_dtype=\"bf16\",enable_prefix_caching=\"True\",kv_cache_memory_bytes=\"4096\",\
                 num_gpu_blocks=\"64\"";
    assert_eq!(parsed.value("cache_config_info", cache), 1.0);
}

fn tenant(number: u32, tokens: u64) -> kvern_core::TenantSignals {
    kvern_core::TenantSignals {
        tenant: TenantId(number),
        waiting: 1,
        running: 2,
        blocks_live: 3,
        blocks_cached: 4,
        tokens_charged: tokens,
        tokens_refunded: 5,
    }
}

#[test]
fn the_load_in_units_and_by_tenant_within_bounds() {
    let telemetry = telemetry();
    let signals = kvern_core::Signals {
        queued_tokens: 900,
        queued_prefill: Micros(1_500_000),
        predicted_ttft: Micros(u64::MAX),
        blocks_free: 1,
        blocks_cached: 2,
        blocks_live: 3,
        waiting: [4, 5, 0, 0, 0, 0, 0, 0],
        kv_pressure: 250,
        saturation: 250,
        ..kvern_core::Signals::default()
    };
    let tenants = (0..150).map(|number| tenant(number, u64::from(number))).collect();
    let outlook = Outlook { signals, time_to_saturation: None, desired_replicas: 1_500, tenants };
    let names = (1..150).map(|number| (TenantId(number), Arc::from(format!("t{number}")))).collect();
    telemetry.on_outlook(&outlook, &names);
    telemetry.on_outlook(&outlook, &names);
    let parsed = parse(&telemetry.render());
    for (name, more, expected) in [
        ("queued_prompt_tokens", "", 900.0),
        ("queued_prefill_seconds", "", 1.5),
        ("predicted_ttft_seconds", "", f64::INFINITY),
        ("time_to_saturation_seconds", "", f64::INFINITY),
        ("desired_replicas", "", 1.5),
        ("saturation", "", 0.25),
        ("pressure", "of=\"kv\"", 0.25),
        ("kv_blocks", "state=\"live\"", 3.0),
        ("num_requests_waiting_by_class", "class=\"low\"", 5.0),
        ("tenant_requests", "tenant=\"_anonymous\",state=\"running\"", 2.0),
        ("tenant_tokens_charged_total", "tenant=\"t99\"", 99.0),
        // Those numbered 100 to 149.
        ("tenant_tokens_charged_total", "tenant=\"_other\"", 6_225.0),
        ("tenant_tokens_refunded_total", "tenant=\"_other\"", 250.0),
        ("tenant_kv_blocks", "tenant=\"_other\",state=\"cached\"", 200.0),
    ] {
        assert_eq!(parsed.series(&format!("kvern:{name}"), more), expected, "{name} {more}");
    }
    let by_tenant = parsed.values.keys().filter(|series| series.starts_with("kvern:tenant_requests{")).count();
    assert_eq!(by_tenant, 2 * 101, "100 tenants and the others, in two states");
}

#[test]
fn devices_are_told_apart_by_worker() {
    let telemetry = telemetry();
    let us = Duration::from_micros;
    telemetry.on_device_time(WorkerId(1), us(1_250_000), us(500));
    telemetry.on_device_time(WorkerId(0), us(750), Duration::ZERO);
    telemetry.on_device_time(WorkerId(1), us(250_000), us(250));
    (0..3).for_each(|_| telemetry.on_step_ahead(WorkerId(1)));
    let parsed = parse(&telemetry.render());
    for (name, worker, expected) in [
        ("device_busy_seconds_total", "prefill", 0.00075),
        ("device_busy_seconds_total", "decode", 1.5),
        ("device_idle_seconds_total", "prefill", 0.0),
        ("device_idle_seconds_total", "decode", 0.00075),
        ("steps_ahead_total", "prefill", 0.0),
        ("steps_ahead_total", "decode", 3.0),
    ] {
        let found = parsed.series(&format!("kvern:{name}"), &format!("worker=\"{worker}\""));
        assert_eq!(found, expected, "{name} {worker}");
        assert_eq!(parsed.types[&format!("kvern:{name}")], "counter");
    }
}

#[test]
fn every_series_of_our_own_is_documented() {
    let telemetry = telemetry();
    telemetry.on_outlook(&Outlook { tenants: vec![tenant(0, 1)], ..Outlook::default() }, &HashMap::new());
    let documented = include_str!("../../docs/metrics.md");
    for name in parse(&telemetry.render()).types.keys().filter(|name| name.starts_with("kvern:")) {
        assert!(documented.contains(&format!("`{name}")), "{name} is not in docs/metrics.md");
    }
}

fn timeline(id: u64, arrived: u64) -> RequestTimeline {
    let info = RequestInfo { id: RequestId(id), external_id: "cmpl-1".into(), max_new_tokens: 100, n: 2 };
    RequestTimeline::new(info, 40, Micros(arrived))
}

#[test]
fn a_request_is_observed_once_in_each_phase() {
    let telemetry = telemetry();
    let mut request = timeline(1, 1_000_000);
    request.on_scheduled(&telemetry, Micros(1_500_000), 16);
    for at in [2_000_000, 2_100_000] {
        request.on_token(&telemetry, Micros(at));
    }
    // A preemption and what follows from it: neither the queue time nor the cached tokens change.
    request.on_scheduled(&telemetry, Micros(2_200_000), 32);
    request.on_token(&telemetry, Micros(2_400_000));
    let usage =
        Usage { prompt_tokens: 40, cached_tokens: 16, completion_tokens: 3, preemptions: 1, ..Usage::default() };
    request.on_finish(&telemetry, Micros(2_500_000), FinishReason::Stop, usage);
    telemetry.on_step(56);
    let parsed = parse(&telemetry.render());
    let sums = [
        ("request_queue_time_seconds", 0.5, 1.0),
        ("time_to_first_token_seconds", 1.0, 1.0),
        ("inter_token_latency_seconds", 0.4, 2.0),
        ("request_time_per_output_token_seconds", 0.2, 1.0),
        ("request_prefill_time_seconds", 0.5, 1.0),
        ("request_decode_time_seconds", 0.4, 1.0),
        ("request_inference_time_seconds", 0.9, 1.0),
        ("e2e_request_latency_seconds", 1.5, 1.0),
        ("request_prompt_tokens", 40.0, 1.0),
        ("request_generation_tokens", 3.0, 1.0),
        ("request_max_num_generation_tokens", 3.0, 1.0),
        ("request_params_max_tokens", 100.0, 1.0),
        ("request_params_n", 2.0, 1.0),
        ("request_prefill_kv_computed_tokens", 24.0, 1.0),
        ("request_num_preemptions", 1.0, 1.0),
        ("iteration_tokens_total", 56.0, 1.0),
    ];
    for (name, sum, count) in sums {
        let found = parsed.value(&format!("{name}_sum"), "");
        assert!((found - sum).abs() < 1e-9, "{name}: expected {sum}, found {found}");
        assert_eq!(parsed.value(&format!("{name}_count"), ""), count, "{name}");
        assert_eq!(parsed.value(&format!("{name}_bucket"), "le=\"+Inf\""), count, "{name}");
    }
    assert_eq!(parsed.value("inter_token_latency_seconds_bucket", "le=\"0.1\""), 1.0);
    assert_eq!(parsed.value("inter_token_latency_seconds_bucket", "le=\"0.075\""), 0.0);
    let counters =
        [("prompt_tokens_total", 40.0), ("prompt_tokens_cached_total", 16.0), ("generation_tokens_total", 3.0)];
    for (name, expected) in counters {
        assert_eq!(parsed.value(name, ""), expected, "{name}");
    }
}

#[test]
fn every_end_has_its_label() {
    let ends: [(FinishReason, &str); 7] = [
        (FinishReason::Stop, "stop"),
        (FinishReason::Cancelled(CancelReason::StopString), "stop"),
        (FinishReason::Length, "length"),
        (FinishReason::Cancelled(CancelReason::ClientGone), "abort"),
        (FinishReason::Cancelled(CancelReason::SlowReader), "abort"),
        (FinishReason::Cancelled(CancelReason::Shutdown), "abort"),
        (FinishReason::Error, "error"),
    ];
    for (reason, label) in ends {
        let telemetry = telemetry();
        timeline(1, 0).on_finish(&telemetry, Micros(5), reason, Usage::default());
        let parsed = parse(&telemetry.render());
        for other in ["stop", "length", "abort", "error"] {
            let value = parsed.value("request_success_total", &format!("finished_reason=\"{other}\""));
            assert_eq!(value, f64::from(u8::from(other == label)), "{reason:?} {other}");
        }
        // Never scheduled: no phase but the whole.
        assert_eq!(parsed.value("e2e_request_latency_seconds_count", ""), 1.0);
        for phase in ["request_queue_time", "request_prefill_time", "request_decode_time", "time_to_first_token"] {
            assert_eq!(parsed.value(&format!("{phase}_seconds_count"), ""), 0.0, "{phase}");
        }
    }
}

#[test]
fn refusals_are_no_requests() {
    let telemetry = telemetry();
    for refusal in [Refusal::QueueFull(Backoff::default()), Refusal::TooLong, Refusal::Empty] {
        timeline(1, 0).on_finish(&telemetry, Micros(5), FinishReason::Refused(refusal), Usage::default());
    }
    telemetry.on_rejected(Refusal::QueueFull(Backoff::default()));
    let parsed = parse(&telemetry.render());
    assert_eq!(parsed.value("e2e_request_latency_seconds_count", ""), 0.0);
    let series = parsed.values.iter().find(|(series, _)| series.starts_with("vllm:admission_rejections_total"));
    let (series, value) = series.unwrap();
    assert!(series.contains("reason=\"max_num_queued_reqs\""), "{series}");
    assert_eq!(*value, 2.0);
}

#[test]
fn gauges_and_totals_follow_the_core() {
    let telemetry = telemetry();
    let mut stats = Stats { running: 3, waiting: 2, blocks_total: 64, blocks_live: 16, ..Stats::default() };
    (stats.prefix_queries, stats.prefix_hits, stats.preemptions) = (100, 48, 1);
    telemetry.on_stats(&stats);
    (stats.running, stats.prefix_queries, stats.prefix_hits) = (1, 140, 64);
    telemetry.on_stats(&stats);
    let parsed = parse(&telemetry.render());
    let expected = [
        ("num_requests_running", "", 1.0),
        ("num_requests_waiting", "", 2.0),
        ("num_requests_waiting_by_reason", "reason=\"capacity\"", 2.0),
        ("num_requests_waiting_by_reason", "reason=\"deferred\"", 0.0),
        ("kv_cache_usage_perc", "", 0.25),
        ("prefix_cache_queries_total", "", 140.0),
        ("prefix_cache_hits_total", "", 64.0),
        ("num_preemptions_total", "", 1.0),
    ];
    for (name, more, value) in expected {
        assert_eq!(parsed.value(name, more), value, "{name} {more}");
    }
}

#[test]
fn token_buckets_end_at_the_context() {
    for (max, last, count) in [(0, 1.0, 1), (1, 1.0, 1), (8192, 5000.0, 12), (u32::MAX, 2e9, 29)] {
        let bounds = buckets::tokens(max);
        assert_eq!((bounds.last().copied(), bounds.len()), (Some(last), count), "{max}");
    }
}

/// The line of a request, as the JSON log has it.
#[test]
fn a_request_writes_one_line() {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    let (telemetry, lines) = (telemetry(), Lines::default());
    let writer = lines.clone();
    let log = tracing_subscriber::fmt().json().flatten_event(true).with_writer(move || writer.clone()).finish();
    tracing::subscriber::with_default(log, || {
        let mut request = timeline(7, 0);
        request.on_scheduled(&telemetry, Micros(1_000), 16);
        request.on_token(&telemetry, Micros(3_000));
        request.on_token(&telemetry, Micros(4_500));
        let usage = Usage { prompt_tokens: 40, cached_tokens: 16, completion_tokens: 2, ..Usage::default() };
        request.on_finish(&telemetry, Micros(5_000), FinishReason::Length, usage);
    });
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (field, expected) in [
        ("id", serde_json::json!("cmpl-1")),
        ("request", 7.into()),
        ("prompt_tokens", 40.into()),
        ("cached_tokens", 16.into()),
        ("completion_tokens", 2.into()),
        ("reason", "length".into()),
        ("level", "INFO".into()),
        ("target", "kvern::request".into()),
    ] {
        assert_eq!(line[field], expected, "{field} of {text}");
    }
    for (field, expected) in [("queue_ms", 1.0), ("ttft_ms", 3.0), ("itl_ms", 1.5), ("e2e_ms", 5.0)] {
        let found = line[field].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-9, "{field}: expected {expected}, found {found}");
    }
}
