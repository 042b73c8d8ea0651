//! Times between timers: a microsecond for each operation, and what the test lets go by.

use std::time::Duration;

use kvern_kernels::cuda::driver::{Driver, Graph};

use super::*;

const fn us(number: u64) -> Duration {
    Duration::from_micros(number)
}

#[test]
fn time_is_what_work_takes_and_what_goes_by() {
    for lazy in [false, true] {
        let rig = Rig::with(Options { lazy, ..Options::default() });
        let (x, out) = (rig.device(2 * COLUMNS), rig.device(COLUMNS));
        // Loaded before the capture.
        rig.driver.kernel("kvern_silu_mul_f32", 0).unwrap();
        let [first, second, third] = [(); 3].map(|()| rig.driver.timer(rig.streams[0]).unwrap());
        let record = |timer| rig.driver.record(timer, rig.streams[0]).unwrap();
        record(first);
        rig.fill(0, x, 1).unwrap();
        record(second);
        rig.driver.begin_capture(rig.streams[0]).unwrap();
        rig.fill(0, x, 2).unwrap();
        rig.gate(0, x, out).unwrap();
        let graph = rig.driver.end_capture(rig.streams[0]).unwrap();
        // SAFETY: its memory is still there.
        unsafe { rig.driver.launch_graph(graph, rig.streams[0]) }.unwrap();
        record(third);
        rig.driver.synchronize(third).unwrap();
        rig.driver.rest(us(40));
        let elapsed = |from, to| rig.driver.elapsed(from, to).unwrap();
        assert_eq!([elapsed(first, second), elapsed(second, third)], [us(1), us(2)]);
        assert_eq!([elapsed(first, third), elapsed(third, first)], [us(3), us(0)]);
        // The last time counts.
        record(first);
        rig.fill(0, x, 3).unwrap();
        record(second);
        rig.driver.synchronize(second).unwrap();
        assert_eq!([elapsed(third, first), elapsed(first, second)], [us(40), us(1)], "lazy: {lazy}");
        assert_eq!(rig.driver.refusals(), Vec::<String>::new());
    }
}

#[test]
fn a_time_is_told_when_the_host_knows_that_it_was_reached() {
    let rig = Rig::new();
    let [timer, later] = [(); 2].map(|()| rig.driver.timer(rig.streams[0]).unwrap());
    let other = rig.driver.timer(rig.streams[1]).unwrap();
    let plain = rig.events[0];
    let elapsed = |from, to| rig.driver.elapsed(from, to);
    refused(elapsed(timer, later), &["e4 to be a timer that was passed, found it was never recorded"]);
    let unknown = "found the host does not know that it was";
    // A wait for what came before says nothing of it, though nothing is between the two.
    rig.record(0, 0);
    rig.driver.record(timer, rig.streams[0]).unwrap();
    rig.synchronize(0).unwrap();
    refused(elapsed(timer, timer), &[unknown]);
    // Nor does one for another stream.
    rig.driver.record(other, rig.streams[1]).unwrap();
    rig.driver.synchronize(other).unwrap();
    refused(elapsed(other, timer), &["e4", unknown]);
    rig.record(0, 0);
    rig.synchronize(0).unwrap();
    elapsed(timer, other).unwrap();
    refused(elapsed(timer, plain), &["e0", "found an event without time"]);
    refused(elapsed(timer, later), &["e5", "never recorded"]);
    rig.driver.record(timer, rig.streams[0]).unwrap();
    refused(elapsed(timer, other), &["e4", unknown]);
    refused(elapsed(other, Event(70)), &["7 events, found 70"]);
    assert_eq!(rig.driver.refusals().len(), 7);
}

/// What is captured is launched later, and more than once.
#[test]
fn timers_are_not_captured() {
    let rig = Rig::new();
    let timer = rig.driver.timer(rig.streams[0]).unwrap();
    rig.driver.begin_capture(rig.streams[0]).unwrap();
    refused(rig.driver.record(timer, rig.streams[0]), &["expected no record during a capture"]);
    let ended: Result<Graph> = rig.driver.end_capture(rig.streams[0]);
    refused(ended, &["expected a whole capture, found record in it"]);
}
