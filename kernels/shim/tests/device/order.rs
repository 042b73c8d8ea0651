//! Orders: between streams, between streams and the host, in captures.

use kvern_cuda_abi::{Ptr, RopeStoreParams};
use kvern_kernels::cuda::driver::{Driver, HostAccess, StreamPriority};

use super::*;

#[test]
fn a_read_needs_an_event_after_the_write() {
    let rig = Rig::new();
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    rig.record(0, 0);
    rig.fill(0, x, 1).unwrap();
    let words = ["kvern_silu_mul_f32 s1", "x: expected to be read after kvern_fill_f32 on s0"];
    refused(rig.gate(1, x, out), &words);
    // An event from before the write.
    rig.wait(1, 0);
    refused(rig.gate(1, x, out), &words);
    // The other stream's own event.
    rig.record(1, 1);
    rig.wait(1, 1);
    refused(rig.gate(1, x, out), &words);
    rig.record(0, 0);
    refused(rig.gate(1, x, out), &words);
    rig.wait(1, 0);
    rig.gate(1, x, out).unwrap();
    assert_eq!(rig.driver.refusals().len(), 4);
}

#[test]
fn a_wait_that_is_left_out_orders_nothing() {
    let rig = Rig::new();
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    rig.fill(0, x, 1).unwrap();
    rig.record(0, 0);
    rig.driver.leave_out_wait(2);
    rig.wait(0, 0);
    rig.wait(1, 0);
    refused(rig.gate(1, x, out), &["x: expected to be read after kvern_fill_f32 on s0"]);
    rig.wait(1, 0);
    rig.gate(1, x, out).unwrap();
}

#[test]
fn a_write_needs_an_event_after_reads_and_writes() {
    let rig = Rig::new();
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    rig.fill(0, x, 1).unwrap();
    rig.record(0, 0);
    rig.wait(1, 0);
    rig.gate(1, x, out).unwrap();
    // The stream that wrote x knows nothing of who read it since.
    refused(rig.fill(0, x, 2), &["out: expected to be written after kvern_silu_mul_f32 on s1"]);
    refused(rig.gate(0, x, out), &["out: expected to be written after kvern_silu_mul_f32 on s1"]);
    // Two may read at once.
    rig.gate(0, x, rig.device(COLUMNS)).unwrap();
    rig.record(1, 1);
    rig.wait(0, 1);
    rig.fill(0, x, 2).unwrap();
    rig.gate(0, x, out).unwrap();
}

#[test]
fn order_passes_on_through_streams_and_through_the_host() {
    let rig = Rig::new();
    let third = rig.driver.stream(StreamPriority::Normal, None).unwrap();
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    rig.fill(0, x, 1).unwrap();
    rig.record(0, 0);
    // From stream 0 by way of the third one.
    rig.driver.wait(third, rig.events[0]).unwrap();
    rig.driver.record(rig.events[1], third).unwrap();
    rig.wait(1, 1);
    rig.gate(1, x, out).unwrap();
    refused(rig.fill(0, x, 2), &["kvern_silu_mul_f32 on s1"]);
    rig.record(2, 1);
    refused(rig.fill(0, x, 2), &["kvern_silu_mul_f32 on s1"]);
    rig.synchronize(2).unwrap();
    rig.fill(0, x, 2).unwrap();
}

#[test]
fn parts_of_an_allocation_are_apart() {
    let rig = Rig::new();
    let (x, out, from) = (rig.device(4 * COLUMNS), rig.device(COLUMNS), rig.pinned(&[1.0; 2 * COLUMNS]));
    rig.fill(0, x, 1).unwrap();
    rig.to_device(1, offset(x, 2 * COLUMNS), from, 2 * COLUMNS).unwrap();
    rig.gate(0, x, out).unwrap();
    refused(rig.gate(0, offset(x, 1), out), &["copy_to_device 512 bytes on s1"]);
    refused(rig.to_device(1, offset(x, 2 * COLUMNS - 1), from, 2), &["to: expected to be written after"]);
}

#[test]
fn the_host_reads_a_copy_after_an_event() {
    let rig = Rig::new();
    let (x, to) = (rig.device(2 * COLUMNS), rig.pinned(&[0.0; 2 * COLUMNS]));
    rig.fill(0, x, 1).unwrap();
    rig.record(0, 0);
    rig.to_host(0, to, x, COLUMNS).unwrap();
    let early = ["host_access", "copy_to_host 256 bytes on s0"];
    refused(rig.touch(to, 1, HostAccess::Read), &early);
    refused(rig.touch(to, 1, HostAccess::Write), &early);
    // From before the copy.
    rig.synchronize(0).unwrap();
    refused(rig.touch(to, 1, HostAccess::Read), &early);
    rig.record(0, 0);
    refused(rig.touch(to, COLUMNS, HostAccess::Read), &early);
    // Not a part of it.
    rig.touch(offset_host(to, COLUMNS), COLUMNS, HostAccess::Read).unwrap();
    rig.synchronize(0).unwrap();
    rig.touch(to, COLUMNS, HostAccess::Read).unwrap();
    rig.touch(to, COLUMNS, HostAccess::Write).unwrap();
}

