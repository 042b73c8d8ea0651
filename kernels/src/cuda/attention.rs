//! The division of a step's attention on a device, and its launches.
//!
//! Rows of sequences with one query go to the decode kernel, cut into pieces that are dealt out evenly; longer queries go to
//! the prefill kernel in tiles. Where decodes begin with the same blocks, and many of them, those go to the cascade kernel,
//! which reads them once. What differs between layers is the window alone, so there is a division for each window that
//! the model has. The f32 kernel, the oracle, takes tiles for all.

use kvern_cuda_abi::{
    CascadeParams, CascadeRow, CascadeTile, DecodeItem, DecodeMerge, DecodeParams, DecodePlan, DecodeQuery,
    KernelParams, PrefillHopperParams, PrefillParams, PrefillPlan, PrefillQuery, PrefillTile, Ptr, TensorMap, launch,
    piece_len,
};

use super::driver::{Element, Kernel, LaunchShape};
use super::memory::DeviceMemory;
use super::prefix::SharedPrefixes;
use super::uploads::StepArray;
use super::{CudaDevice, shape};
use crate::attention_plan::{AttentionLimits, RESERVED_BLOCK_SIZE, sequences};
use crate::ops::Attention;
use crate::{HeadLayout, KernelError, KvCache, KvShape, Result, SequenceBatch, Tensor};

/// Head sizes that kernels on matrix units were compiled for, and the most of the others.
const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
const HEAD_DIM_MAX: usize = 256;
/// Query rows of a tile of the f32 kernel.
const F32_TILE_ROWS: usize = 4;
/// Partial results that there is room for, unless the longest sequence alone needs more. Rows that find no room are not cut.
const PARTIALS_MAX: usize = 8192;
/// Tokens of contexts for which tables have room for blocks of any size; longer ones have it for the usual one or larger.
const SHORT_CONTEXT: usize = 4096;

/// The kernels for one size of heads.
enum AttentionKernels {
    F32 { attention: Kernel },
    Tiles { decode: Kernel, merge: Kernel, prefill: Kernel, prefill_hopper: Option<Kernel>, cascade: Kernel },
}

/// Decode's pieces under one window.
struct WindowPlan {
    window: Option<u32>,
    plan: DecodePlan,
    starts: StepArray<u32>,
    merges: StepArray<DecodeMerge>,
    cascade_rows: StepArray<CascadeRow>,
    items: StepArray<DecodeItem>,
    cascade_tiles: StepArray<CascadeTile>,
}

/// Room for the division of any step within the limits, at fixed addresses.
pub(crate) struct DevicePlan {
    kernels: AttentionKernels,
    heads: HeadLayout,
    /// Blocks of decode per KV head, by share of the device.
    workers: Vec<u32>,
    /// Query rows of a tile of the portable kernel.
    tile_rows: u32,
    /// The step's tiles are for the kernel for sm_90a.
    is_hopper: bool,
    windows: Vec<WindowPlan>,
    prefill: PrefillPlan,
    tiles: StepArray<PrefillTile>,
    /// The sequences' block tables, end to end; what refers to one names its first entry.
    tables: StepArray<u32>,
    sums: DeviceMemory,
    values: DeviceMemory,
    /// Prefixes that decodes share, and from how many bytes of saved reads on they are read once.
    prefixes: SharedPrefixes,
    shared_prefix_bytes: u64,
    /// Query rows of a tile of the cascade kernel.
    cascade_rows: u32,
    decode_queries: Vec<DecodeQuery>,
    prefill_queries: Vec<PrefillQuery>,
    table_entries: Vec<u32>,
    /// Where each sequence's table begins.
    table_starts: Vec<u32>,
    block_size: usize,
}

