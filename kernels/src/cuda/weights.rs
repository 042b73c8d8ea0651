//! Stored matrices to a device. Reading, conversion and copying overlap: while one stretch of pinned memory is copied, the
//! host's threads fill the other.

use std::sync::Arc;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use kvern_cuda_abi::{FillParams, Ptr};

use super::driver::{Driver, Element, Stream};
use super::memory::{DeviceMemory, Milestone, Pinned};
use super::{CudaDevice, shape};
use crate::cpu::pool::Pool;
use crate::{Format, KernelError, MatrixView, Precision, Result, dequantize};

/// Of each of the loader's two stretches.
const STAGE_BYTES: usize = 16 << 20;
/// Host threads that read and convert; more than that do not make a copy over PCIe faster.
const THREADS_MAX: usize = 16;
/// Bytes that one task of theirs fills, about.
const TASK_BYTES: usize = 256 << 10;
const FILL_THREADS: usize = 256;
const FILL_BLOCKS_MAX: usize = 1 << 14;

/// How a part of a weight lies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// Of the device's element type, row after row.
    Dense,
    /// A quantized format's blocks, as in the file.
    Blocks(Format),
}

/// Output features `first_row..first_row + rows` of a weight.
pub(super) struct DevicePart {
    pub(super) memory: DeviceMemory,
    pub(super) stored: Stored,
    pub(super) first_row: usize,
    pub(super) rows: usize,
}

/// A weight on a device.
pub(crate) struct DeviceWeight {
    pub(super) parts: Vec<DevicePart>,
}

impl DeviceWeight {
    /// Brings the matrices, which were checked, one under the other. `dense`: quantized ones are widened, as a table of
    /// embeddings must be.
    pub(crate) fn pack(
        gpu: &CudaDevice,
        views: &[MatrixView<'_>],
        precision: Precision,
        dense: bool,
    ) -> Result<DeviceWeight> {
        let stored = |view: &MatrixView<'_>| {
            let keep = precision == Precision::AsStored && !dense && gpu.kernels.blocks(view.format).is_some();
            if keep { Stored::Blocks(view.format) } else { Stored::Dense }
        };
        let (mut parts, mut first_row) = (Vec::new(), 0);
        for group in views.chunk_by(|a, b| stored(a) == stored(b)) {
            let part = DeviceWeight::part(gpu, group, stored(&group[0]), first_row)?;
            first_row += part.rows;
            parts.push(part);
        }
        Ok(DeviceWeight { parts })
    }

    fn part(gpu: &CudaDevice, views: &[MatrixView<'_>], stored: Stored, first_row: usize) -> Result<DevicePart> {
        let row_bytes = |view: &MatrixView<'_>| match stored {
            Stored::Dense => view.cols * gpu.element.bytes(),
            Stored::Blocks(_) => view.row_bytes(),
        };
        let bytes: usize = views.iter().map(|view| view.rows * row_bytes(view)).sum();
        let memory = DeviceMemory::new(&gpu.driver, "weights", bytes)?;
        let mut at = 0;
        for view in views {
            let (to, rows) = (memory.at(at), view.rows);
            gpu.loader().write(gpu.stream(), to, rows, row_bytes(view), &|row, out| {
                let stored_row = view.row(view.row_order.stored_row(row, rows));
                match stored {
                    Stored::Dense => convert(view.format, stored_row, gpu.element, out),
                    Stored::Blocks(_) => out.copy_from_slice(stored_row),
                }
            })?;
            at += rows * row_bytes(view);
        }
        Ok(DevicePart { memory, stored, first_row, rows: views.iter().map(|view| view.rows).sum() })
    }

    /// `rows x cols` values, uniform in `[-limit, limit)`, that depend on the seed alone.
    pub(crate) fn random(gpu: &CudaDevice, rows: usize, cols: usize, seed: u64, limit: f32) -> Result<DeviceWeight> {
        let elements = rows * cols;
        let memory = DeviceMemory::new(&gpu.driver, "weights", elements * gpu.element.bytes())?;
        let params = FillParams { out: memory.ptr(), elements: elements as u64, seed, limit, pad: 0 };
        let blocks = elements.div_ceil(FILL_THREADS).clamp(1, FILL_BLOCKS_MAX);
        // SAFETY: there is room for so many.
        unsafe { gpu.launch(gpu.kernels.fill, shape([blocks, 1], FILL_THREADS), &params)? };
        Ok(DeviceWeight { parts: vec![DevicePart { memory, stored: Stored::Dense, first_row: 0, rows }] })
    }

    /// Where a table of dense rows is.
    pub(super) fn table(&self) -> Result<Ptr> {
        match self.parts.as_slice() {
            [DevicePart { memory, stored: Stored::Dense, .. }] => Ok(memory.ptr()),
            _ => Err(KernelError::shape("embed", "a dense table, by Weight::table", "a quantized or stacked weight")),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.memory.bytes()).sum()
    }
}

/// F32 values to device memory, as elements of another type where asked.
pub(crate) fn upload(gpu: &CudaDevice, what: &str, values: &[f32], element: Element) -> Result<DeviceMemory> {
    const ROW: usize = 4096;
    let memory = DeviceMemory::new(&gpu.driver, what, values.len() * element.bytes())?;
    let (rows, rest) = values.as_chunks::<ROW>();
    let mut loader = gpu.loader();
    let row_bytes = ROW * element.bytes();
    loader.write(gpu.stream(), memory.ptr(), rows.len(), row_bytes, &|row, out| narrow(&rows[row], element, out))?;
    let at = memory.at(rows.len() * row_bytes);
    let fill = |_: usize, out: &mut [u8]| narrow(rest, element, out);
    loader.write(gpu.stream(), at, usize::from(!rest.is_empty()), rest.len() * element.bytes(), &fill)?;
    Ok(memory)
}

