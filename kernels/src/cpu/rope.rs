//! Rotary embedding of q and k, and the store of k and v to the KV cache.

use super::CpuDevice;
use super::element::Cell;
use super::rows::norm_in_place;
use super::shared::SharedSlice;
use super::simd::{Kernel, LANES, Simd, dispatch};
use crate::kv_cache::{Cells, KvData};
use crate::ops::RopeAndStore;
use crate::{KvCache, KvShape};

/// Rotates row by row, then stores head by head: two rows with one slot are then still written one after the other.
/// `positions` and `slots` are those of `args`, checked.
pub(crate) fn rope_and_store(
    cpu: &CpuDevice,
    args: &RopeAndStore<'_>,
    (positions, slots): (&[u32], &[u32]),
    qkv: &mut [f32],
    kv: &mut KvCache,
) {
    let (cols, rows) = (args.heads.row_len(), positions.len());
    let shared = SharedSlice::new(qkv);
    cpu.for_row_chunks(rows, cols, &|rows| {
        for row in rows {
            // SAFETY: each row is one task's.
            let qkv = unsafe { shared.part(row * cols..(row + 1) * cols) };
            dispatch(cpu.isa, Row { args, position: positions[row] as usize, qkv });
        }
    });
    let shape = kv.shape();
    match &kv.data {
        KvData::F32(data) => store(cpu, args, (qkv, slots), data, shape),
        KvData::BF16(data) => store(cpu, args, (qkv, slots), data, shape),
        KvData::Device(_) => unreachable!("caches on a GPU are for the ops of a GPU"),
    }
}

struct Row<'a> {
    args: &'a RopeAndStore<'a>,
    position: usize,
    qkv: &'a mut [f32],
}

impl Kernel for Row<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let heads = self.args.heads;
        let (cos, sin) = self.args.rope.row(self.position);
        let rotated = (heads.heads + heads.kv_heads) * heads.head_dim;
        for (head, values) in self.qkv[..rotated].chunks_exact_mut(heads.head_dim).enumerate() {
            if let Some(norm) = &self.args.norm {
                let weight = if head < heads.heads { norm.q } else { norm.k };
                norm_in_place(s, values, weight.host(), norm.eps);
            }
            rotate(s, values, cos, sin);
        }
    }
}

/// `(a, b) = (a cos - b sin, b cos + a sin)` for the pairs `i`, `i + half`.
#[inline(always)]
fn rotate<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    let (first, second) = head[..2 * half].split_at_mut(half);
    let pairs = first.chunks_mut(LANES).zip(second.chunks_mut(LANES));
    for ((a, b), (cos, sin)) in pairs.zip(cos.chunks(LANES).zip(sin.chunks(LANES))) {
        let (x, y) = (s.load_partial(a), s.load_partial(b));
        let (cos, sin) = (s.load_partial(cos), s.load_partial(sin));
        s.store_partial(a, s.sub(s.mul(x, cos), s.mul(y, sin)));
        s.store_partial(b, s.add(s.mul(y, cos), s.mul(x, sin)));
    }
}

/// Writes k, transposed, and v of all rows to their slots.
fn store<C: Cell>(
    cpu: &CpuDevice,
    args: &RopeAndStore<'_>,
    (qkv, slots): (&[f32], &[u32]),
    data: &Cells<C>,
    shape: KvShape,
) {
    cpu.for_row_chunks(shape.kv_heads, slots.len() * shape.head_dim, &|heads| {
        for head in heads {
            dispatch(cpu.isa, StoreHead { args, qkv, slots, data, shape, head });
        }
    });
}

struct StoreHead<'a, C: Cell> {
    args: &'a RopeAndStore<'a>,
    qkv: &'a [f32],
    slots: &'a [u32],
    data: &'a Cells<C>,
    shape: KvShape,
    head: usize,
}

impl<C: Cell> Kernel for StoreHead<'_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let StoreHead { args, qkv, slots, data, shape, head } = self;
        let KvShape { block_size, head_dim, kv_heads, .. } = shape;
        let (k_stride, v_stride) = (shape.padded_block(), shape.padded_head());
        let k_start = (args.heads.heads + head) * head_dim;
        for (qkv, &slot) in qkv.chunks_exact(args.heads.row_len()).zip(slots) {
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            let start = shape.page_start(args.layer, block, head);
            // SAFETY: the pages of a head are one task's, and ops of other devices are at other blocks (`KvCache::share`).
            let pages = unsafe { data.write(start..start + 2 * shape.page()) };
            let (k_page, v_page) = pages.split_at_mut(shape.page());
            let k = qkv[k_start..][..head_dim].chunks(C::VALUES);
            for (cells, values) in k_page.chunks_exact_mut(k_stride).zip(k) {
                cells[offset] = C::of(values);
            }
            let v = &qkv[k_start + kv_heads * head_dim..][..head_dim];
            let at = offset % C::VALUES;
            for (cell, &value) in v_page[offset / C::VALUES * v_stride..].iter_mut().zip(v) {
                *cell = cell.with(at, value);
            }
        }
    }
}