impl AttentionKernels {
    fn new(gpu: &CudaDevice, heads: HeadLayout) -> Result<(Self, Vec<u32>)> {
        let (driver, element, dim) = (gpu.driver.as_ref(), gpu.element, heads.head_dim);
        if element == Element::F32 {
            check_head("attention plan", dim)?;
            return Ok((
                AttentionKernels::F32 { attention: driver.kernel("kvern_attention_f32", 0)? },
                vec![1; gpu.shares().len()],
            ));
        }
        if !HEAD_DIMS.contains(&dim) || heads.group() > launch::prefill_rows(dim) {
            let expected = format!(
                "heads of 64, 96, 128 or 256 values, at most {} per KV head, on a GPU",
                launch::prefill_rows(dim)
            );
            return Err(KernelError::shape("attention plan", expected, format!("{heads:?}")));
        }
        let shared = launch::decode_shared_bytes(dim) as u32;
        let named = |op: &str, shared| driver.kernel(&format!("kvern_{op}_{element}_d{dim}"), shared);
        let decode = named("decode", shared)?;
        let fit = driver.blocks_per_multiprocessor(decode, launch::DECODE_THREADS as u32, shared)?.get() as usize;
        let workers = |multiprocessors| launch::decode_workers(fit * multiprocessors, heads.kv_heads, heads.group());
        let workers = gpu.multiprocessors().map(|count| workers(count) as u32).collect();
        let (merge, prefill) = (named("decode_merge", 0)?, named("prefill", launch::prefill_shared_bytes(dim) as u32)?);
        let cascade = named("cascade", launch::cascade_shared_bytes(dim) as u32)?;
        let hopper = || named("prefill_hopper", launch::prefill_hopper_shared_bytes(dim) as u32);
        let prefill_hopper = gpu.is_prefill_hopper.then(hopper).transpose()?;
        Ok((AttentionKernels::Tiles { decode, merge, prefill, prefill_hopper, cascade }, workers))
    }
}

impl DevicePlan {
    pub(crate) fn new(gpu: &CudaDevice, heads: HeadLayout, limits: &AttentionLimits<'_>) -> Result<Self> {
        let driver = &gpu.driver;
        let (kernels, workers) = AttentionKernels::new(gpu, heads)?;
        let tile_rows = match kernels {
            AttentionKernels::F32 { .. } => F32_TILE_ROWS,
            AttentionKernels::Tiles { .. } => launch::prefill_rows(heads.head_dim) / heads.group(),
        };
        let AttentionLimits { tokens_max, sequences_max, context_max, windows, shared_prefix_bytes } = *limits;
        let pieces = pieces_max(context_max);
        let workers_max = workers.iter().copied().max().unwrap_or(0) as usize;
        let partials = match kernels {
            AttentionKernels::F32 { .. } => 0,
            AttentionKernels::Tiles { .. } => PARTIALS_MAX.max(pieces).min(pieces * sequences_max),
        };
        let window_plan = |window: &Option<u32>| -> Result<WindowPlan> {
            const WHAT: &str = "the plan of decode attention";
            Ok(WindowPlan {
                window: *window,
                plan: DecodePlan::with_partials_max(partials as u32),
                // The short ones first, so that they lie together.
                starts: StepArray::new(gpu, WHAT, workers_max + 1)?,
                merges: StepArray::new(gpu, WHAT, sequences_max)?,
                cascade_rows: StepArray::new(gpu, WHAT, sequences_max)?,
                items: StepArray::new(gpu, WHAT, partials + sequences_max)?,
                // A piece of a prefix is a partial result of each of its rows, and tiles are of some rows.
                cascade_tiles: StepArray::new(gpu, WHAT, partials)?,
            })
        };
        // Short contexts have room for blocks of any size.
        let blocks_max = context_max.div_ceil(RESERVED_BLOCK_SIZE).max(context_max.min(SHORT_CONTEXT));
        let table_entries = sequences_max.checked_mul(blocks_max).and_then(|entries| entries.checked_add(1));
        let table_entries = table_entries.ok_or_else(|| {
            KernelError::shape("attention plan", "sizes in range", format!("{sequences_max} x {context_max}"))
        })?;
        let partial_values = partials * heads.heads;
        let tiles_max = tokens_max.div_ceil(tile_rows) + sequences_max;
        Ok(DevicePlan {
            workers,
            tile_rows: tile_rows as u32,
            is_hopper: false,
            tiles: StepArray::new(gpu, "the plan of prefill attention", tiles_max)?,
            windows: windows.iter().map(window_plan).collect::<Result<_>>()?,
            prefill: PrefillPlan::default(),
            tables: StepArray::new(gpu, "block tables", table_entries)?,
            sums: DeviceMemory::new(driver, "partial results of attention", partial_values * 2 * 4)?,
            values: DeviceMemory::new(driver, "partial results of attention", partial_values * heads.head_dim * 4)?,
            prefixes: SharedPrefixes::default(),
            shared_prefix_bytes,
            cascade_rows: (launch::cascade_rows(heads.head_dim) / heads.group()) as u32,
            decode_queries: Vec::with_capacity(sequences_max),
            prefill_queries: Vec::with_capacity(sequences_max),
            table_entries: Vec::with_capacity(table_entries),
            table_starts: Vec::with_capacity(sequences_max),
            block_size: 1,
            kernels,
            heads,
        })
    }

