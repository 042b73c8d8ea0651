//! Prefill attention, by the portable kernel and by the one for sm_90a, against the scalar reference and against each other.
#![allow(clippy::unwrap_used)]

mod support;

use half::{bf16, f16};
use kvern_cuda_abi::{PrefillHopperParams, PrefillParams, PrefillPlan, PrefillQuery, PrefillTile, launch};
use kvern_cuda_shim::{Buffer, Launch, tensor_map};
use kvern_kernels::Element as DriverElement;
use kvern_kernels::cuda::driver::BoxedMatrix;
use support::paged::{Heads, Paged, pointers, tolerance};
use support::*;

/// Sequences of (tokens that are cached, query rows).
struct Case {
    heads: Heads,
    block_size: usize,
    sequences: &'static [(usize, usize)],
    window: Option<u32>,
}

const fn case(heads: [usize; 3], block_size: usize, sequences: &'static [(usize, usize)], window: Option<u32>) -> Case {
    let [heads, kv_heads, dim] = heads;
    Case { heads: Heads { heads, kv_heads, dim }, block_size, sequences, window }
}

/// A case's memory, as it is before the kernel.
struct Batch<T> {
    paged: Paged<T>,
    queries: Vec<PrefillQuery>,
    qkv: Vec<T>,
    rows: usize,
    scale: f32,
    window: Option<u32>,
}

impl<T: Element> Batch<T> {
    fn new(case: &Case) -> Self {
        let Case { heads, block_size, sequences, window } = *case;
        let mut random = Random(heads.dim as u64 + 7);
        let contexts: Vec<usize> = sequences.iter().map(|(cached, rows)| cached + rows).collect();
        let paged = Paged::<T>::new(&mut random, heads, block_size, &contexts);
        let mut rows = 0;
        let mut queries = Vec::new();
        for (table, &(cached, count)) in sequences.iter().enumerate() {
            queries.push(PrefillQuery { row: rows, rows: count as u32, position: cached as u32, table: table as u32 });
            rows += count as u32;
        }
        let qkv = random.values::<T>(rows as usize * paged.row_len(), 2.0);
        Batch { paged, queries, qkv, rows: rows as usize, scale: 1.0 / (heads.dim as f32).sqrt(), window }
    }

    fn group(&self) -> usize {
        self.paged.heads.heads / self.paged.heads.kv_heads
    }

    fn tiles(&self, tile_rows: usize) -> Vec<PrefillTile> {
        let mut plan = PrefillPlan::default();
        plan.update(&self.queries, tile_rows as u32);
        plan.tiles
    }

    fn scale_log2(&self) -> f32 {
        self.scale * std::f32::consts::LOG2_E
    }

    fn out(&self) -> Buffer<T> {
        Buffer::poisoned(self.rows * self.paged.heads.heads * self.paged.heads.dim)
    }

    /// By the portable kernel, or of F32 by the oracle's.
    fn portable(&self, fault: u32) -> Result<Vec<u32>, String> {
        let Heads { heads, kv_heads, dim } = self.paged.heads;
        let is_f32 = T::SUFFIX == "f32";
        let tiles = self.tiles(if is_f32 { 4 } else { launch::prefill_rows(dim) / self.group() });
        let make = || {
            let (caches, tables) = self.paged.buffers();
            let memory = (caches, tables, [Buffer::of(&self.qkv), self.out()], Buffer::of(&tiles));
            let ([k_cache, v_cache], [qkv, out]) = (pointers(&memory.0), pointers(&memory.2));
            let params = PrefillParams {
                qkv,
                k_cache,
                v_cache,
                out,
                tiles: memory.3.ptr(),
                block_tables: memory.1.ptr(),
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                block_size: self.paged.block_size as u32,
                table_stride: self.paged.stride as u32,
                qkv_stride: self.paged.row_len() as u32,
                window: self.window.unwrap_or(0),
                scale_log2: self.scale_log2(),
                head_dim: dim as u32,
            };
            (memory, params)
        };
        let (kernel, shape) = if is_f32 {
            ("kvern_attention_f32".to_owned(), Launch::new(tiles.len(), 128).rows(heads))
        } else {
            let shape = Launch::new(tiles.len(), launch::PREFILL_THREADS).rows(kv_heads);
            (format!("kvern_prefill_{}_d{dim}", T::SUFFIX), shape.shared(launch::prefill_shared_bytes(dim)))
        };
        run(&kernel, shape.planted(fault), make, |memory| bits(&memory.2[1]))
    }

