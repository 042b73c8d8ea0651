//! The command line as typed. Flags carry vLLM's names where vLLM has the flag; the text of a flag's help is here only.

use super::bench::{Workload, parse_attention, parse_decode, parse_prefill, parse_sampling};
use super::device::DeviceArgs;
use super::scheduling::{PoolLayout, PriorityClass, WorkerLayout, parse_class, parse_saturation};
use super::simulate::{ProfileSource, TraceSource, parse_factor, parse_milliseconds, parse_profile, parse_trace};
use super::values::{
    Secret, parse_amount, parse_count, parse_filled, parse_host, parse_log_level, parse_seconds, parse_secret,
    parse_temperature,
};
use crate::keys::Salt;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A self-hosted LLM inference server with the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "kvern", version, arg_required_else_help = true, max_term_width = 110)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

/// Where else a setting can stand; shown below each subcommand's help.
const LAYERS_HELP: &str = "Every flag but --config is also an environment variable (--max-model-len is KVERN_MAX_MODEL_LEN) \
and a key of the file of --config (max_model_len). A flag wins over the environment, the environment over the file.";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve a model through the OpenAI API
    #[command(after_help = LAYERS_HELP)]
    Serve(ServeArgs),
    /// Answer one prompt on the terminal
    #[command(after_help = LAYERS_HELP)]
    Generate(GenerateArgs),
    /// Time a model's prefill and decoding, without the server
    #[command(after_help = LAYERS_HELP)]
    Bench(BenchArgs),
    /// Make an entry of the keys file
    Key(KeyArgs),
    /// Repeat what `serve --record` has recorded, and compare every decision of the scheduler
    #[command(after_help = LAYERS_HELP)]
    Replay(ReplayArgs),
    /// Run a workload through the scheduler, on a machine that is only calculated
    #[command(after_help = LAYERS_HELP)]
    Simulate(SimulateArgs),
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Path, Hugging Face repository (OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:Q4_K_M) or file in --models-dir
    #[arg(value_name = "MODEL", value_parser = parse_filled)]
    pub(super) model_given: Option<String>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
    #[command(flatten)]
    pub(super) scheduling: SchedulingArgs,
    #[command(flatten)]
    pub(super) record: RecordArgs,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// What the model answers
    #[arg(value_name = "PROMPT")]
    pub(super) prompt: String,
    /// Most tokens to generate [default: until the model stops or the context is full]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub(super) max_tokens: Option<u32>,
    /// Randomness of sampling; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value = "0", value_parser = parse_temperature)]
    pub(super) temperature: f32,
    /// Makes a random answer repeatable [default: a new one each time]
    #[arg(long, value_name = "S")]
    pub(super) seed: Option<u64>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) raw: bool,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// As for serve
    #[arg(value_name = "MODEL", value_parser = parse_filled)]
    pub(super) model_given: Option<String>,
    /// Lengths of prompts to time, in tokens [default, without --decode: 512,2048]
    #[arg(long, value_name = "TOKENS,..", value_delimiter = ',', value_parser = parse_prefill)]
    pub(super) prefill: Vec<Workload>,
    /// Decoding to time: streams, and tokens that each holds [default, without --prefill: 1x4096 and 1 to 64 by 128]
    #[arg(long, value_name = "STREAMSxCONTEXT,..", value_delimiter = ',', value_parser = parse_decode)]
    pub(super) decode: Vec<Workload>,
    /// Attention alone to time, in all layers: of a token of each stream, as --decode, or of two groups, as
    /// 1x32768+31x4096; or of a prompt, by its tokens
    #[arg(long, value_name = "STREAMSxCONTEXT|TOKENS,..", value_delimiter = ',', value_parser = parse_attention)]
    pub(super) attention: Vec<Workload>,
    /// Sampling alone to time, on a GPU: greedy, temperature, filtered (top-k and top-p) or penalties, and rows, as greedy:32
    #[arg(long, value_name = "KIND:ROWS,..", value_delimiter = ',', value_parser = parse_sampling)]
    pub(super) sampling: Vec<Workload>,
    /// Rounds of each workload, after one that does not count; workloads take turns
    #[arg(long, value_name = "N", default_value = "5", value_parser = parse_count)]
    pub(super) rounds: u32,
    /// Steps of a round of decoding
    #[arg(long, value_name = "N", default_value = "32", value_parser = parse_count)]
    pub(super) steps: u32,
    /// Measure in the same rounds what the machine allows: memory reads and products per second
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) limits: bool,
    /// One JSON object per line instead of a table
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    /// new makes a secret and shows it once; hash reads one from standard input
    #[arg(value_name = "TASK", value_enum)]
    pub(super) task: KeyTask,
    /// What the key is called
    #[arg(value_name = "NAME", value_parser = parse_filled)]
    pub(super) name: String,
    /// Salt of the hash, as 32 hex digits; keys of one salt are checked with one hash [default: a new one]
    #[arg(long, value_name = "HEX")]
    pub(super) salt: Option<Salt>,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// A recording
    #[arg(value_name = "FILE")]
    pub(super) recording: PathBuf,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, Args)]