    /// Bytes held on the device.
    pub(crate) fn bytes(&self) -> usize {
        let windows = self.windows.iter().map(|own| {
            let cascade = own.cascade_rows.bytes() + own.cascade_tiles.bytes();
            own.items.bytes() + own.starts.bytes() + own.merges.bytes() + cascade
        });
        let arrays = self.tiles.bytes() + self.tables.bytes() + self.sums.bytes() + self.values.bytes();
        windows.sum::<usize>() + arrays
    }

    /// Plans a batch that was checked. `padded`: launches are as large as for so many sequences of one query each, unless they
    /// share prefixes that are worth more; gives what holds.
    pub(crate) fn update(
        &mut self,
        gpu: &CudaDevice,
        batch: &SequenceBatch<'_>,
        cache: &KvCache,
        padded: Option<usize>,
    ) -> Result<Option<usize>> {
        let kv = &cache.shape();
        let has_hopper = matches!(self.kernels, AttentionKernels::Tiles { prefill_hopper: Some(_), .. });
        self.is_hopper = has_hopper && cache.on_device()?.maps(0).is_some();
        self.block_size = kv.block_size;
        self.table_starts.clear();
        self.decode_queries.clear();
        self.prefill_queries.clear();
        self.table_entries.clear();
        let tiles_only = matches!(self.kernels, AttentionKernels::F32 { .. });
        for sequence in sequences(batch) {
            let table = self.table_entries.len() as u32;
            let blocks = sequence.context.div_ceil(kv.block_size);
            let entries = &batch.block_tables[sequence.index * batch.block_table_stride..][..blocks];
            self.table_entries.extend_from_slice(entries);
            self.table_starts.push(table);
            let (row, context) = (sequence.first_row as u32, sequence.context as u32);
            let rows = sequence.queries as u32;
            if rows == 1 && !tiles_only {
                self.decode_queries.push(DecodeQuery { row, table, context });
            } else {
                self.prefill_queries.push(PrefillQuery { row, rows, position: context - rows, table });
            }
        }
        self.table_entries.push(kv.blocks as u32);
        // No fewer than of the portable kernel, for whose tiles there is room.
        let hopper_rows = launch::PREFILL_HOPPER_ROWS / self.heads.group();
        let tile_rows = if self.is_hopper { hopper_rows as u32 } else { self.tile_rows };
        self.prefill.update(&self.prefill_queries, tile_rows);
        let shares = self.find_prefixes(kv);
        let padded = padded.filter(|_| !shares);
        self.bring(gpu, padded)?;
        Ok(padded)
    }

    /// Whether decodes share prefixes that are worth to be read once; if not, there are none.
    fn find_prefixes(&mut self, kv: &KvShape) -> bool {
        self.prefixes.find(&mut self.decode_queries, &self.table_entries, kv.block_size);
        let token_bytes = (kv.block_bytes() / kv.block_size) as u64;
        let fits = |own: &WindowPlan| own.plan.has_room(&self.decode_queries, &self.prefixes.found);
        let is_worth = !self.prefixes.found.is_empty()
            && self.windows.iter().any(|own| own.window.is_none())
            && self.cascade_rows > 0
            && self.prefixes.saved_tokens.saturating_mul(token_bytes) >= self.shared_prefix_bytes
            && self.windows.iter().filter(|own| own.window.is_none()).all(fits);
        if !is_worth {
            self.prefixes.found.clear();
        }
        is_worth
    }

