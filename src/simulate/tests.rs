#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::{Objectives, ProfileSource, Synthetic, TraceSource};
use kvern_core::{ClassSpec, CoreConfig, CostModel, Micros, PoolId, Role, WorkerSpec};
use proptest::prelude::*;
use std::collections::HashSet;
use std::io::Cursor;
use std::time::Duration;

fn trace(text: &str) -> Result<Trace, TraceError> {
    Trace::read(Box::new(Cursor::new(text.as_bytes().to_vec())), "FILE".to_owned(), 1.0)
}

fn arrivals(text: &str) -> Vec<Arrival> {
    trace(text).unwrap().collect::<Result<_, _>>().unwrap()
}

/// The error that a trace ends with.
fn error(text: &str) -> String {
    match trace(text) {
        Err(error) => error.to_string(),
        Ok(trace) => trace.collect::<Result<Vec<_>, _>>().unwrap_err().to_string(),
    }
}

const AZURE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n";

#[test]
fn reads_azure_s_traces() {
    let rows = |text: &str| -> Vec<(u64, u32, u32)> {
        arrivals(&format!("{AZURE}{text}"))
            .into_iter()
            .map(|arrival| (arrival.at.0, arrival.prompt_tokens, arrival.output_tokens))
            .collect()
    };
    // 2023: ticks of 100 ns, ends of lines as on Windows, none at the end.
    let found = rows(
        "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.0319600,3180,8\r\n2023-11-16 18:20:07.0417510,0,0",
    );
    assert_eq!(found, [(0, 4808, 10), (52_000, 3180, 8), (183_061_791, 1, 1)]);
    // 2024: with a zone, and without a fraction where it is 0; a day later, and an hour that does not count twice.
    let found = rows(
        "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 00:00:01+00:00,3,4\n\n2024-05-11 01:00:00.009930+01:00,5,6\n",
    );
    assert_eq!(found, [(0, 1, 2), (990_070, 3, 4), (86_400_000_000, 5, 6)]);
    let other = "GeneratedTokens, x ,TIMESTAMP,ContextTokens\n7,8,2024-05-10 00:00:00,9\n";
    let [arrival] = &arrivals(other)[..] else { panic!("one row") };
    assert_eq!((arrival.prompt_tokens, arrival.output_tokens, &arrival.content), (9, 7, &Content::Unique));
}

#[test]
fn reads_mooncake_s_traces_and_ours() {
    let text = r#"{"timestamp": 27482, "input_length": 1040, "output_length": 52, "hash_ids": [46, 47, 2353]}
{"timestamp": 30535.5, "input_length": 512, "output_length": 0, "hash_ids": [46], "session_id": "ignored"}

{"timestamp": 30600, "input_length": 100, "output_length": 5, "max_tokens": 50, "tenant": "a", "class": 2, "prefix": "p", "prefix_length": 60, "timeout": 1.5}
{"timestamp": 30599, "input_length": 70, "output_length": 5, "prefix": "p", "prefix_length": 70}"#;
    let mut reading = trace(text).unwrap();
    let found: Vec<Arrival> = reading.by_ref().map(Result::unwrap).collect();
    let shape =
        |arrival: &Arrival| (arrival.at.0, arrival.prompt_tokens, arrival.output_tokens, arrival.output_tokens_max);
    let shapes: Vec<_> = found.iter().map(shape).collect();
    assert_eq!(shapes, [(0, 1040, 52, 52), (3_053_500, 512, 1, 1), (3_118_000, 100, 5, 50), (3_118_000, 70, 5, 5)]);
    assert_eq!(reading.out_of_order(), 1);
    let third = &found[2];
    assert_eq!((third.tenant.as_deref(), third.class, third.timeout), (Some("a"), 2, Some(Micros(1_500_000))));
    let prompts: Vec<Vec<u32>> = found.iter().zip(1..).map(|(arrival, own)| arrival.prompt(own)).collect();
    assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [1040, 512, 100, 70]);
    assert_eq!(prompts[0][..512], prompts[1][..]);
    assert_eq!(prompts[2][..60], prompts[3][..60]);
    assert_ne!(prompts[2][60..70], prompts[3][60..70]);
    let different: HashSet<u32> = prompts[0].iter().copied().collect();
    assert!(different.len() > 1_030 && different.iter().all(|token| *token < 1 << 31));
    assert_ne!(found[3].prompt(1)[..70], Arrival { content: Content::Unique, ..found[3].clone() }.prompt(1)[..70]);
}

