#![allow(clippy::unwrap_used)]

use super::*;
use kvern_kernels::PrefillKernel;

/// Variables of an environment.
type Variables<'a> = &'a [(&'a str, &'a str)];

fn resolve(args: &[&str], env: Variables<'_>) -> Result<Config, ConfigError> {
    let argv = std::iter::once("kvern").chain(args.iter().copied()).map(OsString::from).collect();
    Config::resolve(argv, &Environment::from_pairs(env))
}

fn server(config: &Config) -> &ServerConfig {
    match &config.action {
        Action::Serve(server) => server,
        other => panic!("expected serve, found {other:?}"),
    }
}

/// The row of a setting: `value | origin`.
fn row(config: &Config, name: &str) -> String {
    let setting = config.settings.iter().find(|setting| setting.name == name).unwrap();
    format!("{} | {}", setting.value, setting.origin)
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn defaults() {
    let config = resolve(&["serve"], &[("HOME", "/h")]).unwrap();
    let server = server(&config);
    assert_eq!(server.address, "0.0.0.0:8000".parse().unwrap());
    assert_eq!((server.served_model_names.len(), server.api_keys.len()), (0, 0));
    assert_eq!((server.max_body_bytes, server.shutdown_timeout), (16 << 20, Duration::from_secs(25)));
    let engine = &config.engine;
    assert_eq!((engine.block_size, engine.max_num_seqs, engine.max_num_batched_tokens), (16, 256, None));
    assert_eq!(engine.device, DeviceConfig::default());
    let cpu = kvern_kernels::Device::cpu(CpuOptions { threads: Some(1), isa: None }).unwrap();
    assert_eq!(engine.step_tokens_max(&cpu), 512);
    assert_eq!((engine.max_num_queued_reqs, engine.max_model_len, engine.kv_cache_memory_bytes), (1024, None, None));
    assert!(engine.prefix_caching && engine.cpu.threads.is_none() && engine.cpu.isa.is_none());
    assert_eq!((engine.precision, engine.kv_dtype), (Precision::AsStored, None));
    assert_eq!(config.model.name, None);
    assert_eq!(config.model.hub.cache_dir, PathBuf::from("/h/.cache/huggingface/hub"));
    assert_eq!((config.model.hub.endpoint.as_str(), config.model.hub.offline), ("https://huggingface.co", false));
    assert_eq!(config.log, LogConfig { format: LogFormat::Text, level: "info".into(), prompts: false });
    assert!(config.settings.iter().all(|setting| setting.origin == Origin::Default));
}

#[test]
fn kernels_of_prefill_attention() {
    for (name, kernel) in
        [("auto", PrefillKernel::Auto), ("portable", PrefillKernel::Portable), ("hopper", PrefillKernel::Hopper)]
    {
        let config = resolve(&["serve", "--prefill-attention", name], &[("HOME", "/h")]).unwrap();
        assert_eq!(config.engine.device.prefill_attention, kernel);
    }
}

/// Each layer alone and above the next, for a number, a list, a switch and the model.
#[test]
fn precedence() {
    let file = file(
        "port = 1\nmax_model_len = \"1k\"\nserved-model-name = [\"a\", \"b\"]\nenable_prefix_caching = false\n\
         model = \"file/model\"\nlog_prompts = true\n",
    );
    let path = file.path().to_str().unwrap();
    let env = [
        ("KVERN_PORT", "2"),
        ("KVERN_SERVED_MODEL_NAME", "c,d"),
        ("KVERN_ENABLE_PREFIX_CACHING", "true"),
        ("KVERN_MODEL", "env/model"),
    ];
    let flags = ["serve", "flag/model", "--port", "3", "--served-model-name", "e", "f", "--no-enable-prefix-caching"];
    let with_file =
        |args: &[&'static str]| [args, &["--config", path]].concat().iter().map(|s| (*s).to_owned()).collect();
    let cases: [(Vec<String>, Variables<'_>, [&str; 4]); 4] = [
        (vec!["serve".into()], &[], ["8000 | default", "- | default", "true | default", "- | default"]),
        (with_file(&["serve"]), &[], ["1 | FILE", "a, b | FILE", "false | FILE", "file/model | FILE"]),
        (
            with_file(&["serve"]),
            &env,
            [
                "2 | KVERN_PORT",
                "c, d | KVERN_SERVED_MODEL_NAME",
                "true | KVERN_ENABLE_PREFIX_CACHING",
                "env/model | KVERN_MODEL",
            ],
        ),
        (with_file(&flags), &env, ["3 | flag", "e, f | flag", "false | flag", "flag/model | flag"]),
    ];
    for (args, env, expected) in cases {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let config = resolve(&args, env).unwrap();
        let names = ["port", "served-model-name", "enable-prefix-caching", "model"];
        for (name, expected) in names.iter().zip(expected) {
            assert_eq!(row(&config, name).replace(path, "FILE"), expected, "{args:?} {env:?} {name}");
        }
        let value = |name: &str| row(&config, name).split(" | ").next().unwrap().to_owned();
        assert_eq!(value("port"), server(&config).address.port().to_string());
        assert_eq!(value("enable-prefix-caching"), config.engine.prefix_caching.to_string());
        assert_eq!(value("model"), config.model.name.as_deref().unwrap_or("-"));
    }
}

#[test]
fn the_environment_finds_the_file_and_a_file_may_hold_settings_of_the_other_command() {
    let file = file("config_note = 1");
    let path = file.path().to_str().unwrap();
    let error = resolve(&["serve"], &[("KVERN_CONFIG", path)]).unwrap_err().to_string();
    assert!(error.contains("unknown key `config_note`"), "{error}");
    let file = self::file("port = 1\ntemperature = 0.5\nthreads = 3");
    let path = file.path().to_str().unwrap();
    let config = resolve(&["generate", "hello"], &[("KVERN_CONFIG", path)]).unwrap();
    let Action::Generate(generate) = &config.action else { panic!("expected generate") };
    assert_eq!((generate.prompt.as_str(), generate.temperature), ("hello", 0.5));
    assert_eq!(config.engine.cpu.threads, Some(3));
    assert!(config.describe().contains(path));
}

#[test]
fn benchmarks() {
    let bench = |args: &[&str], env| match resolve(&[&["bench"], args].concat(), env).unwrap().action {
        Action::Bench(bench) => bench,
        other => panic!("expected bench, found {other:?}"),
    };
    let found = bench(&[], &[]);
    assert_eq!((found.rounds, found.steps, found.limits, found.json), (5, 32, false, false));
    assert_eq!(found.workloads, []);
    let prefill = |tokens| Workload::Prefill { tokens };
    let decode = |streams, context| Workload::Decode { streams, context };
    let attention = |groups| Workload::Attention { groups };
    let sampling = |rows, kind| Workload::Sampling { rows, kind };
    let cases: [(&[&str], Variables<'_>, &[Workload]); 6] = [
        (
            &["--sampling", "greedy:1,filtered:256"],
            &[],
            &[sampling(1, Sampling::Greedy), sampling(256, Sampling::Filtered)],
        ),
        (
            &["--attention", "8x1k,1x32k+3x64,2K"],
            &[],
            &[
                attention([(8, 1000), (0, 0)]),
                attention([(1, 32_000), (3, 64)]),
                Workload::PromptAttention { tokens: 2048 },
            ],
        ),
        (&["--prefill", "512,2k"], &[], &[prefill(512), prefill(2000)]),
        (&["--decode", "1x128,16x4K", "--prefill=7"], &[], &[prefill(7), decode(1, 128), decode(16, 4096)]),
        (&[], &[("KVERN_DECODE", "2x3,4x5")], &[decode(2, 3), decode(4, 5)]),
        (&["--decode=1x1"], &[("KVERN_DECODE", "2x3")], &[decode(1, 1)]),
    ];
    for (args, env, expected) in cases {
        assert_eq!(bench(args, env).workloads, expected, "{args:?} {env:?}");
    }
    let found = bench(&["--json", "--limits", "--rounds", "3", "--steps=8", "--threads=2", "the/model"], &[]);
    assert_eq!((found.rounds, found.steps, found.limits, found.json), (3, 8, true, true));
    for args in [["--decode", "16"], ["--decode", "x5"], ["--decode", "1x0"], ["--prefill", "0"], ["--rounds", "0"]]
        .into_iter()
        .chain([["--attention", "1x5+"], ["--attention", "+1x5"], ["--attention", "1x5+0x5"], ["--attention", "0"]])
        .chain([["--sampling", "greedy"], ["--sampling", "greedy:0"], ["--sampling", "beam:3"]])
    {
        let error = resolve(&[&["bench"][..], &args].concat(), &[]).unwrap_err();
        assert!(matches!(error, ConfigError::Usage(_)), "{args:?}: {error}");
    }
}

#[test]
fn workloads_say_what_they_take() {
    let cases = [
        (Workload::Prefill { tokens: 512 }, "prefill 512", 1, 512, 512),
        (Workload::Decode { streams: 16, context: 128 }, "decode 16x128", 16, 160, 512),
        (Workload::Attention { groups: [(16, 128), (0, 0)] }, "attention 16x128", 16, 128, 512),
        (Workload::Attention { groups: [(1, 900), (15, 128)] }, "attention 1x900+15x128", 16, 900, 512),
        (Workload::Attention { groups: [(1, 128), (15, 900)] }, "attention 1x128+15x900", 16, 900, 512),
        (Workload::PromptAttention { tokens: 900 }, "attention 900", 1, 900, 28_800),
        (Workload::Sampling { rows: 16, kind: Sampling::Penalties }, "sampling penalties:16", 16, 0, 512),
    ];
    for (workload, name, streams, context_max, tokens) in cases {
        assert_eq!(workload.to_string(), name);
        let found = (workload.streams(), workload.context_max(32), workload.tokens(32));
        assert_eq!(found, (streams, context_max, tokens), "{name}");
    }
}

#[test]
fn wrong_settings_say_where_they_stand() {
    let cases: [(&str, &[&str], Variables<'_>, &[&str]); 14] = [
        (
            "max_modle_len = 5",
            &["serve"],
            &[],
            &["FILE", "unknown key `max_modle_len`", "did you mean `max_model_len`?"],
        ),
        ("zzzzzzzzzzzzzz = 5", &["serve"], &[], &["unknown key `zzzzzzzzzzzzzz`"]),
        ("port = 70000", &["serve"], &[], &["FILE", "70000", "--port"]),
        ("port = {}", &["serve"], &[], &["FILE", "`port`", "found a table"]),
        ("port = 1\nport = 2", &["serve"], &[], &["FILE", "duplicate key"]),
        ("max_num_seqs = 1\nmax-num-seqs = 2", &["serve"], &[], &["max", "twice"]),
        ("api_key = [\"\"]", &["serve"], &[], &["FILE", "empty"]),
        ("", &["serve"], &[("KVERN_PORT", "eighty")], &["KVERN_PORT", "eighty"]),
        ("", &["serve"], &[("KVERN_DTYPE", "f64")], &["KVERN_DTYPE", "f64", "possible values"]),
        ("", &["serve"], &[("HF_HUB_OFFLINE", "maybe")], &["HF_HUB_OFFLINE", "maybe"]),
        (
            "",
            &["serve", "--max-num-seqs", "1024", "--max-num-batched-tokens", "512"],
            &[],
            &["--max-num-batched-tokens", "1024", "512"],
        ),
        ("", &["serve", "--block-size", "257"], &[], &["--block-size", "256", "257"]),
        ("", &["serve", "--max-body-bytes", "2GiB"], &[], &["--max-body-bytes"]),
        ("", &["serve", "a", "--model", "b"], &[], &["twice", "`a`", "`b`"]),
    ];
    for (text, args, env, expected) in cases {
        let file = file(text);
        let path = file.path().to_str().unwrap();
        let args = [args, &["--config", path]].concat();
        let error = resolve(&args, env).unwrap_err().to_string().replace(path, "FILE");
        for part in expected {
            assert!(error.contains(part), "{text:?} {args:?}: {error:?} lacks {part:?}");
        }
    }
    let error = resolve(&["serve", "--config", "no-such-file.toml"], &[]).unwrap_err().to_string();
    assert!(error.contains("cannot read the configuration file no-such-file.toml"), "{error}");
}

#[test]
fn typed_mistakes_are_clap_errors() {
    for args in [&["serve", "--port", "x"][..], &["serve", "--nope"], &["generate"], &["help"], &[], &["walk"]] {
        assert!(matches!(resolve(args, &[]), Err(ConfigError::Usage(_))), "{args:?}");
    }
}

#[test]
fn keys_and_tokens_are_never_shown() {
    let env = [("HF_TOKEN", "hf_secret"), ("KVERN_API_KEY", "key-one,key-two")];
    let config = resolve(&["serve"], &env).unwrap();
    assert_eq!(row(&config, "api-key"), "2 hidden | KVERN_API_KEY");
    assert_eq!(config.model.hub.token.as_ref().unwrap().reveal(), "hf_secret");
    assert_eq!(server(&config).api_keys[1].reveal(), "key-two");
    for text in [config.describe(), format!("{config:?}")] {
        assert!(!text.contains("hf_secret") && !text.contains("key-"), "{text}");
    }
}

#[test]
fn a_list_flag_from_another_layer_does_not_swallow_the_model() {
    let config = resolve(&["serve", "the/model"], &[("KVERN_API_KEY", "k"), ("KVERN_SERVED_MODEL_NAME", "n")]).unwrap();
    assert_eq!(config.model.name.as_deref(), Some("the/model"));
    assert_eq!(server(&config).served_model_names, ["n"]);
}

#[test]
fn a_kubernetes_service_link_is_not_a_port() {
    let config = resolve(&["serve"], &[("KVERN_PORT", "tcp://10.0.0.1:80")]).unwrap();
    assert_eq!(server(&config).address.port(), 8000);
    assert!(config.notes[0].contains("Service link"), "{:?}", config.notes);
}

#[test]
fn a_gpu_is_divided_between_split_workers_alone() {
    let found = |args: &[&str]| resolve(&[&["serve"][..], args].concat(), &[]).map(|config| server(&config).clone());
    let split = ["--workers", "split", "--decode-multiprocessors", "48"];
    assert_eq!(found(&split).unwrap().scheduling.decode_multiprocessors, Some(48));
    assert_eq!(found(&split[..2]).unwrap().scheduling.decode_multiprocessors, None);
    let error = found(&split[2..]).unwrap_err().to_string();
    assert_eq!(error, "--decode-multiprocessors needs --workers split");
}

#[test]
fn launches_take_turns_unless_asked_otherwise() {
    let cases: [(&[&str], Variables<'_>, bool); 5] = [
        (&["serve"], &[], false),
        (&["serve", "--programmatic-launches", "auto"], &[], false),
        (&["serve", "--programmatic-launches", "off"], &[], false),
        (&["bench", "--programmatic-launches=on"], &[], true),
        (&["serve"], &[("KVERN_PROGRAMMATIC_LAUNCHES", "on")], true),
    ];
    for (args, env, expected) in cases {
        assert_eq!(resolve(args, env).unwrap().engine.device.programmatic_launches, expected, "{args:?} {env:?}");
    }
    assert!(resolve(&["serve", "--programmatic-launches", "yes"], &[]).is_err());
    let Err(ConfigError::Usage(help)) = resolve(&["serve", "--help"], &[]) else { panic!("help") };
    assert!(!help.to_string().contains("programmatic"), "not offered before it is measured");
}

#[test]
fn switches_and_dtypes() {
    let (f32, f16, bf16) = (Some(KvDType::F32), Some(KvDType::F16), Some(KvDType::BF16));
    let cases: [(&[&str], bool, Precision, Option<KvDType>); 10] = [
        (&["serve", "--enable-prefix-caching=false"], false, Precision::AsStored, None),
        (&["serve", "--no-enable-prefix-caching=false"], true, Precision::AsStored, None),
        (&["serve", "--enable-prefix-caching", "--dtype", "f32"], true, Precision::F32, None),
        (&["serve", "--dtype", "float32", "--kv-cache-dtype", "bf16"], true, Precision::F32, bf16),
        (&["serve", "--dtype", "bfloat16", "--kv-cache-dtype", "f32"], true, Precision::BF16, f32),
        (&["serve", "--dtype", "f16", "--kv-cache-dtype", "auto"], true, Precision::F16, None),
        (&["serve", "--dtype", "float16", "--kv-cache-dtype", "half"], true, Precision::F16, f16),
        (&["serve", "--dtype", "half", "--kv-cache-dtype", "float16"], true, Precision::F16, f16),
        (&["serve", "--dtype", "auto", "--kv-cache-dtype", "bfloat16"], true, Precision::AsStored, bf16),
        (&["serve", "--no-enable-prefix-caching", "--cpu-isa", "avx2"], false, Precision::AsStored, None),
    ];
    for (args, caching, precision, kv) in cases {
        let engine = resolve(args, &[]).unwrap().engine;
        assert_eq!((engine.prefix_caching, engine.precision, engine.kv_dtype), (caching, precision, kv), "{args:?}");
    }
}

#[test]
fn amounts() {
    let cases: [(&str, Option<u64>); 21] = [
        ("1", Some(1)),
        ("4096", Some(4096)),
        ("8k", Some(8_000)),
        ("8K", Some(8_192)),
        ("4GiB", Some(4 << 30)),
        ("4 GiB", Some(4 << 30)),
        ("1.5GiB", Some(3 << 29)),
        ("0.5KB", Some(500)),
        ("16T", Some(16 << 40)),
        ("999999999999999999", Some(999_999_999_999_999_999)),
        ("", None),
        ("0", None),
        ("-1", None),
        ("1e9", None),
        ("GiB", None),
        ("1.", None),
        (".5G", None),
        ("4 gib", None),
        ("NaN", None),
        ("99999999999999999999", None),
        ("999999999999999999T", None),
    ];
    for (text, expected) in cases {
        assert_eq!(values::parse_amount(text).ok(), expected, "{text:?}");
    }
}

#[test]
fn the_hub_cache_follows_its_variables() {
    let cases: [(&[&str], Variables<'_>, &str); 5] = [
        (&[], &[], ".cache/huggingface/hub"),
        (&[], &[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")], "/x/huggingface/hub"),
        (&[], &[("HF_HOME", "/hf"), ("HOME", "/h")], "/hf/hub"),
        (&[], &[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/cache")], "/cache"),
        (&["--download-dir", "/d"], &[("HF_HUB_CACHE", "/cache")], "/d"),
    ];
    for (args, env, expected) in cases {
        let config = resolve(&[&["serve"], args].concat(), env).unwrap();
        assert_eq!(config.model.hub.cache_dir, PathBuf::from(expected), "{args:?} {env:?}");
    }
}

#[test]
fn recordings() {
    let record = |args: &[&str], env| server(&resolve(&[&["serve"], args].concat(), env).unwrap()).record.clone();
    assert_eq!(record(&["--record-prompts", "--record-max-bytes=5"], &[]), None);
    let path = PathBuf::from("a.rec");
    let plain = RecordConfig { path: path.clone(), bytes_max: 1 << 30, prompts: false };
    assert_eq!(record(&["--record", "a.rec"], &[]), Some(plain));
    let variables = [("KVERN_RECORD", "a.rec"), ("KVERN_RECORD_MAX_BYTES", "2k"), ("KVERN_RECORD_PROMPTS", "true")];
    assert_eq!(record(&[], &variables), Some(RecordConfig { path: path.clone(), bytes_max: 2_000, prompts: true }));
    let replay = resolve(&["replay", "a.rec", "--log-level", "debug"], &[]).unwrap();
    assert_eq!((replay.action, replay.log.level.as_str()), (Action::Replay(ReplayConfig { path }), "debug"));
}

#[test]
fn simulations() {
    let simulate = |args: &[&str], env| match resolve(&[&["simulate"], args].concat(), env).unwrap().action {
        Action::Simulate(simulate) => simulate,
        other => panic!("expected simulate, found {other:?}"),
    };
    let plain = simulate(&["trace.csv"], &[]);
    assert_eq!(plain.trace, Some(TraceSource::File("trace.csv".into())));
    assert_eq!((plain.profile, plain.requests_max, plain.speed_up), (ProfileSource::Default, None, 1.0));
    assert_eq!(plain.objectives, Objectives::default());
    assert!(!plain.no_prefix_caching && !plain.json && !plain.print_profile);
    let flags =
        ["synthetic:azure", "--speed-up", "2.5", "--ttft=1500", "--itl", "12.5", "--no-prefix-caching", "--json"];
    let found = simulate(&flags, &[("KVERN_PROFILE", "p.toml")]);
    assert_eq!(found.trace, Some(TraceSource::Synthetic(Synthetic::Azure)));
    assert_eq!((found.profile, found.requests_max), (ProfileSource::File("p.toml".into()), Some(10_000)));
    let (ttft, itl) = (Duration::from_millis(1_500), Duration::from_micros(12_500));
    assert_eq!(found.objectives, Objectives { ttft: Some(ttft), itl: Some(itl) });
    assert!(found.speed_up == 2.5 && found.no_prefix_caching && found.json);
    assert_eq!(simulate(&["synthetic:mooncake", "--requests", "7k"], &[]).requests_max, Some(7_000));
    assert!(simulate(&["--print-profile"], &[]).print_profile);
    for args in [&[][..], &["synthetic:x"], &["t", "--speed-up=0"], &["t", "--ttft=-1"], &["t", "--requests=0"]] {
        let error = resolve(&[&["simulate"][..], args].concat(), &[]).unwrap_err();
        assert!(matches!(error, ConfigError::Usage(_)), "{args:?}: {error}");
    }
}
