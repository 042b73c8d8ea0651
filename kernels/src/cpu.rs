//! The CPU backend.
//!
//! ```text
//! simd     sixteen lanes at every instruction-set level; kernels are written once over it
//! pool     the threads
//! amx      tile registers
//! panel    packed weights, record their bytes where they are integers; pack fills them, embed reads rows back
//! quantize activations to int8 per group of 32; round: to pairs of bf16
//! matmul   drives the tiles of dense (float panels), by pair_task those of bf16 in the order of tile registers, and by
//!          quant_task those of quant (integer panels, opened by open)
//! blocked  products of bf16 by vectors in the order of tile registers
//! attend   paged attention: scores, weights and outputs of a split of positions; splits merged
//! rows     norms, gated activation, gather; rope: rotary embedding and the store to the KV cache
//! ```
//!
//! Everything here trusts its arguments: shapes were checked in `ops.rs` and at packing.

pub(crate) mod amx;
pub(crate) mod attend;
mod blocked;
mod dense;
mod element;
mod embed;
mod exp;
mod matmul;
mod open;
pub(crate) mod pack;
pub(crate) mod pair;
mod pair_task;
pub(crate) mod panel;
pub(crate) mod pool;
mod quant;
mod quant_task;
mod quantize;
pub(crate) mod record;
mod rope;
mod round;
mod rows;
mod shared;
mod simd;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::buffer::{Arena, Buffer};
use crate::reference::Products;
use crate::{CpuIsa, CpuOptions, KernelError, Result};

pub(crate) use attend::attention;
pub(crate) use embed::embed;
pub(crate) use matmul::matmul;
pub(crate) use rope::rope_and_store;
pub(crate) use rows::{add_rms_norm, gather_rows, rms_norm, silu_mul};

/// Threads, level and scratch of one CPU device.
pub(crate) struct CpuDevice {
    pub(crate) pool: pool::Pool,
    pub(crate) isa: simd::Isa,
    tiles: amx::TileUnits,
    /// Quantized activations of the running matrix product; grows to the largest seen.
    activations: Mutex<quantize::QuantRows>,
    /// Rounded ones, likewise; larger from the start.
    pairs: Mutex<round::PairRows>,
    /// Per worker, the records that it has open.
    opened: Vec<Mutex<Buffer<open::Group>>>,
    /// Where packed weights are placed.
    weights: Mutex<Arena>,
}

impl CpuDevice {
    /// `bf16`: whether to use the bf16 instructions that the machine may have beside its level.
    pub(crate) fn new(options: CpuOptions, bf16: bool) -> Result<Self> {
        let best = simd::best_isa();
        let level = options.isa.unwrap_or(best);
        if level > best {
            return Err(KernelError::Unsupported(format!(
                "expected a machine with {level:?}, found one with {best:?}"
            )));
        }
        let isa = simd::Isa::new(level, bf16);
        let threads = options.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
        let tiles = amx::TileUnits::of(simd::tile_unit(level), isa);
        let activations = Mutex::new(quantize::QuantRows::new()?);
        let pairs = Mutex::new(round::PairRows::new()?);
        let pool = pool::Pool::new(threads)?;
        let opened =
            (0..threads).map(|_| Ok(Mutex::new(Buffer::zeros(quant_task::OPEN_RECORDS)?))).collect::<Result<_>>()?;
        Ok(CpuDevice { pool, isa, tiles, activations, pairs, opened, weights: Mutex::default() })
    }

    pub(crate) fn describe(&self) -> String {
        let isa = match self.isa.level {
            CpuIsa::Scalar => "scalar",
            CpuIsa::Avx2 => "avx2",
            CpuIsa::Avx512 => "avx512",
            CpuIsa::Amx if self.tiles.bf16 == amx::TileUnit::None => "amx without bf16 tiles",
            CpuIsa::Amx => "amx",
        };
        let threads = self.pool.threads();
        format!("cpu ({isa}, {threads} {})", if threads == 1 { "thread" } else { "threads" })
    }

    /// How products of bf16 are summed up.
    pub(crate) fn bf16_products(&self) -> Products {
        if self.tiles.bf16 == amx::TileUnit::None { Products::Bf16Pairs } else { Products::Bf16Tiles }
    }

    /// The scratch for quantized activations. A panic of a former holder leaves nothing that matters behind.
    fn activations(&self) -> MutexGuard<'_, quantize::QuantRows> {
        self.activations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The scratch for rounded activations, likewise.
    fn pairs(&self) -> MutexGuard<'_, round::PairRows> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for the records that worker number `worker` opens.
    fn opened_records(&self, worker: usize) -> MutexGuard<'_, Buffer<open::Group>> {
        self.opened[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place for packed weights.
    fn weights(&self) -> MutexGuard<'_, Arena> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work(row range)` over all of `rows`, in chunks worth a fork if `row_cost` elements are handled per row.
    fn for_row_chunks(&self, rows: usize, row_cost: usize, work: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        /// Elements below which waking other threads costs more than it saves.
        const CHUNK_ELEMENTS: usize = 8192;
        let chunk = CHUNK_ELEMENTS.div_ceil(row_cost.max(1)).min(rows.max(1));
        self.pool.run(rows.div_ceil(chunk), &|_, task| work(task * chunk..rows.min((task + 1) * chunk)));
    }
}
