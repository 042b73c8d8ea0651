//! Packing of stored matrices into panels, in parallel over panels, at load.

use half::f16;

use super::CpuDevice;
use super::pair::Pair;
use super::panel::{Panels, Part};
use super::record::{Codes, GROUP, Layout, Scales, VECTOR};
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
        (Precision::F16, _) | (Precision::AsStored, Format::F16) => {
            Panels::F16(pack_floats(cpu, matrix, 1, |to, _, x| *to = f16::from_f32(x).to_bits())?)
        }
        (Precision::AsStored, format) => {
            let layout = Layout::of(format);
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
fn pack_codes(cpu: &CpuDevice, matrix: &MatrixView<'_>, layout: Layout) -> Result<Buffer<u8>> {
    let format = matrix.format;
    for_panels(cpu, matrix, layout.panel_bytes(matrix.cols), |panel, out| {
        let mut unpacked = Unpacked::new();
        for lane in 0..LANES {
            let Some(row) = lane_row(matrix, panel, lane) else { break };
            for (stored, block) in
                row.chunks_exact(format.block_bytes()).zip(out.chunks_exact_mut(layout.block_bytes()))
            {
                format.unpack(stored, &mut unpacked);
                let (head, records) = block.split_at_mut(layout.head_bytes());
                for (unit, to) in [unpacked.scale_unit, unpacked.min_unit].iter().zip(head.chunks_exact_mut(2 * LANES))
                {
                    put_half(to, lane, *unit);
                }
                for (group, record) in records.chunks_exact_mut(layout.record_bytes()).enumerate() {
                    fill_lane(layout, &unpacked, group, lane, record);
                }
            }
        }
    })
}

/// Writes group `group` of a block into lane `lane` of a record.
fn fill_lane(layout: Layout, block: &Unpacked, group: usize, lane: usize, record: &mut [u8]) {
    let (planes, scales) = record.split_at_mut(layout.code_bytes());
    fill_codes(layout.codes, block.codes[group * GROUP..][..GROUP].as_chunks().0, lane, planes.as_chunks_mut().0);
    match layout.scales {
        Scales::Half => put_half(scales, lane, block.scale_unit),
        Scales::HalfMin => {
            put_half(scales, lane, block.scale_unit);
            put_half(&mut scales[2 * LANES..], lane, block.min_unit);
        }
        Scales::Halves => {
            for half in 0..2 {
                scales[half * LANES + lane] = block.scales[2 * group + half].cast_unsigned();
            }
        }
        Scales::UnitsMin => {
            scales[lane] = block.scales[group].cast_unsigned();
            scales[LANES + lane] = block.mins[group].cast_unsigned();
        }
        Scales::HalvesMin => {
            for half in 0..2 {
                let at = 2 * group + half;
                scales[half * LANES + lane] = (block.scales[at] | block.mins[at] << 4).cast_unsigned();
            }
        }
    }
}

/// Spreads the codes of one lane over the planes of a record.
fn fill_codes(codes: Codes, quads: &[[u8; 4]], lane: usize, planes: &mut [[u8; VECTOR]]) {
    for (quad, codes_of_quad) in quads.iter().enumerate() {
        for (i, &code) in codes_of_quad.iter().enumerate() {
            let mut put = |vector: usize, bits: u8, shift: usize| planes[vector][4 * lane + i] |= bits << shift;
            let (nibble, pair) = ((quad % 4, 4 * (quad / 4)), (quad / 4, 2 * (quad % 4)));
            match codes {
                Codes::Two => put(pair.0, code, pair.1),
                Codes::Three => {
                    put(pair.0, code & 3, pair.1);
                    put(2, code >> 2, quad);
                }
                Codes::Four => put(nibble.0, code, nibble.1),
                Codes::Five => {
                    put(nibble.0, code & 15, nibble.1);
                    put(4, code >> 4, quad);
                }
                Codes::Six => {
                    put(nibble.0, code & 15, nibble.1);
                    put(4 + pair.0, code >> 4, pair.1);
                }
                Codes::Eight => put(quad, code, 0),
            }
        }
    }
}

/// Stores `value` as f16 number `at`; it came from an f16, so that nothing is lost.
fn put_half(to: &mut [u8], at: usize, value: f32) {
    to[2 * at..][..2].copy_from_slice(&f16::from_f32(value).to_bits().to_ne_bytes());
}
