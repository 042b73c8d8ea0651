//! Products against a scalar reference, bit for bit.

use half::{bf16, f16};
use kvern_cuda_abi::Ptr;
use kvern_kernels::cuda::driver::{Driver, Element, Gemm};

use super::*;

/// Numbers in [-1, 1) from a seed (SplitMix64), and some that only rounding to nearest, ties to even, gets right.
fn values(element: Element, len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| rounded(element, next())).collect()
}

fn rounded(element: Element, value: f32) -> f32 {
    match element {
        Element::F32 => value,
        Element::F16 => f16::from_f32(value).to_f32(),
        Element::BF16 => bf16::from_f32(value).to_f32(),
    }
}

/// The bytes of values that are the type's.
fn stored(element: Element, values: &[f32]) -> Vec<u8> {
    let bytes = |value: &f32| match element {
        Element::F32 => value.to_le_bytes().to_vec(),
        Element::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Element::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// Memory of the device with these bytes.
fn upload(rig: &Rig, bytes: &[u8]) -> Ptr {
    let (to, from) = (rig.driver.allocate(bytes.len()).unwrap(), rig.driver.allocate_pinned(bytes.len()).unwrap());
    // SAFETY: as long, new, and left alone after the copy.
    unsafe {
        from.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len());
        rig.driver.copy_to_device(rig.streams[0], to, from, bytes.len()).unwrap();
    }
    to
}

fn download(rig: &Rig, from: Ptr, bytes: usize) -> Vec<u8> {
    let to = rig.driver.allocate_pinned(bytes).unwrap();
    // SAFETY: as long.
    unsafe { rig.driver.copy_to_host(rig.streams[0], to, from, bytes) }.unwrap();
    rig.finish(0);
    rig.driver.host_access(to, bytes, HostAccess::Read).unwrap();
    // SAFETY: as long, and no work runs.
    unsafe { std::slice::from_raw_parts(to.as_ptr(), bytes).to_vec() }
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    gap: usize,
    bias: bool,
}

fn check(element: Element, out_element: Element, case: &Case) {
    let Case { m, n, k, gap, bias } = *case;
    let rig = Rig::new();
    let [x, w, added] = [m * k, n * k, n].map(|len| values(element, len, len as u64));
    let stride = n + gap;
    let out_bytes = m * stride * out_element.bytes();
    let out = rig.driver.allocate(out_bytes).unwrap();
    let gemm = Gemm {
        element,
        out_element,
        x: upload(&rig, &stored(element, &x)),
        w: upload(&rig, &stored(element, &w)),
        bias: if bias { upload(&rig, &stored(element, &added)) } else { Ptr::NULL },
        out,
        m,
        n,
        k,
        out_stride: stride,
        multiprocessors: 0,
        workspace: Ptr::NULL,
        workspace_bytes: 0,
    };
    // SAFETY: sizes are as said.
    unsafe { rig.driver.gemm(rig.streams[0], &gemm) }.unwrap();
    let found = download(&rig, out, out_bytes);
    for (at, found) in found.chunks(out_element.bytes()).enumerate() {
        let (row, column) = (at / stride, at % stride);
        if column >= n {
            assert!(found.iter().all(|byte| *byte == 0xff), "{element}: a write past {n} columns, at {column}");
            continue;
        }
        let products = x[row * k..][..k].iter().zip(&w[column * k..][..k]);
        let sum = products.fold(0.0, |sum, (x, w)| sum + x * w);
        let sum = if bias { sum + added[column] } else { sum };
        let expected = stored(out_element, &[sum]);
        assert_eq!(found, expected, "{element} to {out_element}, {m}x{n}x{k}, row {row}, column {column}");
    }
}

#[test]
fn products_match_the_scalar_reference() {
    let cases = [
        Case { m: 1, n: 1, k: 1, gap: 0, bias: false },
        Case { m: 3, n: 16, k: 64, gap: 0, bias: true },
        Case { m: 5, n: 37, k: 129, gap: 7, bias: false },
        Case { m: 9, n: 50, k: 33, gap: 3, bias: true },
    ];
    for case in &cases {
        for element in [Element::F32, Element::F16, Element::BF16] {
            check(element, element, case);
            check(element, Element::F32, case);
        }
    }
}

#[test]
fn wrong_products_are_refused() {
    let rig = Rig::new();
    let (x, w, out) = (rig.device(4 * 8), rig.device(6 * 8), rig.device(4 * 6));
    for memory in [(x, 128), (w, 192)] {
        rig.zero(0, memory.0, memory.1);
    }
    let right = Gemm {
        element: Element::F32,
        out_element: Element::F32,
        x,
        w,
        bias: Ptr::NULL,
        out,
        m: 4,
        n: 6,
        k: 8,
        out_stride: 6,
        multiprocessors: 0,
        workspace: Ptr::NULL,
        workspace_bytes: 0,
    };
    // SAFETY: a wrong one is to be refused.
    let gemm = |gemm: Gemm| unsafe { rig.driver.gemm(rig.streams[0], &gemm) };
    let wrong = [
        (Gemm { m: 5, ..right }, "x: expected 160 bytes"),
        (Gemm { n: 7, out_stride: 7, ..right }, "w: expected 224 bytes"),
        (Gemm { out_stride: 7, ..right }, "out: expected 108 bytes"),
        (Gemm { out_stride: 5, ..right }, "expected rows at least 6 elements apart, found 5"),
        (Gemm { bias: offset(out, 19), ..right }, "bias: expected 24 bytes"),
        (Gemm { k: 0, ..right }, "sizes of at least 1"),
        (Gemm { multiprocessors: 2, ..right }, "expected a product for 0 multiprocessors on s0, found 2"),
        (Gemm { w: Ptr::NULL, ..right }, "w: expected a matrix, found null"),
        (Gemm { out_element: Element::BF16, ..right }, "expected results of f32"),
        (Gemm { workspace: w, workspace_bytes: 193, ..right }, "workspace: expected 193 bytes"),
    ];
    for (wrong, problem) in wrong {
        refused(gemm(wrong), &["gemm", problem]);
    }
    gemm(right).unwrap();
    rig.finish(0);
    // Another stream's product has the same workspace while this one may run.
    let scratch = rig.device(16);
    gemm(Gemm { workspace: scratch, workspace_bytes: 64, ..right }).unwrap();
    rig.record(0, 0);
    let other = Gemm { out: rig.device(24), workspace: scratch, workspace_bytes: 64, ..right };
    // SAFETY: as above.
    let on_another = || unsafe { rig.driver.gemm(rig.streams[1], &other) };
    refused(on_another(), &["workspace: expected to be written after gemm 4x6x8 f32 on s0"]);
    rig.wait(1, 0);
    on_another().unwrap();
}
