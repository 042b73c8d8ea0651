//! What the host and the CUDA kernels agree on: parameter structs, and how one step's attention is divided.
//!
//! A package of its own, without dependencies, because two sides need it that must not know each other: the CUDA backend,
//! which launches on a device, and the shim, which launches on the host.

pub mod launch;
mod params;
mod plan;

pub use params::*;
pub use plan::{DecodePlan, DecodeQuery, PrefillPlan, PrefillQuery, SharedPrefix, piece_len};
