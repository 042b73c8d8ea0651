//! The scheduler and the KV cache's bookkeeping: `apply` an input, `plan` a step. No clock, thread, I/O, random number,
//! float or map-order decision, so that a run can be simulated, recorded and replayed exactly.

mod config;
mod engine;
mod event;
mod ids;
mod plan;

pub use config::*;
pub use engine::*;
pub use event::*;
pub use ids::*;
pub use plan::*;