#[test]
fn the_host_writes_a_source_after_its_copy() {
    let rig = Rig::new();
    let (x, from) = (rig.device(COLUMNS), rig.pinned(&[1.0; COLUMNS]));
    rig.to_device(0, x, from, COLUMNS / 2).unwrap();
    rig.touch(from, COLUMNS, HostAccess::Read).unwrap();
    refused(rig.touch(from, COLUMNS, HostAccess::Write), &["expected to be written after copy_to_device"]);
    rig.touch(offset_host(from, COLUMNS / 2), COLUMNS / 2, HostAccess::Write).unwrap();
    rig.finish(0);
    rig.touch(from, COLUMNS, HostAccess::Write).unwrap();
}

fn offset_host(memory: NonNull<u8>, len: usize) -> NonNull<u8> {
    // SAFETY: within the allocation.
    unsafe { memory.add(4 * len) }
}

#[test]
fn captures_take_work_and_nothing_else() {
    let rig = Rig::new();
    let (x, stream) = (rig.device(2 * COLUMNS), rig.streams[0]);
    rig.driver.kernel("kvern_fill_f32", 0).unwrap();
    rig.record(0, 0);
    refused(rig.driver.end_capture(stream), &["outside of one"]);
    let wrong: [(&str, &dyn Fn() -> Result<()>); 7] = [
        ("allocate", &|| rig.driver.allocate(16).map(drop)),
        ("allocate_pinned", &|| rig.driver.allocate_pinned(16).map(drop)),
        ("kernel", &|| rig.driver.kernel("kvern_gelu_mul_f32", 0).map(drop)),
        ("synchronize", &|| rig.synchronize(0)),
        ("record", &|| rig.driver.record(rig.events[1], stream)),
        ("wait", &|| rig.driver.wait(stream, rig.events[0])),
        ("free", &|| {
            // SAFETY: it is to be refused.
            panics(&["free", "during a capture"], || unsafe { rig.driver.free(x) });
            Err(KernelError::Driver { call: "free".to_owned(), status: "during a capture".to_owned() })
        }),
    ];
    for (call, work) in wrong {
        rig.driver.begin_capture(stream).unwrap();
        rig.fill(0, x, 1).unwrap();
        refused(work(), &[call, "during a capture"]);
        refused(rig.driver.end_capture(stream), &["end_capture", call]);
        // Ended nevertheless.
        rig.record(0, 0);
    }
    rig.driver.begin_capture(stream).unwrap();
    refused(rig.driver.begin_capture(stream), &["found it in one"]);
    rig.fill(0, x, 1).unwrap();
    // What others do on their streams is no part of it.
    rig.record(1, 1);
    rig.driver.end_capture(stream).unwrap();
}

#[test]
fn another_thread_may_go_on_during_a_capture() {
    let rig = Rig::new();
    rig.record(0, 0);
    rig.record(1, 1);
    rig.driver.begin_capture(rig.streams[0]).unwrap();
    let elsewhere = |work: &(dyn Fn() -> Result<()> + Sync)| std::thread::scope(|s| s.spawn(work).join().unwrap());
    elsewhere(&|| rig.synchronize(1)).unwrap();
    elsewhere(&|| rig.driver.allocate(16).map(drop)).unwrap();
    elsewhere(&|| rig.driver.kernel("kvern_gelu_mul_f32", 0).map(drop)).unwrap();
    refused(elsewhere(&|| rig.synchronize(0)), &["synchronize", "s0"]);
    assert!(rig.driver.end_capture(rig.streams[0]).is_err());
}

fn rope(rig: &Rig, stream: usize, qkv: Ptr, cache: Ptr, lists: [Ptr; 2]) -> Result<()> {
    let [tables, numbers] = lists;
    let params = RopeStoreParams {
        qkv,
        k_cache: cache,
        v_cache: cache,
        q_weight: Ptr::NULL,
        k_weight: Ptr::NULL,
        cos: tables,
        sin: tables,
        positions: numbers,
        slots: numbers,
        rows: 1,
        heads: 1,
        kv_heads: 1,
        block_size: 1,
        rotary_dim: 16,
        head_dim: 16,
        eps: 0.0,
        pad: 0,
    };
    rig.launch(stream, "kvern_rope_store_f32", 1, 128, &params)
}

#[test]
fn caches_have_to_be_there_and_the_scheduler_orders_them() {
    let rig = Rig::new();
    let (first, second, cache) = (rig.device(48), rig.device(48), rig.device(64));
    let lists = [rig.device(64), rig.device(4)];
    for memory in lists {
        rig.zero(0, memory, 16);
    }
    rig.finish(0);
    rope(&rig, 0, first, cache, lists).unwrap();
    rope(&rig, 1, second, cache, lists).unwrap();
    refused(rope(&rig, 1, first, cache, lists), &["qkv", "kvern_rope_store_f32 on s0"]);
    // A block that is brought back meanwhile.
    rig.to_device(1, cache, rig.pinned(&[1.0; 16]), 16).unwrap();
    rope(&rig, 0, first, cache, lists).unwrap();
    let words = ["free", "kvern_rope_store_f32 on s"];
    // SAFETY: it is to be refused.
    panics(&words, || unsafe { rig.driver.free(cache) });
    rig.finish(0);
    rig.finish(1);
    // SAFETY: nothing uses it any more.
    unsafe { rig.driver.free(cache) };
    refused(rope(&rig, 0, first, cache, lists), &["k_cache", "freed"]);
}