    /// The step's block tables on the device, where each sequence's begins, and where one begins that is the cache's spare block.
    pub(crate) fn tables(&self) -> Ptr {
        self.tables.ptr()
    }

    pub(crate) fn table_starts(&self) -> &[u32] {
        &self.table_starts
    }

    pub(crate) fn spare_table(&self) -> u32 {
        self.table_entries.len() as u32 - 1
    }

    pub(crate) fn block_size(&self) -> usize {
        self.block_size
    }

    /// The plan to the device's arrays.
    fn bring(&mut self, gpu: &CudaDevice, padded: Option<usize>) -> Result<()> {
        let tiles = &self.prefill.tiles;
        let no_tile = PrefillTile { row: 0, rows: 0, position: 0, table: 0 };
        let tile_count = match self.kernels {
            AttentionKernels::F32 { .. } => padded.unwrap_or(tiles.len()),
            AttentionKernels::Tiles { .. } => tiles.len(),
        };
        let tile = |at: usize| tiles.get(at).copied().unwrap_or(no_tile);
        let workers = self.workers[gpu.share()];
        self.tables.fill(self.table_entries.iter().copied())?;
        self.tiles.fill((0..tile_count).map(tile))?;
        for own in &mut self.windows {
            let WindowPlan { window, plan, items, starts, merges, cascade_rows, cascade_tiles } = own;
            let prefixes = self.prefixes.found.as_slice();
            if window.is_none() && !prefixes.is_empty() {
                plan.update_shared(&self.decode_queries, prefixes, self.cascade_rows, workers);
            } else {
                plan.update(&self.decode_queries, *window, workers);
            }
            let merge_count = if self.decode_queries.is_empty() { 0 } else { padded.unwrap_or(plan.merges.len()) };
            let no_merge = DecodeMerge { row: 0, first: 0, count: 0 };
            let merge = |at: usize| plan.merges.get(at).copied().unwrap_or(no_merge);
            items.fill(plan.items.iter().copied())?;
            starts.fill(plan.starts.iter().copied())?;
            merges.fill((0..merge_count).map(merge))?;
            cascade_rows.fill(plan.cascade_rows.iter().copied())?;
            cascade_tiles.fill(plan.cascade_tiles.iter().copied())?;
        }
        Ok(())
    }

    pub(crate) fn launch(
        &self,
        gpu: &CudaDevice,
        args: &Attention<'_>,
        qkv: &Tensor,
        kv: &KvCache,
        out: &mut Tensor,
    ) -> Result<()> {
        let cache = kv.on_device()?;
        let layer = cache.layer(args.layer);
        match self.kernels {
            AttentionKernels::F32 { attention } => {
                let grid = [self.tiles.len(), args.heads.heads];
                self.launch_tiles(gpu, attention, shape(grid, 128), &self.prefill_params(args, qkv, kv, layer, out))
            }
            AttentionKernels::Tiles { decode, merge, prefill, prefill_hopper, cascade } => {
                self.launch_decode(gpu, [decode, merge, cascade], args, &(qkv, kv, layer, &*out))?;
                let (grid, dim) = ([self.tiles.len(), args.heads.kv_heads], args.heads.head_dim);
                let portable = self.prefill_params(args, qkv, kv, layer, out);
                if let (true, Some(kernel)) = (self.is_hopper, prefill_hopper) {
                    let missing =
                        || KernelError::shape("attention", "the cache of the plan", "one without tensor maps");
                    let maps = cache.maps(args.layer).ok_or_else(missing)?;
                    let shape = shape(grid, launch::PREFILL_HOPPER_THREADS);
                    let shape = with_shared(shape, launch::prefill_hopper_shared_bytes(dim));
                    return self.launch_tiles(gpu, kernel, shape, &hopper_params(&portable, maps));
                }
                let shape = with_shared(shape(grid, launch::PREFILL_THREADS), launch::prefill_shared_bytes(dim));
                self.launch_tiles(gpu, prefill, shape, &portable)
            }
        }
    }

