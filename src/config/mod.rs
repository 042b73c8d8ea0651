//! Settings as typed become a [`Config`] as meant, once, at start.
//!
//! Owner: `main`, which passes parts of the `Config` on; nothing changes it afterwards. This module is the only reader of
//! the process environment (`environment.rs`).
//!
//! ```text
//! command line > environment (KVERN_*) > file (--config FILE) > default
//!        \______________ layers.rs: one winner per setting ______________/
//!                                   |
//!                      args.rs: typed by clap  ->  Config
//! ```
//!
//! Every setting has one name: the flag `--max-model-len` is `KVERN_MAX_MODEL_LEN` in the environment and `max_model_len`
//! (or `max-model-len`) in the file. All three pass the same parser.

mod args;
mod bench;
mod device;
mod environment;
mod layers;
mod record;
mod resolve;
mod scheduling;
mod simulate;
mod values;

pub use args::{KeyTask, LogFormat};
pub use bench::{BenchConfig, Sampling, Workload};
pub use device::{DeviceChoice, DeviceConfig};
pub use environment::Environment;
pub use layers::{Origin, Setting};
pub use record::{RecordConfig, ReplayConfig};
pub use scheduling::{CLASSES_MAX, PoolLayout, PriorityClass, SchedulingConfig, WorkerLayout};
pub use simulate::{Objectives, ProfileSource, SimulateConfig, Synthetic, TraceSource};
pub use values::Secret;

use crate::keys::Salt;
use kvern_kernels::{CpuOptions, Device, KvDType, Precision};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Share of the memory that is available once the weights are loaded which the KV cache takes when
/// `--kv-cache-memory-bytes` is not given. The rest is for the workspace, the front end and the page cache that holds the
/// weights.
pub const KV_CACHE_SHARE_OF_AVAILABLE: f64 = 0.5;

/// Everything that the process was told, checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub action: Action,
    pub model: ModelSource,
    pub engine: EngineConfig,
    pub log: LogConfig,
    /// Things that the operator should know about the settings, for the log.
    pub notes: Vec<String>,
    settings: Vec<Setting>,
}

/// What the process was started for.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Serve(ServerConfig),
    Generate(GenerateConfig),
    Bench(BenchConfig),
    Key(KeyConfig),
    Replay(ReplayConfig),
    Simulate(SimulateConfig),
}

/// `kvern serve`.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    pub address: SocketAddr,
    /// What clients call the model, the first one in answers; empty: the name that it was asked for by.
    pub served_model_names: Vec<String>,
    /// Empty, and no `keys_file`: open to all.
    pub api_keys: Vec<Secret>,
    /// Keys with tenants and limits.
    pub keys_file: Option<PathBuf>,
    /// `/metrics` needs a key too.
    pub guard_metrics: bool,
    pub max_body_bytes: usize,
    /// How long running requests may go on after SIGTERM.
    pub shutdown_timeout: Duration,
    pub scheduling: SchedulingConfig,
    pub record: Option<RecordConfig>,
}

/// `kvern generate`.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateConfig {
    pub prompt: String,
    /// `None`: until the model stops or the context is full.
    pub max_tokens: Option<u32>,
    /// 0 is greedy.
    pub temperature: f32,
    pub seed: Option<u64>,
    /// The prompt as it is, without the chat template.
    pub raw: bool,
}

/// `kvern key`.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyConfig {
    pub task: KeyTask,
    pub name: String,
    /// `None`: a new one.
    pub salt: Option<Salt>,
}

/// Which model, and where to look for it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSource {
    /// A path, a repository or a name in `models_dir`; `None` is the default model.
    pub name: Option<String>,
    /// Branch, tag or commit of a repository.
    pub revision: Option<String>,
    /// Folder of single-file models, filled by `make model`.
    pub models_dir: PathBuf,
    pub hub: HubConfig,
}

/// The Hugging Face Hub, as its own variables (`HF_HOME`, `HF_TOKEN`, ...) describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubConfig {
    /// Root of the cache that holds `models--OWNER--NAME`.
    pub cache_dir: PathBuf,
    /// From HF_TOKEN or the file that `hf auth login` writes.
    pub token: Option<Secret>,
    pub endpoint: String,
    /// Use the cache only.
    pub offline: bool,
}

/// Limits and precision of the engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most tokens (prompt and answer) of a request; `None`: the model's context.
    pub max_model_len: Option<u32>,
    /// Most requests that run at once.
    pub max_num_seqs: u32,
    /// Most tokens of one step; `None`: [what suits the device](Self::step_tokens_max).
    pub max_num_batched_tokens: Option<u32>,
    /// Most requests that wait.
    pub max_num_queued_reqs: u32,
    /// Tokens of a KV block.
    pub block_size: u32,
    pub prefix_caching: bool,
    /// `None`: [`KV_CACHE_SHARE_OF_AVAILABLE`].
    pub kv_cache_memory_bytes: Option<u64>,
    pub precision: Precision,
    /// `None`: [what suits the device](crate::device::kv_dtype).
    pub kv_dtype: Option<KvDType>,
    pub device: DeviceConfig,
    pub cpu: CpuOptions,
}

impl EngineConfig {
    /// Most tokens of one step on this device.
    #[must_use]
    pub fn step_tokens_max(&self, device: &Device) -> u32 {
        device::step_tokens(self.max_num_batched_tokens, self.max_num_seqs, device)
    }
}

/// How the log looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    pub format: LogFormat,
    /// A level, or directives such as `info,kvern::engine=debug`.
    pub level: String,
    /// The text of each prompt is logged.
    pub prompts: bool,
}

/// Why the process cannot start as it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A usage error, or a request for help: print it as clap does and exit with its code.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    #[error("cannot read the configuration file {path}: {source}")]
    FileUnreadable { path: String, source: std::io::Error },
    #[error("{path}: {source}")]
    FileSyntax { path: String, source: Box<toml::de::Error> },
    #[error("{path}: unknown key `{key}`{hint}")]
    UnknownKey { path: String, key: String, hint: String },
    #[error("{origin}: {message}")]
    BadValue { origin: Origin, message: String },
    #[error("{0}")]
    Conflict(String),
}

impl Config {
    /// Reads the command line, the environment and the file that they name.
    ///
    /// # Errors
    /// Whatever the operator got wrong, in words for a terminal.
    pub fn from_process() -> Result<Config, ConfigError> {
        Config::resolve(std::env::args_os().collect(), &Environment::from_process())
    }

    /// As [`Config::from_process`], with the inputs given: `argv` with the program's name first.
    ///
    /// # Errors
    /// As [`Config::from_process`].
    pub fn resolve(argv: Vec<OsString>, environment: &Environment) -> Result<Config, ConfigError> {
        resolve::resolve(argv, environment)
    }

    /// The effective settings as a table: name, value, where the value came from. Keys are counted, not shown.
    #[must_use]
    pub fn describe(&self) -> String {
        let width = |column: fn(&Setting) -> usize| self.settings.iter().map(column).max().unwrap_or(0);
        let (names, values) = (width(|setting| setting.name.len()), width(|setting| setting.value.chars().count()));
        let mut table = String::new();
        for Setting { name, value, origin } in &self.settings {
            writeln!(table, "  {name:names$}  {value:values$}  {origin}")
                .expect("a String takes all that is written to it");
        }
        table
    }
}

#[cfg(test)]
mod tests;
