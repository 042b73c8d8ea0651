//! When steps begin and end, on a device whose time the test says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvern_cuda_shim::device::{Call, Options, ShimDriver};
use kvern_kernels::cuda::driver::{Driver, StreamPriority};
use kvern_kernels::{BesideOptions, CpuOptions, Device, DeviceShare, Element, StepClock, StepSpan, Tensor, ops};

const fn us(number: u64) -> Duration {
    Duration::from_micros(number)
}

fn span(busy: u64, gap: impl Into<Option<u64>>) -> StepSpan {
    StepSpan { busy: us(busy), gap: gap.into().map(us) }
}

/// A device, a clock of its steps, and work for it.
struct Steps {
    shim: Arc<ShimDriver>,
    device: Device,
    clock: StepClock,
    x: Tensor,
    out: Tensor,
}

impl Steps {
    fn new(options: Options) -> Steps {
        let shim = ShimDriver::new(options);
        let device = Device::gpu(Arc::clone(&shim) as _, Element::F32).unwrap();
        Steps::on(shim, device)
    }

    fn on(shim: Arc<ShimDriver>, device: Device) -> Steps {
        let clock = StepClock::new(&device).unwrap();
        let x = Tensor::from_f32(&device, 64, &[1.0; 64]).unwrap();
        let out = Tensor::zeros(&device, 1, 32).unwrap();
        device.synchronize().unwrap();
        shim.clear_log();
        Steps { shim, device, clock, x, out }
    }

    /// So many launches.
    fn work(&mut self, launches: usize) {
        for _ in 0..launches {
            ops::silu_mul(&self.device, &self.x, &mut self.out).unwrap();
        }
    }

    fn step(&mut self, launches: usize) {
        self.clock.begin(&self.device).unwrap();
        self.work(launches);
        self.clock.end(&self.device).unwrap();
    }
}

/// What lies between two steps is known by one stream's marks alone.
#[test]
fn a_gap_between_shares_of_the_device_is_not_told() {
    let shim = ShimDriver::new(Options { multiprocessors: 8, ..Options::default() });
    let gpu = Device::gpu(Arc::clone(&shim) as _, Element::F32).unwrap();
    let [part, _] = gpu.divide(2).unwrap();
    let device = gpu.beside(BesideOptions { threads: 1, is_urgent: true, part: Some(part) }).unwrap();
    let mut steps = Steps::on(shim, device);
    let shares = [(DeviceShare::Whole, None), (DeviceShare::Part, None), (DeviceShare::Part, Some(7))];
    for (share, gap) in shares.into_iter().chain([(DeviceShare::Whole, None), (DeviceShare::Whole, Some(7))]) {
        steps.shim.rest(us(7));
        steps.device.move_to(share).unwrap();
        steps.step(2);
        assert_eq!(steps.clock.take().unwrap(), span(2, gap), "{share:?}");
    }
    assert_eq!(steps.shim.refusals(), Vec::<String>::new());
    let [whole, part] = [None, Some(part)].map(|part| steps.shim.stream(StreamPriority::High, part).unwrap());
    let timers = [whole, part].map(|stream| {
        let timer = steps.shim.timer(stream).unwrap();
        steps.shim.record(timer, stream).unwrap();
        steps.shim.synchronize(timer).unwrap();
        timer
    });
    let text = steps.shim.elapsed(timers[0], timers[1]).unwrap_err().to_string();
    assert!(text.contains("timers of one part of the device, found those of the whole device and of p0"), "{text}");
}

#[test]
fn a_step_is_busy_from_mark_to_mark_and_the_device_idles_between() {
    let mut steps = Steps::new(Options::default());
    steps.step(3);
    assert_eq!(steps.clock.take().unwrap(), span(3, None), "there is none before the first");
    for round in 0..5 {
        steps.shim.rest(us(20 + round));
        steps.step(2);
        // The next one is there before this one is asked for.
        steps.step(4);
        steps.shim.rest(us(1000));
        assert_eq!(steps.clock.take().unwrap(), span(2, 20 + round + 1000 * u64::from(round > 0)));
        assert_eq!(steps.clock.take().unwrap(), span(4, 0));
    }
    // What is done outside of steps is no step's time.
    steps.work(5);
    steps.step(0);
    assert_eq!(steps.clock.take().unwrap(), span(0, 1005));
    assert_eq!(steps.shim.refusals(), Vec::<String>::new());
}

