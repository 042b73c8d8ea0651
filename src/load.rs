//! From a model's name to a running engine with its text side, as `serve` and `generate` both need it.

use crate::admission::{GenerationDefaults, REPETITION_PENALTY_MAX};
use crate::config::{Action, Config, SchedulingConfig};
use crate::hub::{self, HubError};
use crate::runtime::{self, Runtime, RuntimeOptions, StartError, StartProgress};
use crate::text::{TextModel, TextModelError};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use kvern_models::gguf::Gguf;
use kvern_models::{LoadError, LoadFormat, ModelConfig, ModelFiles};
use std::sync::Arc;
use std::time::Instant;

#[derive(Debug, thiserror::Error)]
pub enum LoadFailure {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Files(#[from] LoadError),
    #[error(transparent)]
    Text(#[from] TextModelError),
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A model that is ready to answer.
pub struct Loaded {
    pub runtime: Runtime,
    pub text: Arc<TextModel>,
    /// What clients call it; at least one.
    pub names: Vec<String>,
    /// Where it was loaded from.
    pub root: String,
    /// Equal for equal builds and weights.
    pub fingerprint: String,
}

/// Resolves, loads and starts the model that `config` names; says on the log what came of it. `names` overrides what
/// clients call it.
pub fn load(config: &Config, names: &[String]) -> Result<Loaded, LoadFailure> {
    let started = Instant::now();
    let resolved = hub::locate(&config.model)?;
    let files = match config.engine.device.load_format {
        LoadFormat::Files => ModelFiles::open(&resolved.path)?,
        LoadFormat::Dummy { .. } => ModelFiles::open_config(&resolved.path)?,
    };
    let text = Arc::new(match &files {
        ModelFiles::Gguf(path) => TextModel::from_gguf(&Gguf::open(path)?)?,
        ModelFiles::SafeTensors { dir } | ModelFiles::ConfigOnly { dir } => TextModel::from_dir(dir)?,
    });
    let names = if names.is_empty() { vec![resolved.name.clone()] } else { names.to_vec() };
    let (scheduling, record) = match &config.action {
        Action::Serve(server) => (server.scheduling.clone(), server.record.clone()),
        _ => (SchedulingConfig::default(), None),
    };
    let served_model_name = names[0].clone();
    let options =
        RuntimeOptions { engine: config.engine.clone(), scheduling, served_model_name, record, plan_ahead: None };
    let (weights, steps) = (progress_bar(WEIGHTS_BAR), progress_bar(STEPS_BAR));
    let runtime = runtime::start(&files, &options, &mut |progress| match progress {
        StartProgress::Weights(progress) => {
            weights.set_length(progress.total_bytes);
            weights.set_position(progress.done_bytes);
        }
        StartProgress::Capture { done, total } => {
            weights.finish_and_clear();
            steps.set_length(total as u64);
            steps.set_position(done as u64);
        }
    })?;
    weights.finish_and_clear();
    steps.finish_and_clear();
    report(&runtime, &names[0], &resolved.path.display().to_string(), started);
    let fingerprint = format!("kvern-{}-{:x}", env!("CARGO_PKG_VERSION"), runtime.account.weight_bytes);
    Ok(Loaded { runtime, text, names, root: resolved.path.display().to_string(), fingerprint })
}

/// What requests get where they ask for nothing, from the model's generation_config.json; a value that a request could not
/// ask for is as if it were not there.
#[must_use]
pub fn generation_defaults(config: &ModelConfig) -> GenerationDefaults {
    let given = &config.generation;
    let none = GenerationDefaults::default();
    let within = |value: Option<f32>, least: f32, most: f32| value.filter(|v| (least..=most).contains(v));
    GenerationDefaults {
        temperature: within(given.temperature, 0.0, 2.0).unwrap_or(none.temperature),
        top_p: within(given.top_p, f32::MIN_POSITIVE, 1.0).unwrap_or(none.top_p),
        top_k: given.top_k.unwrap_or(none.top_k),
        min_p: within(given.min_p, 0.0, 1.0).unwrap_or(none.min_p),
        repetition_penalty: within(given.repetition_penalty, f32::MIN_POSITIVE, REPETITION_PENALTY_MAX)
            .unwrap_or(none.repetition_penalty),
    }
}

/// The effective configuration, one setting a line, for the log at start.
pub fn announce(config: &Config) {
    tracing::info!("configuration (value, origin):\n{}", config.describe().trim_end());
    for note in &config.notes {
        tracing::warn!("{note}");
    }
}

fn report(runtime: &Runtime, name: &str, path: &str, started: Instant) {
    let account = &runtime.account;
    if !account.table.is_empty() {
        tracing::info!("memory of the GPU:\n{}", account.lines().trim_end());
    }
    tracing::info!(
        model = name,
        path,
        device = account.device,
        weights = %HumanBytes(account.weight_bytes),
        workspace = %HumanBytes(account.workspace_bytes),
        seconds = started.elapsed().as_secs_f32(),
        "model loaded"
    );
    tracing::info!(
        memory = %HumanBytes(account.kv_bytes),
        dtype = account.kv_dtype.name(),
        blocks = account.kv_blocks,
        block_size = account.block_size,
        tokens = u64::from(account.kv_blocks) * u64::from(account.block_size),
        max_model_len = runtime.max_model_len,
        full_length_sequences = u64::from(account.kv_blocks) * u64::from(account.block_size) / u64::from(runtime.max_model_len),
        reason = account.kv_reason,
        "KV cache"
    );
}

const WEIGHTS_BAR: &str = "loading weights {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
const STEPS_BAR: &str = "capturing decode steps {wide_bar} {pos}/{len}";

/// Hidden where standard error is no terminal.
fn progress_bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    ProgressBar::new(0).with_style(style)
}