#[test]
fn bad_lines_are_told() {
    let azure = |row: &str| format!("{AZURE}2024-05-10 00:00:00,1,2\n{row}\n");
    let json = |row: &str| format!("{{\"timestamp\": 0, \"input_length\": 9, \"output_length\": 1}}\n{row}");
    let rest = r#""timestamp": 1, "input_length": 600, "output_length": 5"#;
    let table = [
        (
            String::new(),
            "FILE: expected lines of JSON or a header with TIMESTAMP, ContextTokens and GeneratedTokens, found ``",
        ),
        ("TIMESTAMP,ContextTokens\n".into(), "GeneratedTokens, found `TIMESTAMP,ContextTokens`"),
        (
            azure("2024-05-10,1,2"),
            "FILE, line 3: expected a time such as 2023-11-16 18:17:03.9799600, found `2024-05-10`",
        ),
        (azure("2024-05-10 00:00:00,x,2"), "line 3: expected a number in ContextTokens, found `x`"),
        (azure("2024-05-10 00:00:00,-1,2"), "line 3: expected a number in ContextTokens, found `-1`"),
        (azure("2024-05-10 00:00:00,1"), "line 3: expected a column GeneratedTokens"),
        (json("nonsense"), "FILE, line 2: expected"),
        (json("{\"timestamp\": 1, \"input_length\": 9}"), "line 2: missing field `output_length`"),
        (
            json("{\"timestamp\": -1, \"input_length\": 9, \"output_length\": 1}"),
            "line 2: expected a timestamp of 0 to",
        ),
        (json("{\"timestamp\": 1, \"input_length\": 99999999999, \"output_length\": 1}"), "line 2: invalid value"),
        (json(&format!("{{{rest}, \"hash_ids\": [1]}}")), "line 2: expected 2 hash_ids for 600 tokens, found 1"),
        (
            json(&format!("{{{rest}, \"hash_ids\": [1, 2], \"prefix\": \"p\"}}")),
            "expected hash_ids or a prefix, found both",
        ),
        (json(&format!("{{{rest}, \"prefix\": \"p\"}}")), "expected prefix and prefix_length together, found one"),
        (
            json(&format!("{{{rest}, \"prefix\": \"p\", \"prefix_length\": 601}}")),
            "at most input_length (600), found 601",
        ),
        (json(&format!("{{{rest}, \"max_tokens\": 4}}")), "expected max_tokens of at least output_length (5), found 4"),
        (json(&format!("{{{rest}, \"timeout\": -4}}")), "expected a timeout in seconds, found -4"),
    ];
    for (text, expected) in table {
        let found = error(&text);
        assert!(found.contains(expected), "{text:?}: expected {expected:?}, found {found:?}");
    }
    let missing = TraceSource::File("missing-trace".into());
    assert!(matches!(Trace::open(&missing, 1.0), Err(TraceError::Read { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any bytes are a trace or an error.
    #[test]
    fn any_bytes_are_read_or_refused(
        bytes in prop::collection::vec(prop_oneof![4 => 32u8..127, 1 => any::<u8>()], 0..300),
        header in prop_oneof![Just(""), Just(AZURE), Just("{")],
    ) {
        let bytes = [header.as_bytes(), &bytes].concat();
        if let Ok(trace) = Trace::read(Box::new(Cursor::new(bytes)), "FILE".to_owned(), 1.0) {
            let rows: Vec<_> = trace.collect();
            prop_assert!(rows.iter().rev().skip(1).all(Result::is_ok));
        }
    }
}

#[test]
fn profiles_are_written_as_they_are_read() {
    let default = Profile::default();
    assert_eq!(Profile::parse(default.to_toml().as_bytes()).unwrap(), default);
    assert_eq!(Profile::parse(b"").unwrap(), default);
    let toml = "pools = [100, 200]\nblock_size = 32\nprefix_caching = false\ntransfer_block_us = 7\n\
        [cost]\nstep_ps = 1\nprefill_token_ps = 2\nprefill_context_ps = 3\ndecode_sequence_ps = 4\ndecode_context_ps = 5\n\
        [[worker]]\nrole = \"prefill\"\n[[worker]]\nrole = \"decode\"\npool = 1\n\
        [[class]]\nttft_ms = 500.5\n[[class]]\nitl_ms = 20\n[[tenant]]\nname = \"a\"\nweight = 3\n";
    let profile = Profile::parse(toml.as_bytes()).unwrap();
    assert_eq!((profile.core.pools.as_slice(), profile.core.block_size), (&[100, 200][..], 32));
    assert_eq!(profile.core.workers[1], WorkerSpec { role: Role::Decode, pool: PoolId(1) });
    let class = ClassSpec { ttft: Some(Micros(500_500)), itl: None };
    assert_eq!((profile.core.classes[0], profile.core.classes[1].itl), (class, Some(Micros(20_000))));
    assert_eq!((profile.core.cost.decode_context_ps, profile.transfer_block_us, profile.tenants[0].weight), (5, 7, 3));
    assert_eq!(Profile::parse(profile.to_toml().as_bytes()).unwrap(), profile);
    let json = r#"{"pools": [100], "cost": {"step_ps": 1, "prefill_token_ps": 2, "prefill_context_ps": 3,
        "decode_sequence_ps": 4, "decode_context_ps": 5}}"#;
    assert_eq!(Profile::parse(json.as_bytes()).unwrap().core.pools, [100]);
    let bad = [
        ("block_size = 0", "expected 1 to 4294967295 tokens in a block, found 0"),
        ("blocksize = 1", "unknown field `blocksize`"),
        ("[[worker]]\nrole = \"mixed\"\npool = 3", "expected 0 to 0 workers without a pool, found 1"),
        ("[[class]]\nttft_ms = -1", "expected a time in milliseconds, found -1"),
        ("{", "EOF"),
    ];
    for (text, expected) in bad {
        let found = Profile::parse(text.as_bytes()).unwrap_err();
        assert!(found.contains(expected), "{text:?}: {found}");
    }
}

#[test]
fn a_recording_is_a_profile() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let core = CoreConfig { running_max: 7, ..CoreConfig::mixed(123, 8) };
    let mut bytes = Vec::new();
    kvern_core::record::write_header(&core, &mut bytes);
    std::fs::write(file.path(), &bytes).unwrap();
    let source = ProfileSource::File(file.path().to_owned());
    assert_eq!(Profile::open(&source).unwrap().core, core);
    std::fs::write(file.path(), &bytes[..20]).unwrap();
    assert!(Profile::open(&source).unwrap_err().to_string().contains("expected a whole entry"));
}

/// A machine whose times are easy to add up: 10 ms a step, 1 ms a prompt token, 2 ms a decoding sequence.
fn machine(core: CoreConfig) -> Profile {
    let cost = CostModel {
        step_ps: 10_000_000_000,
        prefill_token_ps: 1_000_000_000,
        prefill_context_ps: 0,
        decode_sequence_ps: 2_000_000_000,
        decode_context_ps: 0,
    };
    Profile { core: CoreConfig { cost, ..core }, ..Profile::default() }
}

fn run(text: &str, profile: &Profile, objectives: Objectives) -> Figures {
    simulate(trace(text).unwrap(), profile, objectives).unwrap()
}

#[test]
fn times_are_those_of_the_cost_model() {
    let profile = machine(CoreConfig::mixed(100, 16));
    let text = r#"{"timestamp": 5, "input_length": 100, "output_length": 4}
{"timestamp": 60, "input_length": 30, "output_length": 2}"#;
    let limit = |ms| Some(Duration::from_millis(ms));
    let figures = run(text, &profile, Objectives { ttft: limit(110), itl: limit(30) });
    // The first runs alone for 10 + 100 ms. The second comes 55 ms after it, waits 55 and has its prompt computed beside a
    // decode in 10 + 2 + 30 ms: 97 ms. Then both decode for 10 + 2 + 2 ms, and the first one alone for 10 + 2.
    assert_eq!((figures.submitted, figures.served, figures.steps), (2, 2, 4));
    assert_eq!(figures.simulated, Micros(110_000 + 42_000 + 14_000 + 12_000));
    let near = |found: Micros, expected_ms: u64| found.0.abs_diff(expected_ms * 1_000) * 100 <= expected_ms * 1_000;
    assert!(
        near(figures.ttft.percentile(50.0), 97) && near(figures.ttft.percentile(100.0), 110),
        "{:?}",
        figures.ttft.percentile(50.0)
    );
    assert_eq!(figures.itl.total(), 4);
    assert!(near(figures.itl.percentile(25.0), 12) && near(figures.itl.percentile(100.0), 42));
    // Their mean gaps are (42 + 14 + 12) / 3 and 14 ms.
    assert_eq!(figures.good, 2);
    assert_eq!(run(text, &profile, Objectives { ttft: limit(109), itl: None }).good, 1);
    assert_eq!(run(text, &profile, Objectives { ttft: None, itl: limit(22) }).good, 1);
    assert_eq!((figures.prompt_tokens, figures.computed_tokens, figures.output_tokens), (130, 130, 6));
}

#[test]
fn prefixes_hit_within_a_tenant_and_not_without_a_cache() {
    let row = |at: u32, tenant: &str| {
        format!(
            "{{\"timestamp\": {at}, \"input_length\": 1024, \"output_length\": 1, \"hash_ids\": [1, {at}], \"tenant\": \"{tenant}\"}}\n"
        )
    };
    let text = [row(1, "a"), row(9_000, "a"), row(20_000, "b"), row(30_000, "a")].concat();
    let profile = machine(CoreConfig::mixed(1_000, 16));
    let figures = run(&text, &profile, Objectives::default());
    assert_eq!((figures.prefix_hits, figures.prefix_queries), (1_024, 4_096));
    assert_eq!((figures.hit_rate(), figures.computed_tokens, figures.served), (0.25, 3_072, 4));
    let row = |at: u32, tenant: &str, public: bool| {
        format!(
            "{{\"timestamp\": {at}, \"input_length\": 1024, \"output_length\": 1, \"prefix\": \"p\", \
             \"prefix_length\": 500, \"tenant\": \"{tenant}\", \"public\": {public}}}\n"
        )
    };
    let rows = |public| [row(1, "a", public), row(9_000, "b", public)].concat();
    // Whole blocks of 16 tokens.
    assert_eq!(run(&rows(true), &profile, Objectives::default()).prefix_hits, 496);
    assert_eq!(run(&rows(false), &profile, Objectives::default()).prefix_hits, 0);
    let mut without = profile.clone();
    without.core.prefix_caching = false;
    assert_eq!(run(&text, &without, Objectives::default()).hit_rate(), 0.0);
}

#[test]
fn tenants_share_by_weight() {
    let rows = (0..400).map(|at| {
        let tenant = ["a", "b"][at % 2];
        format!("{{\"timestamp\": 0, \"input_length\": 40, \"output_length\": 10, \"tenant\": \"{tenant}\"}}\n")
    });
    let text: String = rows.collect();
    let even = run(&text, &machine(CoreConfig::mixed(200, 16)), Objectives::default());
    assert_eq!((even.tenants.len(), even.served), (2, 400));
    assert!((even.fairness() - 1.0).abs() < 1e-9);
    // By the weights that the profile has, equal tokens are three to one.
    let mut profile = machine(CoreConfig::mixed(200, 16));
    profile.tenants = Profile::parse(b"[[tenant]]\nname = \"a\"\nweight = 3").unwrap().tenants;
    let found = run(&text, &profile, Objectives::default()).fairness();
    assert!((found - 0.8).abs() < 1e-9, "{found}");
}

#[test]
fn overload_is_refused_and_lateness_is_stopped() {
    let rows = |timeout: &str| -> String {
        let row = |_| format!("{{\"timestamp\": 0, \"input_length\": 100, \"output_length\": 20{timeout}}}\n");
        (0..100).map(row).collect()
    };
    let core = CoreConfig { waiting_max: 30, running_max: 4, ..CoreConfig::mixed(100, 16) };
    let figures = run(&rows(""), &machine(core.clone()), Objectives::default());
    assert_eq!((figures.refused[3], figures.served, figures.dropped()), (70, 30, 70));
    let figures = run(&rows(", \"timeout\": 1.0"), &machine(core), Objectives::default());
    assert!(figures.refused[5] > 0 || figures.late > 0);
    assert_eq!(figures.served + figures.dropped(), 100);
    let long = "{\"timestamp\": 0, \"input_length\": 5000, \"output_length\": 20}";
    let figures = run(long, &machine(CoreConfig::mixed(100, 16)), Objectives::default());
    assert_eq!((figures.refused[1], figures.served, figures.per_second(1)), (1, 0, 0.0));
}

#[test]
fn answers_end_before_the_client_s_limit() {
    let text = "{\"timestamp\": 0, \"input_length\": 50, \"output_length\": 7, \"max_tokens\": 500}";
    let figures = run(text, &machine(CoreConfig::mixed(100, 16)), Objectives::default());
    assert_eq!((figures.output_tokens, figures.served), (7, 1));
}

#[test]
fn split_workers_transfer_and_both_synthetic_traces_run_alike_twice() {
    let split = CoreConfig {
        workers: [(Role::Prefill, 0), (Role::Decode, 1)]
            .map(|(role, pool)| WorkerSpec { role, pool: PoolId(pool) })
            .to_vec(),
        pools: vec![4_000, 4_000],
        waiting_max: 1_000,
        ..CoreConfig::mixed(1, 16)
    };
    let profiles = [Profile::default(), Profile { core: split, transfer_block_us: 50, ..Profile::default() }];
    for profile in profiles {
        for kind in [Synthetic::Azure, Synthetic::Mooncake] {
            let figures = |_| {
                let trace = Trace::open(&TraceSource::Synthetic(kind), 0.5).unwrap();
                simulate(trace.take(300), &profile, Objectives::default()).unwrap()
            };
            let [a, b] = [0, 1].map(figures);
            assert_eq!(a.submitted, 300);
            assert_eq!(a.failed, 0);
            assert!(a.served > 250, "{kind:?}: {} served", a.served);
            let key =
                |f: &Figures| (f.served, f.steps, f.simulated, f.preemptions, f.prefix_hits, f.ttft.percentile(50.0));
            assert_eq!(key(&a), key(&b));
            assert_eq!(a.prefix_hits > 0, kind == Synthetic::Mooncake);
        }
    }
}

#[test]
fn synthetic_lengths_are_those_of_the_public_traces() {
    let mean = |kind, of: fn(&Arrival) -> u32| {
        let trace = Trace::open(&TraceSource::Synthetic(kind), 1.0).unwrap();
        let arrivals: Vec<Arrival> = trace.take(20_000).map(Result::unwrap).collect();
        let last = arrivals.last().unwrap().at.0 as f64 / 1e6;
        (arrivals.iter().map(|arrival| f64::from(of(arrival))).sum::<f64>() / 20_000.0, 20_000.0 / last)
    };
    let within = |found: f64, expected: f64| (found - expected).abs() < expected * 0.1;
    let (prompt, rate) = mean(Synthetic::Azure, |arrival| arrival.prompt_tokens);
    assert!(within(prompt, 1_150.0) && within(rate, 10.0), "{prompt} {rate}");
    let (output, _) = mean(Synthetic::Azure, |arrival| arrival.output_tokens);
    assert!(within(output, 205.0), "{output}");
    let (prompt, rate) = mean(Synthetic::Mooncake, |arrival| arrival.prompt_tokens);
    assert!((4_000.0..20_000.0).contains(&prompt) && within(rate, 2.0), "{prompt} {rate}");
}

#[test]
fn the_command_writes_a_table_json_or_the_profile() {
    let config = |json, print_profile| SimulateConfig {
        trace: Some(TraceSource::Synthetic(Synthetic::Azure)),
        profile: ProfileSource::Default,
        requests_max: Some(50),
        speed_up: 1.0,
        objectives: Objectives { ttft: Some(Duration::from_secs(2)), itl: None },
        no_prefix_caching: false,
        json,
        print_profile,
    };
    let text = |config: &SimulateConfig| {
        let mut out = Vec::new();
        super::run(config, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    };
    let table = text(&config(false, false));
    for part in
        ["p50", "ttft, ms", "itl, ms", "requests     50: 50 served", "goodput", "(ttft <= 2000 ms)", "times as fast"]
    {
        assert!(table.contains(part), "{part:?} in {table}");
    }
    let json: serde_json::Value = serde_json::from_str(&text(&config(true, false))).unwrap();
    assert_eq!(
        (&json["requests"], &json["served"], &json["objective_ttft_ms"]),
        (&50.into(), &50.into(), &2000.0.into())
    );
    assert_eq!(Profile::parse(text(&config(false, true)).as_bytes()).unwrap(), Profile::default());
}
