//! Where a device's memory goes, known before any is taken.
//!
//! On a GPU everything is built once on a device that only counts, so that the account is made by the code that then takes
//! the memory. What is left of the share that may be taken is the KV cache's.

use super::team::Team;
use super::{RuntimeOptions, StartError};
use crate::config::{KV_CACHE_SHARE_OF_AVAILABLE, PoolLayout};
use indicatif::HumanBytes;
use kvern_kernels::{Device, KvDType, KvShape};
use kvern_models::{LoadOptions, LoadedModel, ModelFiles, StepLimits};
use std::fmt::Write as _;

/// Slots are 32-bit on every backend.
const BLOCKS_MAX: u64 = 1 << 24;
/// What the library of products takes at its first use, and what each ladder of captured steps does, about.
const LIBRARY_BYTES: u64 = 128 << 20;
const LADDER_BYTES: u64 = 64 << 20;
/// The purpose under which the cache counts itself.
const KV_PURPOSE: &str = "the KV cache";
/// What the account leaves to others.
const FREE_PURPOSE: &str = "left free";

/// Where the memory went, for the start-up banner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryAccount {
    pub device: String,
    pub weight_bytes: u64,
    pub workspace_bytes: u64,
    pub kv_bytes: u64,
    pub kv_blocks: u32,
    pub kv_dtype: KvDType,
    pub block_size: u32,
    /// Why the KV cache got what it got.
    pub kv_reason: String,
    /// On a GPU, all of its memory: what for, and how much.
    pub table: Vec<(String, u64)>,
}

impl MemoryAccount {
    /// The table as lines of text; empty on a CPU.
    #[must_use]
    pub fn lines(&self) -> String {
        lines(&self.table)
    }

    /// What a GPU lacks of the memory that the account leaves free, when `free` bytes are: more than nothing if steps took more
    /// than was reserved for them.
    pub(super) fn shortage(&self, free: u64) -> u64 {
        let left = self.table.iter().find(|(purpose, _)| purpose == FREE_PURPOSE).map_or(0, |(_, bytes)| *bytes);
        left.saturating_sub(free)
    }
}

fn lines(table: &[(String, u64)]) -> String {
    let width = table.iter().map(|(purpose, _)| purpose.len()).max().unwrap_or(0);
    table.iter().fold(String::new(), |mut text, (purpose, bytes)| {
        writeln!(text, "  {purpose:width$} {:>12}", HumanBytes(*bytes).to_string()).expect("a string takes all");
        text
    })
}

/// The KV cache that a model gets.
pub(super) struct KvRoom {
    pub(super) blocks: u64,
    pub(super) reason: String,
    /// As of [`MemoryAccount`].
    pub(super) table: Vec<(String, u64)>,
}

/// What the room is for.
pub(super) struct Wanted<'a> {
    pub(super) files: &'a ModelFiles,
    pub(super) load: LoadOptions,
    pub(super) options: &'a RuntimeOptions,
    pub(super) max_model_len: u32,
    pub(super) kv_dtype: KvDType,
}

