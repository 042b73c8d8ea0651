//! The driver against stand-ins for CUDA and cuBLASLt: every call as it arrives there, in order, and what is said of
//! failures.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, slice};

use super::*;
use crate::cuda::driver::Element;

/// Set in the process that finds the fakes instead of the driver and cuBLASLt.
const INSIDE: &str = "KVERN_TEST_FAKE_DRIVER";

static LAYOUT: Layout = Layout { name: "TestParams", bytes: 48, fields: &[] };
const SHAPE: LaunchShape = LaunchShape { grid: [3, 2], threads: 128, shared_bytes: 16, early: false };
const PARAMS: [u64; 6] = [7; 6];

fn params() -> &'static [u8] {
    // SAFETY: numbers are bytes.
    unsafe { slice::from_raw_parts(PARAMS.as_ptr().cast(), 48) }
}

/// Compiles the stand-ins into a folder that the loader can be given.
fn fakes() -> PathBuf {
    let folder = Path::new(env!("OUT_DIR")).join("fake-driver");
    fs::create_dir_all(&folder).unwrap();
    for (source, library) in [("cuda.c", "libcuda.so"), ("cublas_lt.c", "libcublasLt.so")] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/real/fake").join(source);
        let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
        // Beside its name and then to it: another test may be compiling, or running, the same.
        let made = folder.join(format!("{library}.{}.{:?}", std::process::id(), std::thread::current().id()));
        let flags = ["-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o"];
        let done = Command::new(compiler).args(flags).args([&made, &source]).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        fs::rename(&made, folder.join(library)).unwrap();
    }
    folder
}

/// What the fakes noted (`> `) and a scenario said (`= `) in a process of its own.
fn transcript(scenario: &str, settings: &[(&str, &str)]) -> String {
    let test = format!("{}::inside", module_path!().split_once("::").unwrap().1);
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([&test, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("LD_LIBRARY_PATH", fakes()).env(INSIDE, scenario).envs(settings.iter().copied());
    let done = command.output().unwrap();
    let text = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{scenario}: {text}{}", String::from_utf8_lossy(&done.stdout));
    let lines = text.lines().filter(|line| line.starts_with("> ") || line.starts_with("= "));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Says what a call returned.
fn said<T: std::fmt::Debug>(result: Result<T>) {
    match result {
        Ok(value) => eprintln!("= {value:?}"),
        Err(error) => eprintln!("= {error}"),
    }
}

/// The scenarios; a test of its own only in the process that another one starts.
#[test]
fn inside() {
    match env::var(INSIDE).as_deref() {
        Ok("open") => said(open(1).map(|gpu| gpu.properties().name.clone())),
        Ok("whole") => whole(&*open(1).unwrap()),
        Ok("products") => products(&*open(0).unwrap()),
        Ok("parts") => parts(&*open(1).unwrap()),
        Ok("loss") => loss(&*open(0).unwrap()),
        Ok("timers") => timers(&*open(0).unwrap()),
        Ok(other) => panic!("expected a scenario, found {other:?}"),
        Err(_) => println!("run by the tests beside it"),
    }
}

/// All calls but products.
fn whole(gpu: &dyn Driver) {
    said(gpu.allocate(2 << 20));
    let (memory, pinned) = (gpu.allocate(64).unwrap(), gpu.allocate_pinned(64).unwrap());
    // SAFETY: as long as asked for.
    assert_eq!(unsafe { slice::from_raw_parts(pinned.as_ptr(), 64) }, [0; 64]);
    let [stream, urgent] =
        [StreamPriority::Normal, StreamPriority::High].map(|priority| gpu.stream(priority, None).unwrap());
    let event = gpu.event(stream).unwrap();
    let kernel = gpu.kernel("kvern_one", 0).unwrap();
    assert_eq!(gpu.kernel("kvern_one", 47 << 10).unwrap(), kernel);
    assert_eq!(gpu.kernel("kvern_one", 48 << 10).unwrap(), kernel);
    said(gpu.kernel("kvern_two", 300_000));
    said(gpu.kernel("other", 0));
    said(gpu.blocks_per_multiprocessor(kernel, 128, 1000));
    said(gpu.blocks_per_multiprocessor(kernel, 128, 200_000));
    // SAFETY: the fake driver reads nothing but the parameters, and memory of which there is enough.
    unsafe {
        gpu.copy_to_device(stream, memory, pinned, 48).unwrap();
        gpu.copy_to_host(stream, pinned, memory, 32).unwrap();
        gpu.copy_to_host(stream, pinned, memory, 0).unwrap();
        gpu.launch(stream, kernel, SHAPE, params(), &LAYOUT).unwrap();
        said(gpu.launch(stream, kernel, SHAPE, &params()[..40], &LAYOUT));
        said(gpu.launch(stream, kernel, LaunchShape { grid: [0, 1], ..SHAPE }, params(), &LAYOUT));
        let early = LaunchShape { early: true, ..SHAPE };
        gpu.launch(stream, kernel, early, params(), &LAYOUT).unwrap();
        said(gpu.launch(stream, kernel, LaunchShape { grid: [0, 1], ..early }, params(), &LAYOUT));
    }
    let matrix = BoxedMatrix {
        element: Element::BF16,
        memory: Ptr(0x100),
        rows: 4096,
        columns: 128,
        box_rows: 16,
        box_columns: 64,
    };
    said(gpu.tensor_map(&matrix).map(|map| map.words[15]));
    said(gpu.tensor_map(&BoxedMatrix { element: Element::F16, columns: 96, box_columns: 32, box_rows: 256, ..matrix }));
    said(gpu.tensor_map(&BoxedMatrix { element: Element::F32, ..matrix }));
    // Every thread gets the context.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            gpu.record(event, stream).unwrap();
            gpu.wait(urgent, event).unwrap();
            gpu.synchronize(event).unwrap();
        });
    });
    gpu.begin_capture(stream).unwrap();
    said(gpu.end_capture(stream).map(|graph| {
        // SAFETY: nothing is in it.
        unsafe { gpu.launch_graph(graph, urgent) }.unwrap();
        "a graph"
    }));
    // SAFETY: nothing uses them any more.
    unsafe {
        gpu.free(memory);
        gpu.free_pinned(pinned, 64);
    }
}