    fn launch_tiles<P: KernelParams>(
        &self,
        gpu: &CudaDevice,
        kernel: Kernel,
        shape: LaunchShape,
        params: &P,
    ) -> Result<()> {
        if self.tiles.len() == 0 {
            return Ok(());
        }
        // SAFETY: the plan's tiles are of rows in qkv and out, and its tables of blocks in the cache, as was checked.
        unsafe { gpu.launch(kernel, shape, params) }
    }

    fn launch_decode(
        &self,
        gpu: &CudaDevice,
        [decode, merge, cascade]: [Kernel; 3],
        args: &Attention<'_>,
        (qkv, kv, (k_cache, v_cache), out): &(&Tensor, &KvCache, (Ptr, Ptr), &Tensor),
    ) -> Result<()> {
        if self.decode_queries.is_empty() {
            return Ok(());
        }
        let own = self.windows.iter().find(|own| own.window == args.window).ok_or_else(|| {
            let known: Vec<_> = self.windows.iter().map(|own| own.window).collect();
            KernelError::shape("attention", format!("a window of {known:?}"), format!("{:?}", args.window))
        })?;
        let HeadLayout { heads, kv_heads, head_dim } = args.heads;
        let params = DecodeParams {
            qkv: qkv.ptr(),
            k_cache: *k_cache,
            v_cache: *v_cache,
            out: out.ptr(),
            items: own.items.ptr(),
            starts: own.starts.ptr(),
            merges: own.merges.ptr(),
            block_tables: self.tables.ptr(),
            sums: self.sums.ptr(),
            values: self.values.ptr(),
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            block_size: kv.shape().block_size as u32,
            table_stride: 1,
            qkv_stride: args.heads.row_len() as u32,
            scale_log2: args.scale * std::f32::consts::LOG2_E,
        };
        if own.cascade_tiles.len() > 0 {
            self.launch_cascade(gpu, cascade, own, &params, args.heads)?;
        }
        let tiles = launch::decode_head_tiles(args.heads.group());
        let grid = [self.workers[gpu.share()] as usize, kv_heads * tiles];
        let decode_shape = with_shared(shape(grid, launch::DECODE_THREADS), launch::decode_shared_bytes(head_dim));
        // SAFETY: as of the tiles; partial results are within what was allocated, as the plan was told.
        unsafe {
            gpu.launch(decode, decode_shape, &params)?;
            if own.merges.len() == 0 {
                return Ok(());
            }
            gpu.launch(merge, shape([own.merges.len(), heads], head_dim), &params)
        }
    }

    /// Shared prefixes, whose partial results the merge of decode takes with the others.
    fn launch_cascade(
        &self,
        gpu: &CudaDevice,
        kernel: Kernel,
        own: &WindowPlan,
        decode: &DecodeParams,
        heads: HeadLayout,
    ) -> Result<()> {
        let params = CascadeParams {
            qkv: decode.qkv,
            k_cache: decode.k_cache,
            v_cache: decode.v_cache,
            tiles: own.cascade_tiles.ptr(),
            rows: own.cascade_rows.ptr(),
            block_tables: decode.block_tables,
            sums: decode.sums,
            values: decode.values,
            heads: decode.heads,
            kv_heads: decode.kv_heads,
            block_size: decode.block_size,
            table_stride: decode.table_stride,
            qkv_stride: decode.qkv_stride,
            scale_log2: decode.scale_log2,
        };
        let shape = shape([own.cascade_tiles.len(), heads.kv_heads], launch::PREFILL_THREADS);
        // SAFETY: as of decode.
        unsafe { gpu.launch(kernel, with_shared(shape, launch::cascade_shared_bytes(heads.head_dim)), &params) }
    }

    fn prefill_params(
        &self,
        args: &Attention<'_>,
        qkv: &Tensor,
        kv: &KvCache,
        (k_cache, v_cache): (Ptr, Ptr),
        out: &Tensor,
    ) -> PrefillParams {
        PrefillParams {
            qkv: qkv.ptr(),
            k_cache,
            v_cache,
            out: out.ptr(),
            tiles: self.tiles.ptr(),
            block_tables: self.tables.ptr(),
            heads: args.heads.heads as u32,
            kv_heads: args.heads.kv_heads as u32,
            block_size: kv.shape().block_size as u32,
            table_stride: 1,
            qkv_stride: args.heads.row_len() as u32,
            window: args.window.unwrap_or(0),
            scale_log2: args.scale * std::f32::consts::LOG2_E,
            head_dim: args.heads.head_dim as u32,
        }
    }
}

