//! Packing of stored matrices into panels, in parallel over panels, at load.

use half::f16;

use super::CpuDevice;
use super::pair::Pair;
use super::panel::{GROUP, Panels, Part, QuantLayout};
use super::shared::SharedSlice;
use super::simd::LANES;
use crate::buffer::{Buffer, Plain};
use crate::format::Unpacked;
use crate::{Format, MatrixView, Precision, Result, dequantize};

/// Packs a matrix whose shape has been checked.
pub(crate) fn pack(cpu: &CpuDevice, matrix: &MatrixView<'_>, precision: Precision, first_row: usize) -> Result<Part> {
    let panels = match (precision, matrix.format) {
        (Precision::F32, _) | (Precision::AsStored, Format::F32) => {
            Panels::F32(pack_floats(cpu, matrix, 1, |to, _, x| *to = x)?)
        }
        (Precision::BF16, _) | (Precision::AsStored, Format::BF16) => {
            Panels::BF16(pack_floats(cpu, matrix, 2, |to: &mut Pair, at, x| *to = to.with(at, x))?)
        }
        (Precision::AsStored, Format::F16) => {
            Panels::F16(pack_floats(cpu, matrix, 1, |to, _, x| *to = f16::from_f32(x).to_bits())?)
        }
        (Precision::AsStored, format) => {
            let layout = QuantLayout::of(format);
            Panels::Quant(layout, pack_codes(cpu, matrix, layout)?)
        }
    };
    Ok(Part { panels, rows: matrix.rows, first_row, cols: matrix.cols })
}

/// Runs `fill(panel, its elements)` for each panel of `matrix` into one new buffer.
fn for_panels<T: Plain>(
    cpu: &CpuDevice,
    matrix: &MatrixView<'_>,
    panel_len: usize,
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Result<Buffer<T>> {
    let panels = matrix.rows.div_ceil(LANES);
    let mut buffer = cpu.weights().zeros(panels * panel_len)?;
    let shared = SharedSlice::new(&mut buffer[..]);
    cpu.pool.run(panels, &|_, panel| {
        // SAFETY: each panel is one task's.
        fill(panel, unsafe { shared.part(panel * panel_len..(panel + 1) * panel_len) });
    });
    Ok(buffer)
}

/// The stored row that is lane `lane` of a panel, or `None` past the last row.
fn lane_row<'a>(matrix: &'a MatrixView<'_>, panel: usize, lane: usize) -> Option<&'a [u8]> {
    let row = panel * LANES + lane;
    (row < matrix.rows).then(|| matrix.row(matrix.row_order.stored_row(row, matrix.rows)))
}

/// `[cols / per_element][16]` panels of elements, each filled by `put(element, which of its values, value)`.
fn pack_floats<T: Plain>(
    cpu: &CpuDevice,
    matrix: &MatrixView<'_>,
    per_element: usize,
    put: impl Fn(&mut T, usize, f32) + Sync,
) -> Result<Buffer<T>> {
    /// Elements widened at a time: a whole number of blocks of every format.
    const STRETCH: usize = 256;
    let format = matrix.format;
    let stretch_bytes = STRETCH / format.block_elements() * format.block_bytes();
    for_panels(cpu, matrix, matrix.cols.div_ceil(per_element) * LANES, |panel, out| {
        let mut values = [0.0; STRETCH];
        for lane in 0..LANES {
            let Some(row) = lane_row(matrix, panel, lane) else { break };
            for (bytes, out) in row.chunks(stretch_bytes).zip(out.chunks_mut(STRETCH / per_element * LANES)) {
                let values = &mut values[..bytes.len() / format.block_bytes() * format.block_elements()];
                dequantize(format, bytes, values).expect("a stretch is whole blocks");
                for (values, out) in values.chunks(per_element).zip(out.as_chunks_mut::<LANES>().0) {
                    for (at, &value) in values.iter().enumerate() {
                        put(&mut out[lane], at, value);
                    }
                }
            }
        }
    })
}

/// Panels of integer records.
fn pack_codes(cpu: &CpuDevice, matrix: &MatrixView<'_>, layout: QuantLayout) -> Result<Buffer<u8>> {
    let format = matrix.format;
    let groups_per_block = format.block_elements() / GROUP;
    let panel_bytes = matrix.cols / GROUP * layout.record_bytes();
    for_panels(cpu, matrix, panel_bytes, |panel, out| {
        let mut unpacked = Unpacked::new();
        for lane in 0..LANES {
            let Some(row) = lane_row(matrix, panel, lane) else { break };
            let blocks = row.chunks_exact(format.block_bytes());
            for (block, records) in blocks.zip(out.chunks_mut(groups_per_block * layout.record_bytes())) {
                format.unpack(block, &mut unpacked);
                for (group, record) in records.chunks_exact_mut(layout.record_bytes()).enumerate() {
                    fill_lane(layout, &unpacked, group, lane, record);
                }
            }
        }
    })
}

/// Writes group `group` of a block into lane `lane` of a record.
fn fill_lane(layout: QuantLayout, block: &Unpacked, group: usize, lane: usize, record: &mut [u8]) {
    let (codes, affine) = record.split_at_mut(layout.code_bytes());
    let source = block.codes[group * GROUP..][..GROUP].as_chunks::<4>().0;
    let vectors = codes.as_chunks_mut::<{ 4 * LANES }>().0;
    for (quad, vector) in vectors.iter_mut().enumerate() {
        let mut word = source[quad];
        if layout.nibbles {
            for (low, high) in word.iter_mut().zip(source[quad + 4]) {
                *low |= high << 4;
            }
        }
        vector[4 * lane..][..4].copy_from_slice(&word);
    }
    let per_record = if layout.halves { 2 } else { 1 };
    let (scales, mins) = affine.split_at_mut(layout.scale_bytes());
    for half in 0..per_record {
        let (from, to) = (group * per_record + half, half * LANES + lane);
        put(layout.wide, scales, to, block.scales[from]);
        if layout.min {
            put(layout.wide, mins, to, block.mins[from]);
        }
    }
}

/// Stores `value` as element `at`. Narrow values came from f16, so that nothing is lost.
fn put(wide: bool, to: &mut [u8], at: usize, value: f32) {
    if wide {
        to[4 * at..][..4].copy_from_slice(&value.to_ne_bytes());
    } else {
        to[2 * at..][..2].copy_from_slice(&f16::from_f32(value).to_bits().to_ne_bytes());
    }
}
