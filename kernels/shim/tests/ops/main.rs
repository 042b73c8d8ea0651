//! Every op of the public API on a GPU's [`Device`] against the scalar references, over tables of shapes and types.
//!
//! The GPU is the shim, which refuses work in a wrong order; with `KVERN_TEST_GPU=1` and the feature `cuda` it is the
//! machine's first one. Nothing is read from files.
//!
//! ```text
//! products.rs   products with weights of every format, alone and stacked
//! rows.rs       embeddings, norms, gates, rows that move
//! attention.rs  the cache's writes, and attention over it
//! steps.rs      whole steps: alone, in a batch, padded, captured
//! sampling.rs   logits to tokens
//! clock.rs      when steps begin and end
//! refusals.rs   what is refused, and changes nothing
//! ```
#![allow(clippy::unwrap_used)]

mod attention;
mod clock;
/// The generator and the random matrices of the CPU's tests.
#[path = "../../../tests/support/mod.rs"]
mod matrices;
mod products;
mod refusals;
mod rows;
mod sampling;
mod steps;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;

use half::{bf16, f16};
use kvern_cuda_shim::device::{Options, ShimDriver};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, Device, Element, GpuOptions, HeadLayout, KernelError, KvCache, KvDType, KvShape,
    PrefillKernel, SequenceBatch, StepIndices, StepInputs, StepRows, Tensor,
};
use matrices::Random;

const ELEMENTS: [Element; 3] = [Element::F32, Element::BF16, Element::F16];

/// A GPU whose activations are of one type.
struct Rig {
    device: Device,
    /// The same GPU, with the kernel of prompts' attention that takes blocks of any size.
    any_block: Device,
    element: Element,
    shim: Option<Arc<ShimDriver>>,
}

impl Rig {
    fn new(element: Element) -> Rig {
        Rig::with(element, (8, 0), PrefillKernel::Portable).expect("any GPU has the portable kernel")
    }

    /// A GPU of capability 9.0 with its own kernel for prompts' attention; none where the machine's GPU is another.
    fn hopper(element: Element) -> Option<Rig> {
        Rig::with(element, (9, 0), PrefillKernel::Hopper)
    }

    /// The shim has this capability, the machine's GPU its own.
    fn with(element: Element, compute_capability: (u32, u32), prefill: PrefillKernel) -> Option<Rig> {
        if std::env::var_os("KVERN_TEST_GPU").is_some_and(|value| value == "1") {
            let any_block = Device::cuda(0, element).unwrap();
            return match Device::cuda(0, GpuOptions { prefill, ..element.into() }) {
                Err(KernelError::Unsupported(text)) if text.contains("attention by wgmma") => {
                    println!("skipped: {text}");
                    None
                }
                device => Some(Rig { device: device.unwrap(), any_block, element, shim: None }),
            };
        }
        // Work runs as late as it may, so that what is used too early shows.
        let options = Options { lazy: true, seed: element as u64, compute_capability, ..Options::default() };
        let shim = ShimDriver::new(options);
        let device = Device::gpu(Arc::clone(&shim) as _, GpuOptions { prefill, ..element.into() }).unwrap();
        let any_block = Device::gpu(Arc::clone(&shim) as _, element).unwrap();
        Some(Rig { device, any_block, element, shim: Some(shim) })
    }

    /// Largest relative error of rounding to the type of activations: half of a unit in the last place.
    fn epsilon(&self) -> f32 {
        epsilon(self.element)
    }

    /// Largest error of rounding near zero, where f16 loses digits.
    fn tiny(&self) -> f32 {
        if self.element == Element::F16 { 1.0 / 33_554_432.0 } else { 0.0 }
    }

