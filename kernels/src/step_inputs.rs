//! A step's numbers where a device's ops read them: on the host they are borrowed, to a GPU they are copied, once per step.

use std::sync::Arc;

pub use kvern_cuda_abi::NONE as KNOWN;
use kvern_cuda_abi::Ptr;

use crate::cuda::inputs::DeviceInputs;
use crate::cuda::memory::DeviceMemory;
use crate::device::Backend;
use crate::{AttentionPlan, Device, KernelError, Result, SequenceBatch};

/// Row numbers, positions, slots or token ids for an op.
#[derive(Clone, Copy, Debug)]
pub struct Indices<'a>(Place<'a>);

#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    Host(&'a [u32]),
    Device { at: Ptr, len: usize },
}

impl<'a> From<&'a [u32]> for Indices<'a> {
    fn from(host: &'a [u32]) -> Self {
        Indices(Place::Host(host))
    }
}

impl<'a> From<&'a Vec<u32>> for Indices<'a> {
    fn from(host: &'a Vec<u32>) -> Self {
        Indices(Place::Host(host))
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Indices<'a> {
    fn from(host: &'a [u32; N]) -> Self {
        Indices(Place::Host(host))
    }
}

impl<'a> Indices<'a> {
    /// `len` numbers in device memory, which whoever put them there has checked.
    pub(crate) fn device(at: Ptr, len: usize) -> Self {
        Indices(Place::Device { at, len })
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn len(&self) -> usize {
        match self.0 {
            Place::Host(host) => host.len(),
            Place::Device { len, .. } => len,
        }
    }

    /// The numbers, for an op on the host; all of them below `end`.
    pub(crate) fn host_below(self, op: &'static str, what: &str, end: usize) -> Result<&'a [u32]> {
        let Place::Host(host) = self.0 else {
            return Err(KernelError::shape(op, format!("{what} on the host"), "some on a GPU"));
        };
        match host.iter().find(|&&index| index as usize >= end) {
            Some(index) => Err(KernelError::shape(op, format!("{what} below {end}"), index)),
            None => Ok(host),
        }
    }

    /// Where they are, for an op on a GPU.
    pub(crate) fn on_device(self, op: &'static str) -> Result<Ptr> {
        match self.0 {
            Place::Device { at, .. } => Ok(at),
            Place::Host(_) => Err(KernelError::shape(op, "indices on the GPU, by StepInputs", "some on the host")),
        }
    }
}

/// What the rows of one step are.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// `[T]`, each a row of the embedding table.
    pub ids: &'a [u32],
    /// `[T]`
    pub positions: &'a [u32],
    /// `[T]`
    pub slots: &'a [u32],
    /// `[S]`: rows whose logits are wanted.
    pub sample_rows: &'a [u32],
    /// `[B]`, or empty: where a sequence's one token is that which the last step sampled, its place among that step's sampled
    /// rows, and then its id is not read; [`KNOWN`] elsewhere. A GPU's alone.
    pub last_sampled: &'a [u32],
}

/// The tokens that a step has sampled, on a GPU, where the next step finds them.
#[derive(Clone)]
pub struct SampledTokens(pub(crate) Option<Arc<DeviceMemory>>);

/// As [`StepRows`], for ops.
#[derive(Clone, Copy, Debug)]
pub struct StepIndices<'a> {
    pub ids: Indices<'a>,
    pub positions: Indices<'a>,
    pub slots: Indices<'a>,
    pub sample_rows: Indices<'a>,
}

/// Room for the inputs of a step; made once.
pub struct StepInputs(Option<DeviceInputs>);

impl StepInputs {
    /// Room for `tokens_max` rows of which `sequences_max` are sampled.
    pub fn new(device: &Device, tokens_max: usize, sequences_max: usize) -> Result<Self> {
        Ok(StepInputs(match &device.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(gpu) => Some(DeviceInputs::new(gpu, tokens_max, sequences_max)?),
        }))
    }

    /// Brings `rows` of a planned batch to the device, to be [built](Self::build) there. On a GPU ids, positions and slots are its
    /// caller's promise: kernels do not check them.
    ///
    /// `padded` is what [`StepGraphs::padded_rows`](crate::StepGraphs::padded_rows) said: so many rows there are then, and as
    /// many are sampled; those that were not asked for compute nothing that is read, and write K and V to a block of the cache that is for that.
    pub fn update<'a>(
        &mut self,
        device: &Device,
        rows: &StepRows<'a>,
        batch: &SequenceBatch<'_>,
        plan: &AttentionPlan,
        padded: Option<usize>,
    ) -> Result<StepIndices<'a>> {
        let StepRows { ids, positions, slots, sample_rows, last_sampled } = *rows;
        match (&mut self.0, &device.backend) {
            (Some(inputs), Backend::Cuda(_)) => inputs.update(rows, batch, plan.on_device()?, padded),
            _ if !last_sampled.is_empty() => {
                let expected = "tokens that are known, on the CPU";
                Err(KernelError::shape("step inputs", expected, "some that only the last step knows"))
            }
            _ => Ok(StepIndices {
                ids: ids.into(),
                positions: positions.into(),
                slots: slots.into(),
                sample_rows: sample_rows.into(),
            }),
        }
    }

    /// Makes positions, slots, and the ids that only the device knows, of what was brought: the first launch of a step.
    pub fn build(&self, device: &Device) -> Result<()> {
        match (&self.0, &device.backend) {
            (Some(inputs), Backend::Cuda(gpu)) => inputs.build(gpu),
            _ => Ok(()),
        }
    }

    /// Where the sampler leaves the tokens that `last_sampled` is about.
    #[must_use]
    pub fn sampled_tokens(&self) -> SampledTokens {
        SampledTokens(self.0.as_ref().map(DeviceInputs::sampled_tokens))
    }

    /// Bytes held on a GPU.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, DeviceInputs::bytes)
    }
}
