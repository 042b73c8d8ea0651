//! The workers of a server: one that does everything, or a prefill and a decode worker side by side.
//!
//! ```text
//!   mixed            one device, one model, one pool
//!   split, shared    two devices with threads of their own, one set of weights, one pool
//!   split, apart     the same with a pool each, and a thread that copies blocks from one to the other
//! ```
//!
//! On a GPU split workers may have a part each of its multiprocessors, for steps beside the other's; alone they have
//! all.

use super::{PoolLayout, SchedulingConfig, StartError, WorkerLayout, calibrate};
use crate::admission::LOGPROBS_MAX;
use crate::worker::{Mover, Worker, WorkerParts};
use kvern_core::{CostModel, PoolId, Role, WorkerSpec};
use kvern_kernels::{BesideOptions, Device, DeviceSampler, KernelError, KvCache, KvShape, StepClock};
use kvern_models::{ForwardBatch, LoadedModel, Model, StepLimits};

/// Workers before their first step.
pub(super) struct Team {
    pub(super) members: Vec<Member>,
    pools: Vec<u32>,
    mover: Option<Mover>,
}

pub(super) struct Member {
    spec: WorkerSpec,
    device: Device,
    model: Box<dyn Model>,
    kv: KvCache,
    /// On a GPU.
    sampler: Option<DeviceSampler>,
    vocab_size: usize,
}

/// Workers that have run each kind of step, so that the first request finds pages and caches in place.
pub(super) struct ReadyTeam {
    pub(super) workers: Vec<Worker>,
    pub(super) specs: Vec<WorkerSpec>,
    /// Blocks of each pool.
    pub(super) pools: Vec<u32>,
    pub(super) mover: Option<Mover>,
    pub(super) cost: CostModel,
    /// Of a GPU's memory, after all kinds of steps have run.
    pub(super) free_bytes: Option<usize>,
    /// Workers have a part each of their device.
    pub(super) has_parts: bool,
}

impl Team {
    /// `loaded` is on `device`; `shape` is that of all pools together.
    pub(super) fn new(
        device: Device,
        loaded: LoadedModel,
        shape: KvShape,
        wanted: &SchedulingConfig,
        limits: StepLimits,
    ) -> Result<Team, StartError> {
        let LoadedModel { model, config, .. } = loaded;
        let vocab_size = config.vocab_size;
        match wanted.workers {
            WorkerLayout::Mixed => {
                let kv = KvCache::new(&device, shape)?;
                let spec = WorkerSpec { role: Role::Mixed, pool: PoolId(0) };
                let sampler = sampler(&device, model.as_ref(), limits, vocab_size)?;
                let members = vec![Member { spec, device, model, kv, sampler, vocab_size }];
                Ok(Team { members, pools: vec![shape.blocks as u32], mover: None })
            }
            WorkerLayout::Split => {
                let mut team = Team::split(&device, model.as_ref(), shape, wanted)?;
                for member in &mut team.members {
                    member.sampler = sampler(&member.device, member.model.as_ref(), limits, vocab_size)?;
                    member.vocab_size = vocab_size;
                }
                Ok(team)
            }
        }
    }

    fn split(
        device: &Device,
        model: &dyn Model,
        shape: KvShape,
        wanted: &SchedulingConfig,
    ) -> Result<Team, StartError> {
        let threads = device.threads();
        let decode_threads = wanted.decode_threads.unwrap_or(threads / 2).clamp(1, threads);
        // A thread at least, even where there is only one: then the two take turns.
        let prefill_threads = threads.saturating_sub(decode_threads).max(1);
        let parts = wanted.decode_multiprocessors.map(|multiprocessors| device.divide(multiprocessors)).transpose()?;
        let part = |at: usize| parts.map(|parts| parts[at]);
        let prefill = BesideOptions { threads: prefill_threads, is_urgent: false, part: part(1) };
        let decode = BesideOptions { threads: decode_threads, is_urgent: true, part: part(0) };
        let devices = [device.beside(prefill)?, device.beside(decode)?];
        let (caches, pools, mover) = match wanted.pools {
            PoolLayout::Shared => {
                let kv = KvCache::new(device, shape)?;
                // SAFETY: the core plans both workers' steps over one pool: a block that several requests hold is full and only
                // read, and a request is in one step at a time (KV-2 to KV-5 and SCH-2, asserted in release).
                let second = unsafe { kv.share() };
                ([kv, second], vec![shape.blocks as u32], None)
            }
            PoolLayout::Apart => {
                let half = KvShape { blocks: shape.blocks / 2, ..shape };
                let caches = [KvCache::new(device, half)?, KvCache::new(device, half)?];
                // SAFETY: the blocks of a transfer are pinned on both sides until it is done (HND-1): no step writes them.
                let mover = Mover::new(caches.iter().map(|kv| unsafe { kv.share() }).collect());
                (caches, vec![half.blocks as u32; 2], Some(mover))
            }
        };
        let mut members = Vec::with_capacity(2);
        for (at, ((device, kv), role)) in devices.into_iter().zip(caches).zip([Role::Prefill, Role::Decode]).enumerate()
        {
            let pool = PoolId(if pools.len() > 1 { at as u8 } else { 0 });
            let model = model.twin(&device)?;
            members.push(Member { spec: WorkerSpec { role, pool }, device, model, kv, sampler: None, vocab_size: 0 });
        }
        Ok(Team { members, pools, mover })
    }

