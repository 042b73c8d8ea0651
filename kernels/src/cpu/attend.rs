//! Paged attention: online softmax over tiles of positions, without a matrix of scores.
//!
//! A task holds all query vectors that share a KV head, for some rows: each tile of K and V is widened once for all of
//! them. Within a split of positions the softmax is updated tile by tile; splits are then folded in order. Both are counted
//! from position 0, so that a row gets the same bits in a prefill chunk, in decode, and however the plan divides the work.
//!
//! ```text
//! scores  16 lanes are 16 positions: fma over the head's values in order (K is stored transposed for this)
//! weights p = e^(score - max); their sum is kept in 16 lanes, folded at the end of a split
//! output  16 lanes are 16 of the head's values: fma over positions in order
//! ```

mod softmax;
mod tile;

use std::sync::{Mutex, PoisonError};

use self::softmax::State;
use self::tile::Tile;
use super::CpuDevice;
use super::element::{Element, as_bf16};
use super::shared::SharedSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};
use crate::attention_plan::{SPLIT, TILE, Task};
use crate::buffer::Buffer;
use crate::kv_cache::KvData;
use crate::ops::Attention;
use crate::{KvCache, KvShape, Result};

/// Memory of attention, allocated with its plan.
pub(crate) struct Scratch {
    workers: Vec<Mutex<Worker>>,
    /// `[partials][PARTIAL_HEAD + padded head]`: max, sum, output before division.
    partials: Mutex<Buffer<f32>>,
}

/// Values before the output in a partial result: the maximum and the sum, on a cache line of their own.
const PARTIAL_HEAD: usize = LANES;

/// What one worker needs for one task.
struct Worker {
    /// `[queries][head_dim]`.
    q: Buffer<f32>,
    tile: Tile,
    split: State,
    total: State,
}

impl Scratch {
    /// For tasks of at most `queries` query vectors.
    pub(crate) fn new(threads: usize, queries: usize, head_dim: usize, partials: usize) -> Result<Self> {
        let padded = head_dim.next_multiple_of(LANES);
        let worker = || {
            Ok(Mutex::new(Worker {
                q: Buffer::zeros(queries * head_dim)?,
                tile: Tile::new(queries, head_dim)?,
                split: State::new(queries, padded)?,
                total: State::new(queries, padded)?,
            }))
        };
        Ok(Scratch {
            workers: (0..threads).map(|_| worker()).collect::<Result<_>>()?,
            partials: Mutex::new(Buffer::zeros(partials.saturating_mul(PARTIAL_HEAD + padded))?),
        })
    }
}

/// Attention of all planned rows.
pub(crate) fn attention(cpu: &CpuDevice, args: &Attention<'_>, qkv: &[f32], kv: &KvCache, out: &mut [f32]) {
    match &kv.data {
        KvData::F32(data) => run(cpu, args, qkv, &data[..], kv.shape(), out),
        KvData::BF16(data) => run(cpu, args, qkv, as_bf16(data), kv.shape(), out),
    }
}

fn run<E: Element>(cpu: &CpuDevice, args: &Attention<'_>, qkv: &[f32], kv: &[E], shape: KvShape, out: &mut [f32]) {
    let (plan, out) = (args.plan, SharedSlice::new(out));
    let mut partials = plan.scratch.partials.lock().unwrap_or_else(PoisonError::into_inner);
    let partials = SharedSlice::new(&mut partials[..]);
    let job = Job { args, qkv, kv, shape, out: &out, partials: &partials };
    let run = |tasks: &[Task], merge: bool| {
        cpu.pool.run(tasks.len(), &|worker, index| {
            let mut worker = plan.scratch.workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let (job, task) = (&job, &tasks[index]);
            match merge {
                false => dispatch(cpu.isa, Compute { job, task, worker: &mut worker }),
                true => dispatch(cpu.isa, Merge { job, task, worker: &mut worker }),
            }
        });
    };
    run(&plan.tasks, false);
    run(&plan.merges, true);
}

/// What all tasks of one call share.
struct Job<'a, E> {
    args: &'a Attention<'a>,
    qkv: &'a [f32],
    kv: &'a [E],
    shape: KvShape,
    out: &'a SharedSlice<'a, f32>,
    partials: &'a SharedSlice<'a, f32>,
}

impl<E: Element> Job<'_, E> {
    /// Positions that the query at `position` sees.
    #[inline(always)]
    fn visible(&self, position: usize) -> std::ops::Range<usize> {
        let window = self.args.window.map_or(usize::MAX, |window| window as usize);
        (position + 1).saturating_sub(window)..position + 1
    }

    /// Values of q, or of the output, of one query vector of a task: its row and where its head begins.
    #[inline(always)]
    fn query(&self, task: &Task, query: usize) -> (usize, usize) {
        let group = self.args.heads.group();
        (task.row + query / group, (task.kv_head * group + query % group) * self.shape.head_dim)
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

/// A task over its splits, finished or left as partial results.
struct Compute<'a, E> {
    job: &'a Job<'a, E>,
    task: &'a Task,
    worker: &'a mut Worker,
}

impl<E: Element> Kernel for Compute<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Compute { job, task, worker } = self;
        let (head_dim, group) = (job.shape.head_dim, job.args.heads.group());
        let queries = task.rows * group;
        let row_len = job.args.heads.row_len();
        for (query, q) in worker.q.chunks_exact_mut(head_dim).take(queries).enumerate() {
            let (row, col) = job.query(task, query);
            q.copy_from_slice(&job.qkv[row * row_len + col..][..head_dim]);
        }
        worker.total.clear(queries);
        // The first row looks back furthest, the last one sees most.
        let seen = job.visible(task.position).start..task.position + task.rows;
        for (number, split) in task.splits.clone().enumerate() {
            worker.split.clear(queries);
            let span = seen.start.max(split * SPLIT)..seen.end.min((split + 1) * SPLIT);
            for start in (span.start / TILE * TILE..span.end).step_by(TILE) {
                let span = span.start.max(start)..span.end.min(start + TILE);
                // The next tile comes while this one is computed, the first of the next split included.
                Tile::prefetch(s, job, task, span.end..(span.end + TILE).min(task.splits.end * SPLIT).min(seen.end));
                worker.tile.load(s, job, task, start, span);
                worker.tile.score(s, &worker.q[..queries * head_dim]);
                let visible = |query: usize| {
                    let seen = job.visible(task.position + query / group);
                    let tile = |position: usize| position.clamp(start, start + TILE) - start;
                    tile(seen.start)..tile(seen.end)
                };
                for query in 0..queries {
                    let scores = worker.tile.scores(query);
                    worker.split.update(s, query, scores, job.args.scale, visible(query));
                }
                worker.tile.accumulate(s, queries, &mut worker.split, visible);
            }
            for query in 0..queries {
                worker.split.fold_sum(s, query);
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

/// Folds the partial results of a task's splits in order.
struct Merge<'a, E> {
    job: &'a Job<'a, E>,
    task: &'a Task,
    worker: &'a mut Worker,
}

impl<E: Element> Kernel for Merge<'_, E> {
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
                worker.total.merge(s, query, softmax::View::of(partial));
            }
        }
        job.finish(s, task, &worker.total);
    }
}
