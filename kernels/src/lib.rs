//! The public ops of Kvern: shapes are checked here, once, and a backend does the work.
//!
//! A tensor is a shape, a dtype and a buffer on a [`Device`]. Ops write into tensors that were allocated at start; no op
//! allocates. Every op is deterministic and batch-invariant: a row of a result depends on nothing but its own inputs,
//! bit for bit, whatever other rows are in the call.

pub mod ops;
mod tensor;

pub use tensor::*;
