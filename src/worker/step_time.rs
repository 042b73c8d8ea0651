//! How long steps take the device, as the host sees it: from the end of one to the end of the next.

use std::time::{Duration, Instant};

/// How long steps take the device.
#[derive(Debug, Default)]
pub(super) struct StepTime {
    /// Of the last step of decodes alone that another might have followed ahead of its end.
    last_decode: Duration,
    last_end: Option<Instant>,
}

impl StepTime {
    /// A step that began at `begun` has ended: the time since then, or since the step before it ended, which the device did first.
    pub(super) fn ended(&mut self, begun: Instant, is_decode: bool) -> Duration {
        let now = Instant::now();
        let from = self.last_end.map_or(begun, |end| end.max(begun));
        self.last_end = Some(now);
        if is_decode {
            self.last_decode = now - from;
        }
        now - from
    }

    /// How long to look for a step to follow the one under way: not so long that its end is missed, if it takes at least as long
    /// as the last one of decodes alone did.
    pub(super) fn patience(&self) -> Duration {
        (self.last_decode / 2).clamp(Duration::from_micros(50), Duration::from_millis(20))
    }
}
