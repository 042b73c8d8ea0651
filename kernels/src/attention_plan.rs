//! The division of one step's attention into tasks, made once per step and run once per layer.
//!
//! A task is some query rows of one sequence under one KV head, over all positions or, where a few rows see a long
//! context, over one stretch of them. How work is divided cannot be seen in results: a row's reduction always goes over
//! splits of [`SPLIT`] positions, counted from position 0, whoever computes them.
//!
//! Time O(query rows + table entries) per update; memory is reserved at construction and reused.

use std::ops::Range;

use crate::cpu::attend::Scratch;
use crate::cuda::attention::DevicePlan;
use crate::device::Backend;
use crate::{Device, KernelError, KvCache, KvShape, Result};

/// Positions per partial result.
pub(crate) const SPLIT: usize = 256;
/// Query vectors (rows times heads per KV head) that a task holds at once, unless one row has more.
const TASK_QUERIES: usize = 48;
/// Tasks per thread to aim for.
const TASKS_PER_THREAD: usize = 6;
/// Block tables are reserved for blocks of this size; smaller blocks make the CPU's grow at first use.
pub(crate) const RESERVED_BLOCK_SIZE: usize = 16;

/// Sizes of attention heads within a fused q, k, v row: `[q: heads * head_dim | k: kv_heads * head_dim | v: same]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl HeadLayout {
    /// Values of a fused row.
    pub(crate) fn row_len(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Query heads that share a KV head.
    pub(crate) fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    /// Heads in whole groups, and sizes far from overflow.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        const MAX: usize = 1 << 20;
        let HeadLayout { heads, kv_heads, head_dim } = self;
        let sizes = 1..=MAX;
        if sizes.contains(&heads) && sizes.contains(&kv_heads) && sizes.contains(&head_dim) && heads % kv_heads == 0 {
            return Ok(());
        }
        Err(KernelError::shape(op, format!("1 to {MAX} heads, a multiple of the KV heads"), format!("{self:?}")))
    }
}

/// Where each sequence of a batch stands; borrowed for one step.
#[derive(Clone, Copy, Debug)]
pub struct SequenceBatch<'a> {
    /// `[B + 1]`: query rows of sequence `b` are `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`.
    pub cu_seqlens_q: &'a [u32],
    /// `[B]`: tokens of the sequence with this step's queries included; query row `r` of `b` (from 0) stands at
    /// position `context_lens[b] - queries(b) + r` and sees positions up to its own.
    pub context_lens: &'a [u32],
    /// `[B, block_table_stride]` block ids; entries past the context are not read.
    pub block_tables: &'a [u32],
    pub block_table_stride: usize,
}

/// Some query rows of one sequence under one KV head.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    /// First row in the batch, and the position of its token.
    pub(crate) row: usize,
    pub(crate) position: usize,
    pub(crate) rows: usize,
    pub(crate) kv_head: usize,
    /// Where the sequence's block table begins in [`AttentionPlan::tables`].
    pub(crate) table: usize,
    /// Splits of positions to go over.
    pub(crate) splits: Range<usize>,
    /// Where the partial results of these splits go; `None` if they are all there are.
    pub(crate) partials: Option<usize>,
}

impl Task {
    /// Positions times rows: what it costs.
    fn cost(&self) -> usize {
        self.rows * (self.splits.len() * SPLIT).min(self.position + self.rows)
    }
}

/// What a plan has room for.
#[derive(Clone, Copy, Debug)]
pub struct AttentionLimits<'a> {
    /// Query rows, and sequences, of a step.
    pub tokens_max: usize,
    pub sequences_max: usize,
    /// Tokens of the longest sequence.
    pub context_max: usize,
    /// The windows that layers have, each once; `None` is all positions. The CPU takes any.
    pub windows: &'a [Option<u32>],
    /// Bytes of K and V that a GPU reads once instead of for each sequence, in a decode step whose sequences begin alike, from
    /// which on it does so: [`SHARED_PREFIX_BYTES`] where nothing else is known.
    pub shared_prefix_bytes: u64,
}

/// What a GPU reads in about half a millisecond: as much as the host takes longer to launch such a step kernel by kernel.
pub const SHARED_PREFIX_BYTES: u64 = 1 << 30;

impl AttentionLimits<'_> {
    /// For layers that see all positions.
    #[must_use]
    pub fn new(tokens_max: usize, sequences_max: usize, context_max: usize) -> Self {
        let shared_prefix_bytes = SHARED_PREFIX_BYTES;
        AttentionLimits { tokens_max, sequences_max, context_max, windows: &[None], shared_prefix_bytes }
    }
}

/// Work of paged attention, divided once per step and run once per layer. Reused, so that planning allocates nothing.
pub struct AttentionPlan {
    heads: HeadLayout,
    tokens_max: usize,
    /// The division on a GPU; then what is of the CPU stays empty.
    device: Option<DevicePlan>,
    partials_max: usize,
    /// Query rows planned, and the cache's blocks they were checked against.
    rows: usize,
    blocks: usize,
    block_size: usize,
    pub(crate) tables: Vec<u32>,
    /// Most expensive first.
    pub(crate) tasks: Vec<Task>,
    /// Row groups whose splits became several tasks; `splits` and `partials` are those of all of them.
    pub(crate) merges: Vec<Task>,
    pub(crate) scratch: Scratch,
}