    /// By the kernel for sm_90a, in tiles of at most `pairs` pairs of a row and a head.
    fn hopper(&self, pairs: usize, fault: u32) -> Result<Vec<u32>, String> {
        let Heads { heads, kv_heads, dim } = self.paged.heads;
        let block_size = self.paged.block_size;
        assert!(launch::prefill_hopper_takes(dim, block_size));
        let tiles = self.tiles((pairs / self.group()).max(1));
        let make = || {
            let (caches, tables) = self.paged.buffers();
            let memory = (caches, tables, [Buffer::of(&self.qkv), self.out()], Buffer::of(&tiles));
            let [k_map, v_map] = pointers(&memory.0).map(|memory| {
                tensor_map(&BoxedMatrix {
                    element: if T::SUFFIX == "f16" { DriverElement::F16 } else { DriverElement::BF16 },
                    memory,
                    rows: self.paged.k.len() / dim,
                    columns: dim,
                    box_rows: block_size,
                    box_columns: launch::prefill_hopper_panel(dim),
                })
            });
            let [qkv, out] = pointers(&memory.2);
            let params = PrefillHopperParams {
                k_map,
                v_map,
                qkv,
                out,
                tiles: memory.3.ptr(),
                block_tables: memory.1.ptr(),
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                block_size: block_size as u32,
                table_stride: self.paged.stride as u32,
                qkv_stride: self.paged.row_len() as u32,
                window: self.window.unwrap_or(0),
                scale_log2: self.scale_log2(),
                pad: 0,
                unused: [0; 8],
            };
            (memory, params)
        };
        let shape = Launch::new(tiles.len(), launch::PREFILL_HOPPER_THREADS).rows(kv_heads);
        let kernel = format!("kvern_prefill_hopper_{}_d{dim}", T::SUFFIX);
        let shape = shape.shared(launch::prefill_hopper_shared_bytes(dim)).planted(fault);
        run(&kernel, shape, make, |memory| bits(&memory.2[1]))
    }

    fn check(&self, what: &str, found: &[u32]) -> Result<(), String> {
        let (Heads { heads, dim, .. }, (relative, absolute)) = (self.paged.heads, tolerance::<T>());
        for query in &self.queries {
            for (at, head) in (0..query.rows as usize).flat_map(|at| (0..heads).map(move |head| (at, head))) {
                let row = query.row as usize + at;
                let q = &self.qkv[row * self.paged.row_len() + head * dim..][..dim];
                let position = query.position as usize + at;
                let expected = self.paged.expected(q, query.table as usize, position, head, self.scale, self.window);
                let found = &found[(row * heads + head) * dim..][..dim];
                let what = format!("{what} {} {:?} row {row} head {head}", T::SUFFIX, self.paged.heads);
                compare(&what, found, &expected, relative, absolute)?;
            }
        }
        Ok(())
    }
}

fn check_portable<T: Element>(case: &Case, fault: u32) -> Result<(), String> {
    let batch = Batch::<T>::new(case);
    batch.check("portable", &batch.portable(fault)?)
}

fn check_hopper<T: Element>(case: &Case, fault: u32) -> Result<(), String> {
    let batch = Batch::<T>::new(case);
    let found = batch.hopper(launch::PREFILL_HOPPER_ROWS, fault)?;
    batch.check("hopper", &found)?;
    // Of its twin, which adds the same up in tiles of another size, each is as far as it may be from the reference.
    let twin: Vec<f32> = batch.portable(0)?.into_iter().map(f32::from_bits).collect();
    let (relative, absolute) = tolerance::<T>();
    compare("hopper and portable", &found, &twin, 2.0 * relative, 2.0 * absolute)
}

