//! From a model's files to a running engine: load, size the KV cache, warm up, start the worker and engine threads.
//!
//! The memory account is made before the KV cache is allocated, and after start nothing grows with load: workspace is
//! sized by the step limits, the KV cache by what is left, queues by their bounds.

mod account;
mod calibrate;
mod team;

pub use account::MemoryAccount;
pub(crate) use account::available_memory;

use crate::config::{EngineConfig, PoolLayout, PriorityClass, RecordConfig, SchedulingConfig, WorkerLayout};
use crate::engine::{EngineHandle, EngineLimits, EngineLoop, EngineParts};
use crate::record::Recorder;
use crate::telemetry::{Telemetry, TelemetryInfo};
use account::{KvRoom, Wanted};
use kvern_core::{ClassSpec, CoreConfig, CostModel, Engine as Core, Micros, Role, WorkerId, WorkerSpec};
use kvern_kernels::{Device, KernelError};
use kvern_models::{Checkpoint, LoadError, LoadOptions, LoadProgress, ModelConfig, ModelFiles, StepLimits};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use team::{ReadyTeam, Team};
use tokio::sync::oneshot;

/// What the engine is built with.
#[derive(Clone, Debug)]
pub struct RuntimeOptions {
    pub engine: EngineConfig,
    pub scheduling: SchedulingConfig,
    /// Label of the metrics.
    pub served_model_name: String,
    /// Where the core's inputs are recorded.
    pub record: Option<RecordConfig>,
    /// Whether decode steps are planned ahead; `None` is on a GPU. A CPU gains nothing by it: for tests.
    #[doc(hidden)]
    pub plan_ahead: Option<bool>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("max_model_len is {found}, more than the {limit} tokens that the model was made for")]
    BeyondModel { found: u32, limit: u32 },
    #[error(
        "the KV cache gets {bytes} bytes, which hold {tokens} tokens; one sequence of max_model_len {model_len} needs \
         {needed} bytes: lower --max-model-len or raise --kv-cache-memory-bytes"
    )]
    KvTooSmall { bytes: u64, tokens: u64, model_len: u32, needed: u64 },
    #[error("expected a model that fits the GPU with a context of {model_len} tokens, found:\n{table}  {hint}")]
    DoesNotFit { model_len: u32, table: String, hint: String },
    #[error("{0}")]
    Unsupported(String),
    #[error("could not start the {name} thread: {source}")]
    Thread { name: &'static str, source: std::io::Error },
    #[error("cannot record to {path}: {source}")]
    Record { path: String, source: std::io::Error },
    #[error("the warm-up step failed: {0}")]
    WarmUp(KernelError),
}

/// A running engine and what the front end must know of its model.
pub struct Runtime {
    pub handle: EngineHandle,
    pub config: ModelConfig,
    pub max_model_len: u32,
    pub account: MemoryAccount,
    /// Resolves when the engine has ended, for whatever reason.
    pub ended: oneshot::Receiver<()>,
    threads: Vec<JoinHandle<()>>,
    killed: Vec<Arc<AtomicBool>>,
}

impl Runtime {
    /// Ends a worker with the step that it is at or that it takes next, as if its thread had died: for tests.
    #[doc(hidden)]
    pub fn kill_worker(&self, number: usize) {
        self.killed[number].store(true, Ordering::Relaxed);
    }

    /// Takes no new work, and waits until what runs has finished and the threads have ended.
    pub fn join(self) {
        let Runtime { handle, threads, .. } = self;
        handle.drain();
        for thread in threads {
            // A panic was reported where it happened.
            let _ = thread.join();
        }
    }
}

/// Tokens of the smallest block on a GPU: room for block tables is made for blocks of this size.
const GPU_BLOCK_SIZE_MIN: u32 = 16;

/// What a start is at.
#[derive(Clone, Copy, Debug)]
pub enum StartProgress {
    Weights(LoadProgress),
    /// Decode steps that are captured.
    Capture {
        done: usize,
        total: usize,
    },
}

/// Opens the device that the settings name, loads `files` and starts the engine; `progress` hears of it.
pub fn start(
    files: &ModelFiles,
    options: &RuntimeOptions,
    progress: &mut dyn FnMut(StartProgress),
) -> Result<Runtime, StartError> {
    let checkpoint = Checkpoint::open(files)?;
    let device = crate::device::open(&options.engine, &checkpoint)?;
    start_model(device, files, ModelConfig::read(&checkpoint)?, options, progress)
}

/// As [`start`], on this device.
pub fn start_on(
    device: Device,
    files: &ModelFiles,
    options: &RuntimeOptions,
    progress: &mut dyn FnMut(StartProgress),
) -> Result<Runtime, StartError> {
    let model_config = ModelConfig::read(&Checkpoint::open(files)?)?;
    start_model(device, files, model_config, options, progress)
}

