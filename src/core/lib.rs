//! The scheduler and the KV cache's bookkeeping: `apply` an input, `plan` a step. No clock, thread, I/O, random number,
//! float or map-order decision, so that a run can be simulated, recorded and replayed exactly.
//!
//! ```text
//!   Timed<Input> --> Engine::apply --+--> Effects     engine.rs: dispatch only
//!     Submit, Cancel    intake.rs    |
//!     StepDone          completion.rs|
//!                                    v
//!   WorkerId ----> Engine::plan ---> StepPlan         scheduler.rs fills it, policy.rs chooses
//!
//!   state: request.rs (store, waiting queue), worker.rs (running list, step in flight), kv/ (one pool for each worker)
//!   proof: invariants.rs, sim/ (tests only, with the mistakes of fault.rs planted), record/ (record and replay)
//! ```
//!
//! What is absent: workers with other roles than mixed and the handoff between them, priorities and deadlines, planning
//! ahead of the device, and any knowledge of text, sampling or tensors.

mod completion;
mod config;
mod engine;
mod event;
mod fault;
mod ids;
mod intake;
mod invariants;
mod kv;
mod plan;
mod policy;
pub mod record;
mod request;
mod scheduler;
#[cfg(test)]
mod sim;
mod worker;

pub use config::*;
pub use engine::*;
pub use event::*;
pub use ids::*;
pub use invariants::InvariantId;
pub use plan::*;
