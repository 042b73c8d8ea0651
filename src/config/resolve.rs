//! Args as typed -> Config as meant: defaults that depend on other settings, and checks across settings.

use super::args::{
    BenchArgs, Cli, Command, CpuIsaArg, DtypeArg, EngineArgs, GenerateArgs, KeyArgs, LogArgs, ModelArgs, RecordArgs,
    ReplayArgs, SchedulingArgs, ServeArgs, SimulateArgs,
};
use super::scheduling::{CLASSES_MAX, PoolLayout, PriorityClass, SchedulingConfig, WorkerLayout};
use super::{
    Action, BenchConfig, Config, ConfigError, EngineConfig, Environment, GenerateConfig, HubConfig, KeyConfig,
    LogConfig, ModelSource, Objectives, RecordConfig, ReplayConfig, Secret, ServerConfig, SimulateConfig, TraceSource,
    layers,
};
use clap::{CommandFactory, FromArgMatches};
use kvern_kernels::{CpuIsa, CpuOptions, KvDType, Precision};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

const HUB_ENDPOINT: &str = "https://huggingface.co";

/// Largest block: a longer one would make almost every prefix hit miss its tail.
const BLOCK_SIZE_MAX: u32 = 256;

/// Largest body: the front end keeps a body in memory while it parses it.
const BODY_BYTES_MAX: u64 = 1 << 30;

/// Requests of a synthetic trace where nothing is asked for.
const SYNTHETIC_REQUESTS: u64 = 10_000;

pub(super) fn resolve(argv: Vec<OsString>, environment: &Environment) -> Result<Config, ConfigError> {
    let cli = Cli::command();
    let name = argv.get(1).cloned();
    let layered = layers::merge(&cli, argv, environment)?;
    let command = match name.as_ref().and_then(|name| name.to_str()) {
        Some("generate") => Command::Generate(GenerateArgs::from_arg_matches(&layered.matches)?),
        Some("bench") => Command::Bench(BenchArgs::from_arg_matches(&layered.matches)?),
        Some("key") => Command::Key(KeyArgs::from_arg_matches(&layered.matches)?),
        Some("replay") => Command::Replay(ReplayArgs::from_arg_matches(&layered.matches)?),
        Some("simulate") => Command::Simulate(SimulateArgs::from_arg_matches(&layered.matches)?),
        _ => Command::Serve(ServeArgs::from_arg_matches(&layered.matches)?),
    };
    let (action, model, engine, log) = match command {
        Command::Serve(args) => {
            let model = ModelArgs { model: one_model(args.model_given, args.model.model)?, ..args.model };
            let server = ServerConfig {
                address: SocketAddr::new(args.server.host, args.server.port),
                served_model_names: args.server.served_model_name,
                api_keys: args.server.api_key,
                keys_file: args.server.keys,
                guard_metrics: args.server.guard_metrics,
                max_body_bytes: body_bytes(args.server.max_body_bytes)?,
                shutdown_timeout: args.server.shutdown_timeout,
                scheduling: scheduling_config(args.scheduling)?,
                record: record_config(args.record),
            };
            (Action::Serve(server), model, args.engine, args.log)
        }
        Command::Generate(args) => {
            let GenerateArgs { prompt, max_tokens, temperature, seed, raw, .. } = args;
            let generate = GenerateConfig { prompt, max_tokens, temperature, seed, raw };
            (Action::Generate(generate), args.model, args.engine, args.log)
        }
        Command::Bench(args) => {
            let model = ModelArgs { model: one_model(args.model_given, args.model.model)?, ..args.model };
            let BenchArgs { prefill, decode, attention, sampling, rounds, steps, limits, json, .. } = args;
            let workloads = [prefill, decode, attention, sampling].concat();
            let bench = BenchConfig { workloads, rounds, steps, limits, json };
            (Action::Bench(bench), model, args.engine, args.log)
        }
        Command::Key(KeyArgs { task, name, salt, log }) => {
            let unused = without_settings(&cli)?;
            (Action::Key(KeyConfig { task, name, salt }), unused.model, unused.engine, log)
        }
        Command::Replay(args) => {
            let unused = without_settings(&cli)?;
            let replay = ReplayConfig { path: args.recording };
            (Action::Replay(replay), unused.model, unused.engine, args.log)
        }
        Command::Simulate(args) => {
            let unused = without_settings(&cli)?;
            let log = args.log;
            let args = SimulateArgs { log: unused.log, ..args };
            (Action::Simulate(simulate_config(args)), unused.model, unused.engine, log)
        }
    };
    Ok(Config {
        action,
        model: model_source(model, environment)?,
        engine: engine_config(engine)?,
        log: log_config(log),
        notes: layered.notes,
        settings: layered.settings,
    })
}