fn start_model(
    device: Device,
    files: &ModelFiles,
    model_config: ModelConfig,
    options: &RuntimeOptions,
    progress: &mut dyn FnMut(StartProgress),
) -> Result<Runtime, StartError> {
    let max_model_len = model_len(&model_config, options)?;
    if device.is_gpu() {
        check_gpu(options)?;
    }
    let kv_dtype = crate::device::kv_dtype(&options.engine, &device)?;
    let limits = StepLimits {
        tokens_max: options.engine.step_tokens_max(&device) as usize,
        sequences_max: options.engine.max_num_seqs as usize,
        context_max: max_model_len as usize,
    };
    let load = LoadOptions { precision: options.engine.precision, format: options.engine.device.load_format, limits };
    let plan_ahead = options.plan_ahead.unwrap_or(device.is_gpu());
    let wanted = Wanted { files, load, options, max_model_len, kv_dtype };
    let mut phases = Phases::new();
    let gpu_room = if device.is_gpu() { Some(wanted.on_gpu(&device)?) } else { None };
    phases.end("account");
    let loaded = kvern_models::load(&device, files, &load, &mut |done| progress(StartProgress::Weights(done)))?;
    phases.end("weights");
    let room = match gpu_room {
        Some(room) => room,
        None => wanted.on_cpu(&loaded, available_memory())?,
    };
    let KvRoom { blocks, reason, table } = room;
    let shape = loaded.kv_shape(blocks as usize, options.engine.block_size as usize, kv_dtype);
    let (weight_bytes, workspace_bytes) = (loaded.weight_bytes as u64, loaded.workspace_bytes as u64);
    let team = Team::new(device, loaded, shape, &options.scheduling, limits)?;
    phases.end("memory");
    let account = MemoryAccount {
        device: team.describe(),
        weight_bytes,
        workspace_bytes: workspace_bytes * team.members.len() as u64,
        kv_bytes: (shape.blocks * shape.block_bytes()) as u64,
        kv_blocks: shape.blocks as u32,
        kv_dtype,
        block_size: options.engine.block_size,
        kv_reason: reason,
        table,
    };
    let ready = team.warm(limits, plan_ahead, &mut |done, total| progress(StartProgress::Capture { done, total }))?;
    phases.end("warm-up");
    // Others may use the GPU as well, so this is no error.
    match ready.free_bytes.map_or(0, |free| account.shortage(free as u64)) {
        0 => {}
        bytes => tracing::warn!(bytes, "after warm-up less of the GPU's memory is free than the account says"),
    }
    tracing::info!("start: {phases}");
    let core_limits = CoreLimits { max_model_len, step_tokens_max: limits.tokens_max as u32, plan_ahead };
    let Running { handle, threads, ended, killed } = spawn(ready, options, core_limits, &account)?;
    Ok(Runtime { handle, config: model_config, max_model_len, account, ended, threads, killed })
}

/// Refuses settings that a GPU's workers cannot have.
fn check_gpu(options: &RuntimeOptions) -> Result<(), StartError> {
    if options.scheduling.pools == PoolLayout::Apart {
        let text = "--kv-pools apart needs workers with memory of their own; those on one GPU share a pool";
        return Err(StartError::Unsupported(text.to_owned()));
    }
    let found = options.engine.block_size;
    if found < GPU_BLOCK_SIZE_MIN {
        let text = format!("--block-size: expected at least {GPU_BLOCK_SIZE_MIN} tokens on a GPU, found {found}");
        return Err(StartError::Unsupported(text));
    }
    Ok(())
}

/// What a start spends its time on, for the log.
struct Phases {
    last: Instant,
    ended: Vec<(&'static str, Duration)>,
}

impl Phases {
    fn new() -> Self {
        Phases { last: Instant::now(), ended: Vec::new() }
    }

    fn end(&mut self, name: &'static str) {
        self.ended.push((name, self.last.elapsed()));
        self.last = Instant::now();
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, time)) in self.ended.iter().enumerate() {
            write!(f, "{}{name} {:.3} s", if at > 0 { ", " } else { "" }, time.as_secs_f64())?;
        }
        Ok(())
    }
}

/// What the core is told of requests and steps.
#[derive(Clone, Copy)]
struct CoreLimits {
    max_model_len: u32,
    step_tokens_max: u32,
    plan_ahead: bool,
}

fn model_len(config: &ModelConfig, options: &RuntimeOptions) -> Result<u32, StartError> {
    let limit = config.max_position_embeddings as u32;
    match options.engine.max_model_len {
        Some(found) if found > limit => Err(StartError::BeyondModel { found, limit }),
        asked => Ok(asked.unwrap_or(limit)),
    }
}