impl AttentionPlan {
    /// Room for every step within `limits`.
    pub fn new(device: &Device, heads: HeadLayout, limits: &AttentionLimits<'_>) -> Result<Self> {
        const OP: &str = "attention plan";
        let AttentionLimits { tokens_max, sequences_max, context_max, .. } = *limits;
        heads.check(OP)?;
        let cpu = match &device.backend {
            Backend::Cpu(cpu) => cpu,
            Backend::Cuda(gpu) => {
                let plan = DevicePlan::new(gpu, heads, limits)?;
                return Ok(AttentionPlan::with(heads, tokens_max, Some(plan), Scratch::new(0, 0, 0, 0)?));
            }
        };
        let threads = cpu.pool.threads();
        let queries = rows_per_task(heads) * heads.group();
        // One sequence of full length in splits, and beside it what all threads may have under way.
        let partials_max = context_max.div_ceil(SPLIT).saturating_add(16 * threads).saturating_mul(heads.heads);
        let tables = sequences_max.checked_mul(context_max.div_ceil(RESERVED_BLOCK_SIZE));
        let tasks = tokens_max.checked_add(TASKS_PER_THREAD * threads * 4).and_then(|n| n.checked_mul(heads.kv_heads));
        let (Some(tables), Some(tasks)) = (tables, tasks) else {
            let found = format!("{tokens_max} tokens, {sequences_max} sequences of {context_max}");
            return Err(KernelError::shape(OP, "sizes in range", found));
        };
        let scratch = Scratch::new(threads, queries, heads.head_dim, partials_max)?;
        Ok(AttentionPlan {
            partials_max,
            tables: reserve(tables)?,
            tasks: reserve(tasks)?,
            merges: reserve(tasks)?,
            ..AttentionPlan::with(heads, tokens_max, None, scratch)
        })
    }

    fn with(heads: HeadLayout, tokens_max: usize, device: Option<DevicePlan>, scratch: Scratch) -> Self {
        let (tables, tasks, merges) = (Vec::new(), Vec::new(), Vec::new());
        let (partials_max, rows, blocks, block_size) = (0, 0, 0, 1);
        AttentionPlan {
            heads,
            tokens_max,
            device,
            partials_max,
            rows,
            blocks,
            block_size,
            tables,
            tasks,
            merges,
            scratch,
        }
    }

    /// Checks the batch against `kv` (block ids in range, tables long enough) and plans it. With `padded` rows, as
    /// [`StepGraphs::padded_rows`](crate::StepGraphs::padded_rows) said, the plan is for as many: those beyond the batch's see
    /// nothing. Gives the rows that hold: none where the plan has to be launched kernel by kernel.
    pub fn update(
        &mut self,
        device: &Device,
        batch: &SequenceBatch<'_>,
        kv: &KvCache,
        padded: Option<usize>,
    ) -> Result<Option<usize>> {
        self.rows = 0;
        if let (Some(plan), Backend::Cuda(gpu)) = (&mut self.device, &device.backend) {
            let KvShape { blocks, block_size, .. } = kv.shape();
            let rows = check_batch(self.tokens_max, batch, kv)?;
            let padded = plan.update(gpu, batch, kv, padded)?;
            (self.rows, self.blocks, self.block_size) = (padded.unwrap_or(rows), blocks, block_size);
            return Ok(padded);
        }
        let Backend::Cpu(cpu) = &device.backend else {
            return Err(KernelError::shape("attention plan", "a plan of the GPU", "one of the CPU"));
        };
        self.tables.clear();
        self.tasks.clear();
        self.merges.clear();
        let rows = check_batch(self.tokens_max, batch, kv)?;
        (self.rows, self.blocks, self.block_size) = (rows, kv.shape().blocks, kv.shape().block_size);
        let cost: usize = sequences(batch).map(|sequence| sequence.queries * sequence.context).sum();
        let task_cost = (cost * self.heads.kv_heads).div_ceil(TASKS_PER_THREAD * cpu.pool.threads());
        let mut partials = 0;
        for sequence in sequences(batch) {
            let table = self.tables.len();
            let blocks = sequence.context.div_ceil(self.block_size);
            self.tables.extend_from_slice(&batch.block_tables[sequence.index * batch.block_table_stride..][..blocks]);
            for first in (0..sequence.queries).step_by(rows_per_task(self.heads)) {
                for kv_head in 0..self.heads.kv_heads {
                    let rows = rows_per_task(self.heads).min(sequence.queries - first);
                    let position = sequence.context - sequence.queries + first;
                    let splits = 0..(position + rows).div_ceil(SPLIT);
                    let row = sequence.first_row + first;
                    let task = Task { row, position, rows, kv_head, table, splits, partials: None };
                    self.add(task, task_cost, &mut partials);
                }
            }
        }
        self.tasks.sort_unstable_by_key(|task| (usize::MAX - task.cost(), task.row, task.kv_head, task.splits.start));
        Ok(None)
    }