/// The settings that a command without a model does not have, at their defaults.
fn without_settings(cli: &clap::Command) -> Result<ServeArgs, ConfigError> {
    let matches = cli.clone().try_get_matches_from(["kvern", "serve"])?;
    let (_, matches) = matches.subcommand().expect("clap matched serve");
    Ok(ServeArgs::from_arg_matches(matches)?)
}

fn record_config(args: RecordArgs) -> Option<RecordConfig> {
    let path = args.record?;
    Some(RecordConfig { path, bytes_max: args.record_max_bytes, prompts: args.record_prompts })
}

fn simulate_config(args: SimulateArgs) -> SimulateConfig {
    let is_endless = matches!(args.trace, Some(TraceSource::Synthetic(_)));
    SimulateConfig {
        trace: args.trace,
        profile: args.profile,
        requests_max: args.requests.or(is_endless.then_some(SYNTHETIC_REQUESTS)),
        speed_up: args.speed_up,
        objectives: Objectives { ttft: args.ttft, itl: args.itl },
        no_prefix_caching: args.no_prefix_caching,
        json: args.json,
        print_profile: args.print_profile,
    }
}

fn one_model(positional: Option<String>, flag: Option<String>) -> Result<Option<String>, ConfigError> {
    match (positional, flag) {
        (Some(a), Some(b)) if a != b => {
            Err(ConfigError::Conflict(format!("the model is given twice: `{a}` and --model `{b}`")))
        }
        (a, b) => Ok(a.or(b)),
    }
}

fn body_bytes(bytes: u64) -> Result<usize, ConfigError> {
    if bytes > BODY_BYTES_MAX {
        let message = format!("--max-body-bytes: expected at most {BODY_BYTES_MAX}, found {bytes}");
        return Err(ConfigError::Conflict(message));
    }
    Ok(usize::try_from(bytes).expect("a GiB fits the address space"))
}

fn model_source(args: ModelArgs, environment: &Environment) -> Result<ModelSource, ConfigError> {
    let home = environment.hub_home();
    let cache_dir = args
        .download_dir
        .or_else(|| environment.get("HF_HUB_CACHE").map(PathBuf::from))
        .unwrap_or_else(|| home.join("hub"));
    let token = environment.get("HF_TOKEN").map(str::to_owned).or_else(|| {
        let path = environment.get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        std::fs::read_to_string(path).ok()
    });
    let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()).map(Secret::new);
    let offline = match environment.get("HF_HUB_OFFLINE").map(str::to_ascii_lowercase).as_deref() {
        None | Some("0" | "false" | "no" | "off") => false,
        Some("1" | "true" | "yes" | "on") => true,
        Some(other) => {
            return Err(ConfigError::Conflict(format!("HF_HUB_OFFLINE: expected 0 or 1, found `{other}`")));
        }
    };
    let endpoint = environment.get("HF_ENDPOINT").unwrap_or(HUB_ENDPOINT).trim_end_matches('/').to_owned();
    let hub = HubConfig { cache_dir, token, endpoint, offline };
    Ok(ModelSource { name: args.model, revision: args.revision, models_dir: args.models_dir, hub })
}

