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
//! cuda/          the CUDA backend: one launch, or a few, per op, by a driver behind a trait; cuda/real.rs is NVIDIA's driver,
//!                and cuda_absent.rs stands in its place in a build without the feature `cuda`
//! ```

mod attention_plan;
mod buffer;
mod cpu;
pub mod cuda;
#[cfg(feature = "cuda")]
#[path = "cuda/real.rs"]
mod cuda_driver;
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
mod step_clock;
mod step_graphs;
mod step_inputs;
mod tensor;
mod weight;

pub use attention_plan::{AttentionLimits, AttentionPlan, HeadLayout, SHARED_PREFIX_BYTES, SequenceBatch};
pub use cuda::PrefillKernel;
pub use cuda::account::Allocations;
pub use cuda::driver::Element;
pub use cuda::sampling::{DeviceSampler, SampleBias, SampleCount, SampleRow, SampledRow};
pub use device::{BesideOptions, CpuIsa, CpuOptions, Device, DeviceShare, GpuOptions};
pub use error::{KernelError, Result};
pub use format::{Format, dequantize};
pub use kv_cache::{KvCache, KvDType, KvShape};
pub use rope_table::RopeTable;
pub use step_clock::{StepClock, StepSpan};
pub use step_graphs::StepGraphs;
pub use step_inputs::{Indices, KNOWN, SampledTokens, StepIndices, StepInputs, StepRows};
pub use tensor::Tensor;
pub use weight::{MatrixView, Precision, RowOrder, Weight};
