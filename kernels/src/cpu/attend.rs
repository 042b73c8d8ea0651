//! Paged attention: softmax over splits of positions, without a matrix of scores.
//!
//! A task holds all query vectors that share a KV head, for some rows. It goes over splits of positions; in each, a few query
//! vectors at a time take three passes over the same keys and values, which stay in the cache. Splits are then merged in
//! order. They are counted from position 0, so that a row gets the same bits in a prefill chunk, in decode, and however the
//! plan divides the work.
//!
//! ```text
//! scores  16 lanes are 16 positions: products over the head's cells in order (K is stored transposed for this)
//! weights p = 2^(score - max of the split), from f32 scores; their sum is kept in 16 lanes, then folded; p is rounded
//! output  16 lanes are 16 of the head's values: products over cells of positions in order
//! ```
//!
//! A cell is an f32, or with a BF16 cache a pair of bf16 (see [`Cell`]). q is multiplied by `scale * log2(e)` and rounded to
//! cells, once per task.
//!
//! Products are summed up in one of two orders ([`Order`]): cell by cell, or, on a device whose tile registers take bf16, in
//! the blocks of those.

mod blocked;
mod positions;
mod state;
mod tile;

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use self::positions::{Copied, Positions};
use self::state::{State, View};
use self::tile::Tile;
use super::CpuDevice;
use super::amx::TileUnit;
use super::element::Cell;
use super::pair::Pair;
use super::round::round_row;
use super::shared::SharedSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};
use crate::attention_plan::{SPLIT, Task};
use crate::buffer::Buffer;
use crate::kv_cache::{Cells, KvData};
use crate::ops::Attention;
use crate::{KvCache, KvShape, Result};

/// Memory of attention, allocated with its plan. Only what belongs to the cache's cells is ever touched.
pub(crate) struct Scratch {
    f32: Vec<Mutex<Worker<f32>>>,
    bf16: Vec<Mutex<Worker<Pair>>>,
    /// `[partials][PARTIAL_HEAD + padded head]`: max, sum, output before division.
    partials: Mutex<Buffer<f32>>,
}

/// Values before the output in a partial result: the maximum and the sum, on a cache line of their own.
const PARTIAL_HEAD: usize = LANES;

/// What one worker needs for one task.
struct Worker<C: Cell> {
    /// `[queries][cells of the head]`.
    q: Buffer<C>,
    copied: Copied<C>,
    tile: tile::Scratch<C>,
    split: State,
    total: State,
}

impl<C: Cell> Worker<C> {
    /// One per thread.
    fn new(threads: usize, queries: usize, head_dim: usize) -> Result<Vec<Mutex<Self>>> {
        let padded = head_dim.next_multiple_of(LANES);
        let worker = || {
            Ok(Mutex::new(Worker {
                q: Buffer::zeros(queries * head_dim.div_ceil(C::VALUES))?,
                copied: Copied::new(head_dim)?,
                tile: tile::Scratch::new(head_dim)?,
                split: State::new(queries, padded)?,
                total: State::new(queries, padded)?,
            }))
        };
        (0..threads).map(|_| worker()).collect()
    }
}

impl Scratch {
    /// For tasks of at most `queries` query vectors.
    pub(crate) fn new(threads: usize, queries: usize, head_dim: usize, partials: usize) -> Result<Self> {
        let padded = head_dim.next_multiple_of(LANES);
        Ok(Scratch {
            f32: Worker::new(threads, queries, head_dim)?,
            bf16: Worker::new(threads, queries, head_dim)?,
            partials: Mutex::new(Buffer::zeros(partials.saturating_mul(PARTIAL_HEAD + padded))?),
        })
    }
}

/// Attention of all planned rows.
pub(crate) fn attention(cpu: &CpuDevice, args: &Attention<'_>, qkv: &[f32], kv: &KvCache, out: &mut [f32]) {
    let (shape, scratch, out) = (kv.shape(), &args.plan.scratch, &SharedSlice::new(out));
    let mut partials = scratch.partials.lock().unwrap_or_else(PoisonError::into_inner);
    let partials = &SharedSlice::new(&mut partials[..]);
    match &kv.data {
        KvData::F32(kv) => {
            let job = Job { args, qkv, kv, shape, out, partials, unit: TileUnit::None };
            run::<_, ByCells>(cpu, &job, &scratch.f32);
        }
        KvData::BF16(kv) => {
            let job = Job { args, qkv, kv, shape, out, partials, unit: cpu.tiles.bf16 };
            match job.unit {
                TileUnit::None => run::<_, ByCells>(cpu, &job, &scratch.bf16),
                _ => run::<_, InBlocks>(cpu, &job, &scratch.bf16),
            }
        }
        KvData::Device(_) => unreachable!("caches on a GPU are for the ops of a GPU"),
    }
}

