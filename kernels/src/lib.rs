//! The public ops of Kvern: shapes are checked here, once, and a backend does the work.
//!
//! A tensor is a shape, a dtype and a buffer on a [`Device`]. Ops write into tensors that were allocated at start; no op
//! allocates. Every op is deterministic and batch-invariant: a row of a result depends on nothing but its own inputs,
//! bit for bit, whatever other rows are in the call and however many threads run. Instruction sets give the same bits too, but
//! for products of bf16: these have one of two orders ([`Device::bf16_products`]), the same for all devices of a level.
//!
//! ```text
//! ops.rs         the ops: shape checks, then `match device { Cpu, Cuda }`
//! reference.rs   what each op computes, as plain loops: the specification
//! format.rs      stored weight formats and their values
//! cpu/           the CPU backend, one file per op
//! limits.rs      what the machine allows: reads, products
//! cuda/driver.rs what the CUDA backend asks of a GPU; cuda/real.rs is NVIDIA's driver behind it, and cuda_absent.rs what
//!                stands in its place in a build without the feature `cuda`
//! ```

mod attention_plan;
mod buffer;
mod cpu;
pub mod cuda;
#[allow(dead_code)] // Until the backend opens it.
#[cfg(feature = "cuda")]
#[path = "cuda/real.rs"]
mod cuda_driver;
#[allow(dead_code)] // As above.
#[cfg(not(feature = "cuda"))]
#[path = "cuda_absent.rs"]
mod cuda_driver;
mod device;
mod error;
mod format;
mod kv_cache;
pub mod limits;
pub mod ops;
pub mod reference;
mod rope_table;
mod tensor;
mod weight;

pub use attention_plan::{AttentionPlan, HeadLayout, SequenceBatch};
pub use device::{CpuIsa, CpuOptions, Device};
pub use error::{KernelError, Result};
pub use format::{Format, dequantize};
pub use kv_cache::{KvCache, KvDType, KvShape};
pub use rope_table::RopeTable;
pub use tensor::Tensor;
pub use weight::{MatrixView, Precision, RowOrder, Weight};
