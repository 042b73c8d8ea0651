//! Planted faults: mistakes that tests switch on, to prove that the simulator and the checks see them.
//!
//! Outside of the package's own unit tests [`planted!`] is `false` and nothing of this is compiled.

/// One mistake. What each breaks, and what catches it, is the table in `sim/faults.rs`.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A prefix hit is not compared token by token.
    SkipTokenCheck,
    /// A prefix hit is not asked for its parent.
    SkipParentCheck,
    /// A prefix hit is not asked for its salt.
    IgnoreSalt,
    /// A prefix hit may cover the last token too.
    HitWholePrompt,
    /// A block is published one token before it is full.
    PublishPartial,
    /// The blocks of a failed step are published.
    PublishFailed,
    /// A reused block stays in the prefix index under its old hash.
    KeepStaleHash,
    /// Now and then a block that is live is handed out again.
    ReuseLive,
    /// A request that finishes gives its blocks back twice.
    ReleaseTwice,
    /// A cancelled request gives its blocks back while the device still reads them.
    FreeInFlight,
    /// A cancelled request keeps its blocks.
    LeakOnCancel,
    /// A step's block table is rotated by one block.
    RotateTable,
    /// A step's block table lacks its last block.
    ShortTable,
    /// A slice starts one token late.
    SkipInputToken,
    /// A step takes one token more than its budget.
    ExceedBudget,
    /// A slice of no tokens is planned.
    EmptySlice,
    /// Nothing is admitted.
    NeverAdmit,
    /// The youngest waiting request is admitted first.
    AdmitYoungest,
    /// The oldest running request is preempted first.
    PreemptOldest,
    /// A preempted request forgets its output.
    RepeatOutput,
    /// Every 16th token is not sent.
    DropToken,
    /// The last word is said twice.
    FinishTwice,
    /// Stop tokens are honoured before `min_new_tokens`.
    IgnoreMinNewTokens,
}

/// Whether `fault` is planted in `$owner`, which has a field `fault: Option<Fault>` in tests.
#[cfg(test)]
macro_rules! planted {
    ($owner:expr, $fault:ident) => {
        $owner.fault == Some(crate::fault::Fault::$fault)
    };
}
#[cfg(not(test))]
macro_rules! planted {
    ($owner:expr, $fault:ident) => {
        false
    };
}
pub(crate) use planted;
