//! Shapes of launches that kernels fix. Each number has its twin in a `.cu` file; one that is wrong fails the shim's tests.

/// Warps per block of `kvern_rope_store_*`; blocks = ceil(rows x (heads + 2 kv_heads) / this).
pub const ROPE_WARPS: usize = 4;

/// Threads per block of `kvern_decode_*`; the grid is (workers, kv_heads x [`decode_head_tiles`]).
pub const DECODE_THREADS: usize = 128;

/// Threads per block of `kvern_prefill_*`; the grid is (tiles, kv_heads).
pub const PREFILL_THREADS: usize = 128;

/// Bytes of one row of a tile in shared memory: 16-bit values and what keeps rows in different banks.
const fn pitch(head_dim: usize) -> usize {
    2 * head_dim + 16
}

/// Tiles of at most 16 query heads that one KV head's group is.
#[must_use]
pub const fn decode_head_tiles(group: usize) -> usize {
    group.div_ceil(16)
}

/// Workers to plan decode attention for, where `blocks` fit the device at once: as many as make one wave, at least one.
#[must_use]
pub const fn decode_workers(blocks: usize, kv_heads: usize, group: usize) -> usize {
    let workers = blocks / (kv_heads * decode_head_tiles(group));
    if workers == 0 { 1 } else { workers }
}

/// Dynamic shared memory of `kvern_decode_*`: 16 rows of q, and per warp a ring of 2 or 3 stages of 16 rows of K and V.
#[must_use]
pub const fn decode_shared_bytes(head_dim: usize) -> usize {
    let stages = if head_dim > 128 { 2 } else { 3 };
    16 * pitch(head_dim) * (1 + 4 * stages * 2)
}

/// Static shared memory of `kvern_decode_*`, in which warps tell each other their maxima and sums.
const DECODE_STATIC_SHARED_BYTES: usize = 512;

/// Shared memory, dynamic and static, that a device must be able to give a block: that of decode with the largest heads.
/// Kernels for sm_90a may ask for more, which the devices that can run them have.
pub const BLOCK_SHARED_BYTES_MIN: usize = decode_shared_bytes(256) + DECODE_STATIC_SHARED_BYTES;

/// Pairs of a query row and a head that a tile of `kvern_prefill_*` has room for.
#[must_use]
pub const fn prefill_rows(head_dim: usize) -> usize {
    if head_dim > 128 { 64 } else { 128 }
}

/// As [`prefill_rows`], of `kvern_cascade_*`, whose blocks have as many threads.
#[must_use]
pub const fn cascade_rows(head_dim: usize) -> usize {
    if head_dim > 96 { 64 } else { 128 }
}

/// Dynamic shared memory of `kvern_cascade_*`, as of prefill.
#[must_use]
pub const fn cascade_shared_bytes(head_dim: usize) -> usize {
    prefill_shared_bytes(head_dim) - pitch(head_dim) * (prefill_rows(head_dim) - cascade_rows(head_dim))
}

/// Dynamic shared memory of `kvern_prefill_*`: the tile of q, and two stages of K and V.
#[must_use]
pub const fn prefill_shared_bytes(head_dim: usize) -> usize {
    let positions = if head_dim > 64 { 32 } else { 64 };
    pitch(head_dim) * (prefill_rows(head_dim) + 4 * positions)
}

/// Threads per block of `kvern_prefill_hopper_*`; the grid is as of prefill.
pub const PREFILL_HOPPER_THREADS: usize = 384;

/// As [`prefill_rows`], of `kvern_prefill_hopper_*`, whatever the size of heads.
pub const PREFILL_HOPPER_ROWS: usize = 128;

/// Positions of a tile of K and V of `kvern_prefill_hopper_*`.
const fn prefill_hopper_positions(head_dim: usize) -> usize {
    if head_dim > 128 { 64 } else { 128 }
}

/// Values of a row of what `kvern_prefill_hopper_*` copies at once: a panel as wide as its swizzle, of 128 bytes or of 64.
#[must_use]
pub const fn prefill_hopper_panel(head_dim: usize) -> usize {
    if head_dim.is_multiple_of(64) { 64 } else { 32 }
}

