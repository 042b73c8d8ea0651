//! What runs when: graphs, lazy streams, failures.

use kvern_cuda_abi::{GateParams, RmsNormParams, SequenceSlice, StepInputsParams};
use kvern_cuda_shim::device::Call;
use kvern_kernels::cuda::driver::{Driver, Graph, Kernel, Part};

use super::*;

#[test]
fn kernels_take_what_they_are_made_for() {
    let rig = Rig::new();
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    refused(rig.driver.kernel("kvern_no_such", 0), &["kernel", "\"kvern_no_such\""]);
    refused(rig.driver.kernel("kvern_sample_best", 163 * 1024 + 1), &["kvern_sample_best", "166912", "found 166913"]);
    let kernel = rig.driver.kernel("kvern_silu_mul_f32", 1024).unwrap();
    assert_eq!(rig.driver.kernel("kvern_silu_mul_f32", 0).unwrap(), kernel);
    let params = GateParams { x, out, rows: 1, columns: COLUMNS as u32 };
    let launch = |kernel, grid, threads, shared_bytes, params: &[u8], layout| {
        let shape = LaunchShape { grid, threads, shared_bytes, early: false };
        // SAFETY: a wrong one is to be refused.
        unsafe { rig.driver.launch(rig.streams[0], kernel, shape, params, layout) }
    };
    let (bytes, own) = (bytes_of(&params), layout::<GateParams>());
    rig.fill(0, x, 1).unwrap();
    launch(kernel, [1, 1], 256, 1024, bytes, own).unwrap();
    refused(launch(kernel, [1, 1], 288, 0, bytes, own), &["1 to 256 threads", "found 288"]);
    refused(launch(kernel, [1, 1], 40, 0, bytes, own), &["whole warps", "found 40"]);
    refused(launch(kernel, [1, 1], 0, 0, bytes, own), &["found 0"]);
    refused(launch(kernel, [1, 1], 32, 1025, bytes, own), &["at most 1024 bytes", "found 1025"]);
    refused(launch(kernel, [0, 1], 32, 0, bytes, own), &["grid", "0x1"]);
    refused(launch(kernel, [1, 65_536], 32, 0, bytes, own), &["grid", "1x65536"]);
    refused(launch(kernel, [1, 1], 32, 0, &bytes[..16], own), &["24 bytes of GateParams", "found 16"]);
    refused(launch(kernel, [1, 1], 32, 0, bytes, layout::<RmsNormParams>()), &["found 24 of RmsNormParams"]);
    refused(launch(Kernel(9), [1, 1], 32, 0, bytes, own), &["kernels, found 9"]);
    assert_eq!(rig.driver.blocks_per_multiprocessor(kernel, 256, 1024).unwrap().get(), 2);
    refused(rig.driver.blocks_per_multiprocessor(kernel, 512, 0), &["found 512"]);
    refused(rig.driver.record(rig.events[0], Stream(7)), &["2 streams, found 7"]);
    refused(rig.driver.synchronize(Event(7)), &["4 events, found 7"]);
}

/// Fills, gates, fills again, and copies: `[COLUMNS]` of `out` to the host.
fn step(rig: &Rig, x: Ptr, out: Ptr, to: NonNull<u8>) {
    rig.fill(0, x, 5).unwrap();
    rig.gate(0, x, out).unwrap();
    rig.fill(0, x, 6).unwrap();
    rig.to_host(0, to, out, COLUMNS).unwrap();
}

fn launch_graph(rig: &Rig, stream: usize, graph: Graph) -> Result<()> {
    // SAFETY: a stale one is to be refused.
    unsafe { rig.driver.launch_graph(graph, rig.streams[stream]) }
}

#[test]
fn a_graph_does_what_its_operations_do() {
    for lazy in [false, true] {
        let rig = Rig::with(Options { lazy, ..Options::default() });
        let (x, out, to) = (rig.device(2 * COLUMNS), rig.device(COLUMNS), rig.pinned(&[0.0; COLUMNS]));
        step(&rig, x, out, to);
        rig.finish(0);
        let (eager, left) = (peek(to, COLUMNS), rig.values(0, x, 2 * COLUMNS));
        assert!(eager.iter().any(|bits| *bits != 0));
        for memory in [x, out] {
            rig.zero(0, memory, 4 * COLUMNS);
        }
        rig.driver.begin_capture(rig.streams[0]).unwrap();
        step(&rig, x, out, to);
        let graph = rig.driver.end_capture(rig.streams[0]).unwrap();
        rig.finish(0);
        assert_eq!(peek(to, COLUMNS), eager, "captured work has not run");
        assert_eq!(rig.values(0, out, COLUMNS), [0; COLUMNS]);
        for _ in 0..2 {
            rig.to_device(0, out, rig.pinned(&[9.0; COLUMNS]), COLUMNS).unwrap();
            launch_graph(&rig, 0, graph).unwrap();
            assert_eq!(rig.values(0, out, COLUMNS), eager);
            assert_eq!(rig.values(0, x, 2 * COLUMNS), left);
            assert_eq!(peek(to, COLUMNS), eager);
        }
        assert!(rig.driver.log().iter().any(|line| line == "graph g0 s0 [4 operations]"), "{:?}", rig.driver.log());
    }
}