impl Wanted<'_> {
    /// Blocks that one sequence of full length takes; each pool must have as many.
    fn sequence_blocks(&self) -> u64 {
        let pools = if self.options.scheduling.pools == PoolLayout::Apart { 2 } else { 1 };
        pools * u64::from(self.max_model_len.div_ceil(self.options.engine.block_size))
    }

    fn shape(&self, loaded: &LoadedModel, blocks: usize) -> KvShape {
        loaded.kv_shape(blocks, self.options.engine.block_size as usize, self.kv_dtype)
    }

    /// Room on a CPU for a model that is loaded: what was asked for, else a share of the free memory.
    pub(super) fn on_cpu(&self, loaded: &LoadedModel, available: Option<u64>) -> Result<KvRoom, StartError> {
        let block_bytes = self.shape(loaded, 0).block_bytes() as u64;
        let useful = self.sequence_blocks() * u64::from(self.options.engine.max_num_seqs);
        let asked = self.options.engine.kv_cache_memory_bytes;
        let (blocks, reason) = kv_blocks(asked, available, block_bytes, useful);
        self.check(KvRoom { blocks, reason, table: Vec::new() }, block_bytes)
    }

    fn check(&self, room: KvRoom, block_bytes: u64) -> Result<KvRoom, StartError> {
        let needed = self.sequence_blocks();
        if room.blocks >= needed {
            return Ok(room);
        }
        Err(StartError::KvTooSmall {
            bytes: room.blocks * block_bytes,
            tokens: room.blocks * u64::from(self.options.engine.block_size),
            model_len: self.max_model_len,
            needed: needed * block_bytes,
        })
    }

    /// Room on a GPU for a model that is yet to be loaded.
    pub(super) fn on_gpu(&self, gpu: &Device) -> Result<KvRoom, StartError> {
        let engine = &self.options.engine;
        let free = gpu.free_bytes()?.unwrap_or(0) as u64;
        let budget = free / 1000 * u64::from(engine.device.memory_utilization);
        let Fixed { mut table, block_bytes } = self.fixed(gpu, self.load.limits)?;
        let fixed: u64 = table.iter().map(|(_, bytes)| bytes).sum();
        let left = budget.saturating_sub(fixed);
        let asked = engine.kv_cache_memory_bytes;
        if let Some(bytes) = asked.filter(|bytes| *bytes > left) {
            table.push(("may be taken".to_owned(), budget));
            let fitting = self.hint(gpu, budget, block_bytes)?;
            let hint = format!(
                "--kv-cache-memory-bytes {bytes} is more than the {left} that are left; with what is left, {fitting}"
            );
            return Err(StartError::DoesNotFit { model_len: self.max_model_len, table: lines(&table), hint });
        }
        // One block more is there for rows that nobody asked for.
        let blocks = (asked.unwrap_or(left) / block_bytes).saturating_sub(1).min(self.blocks_max());
        table.push((KV_PURPOSE.to_owned(), (blocks + 1) * block_bytes));
        if asked.is_none() && blocks < self.sequence_blocks() {
            let hint = self.hint(gpu, budget, block_bytes)?;
            table.push(("may be taken".to_owned(), budget));
            return Err(StartError::DoesNotFit { model_len: self.max_model_len, table: lines(&table), hint });
        }
        let share = f64::from(engine.device.memory_utilization) / 10.0;
        let reason = match asked {
            Some(_) => "as configured".to_owned(),
            None => format!("what {share}% of the free {} leaves", HumanBytes(free)),
        };
        table.push((FREE_PURPOSE.to_owned(), free.saturating_sub(fixed + (blocks + 1) * block_bytes)));
        self.check(KvRoom { blocks, reason, table }, block_bytes)
    }

    /// Rows of a layer's K are numbered by 32 bits on a GPU.
    fn blocks_max(&self) -> u64 {
        let rows = u64::from(self.options.engine.block_size) * KV_HEADS_MAX;
        (u64::from(u32::MAX) / rows - 1).min(BLOCKS_MAX)
    }

    /// What everything but the KV cache takes for steps of these limits.
    fn fixed(&self, gpu: &Device, limits: StepLimits) -> Result<Fixed, StartError> {
        let counting =
            gpu.counting()?.ok_or_else(|| StartError::Unsupported("expected a GPU to account for".into()))?;
        let load = LoadOptions { limits, ..self.load };
        let loaded = kvern_models::load(&counting, self.files, &load, &mut |_| {})?;
        let shape = self.shape(&loaded, 1);
        let team = Team::new(counting.clone(), loaded, shape, &self.options.scheduling, limits)?;
        let reserve = LIBRARY_BYTES + LADDER_BYTES * team.ladders() as u64;
        let reserve = ("captured steps, library of products (reserve)".to_owned(), reserve);
        let purposes = counting.allocations().map_or_else(Vec::new, |counted| counted.purposes);
        let table = purposes.into_iter().filter(|(purpose, _)| purpose != KV_PURPOSE);
        Ok(Fixed {
            table: table.map(|(purpose, bytes)| (purpose, bytes as u64)).chain([reserve]).collect(),
            block_bytes: shape.block_bytes() as u64,
        })
    }

    /// Settings with which it would fit.
    fn hint(&self, gpu: &Device, budget: u64, block_bytes: u64) -> Result<String, StartError> {
        let asked = self.load.limits;
        let mut sequences = asked.sequences_max;
        while sequences > 0 {
            let tokens_max = if sequences == asked.sequences_max { asked.tokens_max } else { sequences.max(512) };
            let limits = StepLimits { sequences_max: sequences, tokens_max: tokens_max.min(asked.tokens_max), ..asked };
            let fixed: u64 = self.fixed(gpu, limits)?.table.iter().map(|(_, bytes)| bytes).sum();
            let left = budget.saturating_sub(fixed);
            let tokens = (left / block_bytes).saturating_sub(1) * u64::from(self.options.engine.block_size);
            if tokens > 0 {
                let context = tokens.min(u64::from(self.max_model_len));
                return Ok(format!(
                    "--max-model-len {context} would fit with --max-num-seqs {} and --max-num-batched-tokens {}",
                    limits.sequences_max, limits.tokens_max
                ));
            }
            sequences /= 2;
        }
        Ok("no context would fit beside the weights: use a smaller or a quantized model".to_owned())
    }
}

/// More than any model has; a bound for numbers of rows.
const KV_HEADS_MAX: u64 = 128;

struct Fixed {
    table: Vec<(String, u64)>,
    block_bytes: u64,
}

/// Blocks that the KV cache gets, and why: what was asked for, else a share of the free memory up to what all sequences
/// at full length could use.
fn kv_blocks(asked: Option<u64>, available: Option<u64>, block_bytes: u64, useful: u64) -> (u64, String) {
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
    #[test]
    fn a_shortage_is_what_is_missing_of_what_was_left_free() {
        let table = vec![("weights".to_owned(), 500), (FREE_PURPOSE.to_owned(), 100)];
        let account = MemoryAccount {
            device: String::new(),
            weight_bytes: 500,
            workspace_bytes: 0,
            kv_bytes: 0,
            kv_blocks: 0,
            kv_dtype: KvDType::BF16,
            block_size: 16,
            kv_reason: String::new(),
            table,
        };
        assert_eq!([0, 60, 100, 200].map(|free| account.shortage(free)), [100, 40, 0, 0]);
        let on_cpu = MemoryAccount { table: Vec::new(), ..account };
        assert_eq!(on_cpu.shortage(0), 0);
    }
}