/// Whether there is a `kvern_prefill_hopper_*` for such heads in blocks of such a size: eight rows are a swizzle's pattern, and blocks
/// make whole tiles.
#[must_use]
pub const fn prefill_hopper_takes(head_dim: usize, block_size: usize) -> bool {
    matches!(head_dim, 64 | 96 | 128 | 256)
        && block_size.is_multiple_of(8)
        && block_size > 0
        && prefill_hopper_positions(head_dim).is_multiple_of(block_size)
}

/// Dynamic shared memory of `kvern_prefill_hopper_*`: the tile of q, two or three stages of K and of V, and what brings these to
/// multiples of 1024 bytes.
#[must_use]
pub const fn prefill_hopper_shared_bytes(head_dim: usize) -> usize {
    let stages = if head_dim > 64 { 2 } else { 3 };
    2 * head_dim * (PREFILL_HOPPER_ROWS + 2 * stages * prefill_hopper_positions(head_dim)) + 1024
}

/// Threads per block, and outputs per block, of `kvern_gemv_*`; blocks = ceil(outputs / outputs per block).
pub const GEMV_THREADS: usize = 128;
pub const GEMV_OUTPUTS: usize = 4;

/// Threads per block of `kvern_sample_*`, exactly these; the grid is (rows, [`sample_parts`]).
pub const SAMPLE_THREADS: usize = 512;

/// Most tokens of a vocabulary that `kvern_sample_*` take.
pub const SAMPLE_VOCAB_MAX: usize = 1 << 20;

/// Entries of a row's list, and bins of a row, of `kvern_sample_*`.
pub const SAMPLE_LISTED: usize = 8192;
pub const SAMPLE_BINS: usize = 2048;

/// Counters of a row of `kvern_sample_*`.
pub const SAMPLE_COUNTERS: usize = 4;

/// Blocks of `kvern_sample_*` that share a row.
#[must_use]
pub const fn sample_parts(vocab: usize) -> usize {
    vocab.div_ceil(8192)
}

/// What these blocks leave of a row for its end, in numbers of 64 bits.
#[must_use]
pub const fn sample_partials(vocab: usize, top_stride: usize) -> usize {
    sample_parts(vocab) * (4 + top_stride)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_for_sm_90a_takes() {
        let takes = |dim: usize| -> Vec<usize> { (0..200).filter(|&size| prefill_hopper_takes(dim, size)).collect() };
        assert_eq!([takes(64), takes(96), takes(128)], [(); 3].map(|()| vec![8, 16, 32, 64, 128]));
        assert_eq!((takes(256), takes(80)), (vec![8, 16, 32, 64], vec![]));
    }

    /// The dynamic shared memory of a kernel, by its name in the table of resources.
    fn dynamic_shared_bytes(kernel: &str) -> usize {
        let Some((name, head_dim)) = kernel.rsplit_once("_d") else { return 0 };
        let Ok(head_dim) = head_dim.parse() else { return 0 };
        let (op, _element) = name.rsplit_once('_').expect("a name ends with an element and a size of heads");
        match op {
            "kvern_decode" => decode_shared_bytes(head_dim),
            "kvern_cascade" => cascade_shared_bytes(head_dim),
            "kvern_prefill" => prefill_shared_bytes(head_dim),
            "kvern_prefill_hopper" => prefill_hopper_shared_bytes(head_dim),
            "kvern_decode_merge" => 0,
            other => panic!("expected a kernel whose shared memory is known, found {other}"),
        }
    }

    #[test]
    fn no_kernel_asks_for_more_shared_memory_than_its_devices_have() {
        let mut most = 0;
        for row in include_str!("../../cuda/resources.txt").lines().filter(|line| !line.starts_with('#')) {
            let columns: Vec<&str> = row.split_whitespace().collect();
            let (kernel, target, fixed) = (columns[0], columns[1], columns[3].parse::<usize>().expect("bytes"));
            let is_hopper = kernel.starts_with("kvern_prefill_hopper_");
            if is_hopper && target == "sm_80" {
                // Nothing launches what is compiled of it for others.
                continue;
            }
            let bytes = fixed + dynamic_shared_bytes(kernel);
            // What a block may have on devices of capability 8.0, and of 9.0.
            let limit = if target == "sm_80" { 163 << 10 } else { 227 << 10 };
            assert!(bytes <= limit, "{kernel} for {target}: {bytes} bytes");
            if !is_hopper {
                most = most.max(bytes);
            }
        }
        assert_eq!(most, BLOCK_SHARED_BYTES_MIN);
    }
}