fn engine_config(args: EngineArgs) -> Result<EngineConfig, ConfigError> {
    let conflict = |message: String| Err(ConfigError::Conflict(message));
    if let Some(found) = args.max_num_batched_tokens.filter(|tokens| *tokens < args.max_num_seqs) {
        return conflict(format!(
            "--max-num-batched-tokens: expected at least --max-num-seqs ({}), so that each running request gets a token \
             per step, found {found}",
            args.max_num_seqs
        ));
    }
    if args.block_size > BLOCK_SIZE_MAX {
        return conflict(format!("--block-size: expected at most {BLOCK_SIZE_MAX}, found {}", args.block_size));
    }
    let precision = match args.dtype {
        DtypeArg::Auto => Precision::AsStored,
        DtypeArg::F32 => Precision::F32,
        DtypeArg::Bf16 => Precision::BF16,
        DtypeArg::F16 => Precision::F16,
    };
    let kv_dtype = match args.kv_cache_dtype {
        DtypeArg::Auto => None,
        DtypeArg::F32 => Some(KvDType::F32),
        DtypeArg::Bf16 => Some(KvDType::BF16),
        DtypeArg::F16 => Some(KvDType::F16),
    };
    let isa = match args.cpu_isa {
        CpuIsaArg::Auto => None,
        CpuIsaArg::Scalar => Some(CpuIsa::Scalar),
        CpuIsaArg::Avx2 => Some(CpuIsa::Avx2),
        CpuIsaArg::Avx512 => Some(CpuIsa::Avx512),
        CpuIsaArg::Amx => Some(CpuIsa::Amx),
    };
    let threads = args.threads.map(|threads| usize::try_from(threads).expect("a u32 fits usize"));
    Ok(EngineConfig {
        max_model_len: args.max_model_len,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_num_queued_reqs: args.max_num_queued_reqs,
        block_size: args.block_size,
        prefix_caching: args.enable_prefix_caching && !args.no_enable_prefix_caching,
        kv_cache_memory_bytes: args.kv_cache_memory_bytes,
        precision,
        kv_dtype,
        device: args.device.config(),
        cpu: CpuOptions { threads, isa },
    })
}

fn scheduling_config(args: SchedulingArgs) -> Result<SchedulingConfig, ConfigError> {
    let conflict = |message: String| Err(ConfigError::Conflict(message));
    let classes = if args.class.is_empty() { PriorityClass::defaults() } else { args.class };
    if classes.len() > CLASSES_MAX {
        return conflict(format!("--class: expected at most {CLASSES_MAX} classes, found {}", classes.len()));
    }
    let twice = classes.iter().enumerate().find(|(at, class)| classes[..*at].iter().any(|c| c.name == class.name));
    if let Some((_, class)) = twice {
        return conflict(format!("--class: expected different names, found `{}` twice", class.name));
    }
    let is_split = args.workers == WorkerLayout::Split;
    if !is_split && (args.decode_threads.is_some() || args.kv_pools == PoolLayout::Apart) {
        return conflict("--decode-threads and --kv-pools apart need --workers split".to_owned());
    }
    if !is_split && args.decode_multiprocessors.is_some() {
        return conflict("--decode-multiprocessors needs --workers split".to_owned());
    }
    Ok(SchedulingConfig {
        classes,
        queued_tokens_max: args.max_num_queued_tokens,
        workers: args.workers,
        pools: args.kv_pools,
        decode_threads: args.decode_threads.map(|threads| usize::try_from(threads).expect("a u32 fits usize")),
        decode_multiprocessors: args.decode_multiprocessors,
        stall_timeout: args.stall_timeout,
        target_saturation: args.target_saturation,
    })
}

fn log_config(args: LogArgs) -> LogConfig {
    LogConfig { format: args.log_format, level: args.log_level, prompts: args.log_prompts }
}
