//! Whether a refusal's `retry_in` was right: some refused requests are asked again and again until they would be taken, others
//! come back exactly when they were told to.

use crate::answer::{Answer, End, Micros, Refusal};
use crate::client::{Asked, Client};
use crate::stats::quantile;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Part of `retry_in` between two attempts, within bounds.
const RESOLUTION: f64 = 1.0 / 10.0;
const PERIOD_S: (f64, f64) = (0.01, 0.1);
/// Probes at a time: they must not become the load. After a burst they are all there is.
const PROBES_MAX: usize = 2;
const PROBES_AFTER_BURST_MAX: usize = 8;
/// A probe is given up after this many times its `retry_in`, and counted as that.
const PATIENCE: f64 = 8.0;

#[derive(Default)]
pub(crate) struct Returns {
    /// Nobody comes back.
    probing_only: bool,
    refused: usize,
    probing: usize,
    /// Seconds told and seconds that proved right.
    pub(crate) probed: Vec<(f64, f64)>,
    given_up: usize,
    came_back: usize,
    taken_back: usize,
    /// Of the requests that were sent by the probes and by those who came back.
    pub(crate) answers: Vec<Answer>,
}

impl Returns {
    pub(crate) fn probing_only() -> Self {
        Returns { probing_only: true, ..Returns::default() }
    }

    /// Of each probe: what was told over what proved right.
    pub(crate) fn ratios(&self) -> Vec<f64> {
        self.probed.iter().map(|(told, right)| told / right).collect()
    }

    /// Median of how far what was told is from what proved right, as a part of the latter.
    pub(crate) fn error_median(&self) -> f64 {
        let errors: Vec<f64> = self.ratios().iter().map(|ratio| (ratio - 1.0).abs()).collect();
        quantile(&errors, 0.5)
    }

    /// Part of those who came back as told that were taken.
    pub(crate) fn taken_share(&self) -> f64 {
        self.taken_back as f64 / self.came_back as f64
    }

    pub(crate) fn summary(&self) -> serde_json::Value {
        let told: Vec<f64> = self.probed.iter().map(|(told, _)| *told).collect();
        let quartiles = |samples: &[f64]| [0.25, 0.5, 0.75].map(|share| quantile(samples, share));
        serde_json::json!({
            "refused": self.refused, "probed": self.probed.len(), "given_up": self.given_up,
            "came_back": self.came_back, "taken": self.taken_back,
            "retry_in_quartiles_s": quartiles(&told),
            "ratio_quartiles": quartiles(&self.ratios()),
        })
    }
}

/// What is done about a refused request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Probe,
    ComeBack,
    Nothing,
}

/// Follows up a refusal, if it is the turn of this one.
pub(crate) async fn follow_up(client: Rc<Client>, asked: Asked, refused: &Answer, returns: Rc<RefCell<Returns>>) {
    let End::Refused(Refusal { retry_in: Some(told), .. }) = refused.end else { return };
    let turn = {
        let mut returns = returns.borrow_mut();
        returns.refused += 1;
        let most = if returns.probing_only { PROBES_AFTER_BURST_MAX } else { PROBES_MAX };
        let turn = if returns.probing < most { Turn::Probe } else { Turn::Nothing };
        let turn = if returns.refused.is_multiple_of(4) && !returns.probing_only { Turn::ComeBack } else { turn };
        returns.probing += usize::from(turn == Turn::Probe);
        returns.came_back += usize::from(turn == Turn::ComeBack);
        turn
    };
    match turn {
        Turn::Probe => {
            let right = probe(&client, asked, told, refused.head, &returns).await;
            let mut returns = returns.borrow_mut();
            returns.probing -= 1;
            returns.given_up += usize::from(right.is_none());
            returns.probed.push((told, right.unwrap_or(told * PATIENCE)));
        }
        Turn::ComeBack => {
            tokio::time::sleep(Duration::from_secs_f64(told)).await;
            let answer = client.ask_due(&asked, client.now()).await;
            let mut returns = returns.borrow_mut();
            returns.taken_back += usize::from(answer.accepted());
            returns.answers.push(answer);
        }
        Turn::Nothing => {}
    }
}

/// Seconds after the refusal when the same request would first have been taken. A probe that is taken leaves at once, so that
/// it hardly adds to the load.
async fn probe(client: &Client, mut asked: Asked, told: f64, since: Micros, returns: &RefCell<Returns>) -> Option<f64> {
    asked.leave_after = Some(0);
    let period = (told * RESOLUTION).clamp(PERIOD_S.0, PERIOD_S.1);
    let after = |at: Micros| at.saturating_sub(since) as f64 / 1e6;
    let mut refused_last = 0.0;
    loop {
        tokio::time::sleep(Duration::from_secs_f64(period)).await;
        let answer = client.ask_due(&asked, client.now()).await;
        let (sent, accepted) = (after(answer.sent), answer.accepted());
        returns.borrow_mut().answers.push(answer);
        if accepted {
            // It would have been taken at some time between the last two attempts.
            return Some((refused_last + sent) / 2.0);
        }
        refused_last = sent;
        if refused_last > told * PATIENCE {
            return None;
        }
    }
}
