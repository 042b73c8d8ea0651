//! Memory: what is there, what is not, and how far it goes.

use kvern_cuda_abi::{BlockCopyParams, GemvParams, Ptr};
use kvern_kernels::Element;
use kvern_kernels::cuda::driver::{BoxedMatrix, Driver};

use super::*;

#[test]
fn pointers_lie_in_live_device_memory() {
    let rig = Rig::new();
    let (x, out, host) = (rig.device(2 * COLUMNS), rig.device(COLUMNS), rig.pinned(&[0.0; 2 * COLUMNS]));
    rig.fill(0, x, 1).unwrap();
    let named = |problem: &'static str| ["kvern_silu_mul_f32", "x: ", problem];
    refused(rig.gate(0, Ptr(4096), out), &named("in no allocation"));
    refused(rig.gate(0, Ptr(host.as_ptr() as u64), out), &named("in the other kind"));
    refused(rig.gate(0, offset(x, 1), out), &named("expected 512 bytes"));
    refused(rig.gate(0, offset(x, 2 * COLUMNS), out), &named("found 0 to the end"));
    refused(rig.gate(0, x, offset(out, COLUMNS / 2)), &["out: expected 256 bytes", "found 128"]);
    rig.gate(0, x, out).unwrap();
    rig.finish(0);
    // SAFETY: nothing uses it any more.
    unsafe { rig.driver.free(x) };
    refused(rig.gate(0, x, out), &named("in an allocation that was freed"));
}

#[test]
fn maps_are_of_live_device_memory() {
    let matrix =
        |memory, rows| BoxedMatrix { element: Element::BF16, memory, rows, columns: 64, box_rows: 16, box_columns: 64 };
    let rig = Rig::with(Options { compute_capability: (9, 0), ..Options::default() });
    // Of 4 bytes each: as many as 32 rows of 64 elements of 2 bytes.
    let memory = rig.device(32 * 32);
    rig.driver.tensor_map(&matrix(memory, 32)).unwrap();
    refused(rig.driver.tensor_map(&matrix(memory, 33)).map(drop), &["tensor_map", "expected 4224 bytes", "found 4096"]);
    refused(rig.driver.tensor_map(&matrix(Ptr(4096), 32)).map(drop), &["tensor_map", "in no allocation"]);
    let wrong = BoxedMatrix { element: Element::F32, ..matrix(memory, 8) };
    assert!(rig.driver.tensor_map(&wrong).unwrap_err().to_string().contains("rows of 16-bit elements"));
    let rig = Rig::new();
    refused(rig.driver.tensor_map(&matrix(rig.device(32), 1)).map(drop), &["expected a device of capability 9.0"]);
}

/// A fill and a product of stored weights, with the right bounds.
#[test]
fn extents_follow_from_the_parameters() {
    let rig = Rig::new();
    let (x, w, out) = (rig.device(32), rig.driver.allocate(5 * 18).unwrap(), rig.device(12));
    rig.zero(0, x, 128);
    rig.zero(0, w, 90);
    let params = |out, outputs, out_stride| GemvParams {
        x,
        w,
        bias: Ptr::NULL,
        out,
        rows: 1,
        inner: 32,
        outputs,
        out_stride,
        out_f32: 0,
        prefetch: 0,
    };
    let gemv = |params: GemvParams| rig.launch(0, "kvern_gemv_q4_0_f32_r1", params.outputs.div_ceil(4), 128, &params);
    gemv(params(out, 5, 100)).unwrap();
    gemv(params(offset(out, 7), 5, 100)).unwrap();
    refused(gemv(params(offset(out, 8), 5, 100)), &["out: expected 20 bytes"]);
    refused(gemv(params(out, 6, 100)), &["w: expected 108 bytes", "found 90"]);
    refused(gemv(GemvParams { rows: 2, ..params(out, 5, 100) }), &["x: expected 256 bytes"]);
    // Poison but for both results.
    let found = rig.values(0, out, 12);
    assert_eq!(
        found.iter().map(|bits| *bits == u32::MAX).collect::<Vec<_>>(),
        [false, false, false, false, false, true, true, false, false, false, false, false]
    );
}

#[test]
fn memory_is_freed_once_and_when_nothing_uses_it() {
    let rig = Rig::new();
    let (x, host) = (rig.device(2 * COLUMNS), rig.pinned(&[0.0; 8]));
    let free = |memory: Ptr| {
        // SAFETY: a wrong one is to be refused.
        unsafe { rig.driver.free(memory) }
    };
    let free_pinned = |bytes: usize| {
        // SAFETY: as above.
        unsafe { rig.driver.free_pinned(host, bytes) }
    };
    rig.fill(0, x, 1).unwrap();
    rig.to_host(0, host, x, 8).unwrap();
    panics(&["free", "copy_to_host 32 bytes on s0"], || free(x));
    panics(&["free", "copy_to_host 32 bytes on s0"], || free_pinned(32));
    rig.finish(0);
    panics(&["free", "within one"], || free(offset(x, 4)));
    panics(&["free", "in the other kind"], || free(Ptr(host.as_ptr() as u64)));
    panics(&["free", "all 32 bytes"], || free_pinned(16));
    free(x);
    free_pinned(32);
    panics(&["free", "freed"], || free(x));
    panics(&["free", "freed"], || free_pinned(32));
    panics(&["free", "in no allocation"], || free(Ptr(1 << 20)));
}