#[test]
fn graphs_keep_order_and_need_their_memory() {
    let rig = Rig::new();
    let (x, out, to) = (rig.device(2 * COLUMNS), rig.device(COLUMNS), rig.pinned(&[0.0; COLUMNS]));
    for kernel in ["kvern_fill_f32", "kvern_silu_mul_f32"] {
        rig.driver.kernel(kernel, 0).unwrap();
    }
    rig.driver.begin_capture(rig.streams[0]).unwrap();
    step(&rig, x, out, to);
    let graph = rig.driver.end_capture(rig.streams[0]).unwrap();
    launch_graph(&rig, 0, graph).unwrap();
    refused(launch_graph(&rig, 1, graph), &["launch_graph", "graph g0 s1", "kvern_fill_f32", "graph g0 on s0"]);
    refused(rig.touch(to, 1, HostAccess::Read), &["graph g0 on s0"]);
    rig.record(0, 0);
    rig.wait(1, 0);
    launch_graph(&rig, 1, graph).unwrap();
    rig.finish(1);
    // SAFETY: nothing uses it, and the graph is not launched again with success.
    unsafe { rig.driver.free(out) };
    refused(launch_graph(&rig, 0, graph), &["kvern_silu_mul_f32", "out", "freed"]);
    refused(launch_graph(&rig, 0, Graph(3)), &["1 graphs, found 3"]);
}

/// Two streams that pass work to each other, and back to the host.
fn pipeline(options: Options) -> (Vec<u32>, Vec<String>) {
    let rig = Rig::with(options);
    let (x, [first, second]) = (rig.device(2 * COLUMNS), [(); 2].map(|()| rig.device(COLUMNS)));
    let mut results = Vec::new();
    let to = [(); 2].map(|()| rig.pinned(&[0.0; COLUMNS]));
    for round in 0..6 {
        rig.fill(0, x, round).unwrap();
        rig.record(0, 0);
        rig.wait(1, 0);
        rig.gate(0, x, first).unwrap();
        rig.gate(1, x, second).unwrap();
        rig.to_host(0, to[0], first, COLUMNS).unwrap();
        rig.to_host(1, to[1], second, COLUMNS).unwrap();
        rig.record(1, 1);
        rig.wait(0, 1);
        rig.record(2, 0);
        if round % 2 == 1 {
            rig.synchronize(2).unwrap();
            for to in to {
                rig.touch(to, COLUMNS, HostAccess::Read).unwrap();
                results.extend(peek(to, COLUMNS));
            }
        }
    }
    assert_eq!(rig.driver.refusals(), Vec::<String>::new());
    (results, rig.driver.log())
}

#[test]
fn lazy_work_has_the_results_of_work_at_once() {
    let (expected, log) = pipeline(Options::default());
    assert_eq!(expected.len(), 6 * COLUMNS);
    for seed in 0..8 {
        let (found, lines) = pipeline(Options { lazy: true, seed, ..Options::default() });
        assert_eq!(found, expected);
        assert_eq!(lines, log);
    }
}

#[test]
fn lazy_work_waits_until_it_is_needed() {
    for lazy in [false, true] {
        let rig = Rig::with(Options { lazy, ..Options::default() });
        let (x, y) = (rig.device(2 * COLUMNS), rig.device(2 * COLUMNS));
        let [to, other] = [(); 2].map(|()| rig.pinned(&[0.0; 2 * COLUMNS]));
        rig.fill(0, x, 1).unwrap();
        rig.to_host(0, to, x, 2 * COLUMNS).unwrap();
        rig.record(0, 0);
        rig.fill(1, y, 1).unwrap();
        rig.to_host(1, other, y, 2 * COLUMNS).unwrap();
        rig.record(1, 1);
        // A read that nobody announced finds poison.
        let is_there = |memory| peek(memory, 2 * COLUMNS).iter().all(|bits| *bits != u32::MAX);
        assert_eq!((is_there(to), is_there(other)), (!lazy, !lazy));
        rig.synchronize(1).unwrap();
        assert_eq!((is_there(to), is_there(other)), (!lazy, true));
        rig.synchronize(0).unwrap();
        assert_eq!(peek(to, 2 * COLUMNS), peek(other, 2 * COLUMNS));
    }
}

