//! Planted faults: each is seen by some seed, by the check that is meant to see it.

use super::run_seed;
use crate::fault::Fault;

/// Each fault and what sees it first, running the seeds from 0.
const FAULTS: [(Fault, &str); 23] = [
    (Fault::SkipTokenCheck, "KV-5"),
    (Fault::SkipParentCheck, "K/V read"),
    (Fault::IgnoreSalt, "K/V read"),
    (Fault::HitWholePrompt, "cached tokens"),
    (Fault::PublishPartial, "KV-4"),
    (Fault::PublishFailed, "K/V read"),
    (Fault::KeepStaleHash, "KV-4"),
    (Fault::ReuseLive, "KV-4"),
    (Fault::ReleaseTwice, "KV-2"),
    (Fault::FreeInFlight, "KV-2"),
    (Fault::LeakOnCancel, "KV-2"),
    (Fault::RotateTable, "K/V read"),
    (Fault::ShortTable, "block table"),
    (Fault::SkipInputToken, "K/V read"),
    (Fault::ExceedBudget, "SCH-1"),
    (Fault::EmptySlice, "SCH-4"),
    (Fault::NeverAdmit, "SCH-5"),
    (Fault::AdmitYoungest, "admission order"),
    (Fault::PreemptOldest, "SCH-5"),
    (Fault::RepeatOutput, "sample mark"),
    (Fault::DropToken, "output"),
    (Fault::FinishTwice, "OUT-2"),
    (Fault::IgnoreMinNewTokens, "finish reason"),
];

/// Seeds within which a fault must be seen.
const SEEDS_MAX: u64 = 1_000;

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
