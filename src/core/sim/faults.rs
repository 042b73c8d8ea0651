//! Planted faults: each is seen by some seed, by the check that is meant to see it.

use super::run_seed;
use crate::fault::Fault;

/// Each fault and what sees it first, running the seeds from 0.
const FAULTS: [(Fault, &str); 24] = [
    (Fault::SkipTokenCheck, "?"),
    (Fault::SkipParentCheck, "?"),
    (Fault::IgnoreSalt, "?"),
    (Fault::HitWholePrompt, "?"),
    (Fault::PublishPartial, "?"),
    (Fault::PublishFailed, "?"),
    (Fault::KeepStaleHash, "?"),
    (Fault::ReuseLive, "?"),
    (Fault::ReleaseTwice, "?"),
    (Fault::FreeInFlight, "?"),
    (Fault::LeakOnCancel, "?"),
    (Fault::RotateTable, "?"),
    (Fault::ShortTable, "?"),
    (Fault::SkipInputToken, "?"),
    (Fault::ExceedBudget, "?"),
    (Fault::EmptySlice, "?"),
    (Fault::NeverAdmit, "?"),
    (Fault::AdmitYoungest, "?"),
    (Fault::ReadmitAtOnce, "?"),
    (Fault::PreemptOldest, "?"),
    (Fault::RepeatOutput, "?"),
    (Fault::DropToken, "?"),
    (Fault::FinishTwice, "?"),
    (Fault::IgnoreMinNewTokens, "?"),
];

/// Seeds within which a fault must be seen.
const SEEDS_MAX: u64 = 500;

#[test]
fn every_planted_fault_is_caught() {
    let mut wrong = Vec::new();
    for (fault, expected) in FAULTS {
        let caught = (0..SEEDS_MAX).find_map(|seed| run_seed(seed, Some(fault)).err().map(|failure| (seed, failure)));
        match caught {
            Some((seed, failure)) if failure.caught == expected => println!("{fault:?}: seed {seed}, {expected}"),
            other => wrong.push(format!("{fault:?}: expected {expected}, found {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