/// Results of a copy are poison until it runs, but not where another copy is still to read.
#[test]
fn memory_that_is_copied_from_and_to_keeps_its_values() {
    let rig = Rig::with(Options { lazy: true, ..Options::default() });
    let (x, y, host) = (rig.device(8), rig.device(8), rig.pinned(&[2.5; 8]));
    rig.to_device(0, x, host, 8).unwrap();
    rig.zero(0, y, 32);
    rig.to_host(0, host, y, 8).unwrap();
    assert_eq!(peek(host, 8), [2.5f32.to_bits(); 8]);
    assert_eq!(rig.values(0, x, 8), [2.5f32.to_bits(); 8]);
    assert_eq!(peek(host, 8), [0; 8]);
}

/// Work that nobody waited for runs in the end, and its failure is not lost.
#[test]
fn what_is_left_runs_when_the_device_goes() {
    let rig = Rig::with(Options { lazy: true, ..Options::default() });
    let fail = step_inputs(&rig, 64);
    fail.unwrap();
    panics(&["kvern_step_inputs", "outside of any buffer"], || drop(rig));
}

/// Reads the block table, which has four entries, up to `rows`.
fn step_inputs(rig: &Rig, rows: u32) -> Result<()> {
    let slice = SequenceSlice { row: 0, rows, start: 0, table: 0, sampled: kvern_cuda_abi::NONE };
    let SequenceSlice { row, rows, start, table, sampled } = slice;
    let slices = rig.device(5);
    rig.to_device(0, slices, rig.pinned(&[row, rows, start, table, sampled].map(f32::from_bits)), 5)?;
    let tables = rig.device(4);
    let [ids, positions, slots] = [(); 3].map(|()| rig.device(64));
    let params = StepInputsParams {
        slices,
        block_tables: tables,
        last_sampled: ids,
        ids,
        positions,
        slots,
        sequences: 1,
        table_stride: 4,
        block_size: 1,
        pad: 0,
    };
    rig.launch(0, "kvern_step_inputs", 1, 128, &params)
}

#[test]
fn a_kernel_that_fails_loses_the_device() {
    let rig = Rig::new();
    step_inputs(&rig, 4).unwrap();
    let lost = |result: Result<()>| match result {
        Err(KernelError::DeviceLost { call, status }) => {
            assert_eq!(call, "kvern_step_inputs");
            assert!(status.contains("outside of any buffer"), "{status}");
        }
        other => panic!("expected a lost device, found {other:?}"),
    };
    let x = rig.device(1);
    lost(step_inputs(&rig, 64));
    lost(rig.synchronize(0));
    lost(rig.driver.allocate(1).map(drop));
    lost(rig.driver.free_bytes().map(drop));
    // SAFETY: no work runs on a lost device.
    unsafe { rig.driver.free(x) };
}

#[test]
fn planted_failures_surface_once() {
    let rig = Rig::new();
    let x = rig.device(2 * COLUMNS);
    rig.driver.fail(Call::Launch, 2, "no luck", false);
    rig.driver.fail(Call::Synchronize, 1, "none either", false);
    rig.fill(0, x, 1).unwrap();
    let before = rig.values_unless(0, x);
    refused(before, &["synchronize: none either"]);
    refused(rig.fill(0, x, 2), &["launch: no luck"]);
    let first = rig.values(0, x, 2 * COLUMNS);
    rig.fill(0, x, 2).unwrap();
    assert_ne!(rig.values(0, x, 2 * COLUMNS), first, "the failed launch did nothing");
    rig.driver.fail(Call::EndCapture, 1, "too much", false);
    rig.driver.begin_capture(rig.streams[0]).unwrap();
    refused(rig.driver.end_capture(rig.streams[0]), &["end_capture: too much"]);
    rig.fill(0, x, 3).unwrap();
    assert_eq!(rig.driver.refusals(), Vec::<String>::new(), "nothing was wrong");
}