fn products(gpu: &dyn Driver) {
    let stream = gpu.stream(StreamPriority::Normal, None).unwrap();
    let gemm = Gemm {
        element: Element::BF16,
        out_element: Element::F32,
        x: Ptr(0x1000),
        w: Ptr(0x2000),
        bias: Ptr(0x30),
        out: Ptr(0x4010),
        m: 70,
        n: 48,
        k: 32,
        out_stride: 50,
        multiprocessors: 0,
        workspace: Ptr(0x100),
        workspace_bytes: 1024,
    };
    let plain = Gemm { bias: Ptr::NULL, ..gemm };
    for gemm in [
        gemm,
        gemm,
        Gemm { m: 72, ..plain },
        Gemm { m: 75, ..plain },
        Gemm { m: 99, ..plain },
        Gemm { n: 13, ..plain },
        Gemm { m: 0, ..plain },
        Gemm { m: 1, multiprocessors: 8, ..plain },
    ] {
        // SAFETY: the fake library reads nothing.
        said(unsafe { gpu.gemm(stream, &gemm) });
    }
}

/// Parts of a device, of sixteen multiprocessors that are divided in fours.
fn parts(gpu: &dyn Driver) {
    said(gpu.divide(0));
    said(gpu.divide(16));
    said(gpu.divide(13));
    let Ok([decode, prefill]) = gpu.divide(5) else { return said(gpu.divide(5)) };
    said(Ok([decode, prefill]));
    let stream = gpu.stream(StreamPriority::High, Some(decode)).unwrap();
    let other = gpu.stream(StreamPriority::Normal, Some(prefill)).unwrap();
    let [event, there] = [stream, other].map(|stream| gpu.event(stream).unwrap());
    let kernel = gpu.kernel("kvern_one", 0).unwrap();
    // SAFETY: as in `whole`.
    unsafe { gpu.launch(stream, kernel, SHAPE, params(), &LAYOUT) }.unwrap();
    gpu.record(event, stream).unwrap();
    gpu.wait(other, event).unwrap();
    gpu.record(there, other).unwrap();
    gpu.synchronize(there).unwrap();
    // A worker goes from all of the device to its part, where a graph is captured and launched.
    let whole = gpu.stream(StreamPriority::High, None).unwrap();
    let left = gpu.event(whole).unwrap();
    // SAFETY: as in `whole`.
    unsafe { gpu.launch(whole, kernel, SHAPE, params(), &LAYOUT) }.unwrap();
    gpu.record(left, whole).unwrap();
    gpu.wait(stream, left).unwrap();
    gpu.begin_capture(stream).unwrap();
    // SAFETY: as in `whole`.
    unsafe { gpu.launch(stream, kernel, SHAPE, params(), &LAYOUT) }.unwrap();
    let graph = gpu.end_capture(stream).unwrap();
    // SAFETY: as in `whole`.
    unsafe { gpu.launch_graph(graph, stream) }.unwrap();
}

fn loss(gpu: &dyn Driver) {
    let stream = gpu.stream(StreamPriority::Normal, None).unwrap();
    let event = gpu.event(stream).unwrap();
    let kernel = gpu.kernel("kvern_one", 0).unwrap();
    // SAFETY: as in `whole`.
    said(unsafe { gpu.launch(stream, kernel, LaunchShape { grid: [666, 1], ..SHAPE }, params(), &LAYOUT) });
    said(gpu.synchronize(event));
    said(gpu.allocate(1));
}