    /// Adds a task, in pieces if it costs more than `task_cost` and there is room for the pieces' partial results.
    fn add(&mut self, mut task: Task, task_cost: usize, partials: &mut usize) {
        let (splits, queries) = (task.splits.end, task.rows * self.heads.group());
        let per_task = (task_cost / (task.rows * SPLIT)).max(1);
        if splits <= per_task || *partials + splits * queries > self.partials_max {
            return self.tasks.push(task);
        }
        task.partials = Some(*partials);
        *partials += splits * queries;
        for start in (0..splits).step_by(per_task) {
            let piece = start..splits.min(start + per_task);
            let partials = task.partials.map(|first| first + start * queries);
            self.tasks.push(Task { splits: piece, partials, ..task.clone() });
        }
        self.merges.push(task);
    }

    /// The division on a GPU.
    pub(crate) fn on_device(&self) -> Result<&DevicePlan> {
        let missing = || KernelError::shape("attention", "a plan of the GPU", "one of the CPU");
        self.device.as_ref().ok_or_else(missing)
    }

    /// Bytes held on a GPU.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.device.as_ref().map_or(0, DevicePlan::bytes)
    }

    /// Whether the plan was made for these heads, rows and such a cache.
    pub(crate) fn check(&self, heads: HeadLayout, rows: usize, kv: &KvCache) -> Result<()> {
        let (planned, found) = ((self.heads, self.rows, self.block_size), (heads, rows, kv.shape().block_size));
        if planned != found || kv.shape().blocks < self.blocks {
            let text = |(heads, rows, size): (HeadLayout, usize, usize), blocks: usize| {
                format!("{heads:?}, {rows} query rows and {blocks} blocks of {size}")
            };
            let expected = text(planned, self.blocks) + " as planned";
            return Err(KernelError::shape("attention", expected, text(found, kv.shape().blocks)));
        }
        Ok(())
    }
}

/// The batch's query rows, if it is consistent and fits the plan and the cache.
fn check_batch(tokens_max: usize, batch: &SequenceBatch<'_>, kv: &KvCache) -> Result<usize> {
    const OP: &str = "attention plan";
    let refuse = |expected: String, found: String| Err(KernelError::shape(OP, expected, found));
    let (sums, contexts, stride) = (batch.cu_seqlens_q, batch.context_lens, batch.block_table_stride);
    if sums.len() != contexts.len() + 1 || sums[0] != 0 || !sums.is_sorted() {
        return refuse(format!("{} rising sums of query rows from 0", contexts.len() + 1), format!("{sums:?}"));
    }
    let rows = sums[contexts.len()] as usize;
    if rows > tokens_max {
        return refuse(format!("at most {} query rows", tokens_max), format!("{rows}"));
    }
    if contexts.len().checked_mul(stride) != Some(batch.block_tables.len()) {
        let expected = format!("{} block tables of {stride}", contexts.len());
        return refuse(expected, format!("{} entries", batch.block_tables.len()));
    }
    let shape = kv.shape();
    for sequence in sequences(batch) {
        let Sequence { index, queries, context, .. } = sequence;
        let blocks = context.div_ceil(shape.block_size);
        if context < queries || blocks > stride {
            let expected =
                format!("a context of {queries} to {} tokens for sequence {index}", stride * shape.block_size);
            return refuse(expected, format!("{context}"));
        }
        let table = &batch.block_tables[index * stride..][..blocks];
        if let Some(block) = table.iter().find(|&&block| block as usize >= shape.blocks) {
            return refuse(format!("blocks below {} for sequence {index}", shape.blocks), format!("{block}"));
        }
    }
    Ok(rows)
}

/// Query rows of one task.
fn rows_per_task(heads: HeadLayout) -> usize {
    (TASK_QUERIES / heads.group()).max(1)
}

/// An empty vector with room, or an error where the system has none.
fn reserve<T>(capacity: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(capacity)
        .map_err(|error| KernelError::Unsupported(format!("cannot plan attention for {capacity} entries: {error}")))?;
    Ok(vec)
}

pub(crate) struct Sequence {
    pub(crate) index: usize,
    pub(crate) first_row: usize,
    pub(crate) queries: usize,
    pub(crate) context: usize,
}

/// The sequences of a batch that have query rows.
pub(crate) fn sequences<'a>(batch: &SequenceBatch<'a>) -> impl Iterator<Item = Sequence> + 'a {
    let bounds = batch.cu_seqlens_q.array_windows::<2>().zip(batch.context_lens).enumerate();
    bounds
        .map(|(index, (&[first, end], &context))| Sequence {
            index,
            first_row: first as usize,
            queries: (end - first) as usize,
            context: context as usize,
        })
        .filter(|sequence| sequence.queries > 0)
}