impl Rig {
    /// As `values`, where the wait may fail.
    fn values_unless(&self, stream: usize, from: Ptr) -> Result<()> {
        let to = self.driver.allocate_pinned(4)?;
        self.to_host(stream, to, from, 1)?;
        self.record(3, stream);
        self.synchronize(3)
    }
}

#[test]
fn a_planted_loss_lasts() {
    let rig = Rig::with(Options { lazy: true, ..Options::default() });
    let x = rig.device(2 * COLUMNS);
    rig.fill(0, x, 1).unwrap();
    rig.record(0, 0);
    rig.driver.fail(Call::Synchronize, 2, "fallen off the bus", true);
    rig.synchronize(1).unwrap();
    let lost = |result: Result<()>| match result {
        Err(KernelError::DeviceLost { call, status }) => {
            assert_eq!((call.as_str(), status.as_str()), ("synchronize", "fallen off the bus"));
        }
        other => panic!("expected a lost device, found {other:?}"),
    };
    lost(rig.synchronize(0));
    lost(rig.synchronize(0));
    lost(rig.fill(0, x, 1));
    // SAFETY: no work runs on a lost device.
    unsafe { rig.driver.free(x) };
}

/// Streams of two parts wait for each other as any two do; what is recorded has to be of the stream's part.
#[test]
fn parts_have_streams_and_events_of_their_own() {
    let rig = Rig::new();
    let wrong = [(0, "1 to 3 of the 4"), (4, "1 to 3 of the 4"), (3, "a division of 4 multiprocessors, found 4")];
    for (multiprocessors, words) in wrong {
        let error = rig.driver.divide(multiprocessors).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    rig.driver.clear_log();
    let parts = rig.driver.divide(1).unwrap();
    assert_eq!(parts.map(|part| part.multiprocessors), [2, 2], "rounded up");
    let [first, second] = parts.map(|part| rig.driver.stream(StreamPriority::High, Some(part)).unwrap());
    let [event, other] = [first, second].map(|stream| rig.driver.event(stream).unwrap());
    refused(rig.driver.record(rig.events[0], first), &["record", "of the whole device, found one of p0"]);
    refused(rig.driver.record(other, first), &["of p1, found one of p0"]);
    refused(rig.driver.stream(StreamPriority::High, Some(Part { number: 2, ..parts[0] })), &["one of 2 parts"]);
    let rig = Rig { streams: [first, second], events: [event, other, event, other], ..rig };
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    rig.fill(0, x, 1).unwrap();
    refused(rig.gate(1, x, out), &["x: expected to be read after kvern_fill_f32 on s2"]);
    rig.record(0, 0);
    rig.wait(1, 0);
    rig.gate(1, x, out).unwrap();
    rig.record(1, 1);
    rig.synchronize(1).unwrap();
    // A graph keeps to the part that it was captured for.
    rig.driver.begin_capture(first).unwrap();
    rig.fill(0, x, 2).unwrap();
    let graph = rig.driver.end_capture(first).unwrap();
    let whole = rig.driver.stream(StreamPriority::High, None).unwrap();
    for (stream, found) in [(second, "found one of p1"), (whole, "found one of the whole device")] {
        // SAFETY: it is to be refused.
        refused(unsafe { rig.driver.launch_graph(graph, stream) }, &["g0 on a stream of p0", found]);
    }
    // SAFETY: what was captured is as it was.
    unsafe { rig.driver.launch_graph(graph, first) }.unwrap();
    let log = rig.driver.log();
    for line in ["part p0 of 2 multiprocessors", "stream s3 High on p1 of 2 multiprocessors"] {
        assert!(log.iter().any(|found| found == line), "{line:?} is not in {log:?}");
    }
}

#[test]
fn the_log_tells_what_was_done() {
    let rig = Rig::new();
    let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
    rig.driver.clear_log();
    rig.fill(0, x, 1).unwrap();
    rig.record(1, 0);
    rig.wait(1, 1);
    rig.gate(1, x, out).unwrap();
    rig.driver.begin_capture(rig.streams[0]).unwrap();
    rig.fill(0, x, 2).unwrap();
    rig.driver.end_capture(rig.streams[0]).unwrap();
    rig.synchronize(1).unwrap();
    let expected = [
        "launch kvern_fill_f32 s0",
        "record e1 s0",
        "wait e1 s1",
        "launch kvern_silu_mul_f32 s1",
        "begin_capture s0",
        "captured launch kvern_fill_f32 s0",
        "end_capture g0 s0 [1 operations]",
        "synchronize e1",
    ];
    assert_eq!(rig.driver.log(), expected);
}
