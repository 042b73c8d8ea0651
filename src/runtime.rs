//! From a model's files to a running engine: load, size the KV cache, warm up, start the worker and engine threads.
//!
//! The memory account is made before the KV cache is allocated, and after start nothing grows with load: workspace is
//! sized by the step limits, the KV cache by what is left, queues by their bounds.

mod calibrate;
mod team;

use crate::config::{
    EngineConfig, KV_CACHE_SHARE_OF_AVAILABLE, PoolLayout, PriorityClass, RecordConfig, SchedulingConfig, WorkerLayout,
};
use crate::engine::{EngineHandle, EngineLimits, EngineLoop, EngineParts};
use crate::record::Recorder;
use crate::telemetry::{Telemetry, TelemetryInfo};
use kvern_core::{ClassSpec, CoreConfig, CostModel, Engine as Core, Micros, WorkerId, WorkerSpec};
use kvern_kernels::{Device, KernelError, KvDType, KvShape};
use kvern_models::{
    Checkpoint, LoadError, LoadOptions, LoadProgress, LoadedModel, ModelConfig, ModelFiles, StepLimits,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
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
    /// Plans decode steps ahead on a CPU, which gains nothing by it: for tests.
    #[doc(hidden)]
    pub plan_ahead: bool,
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

/// Where the memory went, for the start-up banner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryAccount {
    pub device: String,
    pub weight_bytes: u64,
    pub workspace_bytes: u64,
    pub kv_bytes: u64,
    pub kv_blocks: u32,
    pub block_size: u32,
    /// Why the KV cache got what it got.
    pub kv_reason: String,
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

/// Loads `files` and starts the engine; `progress` hears of the bytes loaded.
pub fn start(
    files: &ModelFiles,
    options: &RuntimeOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Runtime, StartError> {
    let device = Device::cpu(options.engine.cpu)?;
    let model_config = ModelConfig::read(&Checkpoint::open(files)?)?;
    let max_model_len = model_len(&model_config, options)?;
    let limits = StepLimits {
        tokens_max: options.engine.max_num_batched_tokens as usize,
        sequences_max: options.engine.max_num_seqs as usize,
        context_max: max_model_len as usize,
    };
    let load = LoadOptions { precision: options.engine.precision, limits };
    let loaded = kvern_models::load(&device, files, &load, progress)?;
    let (shape, kv_reason) = kv_shape(&loaded, options, max_model_len)?;
    let (weight_bytes, workspace_bytes) = (loaded.weight_bytes as u64, loaded.workspace_bytes as u64);
    let team = Team::new(device, loaded.model, shape, &options.scheduling)?;
    let account = MemoryAccount {
        device: team.describe(),
        weight_bytes,
        workspace_bytes: workspace_bytes * team.members.len() as u64,
        kv_bytes: (shape.blocks * shape.block_bytes()) as u64,
        kv_blocks: shape.blocks as u32,
        block_size: options.engine.block_size,
        kv_reason,
    };
    let ready = team.warm(limits, &model_config)?;
    let Running { handle, threads, ended, killed } = spawn(ready, options, max_model_len, &account)?;
    Ok(Runtime { handle, config: model_config, max_model_len, account, ended, threads, killed })
}

fn model_len(config: &ModelConfig, options: &RuntimeOptions) -> Result<u32, StartError> {
    let limit = config.max_position_embeddings as u32;
    match options.engine.max_model_len {
        Some(found) if found > limit => Err(StartError::BeyondModel { found, limit }),
        asked => Ok(asked.unwrap_or(limit)),
    }
}

/// Shape of the KV cache, and why it has its size.
fn kv_shape(
    loaded: &LoadedModel,
    options: &RuntimeOptions,
    max_model_len: u32,
) -> Result<(KvShape, String), StartError> {
    let mut shape = loaded.kv_shape(0, options.engine.block_size as usize, options.engine.kv_dtype);
    let block_bytes = shape.block_bytes() as u64;
    // Each pool must take the longest sequence.
    let pools = if options.scheduling.pools == PoolLayout::Apart { 2 } else { 1 };
    let sequence_blocks = pools * u64::from(max_model_len.div_ceil(options.engine.block_size));
    let useful = sequence_blocks * u64::from(options.engine.max_num_seqs);
    let (blocks, reason) = kv_blocks(options.engine.kv_cache_memory_bytes, available_memory(), block_bytes, useful);
    if blocks < sequence_blocks {
        return Err(StartError::KvTooSmall {
            bytes: blocks * block_bytes,
            tokens: blocks * u64::from(options.engine.block_size),
            model_len: max_model_len,
            needed: sequence_blocks * block_bytes,
        });
    }
    shape.blocks = blocks as usize;
    Ok((shape, reason))
}

/// Blocks that the KV cache gets, and why: what was asked for, else a share of the free memory up to what all sequences
/// at full length could use.
fn kv_blocks(asked: Option<u64>, available: Option<u64>, block_bytes: u64, useful: u64) -> (u64, String) {
    // Slots are 32-bit on every backend.
    const BLOCKS_MAX: u64 = 1 << 24;
    let (blocks, reason) = match (asked, available) {
        (Some(bytes), _) => (bytes / block_bytes, "as configured".to_owned()),
        (None, Some(free)) if share_of(free) / block_bytes < useful => {
            (share_of(free) / block_bytes, format!("{:.0}% of the free memory", KV_CACHE_SHARE_OF_AVAILABLE * 100.0))
        }
        (None, _) => (useful, "all sequences at full length fit".to_owned()),
    };
    (blocks.min(BLOCKS_MAX), reason)
}

fn share_of(bytes: u64) -> u64 {
    (bytes as f64 * KV_CACHE_SHARE_OF_AVAILABLE) as u64
}

/// Bytes that this process may still take: the free memory of the machine, or what its control group leaves.
pub(crate) fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)?;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    // What the group has read of files counts as used and is given up when needed.
    let stat = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let files: u64 = ["inactive_file ", "active_file "]
        .iter()
        .filter_map(|name| stat.lines().find_map(|line| line.strip_prefix(name))?.trim().parse::<u64>().ok())
        .sum();
    let left = |(max, used): (u64, u64)| max.saturating_sub(used.saturating_sub(files));
    let group = read("memory.max").zip(read("memory.current")).map(left);
    Some(group.map_or(machine, |group| group.min(machine)))
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
    max_model_len: u32,
    account: &MemoryAccount,
) -> Result<Running, StartError> {
    let telemetry = Arc::new(Telemetry::new(&telemetry_info(options, max_model_len, account)));
    let ReadyTeam { workers, specs, pools, mover, cost } = team;
    let config = core_config(options, max_model_len, CoreShape { specs, pools, cost });
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

fn telemetry_info(options: &RuntimeOptions, max_model_len: u32, account: &MemoryAccount) -> TelemetryInfo {
    TelemetryInfo {
        model_name: options.served_model_name.clone(),
        max_model_len,
        block_size: options.engine.block_size,
        num_blocks: account.kv_blocks,
        kv_cache_bytes: account.kv_bytes,
        kv_dtype: match options.engine.kv_dtype {
            KvDType::F32 => "f32",
            KvDType::BF16 => "bf16",
        },
        prefix_caching: options.engine.prefix_caching,
        classes: options.scheduling.classes.iter().map(|class| class.name.clone()).collect(),
    }
}

/// What the core is told of the workers.
struct CoreShape {
    specs: Vec<WorkerSpec>,
    pools: Vec<u32>,
    cost: CostModel,
}

fn core_config(options: &RuntimeOptions, max_model_len: u32, shape: CoreShape) -> CoreConfig {
    let micros = |time: std::time::Duration| Micros(time.as_micros() as u64);
    let promise = |class: &PriorityClass| ClassSpec { ttft: class.ttft.map(micros), itl: class.itl.map(micros) };
    CoreConfig {
        workers: shape.specs,
        pools: shape.pools,
        step_tokens_max: options.engine.max_num_batched_tokens,
        running_max: options.engine.max_num_seqs,
        waiting_max: options.engine.max_num_queued_reqs,
        queue_tokens_max: options.scheduling.queued_tokens_max.unwrap_or(u64::MAX),
        request_tokens_max: max_model_len,
        prefix_caching: options.engine.prefix_caching,
        classes: options.scheduling.classes.iter().map(promise).collect(),
        cost: shape.cost,
        plan_ahead: options.plan_ahead,
        ..CoreConfig::mixed(1, options.engine.block_size)
    }
}

fn thread(name: &'static str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|source| StartError::Thread { name, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kv_cache_gets_what_was_asked_or_what_is_useful() {
        let check = |asked, available, useful, want: u64| {
            assert_eq!(kv_blocks(asked, available, 1000, useful).0, want, "{asked:?} {available:?} {useful}");
        };
        check(Some(5_999), Some(1 << 40), 2, 5);
        check(None, Some(100_000), 1 << 20, 50);
        check(None, Some(100_000), 7, 7);
        check(None, None, 7, 7);
        check(Some(u64::MAX), None, 7, 1 << 24);
    }
}
