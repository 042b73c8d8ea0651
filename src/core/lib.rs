//! The scheduler and the KV cache's bookkeeping: `apply` an input, `plan` a step. No clock, thread, I/O, random number,
//! float or map-order decision, so that a run can be simulated, recorded and replayed exactly.
//!
//! ```text
//!   Timed<Input> --> Engine::apply --+--> Effects     engine.rs: dispatch only
//!     Submit, Cancel    intake.rs    |                admission.rs: would it wait too long?
//!     StepDone          completion.rs|
//!     StepFailed        suspects.rs  |
//!     Transfer, Worker  handoff.rs   |
//!                                    v
//!   WorkerId ----> Engine::plan ---> StepPlan         scheduler.rs and prefill.rs fill it, preempt.rs and claim.rs
//!                  Engine::plan_ahead                 make room, policy.rs chooses, visitors.rs keeps steps short;
//!                                                     ahead.rs plans decodes before their tokens are known
//!
//!   state: request.rs (store), queue.rs (who waits, in order), tenants.rs, worker.rs (running list, step in flight),
//!          kv/ (pools), cost.rs (what a step takes)
//!   asked: admission.rs (predicted time to first token), signals.rs (for autoscaling)
//!   proof: invariants.rs, sim/ (tests only, with the mistakes of fault.rs planted), record/ and replay.rs
//! ```
//!
//! What is absent: planning more than one step ahead, and any knowledge of text, sampling or tensors.

mod admission;
mod ahead;
mod claim;
mod completion;
mod config;
mod cost;
mod engine;
mod event;
mod fault;
mod handoff;
mod ids;
mod intake;
mod invariants;
mod kv;
mod plan;
mod policy;
mod preempt;
mod prefill;
mod queue;
pub mod record;
pub mod replay;
mod request;
mod scheduler;
mod signals;
#[cfg(test)]
mod sim;
mod start;
mod suspects;
mod tenants;
mod visitors;
mod worker;

pub use admission::Probe;
pub use config::*;
pub use cost::CostModel;
pub use engine::*;
pub use event::*;
pub use ids::*;
pub use invariants::InvariantId;
pub use plan::*;
pub use signals::*;