/// Stored elements of one row as elements of the device.
fn convert(format: Format, stored: &[u8], element: Element, out: &mut [u8]) {
    let same = matches!(
        (format, element),
        (Format::F32, Element::F32) | (Format::F16, Element::F16) | (Format::BF16, Element::BF16)
    );
    if same {
        return out.copy_from_slice(stored);
    }
    // A few blocks at a time, so that what is widened stays in the first-level cache.
    const VALUES: usize = 1024;
    let mut values = [0.0; VALUES];
    let block = format.block_elements().max(VALUES / 4);
    let (stored_bytes, out_bytes) = (block / format.block_elements() * format.block_bytes(), block * element.bytes());
    for (stored, out) in stored.chunks(stored_bytes).zip(out.chunks_mut(out_bytes)) {
        let values = &mut values[..out.len() / element.bytes()];
        dequantize(format, stored, values).expect("rows are whole blocks, as was checked");
        narrow(values, element, out);
    }
}

/// Rounded to nearest, ties to even.
fn narrow(values: &[f32], element: Element, out: &mut [u8]) {
    const VALUES: usize = 1024;
    for (values, out) in values.chunks(VALUES).zip(out.chunks_mut(VALUES * element.bytes())) {
        let mut words = [0u16; VALUES];
        let words = &mut words[..values.len()];
        match element {
            Element::F32 => {
                out.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_le_bytes());
                continue;
            }
            Element::F16 => {
                let mut halves = [f16::ZERO; VALUES];
                halves[..values.len()].convert_from_f32_slice(values);
                words.iter_mut().zip(halves).for_each(|(word, half)| *word = half.to_bits());
            }
            Element::BF16 => {
                let mut halves = [bf16::ZERO; VALUES];
                halves[..values.len()].convert_from_f32_slice(values);
                words.iter_mut().zip(halves).for_each(|(word, half)| *word = half.to_bits());
            }
        }
        out.as_chunks_mut::<2>().0.iter_mut().zip(words).for_each(|(out, word)| *out = word.to_le_bytes());
    }
}

/// Pinned memory that weights pass through, and threads that fill it.
pub(crate) struct Loader {
    /// What copies to the device; work of other streams waits for it there.
    stream: Stream,
    stages: [Stage; 2],
    /// Which stage is next.
    turn: usize,
    counts_only: bool,
    pool: Pool,
}

struct Stage {
    pinned: Pinned<u8>,
    copied: Milestone,
}

/// The start of a stretch that tasks write disjoint parts of.
#[derive(Clone, Copy)]
struct Start(*mut u8);

// SAFETY: each task writes rows of its own.
unsafe impl Send for Start {}
// SAFETY: as above.
unsafe impl Sync for Start {}

impl Start {
    /// # Safety
    /// The range is within the stretch and nobody else uses it.
    unsafe fn slice<'a>(self, from: usize, len: usize) -> &'a mut [u8] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}

impl Loader {
    /// Copies on this stream.
    pub(super) fn new(driver: &Arc<dyn Driver>, stream: Stream) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS_MAX));
        let threads = if driver.counts_only() { 1 } else { cores };
        let stage = || {
            let (pinned, copied) = (Pinned::new(driver, STAGE_BYTES)?, Milestone::new(driver, [stream])?);
            Ok::<_, KernelError>(Stage { pinned, copied })
        };
        Ok(Loader {
            stream,
            stages: [stage()?, stage()?],
            turn: 0,
            counts_only: driver.counts_only(),
            pool: Pool::new(threads)?,
        })
    }

    /// Has `rows` rows of `row_bytes` filled, each by `fill`, and copied to `to`. The copies are on their way when it
    /// returns, and what is put on `stream` from then on comes after them.
    fn write(
        &mut self,
        stream: Stream,
        to: Ptr,
        rows: usize,
        row_bytes: usize,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<()> {
        if self.counts_only {
            return Ok(());
        }
        let rows_at_once = STAGE_BYTES / row_bytes.max(1);
        if rows_at_once == 0 {
            return Err(KernelError::shape("load", format!("rows of at most {STAGE_BYTES} bytes"), row_bytes));
        }
        let task_rows = (TASK_BYTES / row_bytes.max(1)).max(1);
        for first in (0..rows).step_by(rows_at_once) {
            let count = rows_at_once.min(rows - first);
            self.turn = 1 - self.turn;
            let Stage { pinned, copied } = &mut self.stages[self.turn];
            copied.wait()?;
            let start = Start(pinned.write(0..STAGE_BYTES)?.as_mut_ptr());
            self.pool.run(count.div_ceil(task_rows), &|_, task| {
                for row in task * task_rows..count.min((task + 1) * task_rows) {
                    // SAFETY: rows of the stage, each of one task.
                    fill(first + row, unsafe { start.slice(row * row_bytes, row_bytes) });
                }
            });
            let at = Ptr(to.0 + (first * row_bytes) as u64);
            // SAFETY: the stage is not written again before `copied` has passed; the caller has room at `to`.
            unsafe { pinned.copy_to(self.stream, at, 0, count * row_bytes)? };
            copied.set(self.stream)?;
        }
        // The memory is new: nothing on the other stream can still use it.
        if stream != self.stream { self.stages[self.turn].copied.hold(stream) } else { Ok(()) }
    }
}