/// Times between records, which the stand-in puts half a millisecond apart.
fn timers(gpu: &dyn Driver) {
    let [part, _] = gpu.divide(4).unwrap();
    let stream = gpu.stream(StreamPriority::Normal, Some(part)).unwrap();
    let [began, ended] = [(); 2].map(|()| gpu.timer(stream).unwrap());
    let plain = gpu.event(stream).unwrap();
    said(gpu.elapsed(began, ended));
    gpu.record(began, stream).unwrap();
    gpu.record(plain, stream).unwrap();
    gpu.record(ended, stream).unwrap();
    gpu.synchronize(plain).unwrap();
    said(gpu.elapsed(began, ended));
    said(gpu.elapsed(began, plain));
    gpu.synchronize(ended).unwrap();
    said(gpu.elapsed(began, ended));
    said(gpu.elapsed(ended, began));
    gpu.record(began, stream).unwrap();
    said(gpu.elapsed(ended, began));
}

/// Without kernels in the binary nothing opens, and the transcripts cannot be had.
fn built_with_kernels() -> bool {
    let found = transcript("open", &[]);
    let built = !found.contains("it was built without `make cuda`");
    if !built {
        println!("skipped: this build has no kernels: run `make cuda`");
    }
    built
}

/// Apart from the lines of libraries, of which there are as many as files of kernels.
fn without_libraries(transcript: &str) -> String {
    let loads = transcript.matches("> cuLibraryLoadData of a fatbin\n").count();
    assert!(loads > 0 && loads == transcript.matches("> cuLibraryUnload\n").count(), "{transcript}");
    transcript.lines().filter(|line| !line.starts_with("> cuLibrary")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    let cases = [
        ("FAKE_INIT", "100", "expected an NVIDIA GPU, found the driver without one"),
        ("FAKE_INIT", "34", "cuInit: CUDA_ERROR_STUB_LIBRARY (what it means)"),
        ("FAKE_VERSION", "12080", "expected an NVIDIA driver for CUDA 13.0 or later, found one for 12.8"),
        ("FAKE_CAPABILITY", "7", "expected compute capability 8.0 or later, found 7.0 of Fake 71"),
        (
            "FAKE_BLOCK_SHARED",
            "101376",
            "expected 144128 bytes of shared memory for a block, as attention takes them, found 101376 of Fake 71",
        ),
    ];
    for (name, value, expected) in cases {
        let found = transcript("open", &[(name, value)]);
        assert_eq!(found.lines().last(), Some(format!("= {expected}").as_str()), "{name}={value}");
        assert_eq!(found.matches("Retain").count(), found.matches("Release").count(), "{found}");
    }
    if built_with_kernels() {
        let found = without_libraries(&transcript("open", &[("FAKE_CUBLAS", "110000")]));
        let expected = "> cuInit 0\n> cuDevicePrimaryCtxRetain 71\n> cuDevicePrimaryCtxRelease 71\n\
                        = expected cublasLt of version 120000 or later, found 110000\n";
        assert_eq!(found, expected);
    }
}

#[test]
fn every_call_reaches_the_driver_as_meant_and_everything_is_given_back() {
    if built_with_kernels() {
        assert_eq!(without_libraries(&transcript("whole", &[])), include_str!("fake/whole.txt"));
        let failed = transcript("whole", &[("FAKE_CAPTURE", "901")]);
        let expected = "= cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (what it means)\n";
        assert!(failed.contains(expected) && !failed.contains("> cuGraph"), "{failed}");
    }
}

/// But on compute capability 9.0 launches take turns, whatever was asked for: elsewhere kernels do not wait.
#[test]
fn launches_begin_early_where_the_kernels_wait() {
    if built_with_kernels() {
        for (major, minor, early) in [("8", "0", 0), ("8", "9", 0), ("9", "0", 2), ("10", "0", 0), ("12", "0", 0)] {
            let found = transcript("whole", &[("FAKE_CAPABILITY", major), ("FAKE_MINOR", minor)]);
            let launches = found.matches("> cuLaunchKernelEx").count();
            assert_eq!(launches, early, "{major}.{minor}: {found}");
            assert_eq!(found.matches("> cuLaunchKernel").count(), 4, "{major}.{minor}: {found}");
        }
    }
}

#[test]
fn products_are_described_as_the_library_sees_them() {
    if built_with_kernels() {
        assert_eq!(without_libraries(&transcript("products", &[])), include_str!("fake/products.txt"));
    }
}

#[test]
fn parts_of_a_device_have_their_streams_and_events() {
    if built_with_kernels() {
        assert_eq!(without_libraries(&transcript("parts", &[])), include_str!("fake/parts.txt"));
        let refused = transcript("parts", &[("FAKE_PARTS", "801")]);
        let expected = "= expected a GPU whose multiprocessors can be divided (green contexts), found \
                        CUDA_ERROR_NOT_SUPPORTED of cuDeviceGetDevResource\n";
        assert!(refused.contains(expected) && !refused.contains("cuGreenCtx"), "{refused}");
    }
}

#[test]
fn times_are_told_of_events_that_the_device_has_passed() {
    if built_with_kernels() {
        assert_eq!(without_libraries(&transcript("timers", &[])), include_str!("fake/timers.txt"));
    }
}

#[test]
fn a_lost_device_is_lost_for_good() {
    if built_with_kernels() {
        assert_eq!(without_libraries(&transcript("loss", &[])), include_str!("fake/loss.txt"));
    }
}