/// The same launch for sm_90a, by maps of a layer's K and V.
fn hopper_params(portable: &PrefillParams, [k_map, v_map]: [TensorMap; 2]) -> PrefillHopperParams {
    let PrefillParams { qkv, out, tiles, block_tables, heads, kv_heads, block_size, .. } = *portable;
    let PrefillParams { table_stride, qkv_stride, window, scale_log2, .. } = *portable;
    PrefillHopperParams {
        k_map,
        v_map,
        qkv,
        out,
        tiles,
        block_tables,
        heads,
        kv_heads,
        block_size,
        table_stride,
        qkv_stride,
        window,
        scale_log2,
        pad: 0,
        unused: [0; 8],
    }
}

/// What any kernel that goes over heads takes: pairs of values, and no more than it has shared memory for.
pub(super) fn check_head(op: &'static str, dim: usize) -> Result<()> {
    if dim.is_multiple_of(2) && dim <= HEAD_DIM_MAX {
        return Ok(());
    }
    let expected = format!("heads of an even number of values, at most {HEAD_DIM_MAX}, on a GPU");
    Err(KernelError::shape(op, expected, dim))
}

/// Pieces of the context of at most `context_max` positions that is cut into the most: each length of pieces at its longest context.
fn pieces_max(context_max: usize) -> usize {
    let pieces = |context: usize| context.div_ceil(piece_len(context as u32) as usize);
    [4096, 32_768, context_max].map(|context| pieces(context.min(context_max))).into_iter().max().unwrap_or(1)
}

fn with_shared(shape: LaunchShape, bytes: usize) -> LaunchShape {
    LaunchShape { shared_bytes: bytes as u32, ..shape }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;
    use crate::cuda::account::CountingDriver;
    use crate::cuda::driver::{DeviceProperties, StreamPriority};

    /// A plan has as many blocks of decode as fit what its stream is on: all of the device, and the part of it.
    #[test]
    fn decode_is_cut_for_the_part_of_the_device() {
        let like = DeviceProperties {
            name: "a device".to_owned(),
            compute_capability: (9, 0),
            driver_version: (13, 0),
            multiprocessors: 132,
            shared_bytes: 228 << 10,
            block_shared_bytes: 227 << 10,
            memory_bytes: 1 << 30,
        };
        let whole = CudaDevice::counting(Arc::new(CountingDriver::new(like)), Element::BF16.into()).unwrap();
        let heads = HeadLayout { heads: 32, kv_heads: 8, head_dim: 128 };
        let limits = AttentionLimits {
            tokens_max: 64,
            sequences_max: 8,
            context_max: 256,
            windows: &[None],
            shared_prefix_bytes: u64::MAX,
        };
        let workers = |gpu: &CudaDevice| DevicePlan::new(gpu, heads, &limits).unwrap().workers;
        let all = launch::decode_workers(132, 8, 4) as u32;
        assert_eq!(workers(&whole), [all]);
        for part in whole.driver.divide(48).unwrap() {
            let gpu = whole.second(StreamPriority::High, Some(part)).unwrap();
            let own = launch::decode_workers(part.multiprocessors as usize, 8, 4) as u32;
            assert!(workers(&gpu) == [all, own] && own < all, "{part:?}");
        }
    }

    #[test]
    fn no_shorter_context_is_cut_into_more_pieces() {
        for context_max in [1, 255, 257, 4096, 4097, 9000, 20_480, 32_768, 32_769, 40_960, 65_535, 65_537, 131_072] {
            let most =
                (1..=context_max).map(|context: usize| context.div_ceil(piece_len(context as u32) as usize)).max();
            assert_eq!(Some(pieces_max(context_max)), most, "up to {context_max}");
        }
    }
}