#[test]
fn memory_ends() {
    let rig = Rig::with(Options { memory_bytes: 1000, ..Options::default() });
    assert_eq!(rig.driver.properties().memory_bytes, 1000);
    let first = rig.driver.allocate(600).unwrap();
    assert_eq!(rig.driver.free_bytes().unwrap(), 400);
    match rig.driver.allocate(401) {
        Err(KernelError::OutOfMemory { asked: 401, free: 400, .. }) => (),
        other => panic!("expected no memory to be left, found {other:?}"),
    }
    rig.driver.allocate_pinned(5000).unwrap();
    rig.driver.allocate(400).unwrap();
    // SAFETY: nothing uses it.
    unsafe { rig.driver.free(first) };
    assert_eq!(rig.driver.free_bytes().unwrap(), 600);
    assert_ne!(rig.driver.allocate(600).unwrap(), first, "freed addresses are not given out again");
}

/// As with a GPU's driver.
#[test]
fn nothing_can_be_allocated_copied_and_freed() {
    let rig = Rig::new();
    let (device, host) = (rig.driver.allocate(0).unwrap(), rig.driver.allocate_pinned(0).unwrap());
    assert_ne!(device, Ptr::NULL);
    rig.to_device(0, Ptr::NULL, host, 0).unwrap();
    rig.to_host(0, host, Ptr::NULL, 0).unwrap();
    // SAFETY: nothing uses it.
    unsafe {
        rig.driver.free(device);
        rig.driver.free_pinned(host, 0);
        rig.driver.free(Ptr::NULL);
    }
    assert_eq!(rig.driver.refusals(), Vec::<String>::new());
}

#[test]
fn memory_is_poison_or_zeros_and_aligned() {
    let rig = Rig::new();
    for len in [1, 3, 5000] {
        let (device, host) = (rig.device(len), rig.driver.allocate_pinned(len * 4).unwrap());
        assert_eq!((device.0 % 16, host.as_ptr() as usize % 16), (0, 0));
        assert_eq!(peek(host, len), vec![0; len]);
        assert_eq!(rig.values(0, device, len), vec![u32::MAX; len]);
        rig.zero(0, device, len * 4);
        assert_eq!(rig.values(0, device, len), vec![0; len]);
    }
}

#[test]
fn copies_go_between_pinned_and_device_memory() {
    let rig = Rig::new();
    let (x, host) = (rig.device(8), rig.pinned(&[1.5; 8]));
    rig.to_device(0, x, host, 8).unwrap();
    rig.to_host(0, host, x, 8).unwrap();
    let mut own = [0.0f32; 8];
    let own = NonNull::from(&mut own).cast();
    refused(rig.to_device(0, x, own, 8), &["from: expected pinned memory"]);
    refused(rig.to_host(0, own, x, 8), &["to: expected pinned memory"]);
    refused(rig.to_device(0, Ptr(host.as_ptr() as u64), host, 8), &["to: expected device memory"]);
    refused(rig.to_device(0, x, host, 9), &["from: expected 36 bytes", "found 32"]);
    refused(rig.to_device(0, offset(x, 1), host, 8), &["to: expected 32 bytes", "found 28"]);
    refused(rig.touch(own, 8, HostAccess::Read), &["expected pinned memory"]);
    refused(rig.touch(host, 9, HostAccess::Read), &["expected 36 bytes"]);
    assert_eq!(rig.values(0, x, 8), [1.5f32.to_bits(); 8]);
}

/// Pools of KV blocks are named by a list on the device, which is looked at when the kernel runs.
#[test]
fn lists_of_pools_name_live_memory() {
    for freed in [false, true] {
        let rig = Rig::new();
        let pools = [rig.device(16), rig.device(16)];
        let (lists, pairs) = (rig.device(4), rig.device(2));
        let listed = pools.map(|pool| [pool.0 as u32, (pool.0 >> 32) as u32].map(f32::from_bits));
        rig.to_device(0, lists, rig.pinned(listed.as_flattened()), 4).unwrap();
        rig.to_device(0, pairs, rig.pinned(&[f32::from_bits(0), f32::from_bits(1)]), 2).unwrap();
        rig.to_device(0, pools[1], rig.pinned(&[7.0; 8]), 8).unwrap();
        rig.finish(0);
        if freed {
            // SAFETY: nothing uses it.
            unsafe { rig.driver.free(pools[1]) };
        }
        let params = BlockCopyParams { pools: lists, pairs, block_bytes: 32, pair_count: 1, pool_count: 2 };
        let kernel = rig.driver.kernel("kvern_block_copy", 0).unwrap();
        let shape = LaunchShape { grid: [1, 2], threads: 32, shared_bytes: 0, early: false };
        let layout = layout::<BlockCopyParams>();
        // SAFETY: sizes are right, and a pool that is not there is to be refused.
        let done = unsafe { rig.driver.launch(rig.streams[0], kernel, shape, bytes_of(&params), layout) };
        match done {
            Ok(()) => {
                assert!(!freed);
                assert_eq!(rig.values(0, pools[1], 16), [7.0f32.to_bits(); 16]);
            }
            Err(error) => {
                assert!(freed);
                let text = error.to_string();
                assert!(text.contains("kvern_block_copy") && text.contains("freed"), "{text}");
            }
        }
    }
}
