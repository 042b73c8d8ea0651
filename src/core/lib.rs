//! The scheduler and the KV cache's bookkeeping: `apply` an input, `plan` a step. No clock, thread, I/O, random number,
//! float or map-order decision, so that a run can be simulated, recorded and replayed exactly.

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