fn run<C: Cell, O: Order<C>>(cpu: &CpuDevice, job: &Job<'_, C>, workers: &[Mutex<Worker<C>>]) {
    let run = |tasks: &[Task], merge: bool| {
        cpu.pool.run(tasks.len(), &|worker, index| {
            let mut worker = workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let (worker, task) = (&mut *worker, &tasks[index]);
            match merge {
                false => dispatch(cpu.isa, Compute::<C, O> { job, task, worker, order: PhantomData }),
                true => dispatch(cpu.isa, Merge { job, task, worker }),
            }
        });
    };
    run(&job.args.plan.tasks, false);
    run(&job.args.plan.merges, true);
}

/// What all tasks of one call share.
struct Job<'a, C: Cell> {
    args: &'a Attention<'a>,
    qkv: &'a [f32],
    kv: &'a Cells<C>,
    shape: KvShape,
    out: &'a SharedSlice<'a, f32>,
    partials: &'a SharedSlice<'a, f32>,
    /// The tile registers of products in blocks.
    unit: TileUnit,
}

impl<'a, C: Cell> Job<'a, C> {
    /// Positions that the query at `position` sees.
    #[inline(always)]
    fn visible(&self, position: usize) -> Range<usize> {
        let window = self.args.window.map_or(usize::MAX, |window| window as usize);
        (position + 1).saturating_sub(window)..position + 1
    }

    /// Positions that query vector `query` of a task sees in a split, counted from its start.
    #[inline(always)]
    fn seen(&self, task: &Task, split: usize, query: usize) -> Range<usize> {
        let seen = within(split, self.visible(task.position + query / self.args.heads.group()));
        seen.start - split * SPLIT..seen.end - split * SPLIT
    }

    /// K and V of all positions that a task's queries see in a split.
    #[inline(always)]
    fn positions(&self, task: &Task, split: usize, copied: &'a mut Copied<C>) -> Positions<'a, C> {
        // The first row looks back furthest, the last one sees most.
        let seen = self.visible(task.position).start..task.position + task.rows;
        let end = seen.end.min(task.splits.end * SPLIT);
        Positions::new(self, task, within(split, seen), end, copied)
    }

    /// Values of q, or of the output, of one query vector of a task: its row and where its head begins.
    #[inline(always)]
    fn query(&self, task: &Task, query: usize) -> (usize, usize) {
        let group = self.args.heads.group();
        (task.row + query / group, (task.kv_head * group + query % group) * self.shape.head_dim)
    }

    /// K and V of a task's head in block number `block` of its sequence.
    #[inline(always)]
    fn pages(&self, task: &Task, block: usize) -> (&'a [C], &'a [C]) {
        let id = self.args.plan.tables[task.table + block] as usize;
        let (start, page) = (self.shape.page_start(self.args.layer, id, task.kv_head), self.shape.page());
        // SAFETY: no op writes K and V while another one reads them: ops of a device follow each other, and those of other
        // devices are at other blocks (`KvCache::share`).
        unsafe { self.kv.read(start..start + 2 * page) }.split_at(page)
    }

    /// Divides the outputs of a task by their sums and stores them.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, task: &Task, total: &State) {
        let (head_dim, cols) = (self.shape.head_dim, self.args.heads.heads * self.shape.head_dim);
        for query in 0..task.rows * self.args.heads.group() {
            let (row, col) = self.query(task, query);
            // SAFETY: no two tasks have the same row and heads.
            let out = unsafe { self.out.part(row * cols + col..row * cols + col + head_dim) };
            total.divide(s, query, out);
        }
    }

    /// The partial result of split number `split` of a task's splits, and query vector `query`.
    ///
    /// # Safety
    /// Nobody else uses it at the same time.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    unsafe fn partial(&self, first: usize, split: usize, queries: usize, query: usize, padded: usize) -> &mut [f32] {
        let (index, len) = (first + split * queries + query, PARTIAL_HEAD + padded);
        // SAFETY: the caller's promise.
        unsafe { self.partials.part(index * len..(index + 1) * len) }
    }
}

/// The part of a range of positions that lies in a split.
#[inline(always)]
fn within(split: usize, positions: Range<usize>) -> Range<usize> {
    let (start, end) = (split * SPLIT, (split + 1) * SPLIT);
    positions.start.clamp(start, end)..positions.end.clamp(start, end)
}