/// What [`spawn`] started.
struct Running {
    handle: EngineHandle,
    threads: Vec<JoinHandle<()>>,
    ended: oneshot::Receiver<()>,
    killed: Vec<Arc<AtomicBool>>,
}

fn spawn(
    team: ReadyTeam,
    options: &RuntimeOptions,
    limits: CoreLimits,
    account: &MemoryAccount,
) -> Result<Running, StartError> {
    let ReadyTeam { workers, specs, pools, mover, cost, has_parts, .. } = team;
    let telemetry = Arc::new(Telemetry::new(&telemetry_info(options, limits.max_model_len, account, &specs)));
    let config = core_config(options, limits, CoreShape { specs, pools, cost, has_parts });
    let recorder = options.record.as_ref().map(|record| {
        let failed = |source| StartError::Record { path: record.path.display().to_string(), source };
        Recorder::start(record, &config).map_err(failed)
    });
    let recorder = recorder.transpose()?;
    let core = Core::new(config);
    let limits =
        EngineLimits { waiting_max: options.engine.max_num_queued_reqs, stall_max: options.scheduling.stall_timeout };
    let (handle, inbox, shared) = EngineHandle::new(limits, Arc::clone(&telemetry));
    let (ended, has_ended) = oneshot::channel();
    let (mut senders, mut threads, mut killed) = (Vec::new(), Vec::new(), Vec::new());
    for (number, worker) in workers.into_iter().enumerate() {
        // A step, and the one ahead of it.
        let (steps, commands) = sync_channel(2);
        let (reporter, kill) = (handle.reporter(), Arc::new(AtomicBool::new(false)));
        senders.push(steps);
        killed.push(Arc::clone(&kill));
        let id = WorkerId(number as u8);
        threads.push(thread("kvern-worker", move || {
            crate::engine::serve_worker(id, worker, &commands, &kill, &reporter);
        })?);
    }
    let mut transfers = None;
    if let Some(mover) = mover {
        // Each running request moves at most once at a time.
        let (jobs, received) = sync_channel(options.engine.max_num_seqs as usize);
        let reporter = handle.reporter();
        transfers = Some(jobs);
        threads.push(thread("kvern-mover", move || crate::engine::serve_mover(mover, &received, &reporter))?);
    }
    let engine = EngineLoop::new(EngineParts {
        core,
        recorder,
        inbox,
        workers: senders,
        mover: transfers,
        shared,
        telemetry,
        target_saturation: options.scheduling.target_saturation,
    });
    threads.push(thread("kvern-engine", move || {
        engine.run();
        // Whoever waits for it is told by the drop as well, should the loop panic.
        let _ = ended.send(());
    })?);
    Ok(Running { handle, threads, ended: has_ended, killed })
}

fn telemetry_info(
    options: &RuntimeOptions,
    max_model_len: u32,
    account: &MemoryAccount,
    workers: &[WorkerSpec],
) -> TelemetryInfo {
    let name = |worker: &WorkerSpec| match worker.role {
        Role::Mixed => "mixed",
        Role::Prefill => "prefill",
        Role::Decode => "decode",
    };
    TelemetryInfo {
        model_name: options.served_model_name.clone(),
        max_model_len,
        block_size: options.engine.block_size,
        num_blocks: account.kv_blocks,
        kv_cache_bytes: account.kv_bytes,
        kv_dtype: account.kv_dtype.name(),
        prefix_caching: options.engine.prefix_caching,
        classes: options.scheduling.classes.iter().map(|class| class.name.clone()).collect(),
        workers: workers.iter().map(name).collect(),
    }
}

/// What the core is told of the workers.
struct CoreShape {
    specs: Vec<WorkerSpec>,
    pools: Vec<u32>,
    cost: CostModel,
    has_parts: bool,
}

fn core_config(options: &RuntimeOptions, limits: CoreLimits, shape: CoreShape) -> CoreConfig {
    let micros = |time: std::time::Duration| Micros(time.as_micros() as u64);
    let promise = |class: &PriorityClass| ClassSpec { ttft: class.ttft.map(micros), itl: class.itl.map(micros) };
    CoreConfig {
        workers: shape.specs,
        pools: shape.pools,
        step_tokens_max: limits.step_tokens_max,
        running_max: options.engine.max_num_seqs,
        waiting_max: options.engine.max_num_queued_reqs,
        queue_tokens_max: options.scheduling.queued_tokens_max.unwrap_or(u64::MAX),
        request_tokens_max: limits.max_model_len,
        prefix_caching: options.engine.prefix_caching,
        classes: options.scheduling.classes.iter().map(promise).collect(),
        cost: shape.cost,
        plan_ahead: limits.plan_ahead,
        device_parts: shape.has_parts,
        ..CoreConfig::mixed(1, options.engine.block_size)
    }
}

fn thread(name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|source| StartError::Thread { name, source })
}