    /// As the device holds them.
    fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        match self.element {
            Element::F32 => {}
            Element::BF16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
            Element::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
        }
        values
    }

    /// Random values in `-scale..scale` that the device holds exactly.
    fn values(&self, random: &mut Random, len: usize, scale: f32) -> Vec<f32> {
        self.rounded((0..len).map(|_| random.unit() * scale).collect())
    }

    fn tensor(&self, cols: usize, values: &[f32]) -> Tensor {
        Tensor::from_f32(&self.device, cols, values).unwrap()
    }

    /// An output full of NaN: whatever an op forgets to write shows.
    fn poisoned(&self, capacity: usize, cols: usize) -> Tensor {
        self.tensor(cols, &vec![f32::NAN; capacity * cols])
    }

    fn read(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.read(&self.device).unwrap()
    }

    /// Runs `work` with a step's numbers on the device, which makes positions and slots by itself: each row is a sequence of its
    /// own, in blocks of one position, of which the last is the row's slot.
    fn with_indices<R>(&self, rows: &StepRows<'_>, work: impl FnOnce(&StepIndices<'_>) -> R) -> R {
        let (device, count) = (&self.any_block, rows.ids.len());
        let stride = rows.positions.iter().max().map_or(1, |&last| last as usize + 1);
        let mut tables = vec![0; count * stride];
        for (row, (&position, &slot)) in rows.positions.iter().zip(rows.slots).enumerate() {
            tables[row * stride + position as usize] = slot;
        }
        let blocks = rows.slots.iter().max().map_or(1, |&last| last as usize + 1);
        let shape = KvShape { layers: 1, blocks, block_size: 1, kv_heads: 1, head_dim: 64, dtype: self.kv_dtype() };
        let kv = KvCache::new(device, shape).unwrap();
        let mut plan =
            AttentionPlan::new(device, layout([1, 1, 64]), &AttentionLimits::new(count, count, stride)).unwrap();
        let batch = SequenceBatch {
            cu_seqlens_q: &(0..=count as u32).collect::<Vec<_>>(),
            context_lens: &rows.positions.iter().map(|position| position + 1).collect::<Vec<_>>(),
            block_tables: &tables,
            block_table_stride: stride,
        };
        plan.update(device, &batch, &kv, None).unwrap();
        let mut inputs = StepInputs::new(device, count, count.max(rows.sample_rows.len())).unwrap();
        let indices = inputs.update(device, rows, &batch, &plan, None).unwrap();
        inputs.build(device).unwrap();
        // Its stream is another one.
        device.synchronize().unwrap();
        let result = work(&indices);
        self.device.synchronize().unwrap();
        result
    }

    /// Type of K and V.
    fn kv_dtype(&self) -> KvDType {
        self.element.into()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let refusals = self.shim.as_ref().map_or_else(Vec::new, |shim| shim.refusals());
        assert!(refusals.is_empty() || std::thread::panicking(), "{refusals:?}");
    }
}

fn epsilon(element: Element) -> f32 {
    match element {
        Element::F32 => 1.0 / 16_777_216.0,
        Element::BF16 => 1.0 / 256.0,
        Element::F16 => 1.0 / 2048.0,
    }
}

fn layout([heads, kv_heads, head_dim]: [usize; 3]) -> HeadLayout {
    HeadLayout { heads, kv_heads, head_dim }
}

/// Numbers that are used as ids and nothing else.
fn as_ids(ids: &[u32]) -> StepRows<'_> {
    const NONE: [u32; 64] = [0; 64];
    StepRows { ids, positions: &NONE[..ids.len()], slots: &NONE[..ids.len()], sample_rows: ids, last_sampled: &[] }
}

/// The numbers below `len` in some order.
fn shuffled(random: &mut Random, len: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    for i in (1..len).rev() {
        order.swap(i, random.below(i + 1));
    }
    order
}

/// Each value within `relative` of the expected one, plus `absolute`.
#[track_caller]
fn close(what: &str, found: &[f32], expected: &[f32], relative: f32, absolute: f32) {
    let bits: Vec<u32> = found.iter().map(|value| value.to_bits()).collect();
    support::compare(what, &bits, expected, relative, absolute).unwrap();
}