    /// For the start-up banner.
    pub(super) fn describe(&self) -> String {
        let one = |member: &Member| match member.spec.role {
            Role::Mixed => member.device.describe(),
            Role::Prefill => format!("prefill on {}", member.device.describe()),
            Role::Decode => format!("decode on {}", member.device.describe()),
        };
        self.members.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// Ladders of decode steps that [`warm`](Self::warm) captures, where it does.
    pub(super) fn ladders(&self) -> usize {
        let decoding = self.members.iter().filter(|member| member.spec.role != Role::Prefill);
        decoding.map(|member| member.device.shares().len()).sum()
    }

    /// Runs each kind of step once on each worker, captures decode steps where that gains something, all with each
    /// share of the device, and measures what steps cost, beside others where that is another share. `progress` hears
    /// how many are captured.
    pub(super) fn warm(
        mut self,
        limits: StepLimits,
        plan_ahead: bool,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<ReadyTeam, StartError> {
        let mut costs = Vec::with_capacity(self.members.len());
        for member in &mut self.members {
            member.warm(limits).map_err(StartError::WarmUp)?;
            if member.spec.role != Role::Prefill {
                member.model.capture(&mut member.kv, progress).map_err(StartError::WarmUp)?;
            }
            member.move_beside().map_err(StartError::WarmUp)?;
            costs.push(calibrate::measure(member, limits).map_err(StartError::WarmUp)?);
        }
        // Decode as the last worker does it, prefill as the first.
        let (first, last) = (costs[0], costs[costs.len() - 1]);
        let cost = CostModel {
            prefill_token_ps: first.prefill_token_ps,
            prefill_context_ps: first.prefill_context_ps,
            ..last
        };
        tracing::debug!(?cost, "measured");
        let free_bytes = self.members[0].device.free_bytes().map_err(StartError::WarmUp)?;
        let has_parts = self.members.iter().any(|member| member.device.shares().len() > 1);
        let specs = self.members.iter().map(|member| member.spec).collect();
        let workers = self.members.into_iter().map(|member| member.worker(limits, plan_ahead));
        let workers = workers.collect::<Result<_, _>>()?;
        Ok(ReadyTeam { workers, specs, pools: self.pools, mover: self.mover, cost, has_parts, free_bytes })
    }
}

impl Member {
    fn warm(&mut self, limits: StepLimits) -> Result<(), KernelError> {
        for share in self.device.shares() {
            self.device.move_to(*share)?;
            self.warm_share(limits)?;
        }
        Ok(())
    }

    /// Steps have the share of the device now that they have beside another worker's.
    fn move_beside(&self) -> Result<(), KernelError> {
        self.device.shares().last().map_or(Ok(()), |share| self.device.move_to(*share))
    }

    /// Prompts of a block and of one token; on a GPU of all doublings up to the longest step, as each size may be another kernel
    /// of the library of products, which takes time and memory at its first use.
    fn warm_share(&mut self, limits: StepLimits) -> Result<(), KernelError> {
        let KvShape { blocks, block_size, .. } = self.kv.shape();
        let longest = limits.tokens_max.min(limits.context_max).min(blocks * block_size);
        let most = if self.is_gpu() { longest } else { longest.min(block_size) };
        let doublings = std::iter::successors(Some(block_size), |length| Some(length * 2));
        for length in doublings.take_while(|length| *length < most).chain([most, 1]) {
            calibrate::time_step(self, 1, 0, length)?;
        }
        Ok(())
    }

    /// A step, to its end.
    pub(super) fn forward(&mut self, batch: &ForwardBatch<'_>) -> Result<(), KernelError> {
        self.model.forward(batch, &mut self.kv)?;
        self.device.synchronize()
    }

    pub(super) fn is_gpu(&self) -> bool {
        self.device.is_gpu()
    }

    pub(super) fn kv_shape(&self) -> KvShape {
        self.kv.shape()
    }

    fn worker(self, limits: StepLimits, plan_ahead: bool) -> Result<Worker, StartError> {
        let Member { device, model, kv, sampler, vocab_size, .. } = self;
        let (threads, block_size, clock) = (device.threads(), kv.shape().block_size as u32, StepClock::new(&device)?);
        Ok(Worker::new(WorkerParts {
            device,
            model,
            kv,
            sampler,
            clock,
            plan_ahead,
            limits,
            block_size,
            vocab_size,
            threads,
        }))
    }
}

/// What samples on the device; `None` where the worker does.
fn sampler(
    device: &Device,
    model: &dyn Model,
    limits: StepLimits,
    vocab_size: usize,
) -> Result<Option<DeviceSampler>, StartError> {
    let tokens = model.sampled_tokens();
    Ok(DeviceSampler::new(device, tokens, limits.sequences_max, vocab_size, LOGPROBS_MAX)?)
}
