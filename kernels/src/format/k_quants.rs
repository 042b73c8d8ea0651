//! The K-quants: super-blocks of 256 codes whose group scales are themselves quantized.

use super::{Unpacked, half_at};

/// `scales[16]` (scale in the low nibble, minimum in the high one), `codes[64]` of 2 bits, `d`, `dmin`.
pub(super) fn q2(block: &[u8], out: &mut Unpacked) {
    (out.scale_unit, out.min_unit) = (half_at(block, 80), -half_at(block, 82));
    for (group, &byte) in block[..16].iter().enumerate() {
        (out.scales[group], out.mins[group]) = ((byte & 15).cast_signed(), (byte >> 4).cast_signed());
    }
    unpack_pairs(&block[16..80], out);
}

/// `high bits[32]`, `codes[64]` of 2 bits, `scales[12]` of 6 bits less 32, `d`.
pub(super) fn q3(block: &[u8], out: &mut Unpacked) {
    let scales = &block[96..108];
    out.scale_unit = half_at(block, 108);
    for group in 0..16 {
        let low = if group < 8 { scales[group] & 15 } else { scales[group - 8] >> 4 };
        let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        out.scales[group] = (low | high << 4).cast_signed() - 32;
    }
    unpack_pairs(&block[32..96], out);
    for i in 0..256 {
        out.codes[i] |= (block[i % 32] >> (i / 32) & 1) << 2;
    }
}

/// `d`, `dmin`, `scales[12]`, `codes[128]` of 4 bits.
pub(super) fn q4(block: &[u8], out: &mut Unpacked) {
    scales_and_mins(block, out);
    unpack_nibbles(&block[16..144], out);
}

/// `d`, `dmin`, `scales[12]`, `high bits[32]`, `codes[128]` of 4 bits.
pub(super) fn q5(block: &[u8], out: &mut Unpacked) {
    scales_and_mins(block, out);
    unpack_nibbles(&block[48..176], out);
    for i in 0..256 {
        out.codes[i] |= (block[16 + i % 32] >> (i / 32) & 1) << 4;
    }
}

/// `low nibbles[128]`, `high pairs[64]`, `scales[16]` of i8, `d`.
pub(super) fn q6(block: &[u8], out: &mut Unpacked) {
    out.scale_unit = half_at(block, 208);
    for group in 0..16 {
        out.scales[group] = block[192 + group].cast_signed();
    }
    for i in 0..256 {
        let (half, quarter, at) = (i / 128, i / 32 % 4, i % 32);
        let low = block[half * 64 + quarter % 2 * 32 + at] >> (4 * (quarter / 2)) & 15;
        let high = block[128 + half * 32 + at] >> (2 * quarter) & 3;
        out.codes[i] = low | high << 4;
    }
}

/// 2-bit codes: each run of 32 bytes holds four runs of 32 codes, lowest bits first.
fn unpack_pairs(bytes: &[u8], out: &mut Unpacked) {
    for i in 0..256 {
        out.codes[i] = bytes[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
    }
}

/// 4-bit codes: each run of 32 bytes holds two runs of 32 codes, low nibbles first.
fn unpack_nibbles(bytes: &[u8], out: &mut Unpacked) {
    for (run, bytes) in bytes.as_chunks::<32>().0.iter().enumerate() {
        for (i, &byte) in bytes.iter().enumerate() {
            (out.codes[run * 64 + i], out.codes[run * 64 + 32 + i]) = (byte & 15, byte >> 4);
        }
    }
}

/// Eight 6-bit scales and eight 6-bit minimums in 12 bytes, in units of `d` and `-dmin`.
///
/// ```text
/// bytes 0..4   scale 0..4 (6 bits), high 2 bits of scale 4..8
/// bytes 4..8   min 0..4 (6 bits), high 2 bits of min 4..8
/// bytes 8..12  low 4 bits of scale 4..8, low 4 bits of min 4..8
/// ```
fn scales_and_mins(block: &[u8], out: &mut Unpacked) {
    let bytes = &block[4..16];
    (out.scale_unit, out.min_unit) = (half_at(block, 0), -half_at(block, 2));
    for group in 0..8 {
        let (scale, min) = if group < 4 {
            (bytes[group] & 63, bytes[group + 4] & 63)
        } else {
            let low = bytes[group + 4];
            (low & 15 | bytes[group - 4] >> 6 << 4, low >> 4 | bytes[group] >> 6 << 4)
        };
        (out.scales[group], out.mins[group]) = (scale.cast_signed(), min.cast_signed());
    }
}
