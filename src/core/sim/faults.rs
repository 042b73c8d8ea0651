//! Planted faults: each is seen by some seed, by the check that is meant to see it.

use super::run_seed;
use crate::fault::Fault;

/// Each fault and the checks that may see it first, running the seeds from 0: several where a fault breaks several promises
/// and the seed decides which shows.
const FAULTS: [(Fault, &[&str]); 57] = [
    (Fault::SkipTokenCheck, &["KV-5", "K/V read"]),
    (Fault::SkipParentCheck, &["K/V read", "KV-5"]),
    (Fault::IgnoreSalt, &["K/V read", "KV-5"]),
    (Fault::IgnoreInnerSalt, &["K/V read", "KV-5"]),
    (Fault::ShareLastBlock, &["K/V read"]),
    (Fault::HitWholePrompt, &["cached tokens", "SCH-5", "KV-4"]),
    (Fault::PublishPartial, &["KV-4"]),
    (Fault::PublishFailed, &["K/V read"]),
    (Fault::KeepStaleHash, &["KV-4"]),
    (Fault::ReuseLive, &["KV-4", "KV-5"]),
    (Fault::ReleaseTwice, &["KV-2"]),
    (Fault::FreeInFlight, &["KV-2", "KV-3"]),
    (Fault::LeakOnCancel, &["KV-2"]),
    (Fault::RotateTable, &["K/V read"]),
    (Fault::ShortTable, &["block table"]),
    (Fault::KeepTable, &["K/V read", "block table", "KV-3"]),
    (Fault::TrustFailedStep, &["block table"]),
    (Fault::SkipInputToken, &["K/V read", "sample mark"]),
    (Fault::ExceedBudget, &["SCH-1"]),
    (Fault::EmptySlice, &["SCH-4"]),
    (Fault::NeverAdmit, &["SCH-5"]),
    (Fault::AdmitYoungest, &["WAIT-1"]),
    (Fault::PreemptBest, &["preemption order"]),
    (Fault::RepeatOutput, &["sample mark"]),
    (Fault::DropToken, &["output", "sample mark"]),
    (Fault::FinishTwice, &["OUT-2"]),
    (Fault::IgnoreMinNewTokens, &["finish reason", "output"]),
    (Fault::SaveUpTime, &["fair share"]),
    (Fault::ChargeNobody, &["fair share"]),
    (Fault::KeepCharge, &["fair share"]),
    (Fault::KeepPlaces, &["place"]),
    (Fault::KeepShares, &["floor"]),
    (Fault::StarveClasses, &["WAIT-1"]),
    (Fault::StarveOldest, &["WAIT-1"]),
    (Fault::IgnoreFloors, &["TEN-1", "preemption order", "floor"]),
    (Fault::IgnoreCeiling, &["TEN-2"]),
    (Fault::EvictFirstTenant, &["eviction order"]),
    (Fault::IgnoreObjectives, &["inter-token latency"]),
    (Fault::IgnorePace, &["inter-token latency"]),
    (Fault::IgnoreVisitors, &["visitors"]),
    (Fault::IgnoreDeadlines, &["deadline", "cancel", "step ahead"]),
    (Fault::QueueForever, &["refusal"]),
    (Fault::UnpinSource, &["HND-1"]),
    (Fault::KeepLostPool, &["K/V read"]),
    (Fault::BlameAll, &["finish reason"]),
    (Fault::AdvanceFailed, &["K/V read", "sample mark"]),
    (Fault::ForgetQuarantine, &["refusal"]),
    (Fault::FreeAhead, &["KV-3"]),
    (Fault::TellOfOver, &["OUT-2"]),
    (Fault::AheadTwice, &["step ahead"]),
    (Fault::AheadAtLastToken, &["sample mark", "input token"]),
    (Fault::KeepAheadOfFailed, &["output", "K/V read", "sample mark"]),
    (Fault::AheadOfTokens, &["step ahead"]),
    (Fault::AheadOfPrompt, &["step ahead"]),
    (Fault::AheadOfWaiting, &["step ahead"]),
    (Fault::IgnoreOthers, &["device share"]),
    (Fault::KeepToPart, &["device share"]),
];

/// Seeds within which a fault must be seen.
const SEEDS_MAX: u64 = 1_000;

#[test]
fn every_planted_fault_is_caught() {
    let mut wrong = Vec::new();
    for (fault, expected) in FAULTS {
        let caught = (0..SEEDS_MAX).find_map(|seed| run_seed(seed, Some(fault)).err().map(|failure| (seed, failure)));
        match caught {
            Some((seed, failure)) if expected.contains(&failure.caught.as_str()) => {
                println!("{fault:?}: seed {seed}, {}", failure.caught);
            }
            other => wrong.push(format!("{fault:?}: expected {expected:?}, found {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
