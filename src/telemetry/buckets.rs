//! Upper bounds of the histograms, in seconds or counts, from vLLM's buckets.py and loggers.py.

/// Time to first token.
pub(super) const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];

/// Gaps between tokens. vLLM begins at 10 ms, where most samples of a fast device fall into one bucket; the first six bounds
/// are ours, and do not disturb a query that was written for vLLM's.
pub(super) const INTER_TOKEN: [f64; 25] = [
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, //
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];

/// Phases of a request.
pub(super) const LATENCY: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// Tokens of a step.
pub(super) const ITERATION: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// The parameter `n`.
pub(super) const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Preemptions of a request.
pub(super) const PREEMPTIONS: [f64; 7] = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// 1, 2, 5, 10, 20, 50, ... as far as `max`; at least the first.
pub(super) fn tokens(max: u32) -> Vec<f64> {
    let decades = (0..10).flat_map(|power| [1u64, 2, 5].map(|mantissa| mantissa * 10u64.pow(power)));
    decades.take_while(|bound| *bound <= u64::from(max.max(1))).map(|bound| bound as f64).collect()
}