/// An order in which products are summed up.
trait Order<C: Cell> {
    /// All queries of a task over one split, into the worker's state of it.
    fn split<S: Simd>(s: S, job: &Job<'_, C>, task: &Task, split: usize, worker: &mut Worker<C>);
}

/// A task over its splits, finished or left as partial results.
struct Compute<'a, C: Cell, O> {
    job: &'a Job<'a, C>,
    task: &'a Task,
    worker: &'a mut Worker<C>,
    order: PhantomData<O>,
}

impl<C: Cell, O: Order<C>> Kernel for Compute<'_, C, O> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Compute { job, task, worker, .. } = self;
        let queries = task.rows * job.args.heads.group();
        let row_len = job.args.heads.row_len();
        let factor = s.splat(job.args.scale * std::f32::consts::LOG2_E);
        let head_cells = job.shape.head_dim.div_ceil(C::VALUES);
        for (query, q) in worker.q.chunks_exact_mut(head_cells).take(queries).enumerate() {
            let (row, col) = job.query(task, query);
            round_row(s, &job.qkv[row * row_len + col..][..job.shape.head_dim], factor, q);
        }
        worker.total.clear(queries);
        for (number, split) in task.splits.clone().enumerate() {
            O::split(s, job, task, split, worker);
            for query in 0..queries {
                match task.partials {
                    // SAFETY: splits and queries of a task are its own.
                    Some(first) => worker
                        .split
                        .save(query, unsafe { job.partial(first, number, queries, query, worker.split.padded()) }),
                    None => worker.total.merge(s, query, worker.split.view(query)),
                }
            }
        }
        if task.partials.is_none() {
            job.finish(s, task, &worker.total);
        }
    }
}

/// One chain over the cells of each sum.
struct ByCells;

impl<C: Cell> Order<C> for ByCells {
    #[inline(always)]
    fn split<S: Simd>(s: S, job: &Job<'_, C>, task: &Task, split: usize, worker: &mut Worker<C>) {
        let (queries, head_cells) = (task.rows * job.args.heads.group(), job.shape.head_dim.div_ceil(C::VALUES));
        let Worker { q, copied, tile, split: state, .. } = worker;
        state.clear(queries);
        let positions = job.positions(task, split, copied);
        let mut first = 0;
        while first < queries {
            // Tiles of about one size rather than whole ones and a small rest; of 6, 4, 3, 2 or 1.
            let left = queries - first;
            let count = match left.div_ceil(left.div_ceil(S::ATTEND_TILE.0)) {
                5 => 3,
                count => count,
            };
            macro_rules! tile {
                ($count:literal) => {
                    Tile::<C, $count> {
                        q: std::array::from_fn(|r| &q[(first + r) * head_cells..][..head_cells]),
                        seen: std::array::from_fn(|r| job.seen(task, split, first + r)),
                        positions: &positions,
                        fetch: first == 0,
                    }
                    .run(s, tile, first, state)
                };
            }
            match count {
                6 if S::ATTEND_TILE.0 >= 6 => tile!(6),
                4 if S::ATTEND_TILE.0 >= 4 => tile!(4),
                3 if S::ATTEND_TILE.0 >= 3 => tile!(3),
                2 if S::ATTEND_TILE.0 >= 2 => tile!(2),
                _ => tile!(1),
            }
            first += count;
        }
    }
}

/// Chains over the blocks of tile registers.
struct InBlocks;

impl Order<Pair> for InBlocks {
    #[inline(always)]
    fn split<S: Simd>(s: S, job: &Job<'_, Pair>, task: &Task, split: usize, worker: &mut Worker<Pair>) {
        if S::BF16_TILES {
            blocked::split(s, job, task, split, worker);
        } else {
            unreachable!("tile registers at a level without");
        }
    }
}

/// Folds the partial results of a task's splits in order.
struct Merge<'a, C: Cell> {
    job: &'a Job<'a, C>,
    task: &'a Task,
    worker: &'a mut Worker<C>,
}

impl<C: Cell> Kernel for Merge<'_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Merge { job, task, worker } = self;
        let queries = task.rows * job.args.heads.group();
        let first = task.partials.expect("a merge has partial results");
        worker.total.clear(queries);
        for (number, _) in task.splits.clone().enumerate() {
            for query in 0..queries {
                // SAFETY: a merge's partial results are its own, and the tasks that wrote them are done.
                let partial = unsafe { job.partial(first, number, queries, query, worker.total.padded()) };
                worker.total.merge(s, query, View::of(partial));
            }
        }
        job.finish(s, task, &worker.total);
    }
}