pub(super) struct SimulateArgs {
    /// Mooncake's or Azure's trace, lines of JSON as docs/simulate.md says, synthetic:azure or synthetic:mooncake
    #[arg(value_name = "TRACE", value_parser = parse_trace, required_unless_present = "print_profile")]
    pub(super) trace: Option<TraceSource>,
    /// Costs and limits of the machine: a TOML or JSON file, a recording, or `default`
    #[arg(long, value_name = "FILE", default_value = "default", value_parser = parse_profile)]
    pub(super) profile: ProfileSource,
    /// Only the first N requests; a synthetic trace has no end, and 10000 without this
    #[arg(long, value_name = "N", value_parser = parse_amount)]
    pub(super) requests: Option<u64>,
    /// Requests come so many times as fast
    #[arg(long, value_name = "FACTOR", default_value = "1", value_parser = parse_factor)]
    pub(super) speed_up: f64,
    /// For the goodput: longest time to the first token, in milliseconds
    #[arg(long, value_name = "MS", value_parser = parse_milliseconds)]
    pub(super) ttft: Option<Duration>,
    /// For the goodput: longest mean time between a request's tokens, in milliseconds
    #[arg(long, value_name = "MS", value_parser = parse_milliseconds)]
    pub(super) itl: Option<Duration>,
    /// Cache no prefixes, whatever the profile says
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) no_prefix_caching: bool,
    /// One JSON object instead of a table
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) json: bool,
    /// Write the profile as TOML and run nothing
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) print_profile: bool,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Recording")]
pub(super) struct RecordArgs {
    /// Record what goes into the scheduler, for `kvern replay`; an earlier recording becomes FILE.1, up to FILE.3
    #[arg(long, value_name = "FILE")]
    pub(super) record: Option<PathBuf>,
    /// Largest size of a recording, at which it ends
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = parse_amount)]
    pub(super) record_max_bytes: u64,
    /// Record the tokens of prompts and answers, not only which are equal
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) record_prompts: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
pub(super) struct ServerArgs {
    /// Address to listen on; the default is all interfaces, as containers need it
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0", value_parser = parse_host)]
    pub(super) host: IpAddr,
    /// Port to listen on
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(super) port: u16,
    /// Names that clients may call the model by, the first one in answers [default: MODEL]
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = parse_filled)]
    pub(super) served_model_name: Vec<String>,
    /// Keys that clients must send as a bearer token [default: open to all]
    #[arg(long, value_name = "KEY", num_args = 1.., value_parser = parse_secret)]
    pub(super) api_key: Vec<Secret>,
    /// TOML file of keys with their tenants and limits, followed as it changes (docs/keys.md)
    #[arg(long, value_name = "FILE")]
    pub(super) keys: Option<PathBuf>,
    /// Ask for a key on /metrics too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) guard_metrics: bool,
    /// Most bytes of a request body
    #[arg(long, value_name = "BYTES", default_value = "16MiB", value_parser = parse_amount)]
    pub(super) max_body_bytes: u64,
    /// Seconds that running requests may go on after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value = "25", value_parser = parse_seconds)]
    pub(super) shutdown_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Scheduling")]