/// What both kernels take.
const CASES: &[Case] = &[
    case([4, 2, 128], 16, &[(0, 70), (33, 5), (64, 1)], None),
    case([3, 1, 64], 16, &[(0, 1), (100, 50), (0, 16)], None),
    case([2, 1, 96], 32, &[(10, 40), (0, 33)], None),
    case([2, 2, 256], 16, &[(20, 30), (0, 3)], None),
    case([4, 1, 64], 8, &[(90, 60)], Some(25)),
    case([1, 1, 128], 128, &[(3, 140)], Some(1)),
];

/// Longer contexts, which go around the rings, and the other groups of heads.
const LONG_CASES: &[Case] = &[
    case([5, 1, 64], 16, &[(700, 30), (383, 1)], None),
    case([7, 1, 128], 16, &[(600, 20), (127, 1), (128, 2)], Some(300)),
    case([8, 1, 128], 32, &[(500, 17)], None),
    case([6, 1, 96], 16, &[(400, 9)], Some(129)),
    case([2, 1, 256], 64, &[(300, 20)], None),
];

#[test]
fn prefill_matches() {
    let own = [case([4, 1, 64], 7, &[(90, 60)], Some(25)), case([1, 1, 128], 1, &[(3, 140)], Some(1))];
    for case in CASES.iter().chain(&own) {
        check_portable::<f32>(case, 0).unwrap();
        check_portable::<bf16>(case, 0).unwrap();
        check_portable::<f16>(case, 0).unwrap();
    }
    for (fault, message) in [(TABLE_OFF_BY_ONE, "found NaN"), (WRONG_SCALE, "expected"), (MISSING_WAIT, "found NaN")] {
        caught(check_portable::<f16>(&CASES[0], fault), message);
    }
}

#[test]
fn prefill_for_sm_90a_matches() {
    for case in CASES {
        check_hopper::<bf16>(case, 0).unwrap();
        check_hopper::<f16>(case, 0).unwrap();
    }
    for case in LONG_CASES {
        check_hopper::<bf16>(case, 0).unwrap();
    }
}

#[test]
fn faults_of_prefill_for_sm_90a_are_noticed() {
    let table = [
        (TABLE_OFF_BY_ONE, "found NaN"),
        (WRONG_SCALE, "expected"),
        (MISSING_WAIT, "accumulators were written while products were under way"),
        (UNWRITTEN_TAIL, "found NaN"),
        (EARLY_RELEASE, "shared memory was written while products that read it were under way"),
        (WRONG_PARITY, "more than 1 arrivals in a phase of a barrier"),
        (WRONG_OFFSET, "expected"),
        (MISSING_FENCE, "while products that read it"),
        (WRONG_BYTES, "a deadlock"),
        (UNFENCED_PRODUCTS, "products without a fence"),
        (EARLY_WEIGHTS, "weights were written while products were under way"),
    ];
    for (fault, message) in table {
        println!("fault {fault}");
        caught(check_hopper::<f16>(&case([4, 2, 128], 16, &[(490, 5)], None), fault), message);
    }
}

/// Rows have the bits that they have alone, whichever others are in their tile.
#[test]
fn bits_do_not_depend_on_the_tile() {
    for case in [case([4, 2, 128], 16, &[(200, 70)], None), case([3, 1, 64], 16, &[(170, 60), (0, 5)], Some(40))] {
        let batch = Batch::<bf16>::new(&case);
        let whole = batch.hopper(launch::PREFILL_HOPPER_ROWS, 0).unwrap();
        for pairs in [1, 13, 64] {
            assert_eq!(batch.hopper(pairs, 0).unwrap(), whole, "tiles of {pairs} pairs");
        }
    }
}
