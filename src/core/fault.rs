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
    /// A private block below a public one is not asked for its salt.
    IgnoreInnerSalt,
    /// The block in which the public part of a prompt ends is public, too.
    ShareLastBlock,
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
    /// A request that starts anew does not bring its whole table.
    KeepTable,
    /// A step that failed counts as one whose blocks the worker has kept.
    TrustFailedStep,
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
    /// The request of the best rank is preempted first.
    PreemptBest,
    /// A preempted request forgets its output.
    RepeatOutput,
    /// Every 16th token is not sent.
    DropToken,
    /// The last word is said twice.
    FinishTwice,
    /// Stop tokens are honoured before `min_new_tokens`.
    IgnoreMinNewTokens,
    /// A tenant that waits again starts its counter at nothing.
    SaveUpTime,
    /// No tenant is charged for its tokens.
    ChargeNobody,
    /// Who ends before its prompt was computed gets nothing back.
    KeepCharge,
    /// Who has no place waits while others have several.
    KeepPlaces,
    /// Who is below its floor waits while others are above their share.
    KeepShares,
    /// Less urgent classes never have their turn.
    StarveClasses,
    /// The oldest request of a tenant never has its turn.
    StarveOldest,
    /// Those below their floor lose their blocks as if they were above their share.
    IgnoreFloors,
    /// Tenants may hold more blocks than their ceiling.
    IgnoreCeiling,
    /// Cached blocks are taken from the first tenant that has any.
    EvictFirstTenant,
    /// Prefill takes what it can, whatever the decodes were promised.
    IgnoreObjectives,
    /// Prefill takes no notice of the deadlines of the decodes beside it.
    IgnorePace,
    /// Busy tenants' prefill gives no way to visitors.
    IgnoreVisitors,
    /// Deadlines pass unseen.
    IgnoreDeadlines,
    /// The queue's limits refuse nothing.
    QueueForever,
    /// The source of a transfer gives its blocks back at once.
    UnpinSource,
    /// The cache of a lost pool is still found.
    KeepLostPool,
    /// A failed step ends all its requests.
    BlameAll,
    /// The requests of a failed step go on as if it had computed their tokens.
    AdvanceFailed,
    /// A prompt that made a step fail is not remembered.
    ForgetQuarantine,
    /// The blocks of a request that ends are given back while the step ahead is at them.
    FreeAhead,
    /// What the step ahead sampled for a request that has ended is told.
    TellOfOver,
    /// Steps are planned ahead of a step that is ahead itself.
    AheadTwice,
    /// The step ahead computes the position of the step before it.
    AheadAtLastToken,
    /// What a step made that ran ahead of one that failed counts.
    KeepAheadOfFailed,
    /// Steps are planned ahead of tokens that the host must know.
    AheadOfTokens,
    /// Plans ahead of a step that ends before a prompt does.
    AheadOfPrompt,
    /// Steps are planned ahead although somebody could start.
    AheadOfWaiting,
    /// Steps have the whole device whoever else is at work on it.
    IgnoreOthers,
    /// Steps keep to their part of the device although nobody else is at work on it.
    KeepToPart,
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