pub(super) struct SchedulingArgs {
    /// Priority class `NAME[:ttft=TIME][:itl=TIME]`, the most urgent first; ttft refuses what would wait longer, itl bounds
    /// the steps of running answers [default: high, normal, low]
    #[arg(long, value_name = "CLASS", num_args = 1.., value_parser = parse_class)]
    pub(super) class: Vec<PriorityClass>,
    /// Most prompt tokens, less the cached ones, that wait; further requests are refused with 503 [default: no limit]
    #[arg(long, value_name = "TOKENS", value_parser = parse_amount)]
    pub(super) max_num_queued_tokens: Option<u64>,
    /// One worker for prefill and decode, or one for each
    #[arg(long, value_name = "LAYOUT", value_enum, default_value_t = WorkerLayout::Mixed)]
    pub(super) workers: WorkerLayout,
    /// One KV pool for split workers, or one for each
    #[arg(long, value_name = "LAYOUT", value_enum, default_value_t = PoolLayout::Shared)]
    pub(super) kv_pools: PoolLayout,
    /// Compute threads of the decode worker of --workers split, out of --threads [default: half]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub(super) decode_threads: Option<u32>,
    /// Multiprocessors of the GPU for the decode worker of --workers split beside prefill, which has the others
    #[arg(long, value_name = "N", hide = true, value_parser = parse_count)]
    pub(super) decode_multiprocessors: Option<u32>,
    /// Seconds without a finished step, while there is work, after which /health/live fails
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = parse_seconds)]
    pub(super) stall_timeout: Duration,
    /// Saturation that replicas should have, for the gauge of desired replicas
    #[arg(long, value_name = "0..1", default_value = "0.7", value_parser = parse_saturation)]
    pub(super) target_saturation: u32,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArgs {
    /// As MODEL [default: SmolLM2-135M-Instruct]
    #[arg(long, value_name = "MODEL", value_parser = parse_filled)]
    pub(super) model: Option<String>,
    /// Branch, tag or commit of a repository [default: main]
    #[arg(long, value_name = "REVISION", value_parser = parse_filled)]
    pub(super) revision: Option<String>,
    /// Cache folder of downloads [default: that of HF_HUB_CACHE or HF_HOME]
    #[arg(long, value_name = "DIR")]
    pub(super) download_dir: Option<PathBuf>,
    /// Folder of model files that MODEL may name, filled by `make model`
    #[arg(long, value_name = "DIR", default_value = "models-cache")]
    pub(super) models_dir: PathBuf,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Engine")]
pub(super) struct EngineArgs {
    /// Most tokens (prompt and answer) of a request [default: the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub(super) max_model_len: Option<u32>,
    /// Most requests that run at once
    #[arg(long, value_name = "N", default_value = "256", value_parser = parse_count)]
    pub(super) max_num_seqs: u32,
    /// Most tokens of one step; more makes prefill cheaper and running answers wait longer [default: 512, on a GPU 2048, and
    /// at least one for each running request]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub(super) max_num_batched_tokens: Option<u32>,
    /// Most requests that wait; further ones are refused with 503
    #[arg(long, value_name = "N", default_value = "1024", value_parser = parse_count)]
    pub(super) max_num_queued_reqs: u32,
    /// Tokens of a KV block
    #[arg(long, value_name = "TOKENS", default_value = "16", value_parser = parse_count)]
    pub(super) block_size: u32,
    /// Memory of the KV cache, such as 4GiB [default: half of what is available; on a GPU what --memory-utilization leaves]
    #[arg(long, value_name = "BYTES", value_parser = parse_amount)]
    pub(super) kv_cache_memory_bytes: Option<u64>,
    /// Share the KV blocks of equal prompt prefixes between requests
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true")]
    pub(super) enable_prefix_caching: bool,
    /// The opposite of --enable-prefix-caching
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) no_enable_prefix_caching: bool,
    /// Precision of the weights, and on a GPU of activations: auto keeps weights as they are stored; activations are then f16
    /// for a model stored in F16, else bf16
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = DtypeArg::Auto)]
    pub(super) dtype: DtypeArg,
    /// Precision of the KV cache; auto is f32 with --dtype f32 and bf16 otherwise, on a GPU that of activations
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = DtypeArg::Auto)]
    pub(super) kv_cache_dtype: DtypeArg,
    /// Compute threads [default: one per available core]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub(super) threads: Option<u32>,
    /// Instruction set of the CPU kernels; auto is the best that the machine has
    #[arg(long, value_name = "ISA", value_enum, default_value_t = CpuIsaArg::Auto)]
    pub(super) cpu_isa: CpuIsaArg,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Log and configuration")]
pub(super) struct LogArgs {
    /// Form of the log on standard error
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(super) log_format: LogFormat,
    /// Level, or filter directives such as info,kvern::engine=debug
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = parse_log_level)]
    pub(super) log_level: String,
    /// Log the text of each prompt
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub(super) log_prompts: bool,
    /// TOML file with any of these settings
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum DtypeArg {
    Auto,
    #[value(aliases = ["float32", "float"])]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(aliases = ["float16", "half"])]
    F16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CpuIsaArg {
    Auto,
    Scalar,
    Avx2,
    Avx512,
    Amx,
}

/// What `kvern key` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KeyTask {
    /// Make a secret.
    New,
    /// Hash one that is there.
    Hash,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}