/// Work that runs as late as it may: the times are read after the wait for the step, and nothing else is waited for.
#[test]
fn a_step_ahead_leaves_no_gap() {
    let mut steps = Steps::new(Options { lazy: true, ..Options::default() });
    steps.step(2);
    for _ in 0..6 {
        steps.step(3);
        let before = steps.shim.log().len();
        steps.clock.take().unwrap();
        let log = steps.shim.log();
        assert_eq!(log[before..].iter().filter(|line| !line.starts_with("synchronize")).count(), 0, "{log:?}");
        assert_eq!(log.len(), before + 1);
    }
    assert_eq!(steps.clock.take().unwrap(), span(3, 0));
    let made = steps.shim.log().iter().filter(|line| line.contains("allocate")).count();
    assert_eq!((made, steps.shim.refusals()), (0, Vec::new()));
}

#[test]
fn what_failed_is_no_neighbor() {
    let mut steps = Steps::new(Options::default());
    let ended = |steps: &mut Steps| steps.clock.take().unwrap();
    steps.step(1);
    // A step fails while it is put on the device, behind one that is under way.
    steps.clock.begin(&steps.device).unwrap();
    steps.work(2);
    steps.clock.abandon();
    assert_eq!(ended(&mut steps), span(1, None));
    steps.step(1);
    steps.step(2);
    assert_eq!([ended(&mut steps), ended(&mut steps)], [span(1, None), span(2, 0)]);
    // A wait for a step fails; the one behind it goes on.
    steps.step(1);
    steps.step(4);
    steps.shim.fail(Call::Synchronize, 1, "planted", false);
    assert!(steps.clock.take().unwrap_err().to_string().contains("planted"));
    assert_eq!(ended(&mut steps), span(4, None));
    steps.step(5);
    assert_eq!(ended(&mut steps), span(5, 0));
    assert_eq!(steps.shim.refusals(), Vec::<String>::new());
}

#[test]
fn marks_have_an_order() {
    let mut steps = Steps::new(Options::default());
    let text = |result: kvern_kernels::Result<()>| result.unwrap_err().to_string();
    assert_eq!(text(steps.clock.take().map(drop)), "step clock: expected a step under way, found none");
    assert_eq!(text(steps.clock.end(&steps.device)), "step clock: expected a step that has begun, found none");
    steps.step(1);
    steps.step(1);
    let third = text(steps.clock.begin(&steps.device));
    assert_eq!(third, "step clock: expected at most two steps under way, found a third");
    let cpu = Device::cpu(CpuOptions { threads: Some(1), isa: None }).unwrap();
    for _ in 0..2 {
        steps.clock.take().unwrap();
    }
    assert!(text(steps.clock.begin(&cpu)).contains("the device that it was made for"));
}

/// On a CPU the times are the host's.
#[test]
fn a_cpu_is_busy_while_it_is_called() {
    let device = Device::cpu(CpuOptions { threads: Some(1), isa: None }).unwrap();
    let mut clock = StepClock::new(&device).unwrap();
    let x = Tensor::from_f32(&device, 1 << 16, &[1.0; 1 << 16]).unwrap();
    let mut out = Tensor::zeros(&device, 1, 1 << 15).unwrap();
    let mut busy = Duration::ZERO;
    let (started, mut inner) = (Instant::now(), Duration::ZERO);
    for step in 0..3 {
        clock.begin(&device).unwrap();
        let began = Instant::now();
        ops::silu_mul(&device, &x, &mut out).unwrap();
        inner += began.elapsed();
        clock.end(&device).unwrap();
        let found = clock.take().unwrap();
        assert_eq!(found.gap.is_some(), step > 0);
        busy += found.busy + found.gap.unwrap_or_default();
    }
    let all = started.elapsed();
    assert!(inner > Duration::ZERO && inner <= busy && busy <= all, "{inner:?} of {busy:?} of {all:?}");
}
