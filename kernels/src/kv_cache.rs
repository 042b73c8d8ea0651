//! K and V of every layer, in blocks.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kvern_cuda_abi::{Ptr, TensorMap, launch};

use crate::buffer::{Buffer, Plain};
use crate::cpu::pair::Pair;
use crate::cuda::CudaDevice;
use crate::cuda::driver::{BoxedMatrix, Element};
use crate::cuda::memory::DeviceMemory;
use crate::device::Backend;
use crate::{Device, KernelError, Result};

/// How K and V are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvDType {
    F32,
    #[default]
    BF16,
    /// On a GPU only.
    F16,
}

/// What K and V are on a GPU with activations of this type.
impl From<Element> for KvDType {
    fn from(element: Element) -> Self {
        match element {
            Element::F32 => KvDType::F32,
            Element::F16 => KvDType::F16,
            Element::BF16 => KvDType::BF16,
        }
    }
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl KvDType {
    /// Bytes per element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::BF16 | KvDType::F16 => 2,
        }
    }

    /// As settings and metrics spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            KvDType::F32 => "f32",
            KvDType::BF16 => "bf16",
            KvDType::F16 => "f16",
        }
    }

    /// Elements per cell, what one lane of a product takes at a time.
    fn cell_values(self) -> usize {
        match self {
            KvDType::F32 => 1,
            KvDType::BF16 | KvDType::F16 => 2,
        }
    }
}

/// Shape of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub dtype: KvDType,
}

impl KvShape {
    /// Bytes of one block over all layers, K and V, with what makes pairs of odd sizes.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        2 * self.layers * self.kv_heads * self.padded_block() * self.padded_head() * self.dtype.bytes()
    }

    /// Tokens per block, rounded up to whole cells of V.
    pub(crate) fn padded_block(&self) -> usize {
        self.block_size.next_multiple_of(self.dtype.cell_values())
    }

    /// Values per head, rounded up to whole cells of K.
    pub(crate) fn padded_head(&self) -> usize {
        self.head_dim.next_multiple_of(self.dtype.cell_values())
    }

    /// Cells of K, or of V, of one head in one block of one layer.
    pub(crate) fn page(&self) -> usize {
        self.padded_block() * self.padded_head() / self.dtype.cell_values()
    }
}

/// K and V of all layers in blocks. A slot is `block * block_size + offset`.
///
/// On the CPU a block of a layer holds, per KV head, K transposed and then V, so that both products of attention run
/// lane by lane without a horizontal sum. BF16 is stored in pairs along the sum, as bf16 products take them (the lanes of a
/// vector, and the rows of a matrix unit's tile): two of a head's values in K, two positions in V. Odd sizes are rounded up.
///
/// ```text
/// F32  [layer][block][kv_head] -> K [head_dim][block_size]        | V [block_size][head_dim]
/// BF16 [layer][block][kv_head] -> K [head_dim / 2][block_size][2] | V [block_size / 2][head_dim][2]
/// ```
///
/// On a GPU it is `[layer][K, then V][block][kv_head][block_size][head_dim]`, with a block more, to which the rows of a step that
/// nobody asked for are written.
pub struct KvCache {
    pub(crate) data: KvData,
    shape: KvShape,
}

/// The cells, by dtype: an f32, or a pair of bf16; or what is on a GPU.
pub(crate) enum KvData {
    F32(Cells<f32>),
    BF16(Cells<Pair>),
    Device(DeviceKv),
}

/// K and V on a GPU.
#[derive(Clone)]
pub(crate) struct DeviceKv {
    memory: Arc<DeviceMemory>,
    /// Bytes of K, or of V, of one layer.
    plane_bytes: usize,
    /// Of K and V of each layer, where the device copies boxes of such blocks.
    maps: Option<Arc<[[TensorMap; 2]]>>,
}

impl DeviceKv {
    fn new(gpu: &CudaDevice, shape: KvShape) -> Result<Self> {
        if shape.dtype != KvDType::from(gpu.element) {
            let expected = format!("{}, as activations on the GPU", gpu.element);
            return Err(KernelError::shape("kv cache", expected, shape.dtype));
        }
        let rows = (shape.blocks + 1) * shape.kv_heads * shape.block_size;
        if u32::try_from(rows).is_err() {
            return Err(KernelError::shape(
                "kv cache",
                "blocks x KV heads x block size below 2^32",
                format!("{shape:?}"),
            ));
        }
        // Each plane begins at whole vectors.
        let plane_bytes = (rows * shape.head_dim * gpu.element.bytes()).next_multiple_of(256);
        let memory = DeviceMemory::new(&gpu.driver, "the KV cache", 2 * shape.layers * plane_bytes)?;
        let memory = Arc::new(memory);
        let mut cache = DeviceKv { memory, plane_bytes, maps: None };
        let takes = launch::prefill_hopper_takes(shape.head_dim, shape.block_size) && i32::try_from(rows).is_ok();
        if gpu.needs_hopper() && !takes {
            let tiles = if shape.head_dim > 128 { 64 } else { 128 };
            let expected = format!(
                "for attention by wgmma, heads of 64, 96, 128 or 256 values in less than 2^31 rows, and blocks of 8 \
                 to {tiles} positions, by powers of two"
            );
            return Err(KernelError::shape("kv cache", expected, format!("{shape:?}")));
        }
        if gpu.is_prefill_hopper && takes {
            cache.maps =
                Some((0..shape.layers).map(|layer| cache.map(gpu, shape, rows, layer)).collect::<Result<_>>()?);
        }
        Ok(cache)
    }

    /// Maps of K and V of a layer, in boxes of a block's rows under one KV head.
    fn map(&self, gpu: &CudaDevice, shape: KvShape, rows: usize, layer: usize) -> Result<[TensorMap; 2]> {
        let map = |memory| {
            gpu.driver.tensor_map(&BoxedMatrix {
                element: gpu.element,
                memory,
                rows,
                columns: shape.head_dim,
                box_rows: shape.block_size,
                box_columns: launch::prefill_hopper_panel(shape.head_dim),
            })
        };
        let (k, v) = self.layer(layer);
        Ok([map(k)?, map(v)?])
    }

    /// By which kernels copy boxes of K and V of a layer.
    pub(crate) fn maps(&self, layer: usize) -> Option<[TensorMap; 2]> {
        self.maps.as_ref().map(|maps| maps[layer])
    }

    /// Where K and V of a layer are.
    pub(crate) fn layer(&self, layer: usize) -> (Ptr, Ptr) {
        (self.memory.at(2 * layer * self.plane_bytes), self.memory.at((2 * layer + 1) * self.plane_bytes))
    }
}

/// Memory that several handles may share. Nobody makes a reference to more than a head's pages in one block, so that handles
/// that are at different blocks are at different memory.
pub(crate) struct Cells<C: Plain>(Buffer<C>);

impl<C: Plain> Cells<C> {
    /// # Safety
    /// Until the result is dropped nobody writes this range.
    #[inline(always)]
    pub(crate) unsafe fn read(&self, range: Range<usize>) -> &[C] {
        assert!(range.start <= range.end && range.end <= self.0.count(), "a page lies within its cache");
        // SAFETY: the range is within the buffer; nobody writes it, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.0.start().add(range.start), range.len()) }
    }

    /// # Safety
    /// Until the result is dropped nobody else reads or writes this range.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn write(&self, range: Range<usize>) -> &mut [C] {
        assert!(range.start <= range.end && range.end <= self.0.count(), "a page lies within its cache");
        // SAFETY: the range is within the buffer; nobody else uses it, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.0.start().add(range.start), range.len()) }
    }

    /// # Safety
    /// As for [`KvCache::share`].
    unsafe fn share(&self) -> Self {
        // SAFETY: elements are only used through `read` and `write`, whose callers keep apart.
        Cells(unsafe { self.0.alias() })
    }
}

impl KvCache {
    /// Zeros on the CPU, where memory is touched lazily by the operating system; anything on a GPU. A shape with a zero or too
    /// large to address, or a type that the device does not have, is [`Shape`](KernelError::Shape).
    pub fn new(device: &Device, shape: KvShape) -> Result<KvCache> {
        let even = |size: usize| size.checked_next_multiple_of(shape.dtype.cell_values());
        let sizes = [shape.layers, shape.blocks, shape.kv_heads, 2].map(Some);
        let sizes = sizes.into_iter().chain([even(shape.block_size), even(shape.head_dim)]);
        let elements = sizes.reduce(|product, size| product?.checked_mul(size?)).flatten();
        let slots = shape.blocks.checked_add(1).and_then(|blocks| blocks.checked_mul(shape.block_size));
        let slots = slots.filter(|&slots| u32::try_from(slots).is_ok());
        let cells = match (elements, slots) {
            (Some(elements), Some(_)) if elements > 0 => elements / shape.dtype.cell_values(),
            _ => {
                return Err(KernelError::shape(
                    "kv cache",
                    "positive sizes and slots below 2^32",
                    format!("{shape:?}"),
                ));
            }
        };
        if let Backend::Cuda(gpu) = &device.backend {
            return Ok(KvCache { data: KvData::Device(DeviceKv::new(gpu, shape)?), shape });
        }
        let data = match shape.dtype {
            KvDType::F32 => KvData::F32(Cells(Buffer::zeros(cells)?)),
            KvDType::BF16 => KvData::BF16(Cells(Buffer::zeros(cells)?)),
            KvDType::F16 => return Err(KernelError::shape("kv cache", "f32 or bf16 on the CPU", shape.dtype)),
        };
        Ok(KvCache { data, shape })
    }

    /// Another handle on the same memory, for a second worker.
    ///
    /// # Safety
    /// While an op writes a block through one handle, no op reads or writes that block through another. Whoever plans the
    /// steps sees to it: a block that several requests hold is full and only read, and a request is in one step at a time.
    #[must_use]
    pub unsafe fn share(&self) -> KvCache {
        // SAFETY: the same promise.
        let data = unsafe {
            match &self.data {
                KvData::F32(cells) => KvData::F32(cells.share()),
                KvData::BF16(cells) => KvData::BF16(cells.share()),
                KvData::Device(device) => KvData::Device(device.clone()),
            }
        };
        KvCache { data, shape: self.shape }
    }

    /// Copies blocks of `from`, the first of each pair, to blocks of this cache, the second, in all layers. Shapes that
    /// differ in more than the number of blocks, and blocks that are not there, are [`Shape`](KernelError::Shape).
    pub fn copy_blocks(&mut self, from: &KvCache, blocks: &[(u32, u32)]) -> Result<()> {
        let (to_shape, from_shape) = (self.shape, from.shape);
        if (KvShape { blocks: from_shape.blocks, ..to_shape }) != from_shape {
            return Err(KernelError::shape("copy blocks", format!("{to_shape:?}"), format!("{from_shape:?}")));
        }
        let fits = |&(a, b): &(u32, u32)| (a as usize) < from_shape.blocks && (b as usize) < to_shape.blocks;
        if let Some(pair) = blocks.iter().find(|pair| !fits(pair)) {
            let expected = format!("blocks below {} and {}", from_shape.blocks, to_shape.blocks);
            return Err(KernelError::shape("copy blocks", expected, format!("{pair:?}")));
        }
        match (&self.data, &from.data) {
            (KvData::F32(to), KvData::F32(from)) => copy(to, to_shape, from, from_shape, blocks),
            (KvData::BF16(to), KvData::BF16(from)) => copy(to, to_shape, from, from_shape, blocks),
            (KvData::Device(_), _) | (_, KvData::Device(_)) => {
                let expected = "caches on the CPU; workers on one GPU share a cache";
                return Err(KernelError::shape("copy blocks", expected, "one on a GPU"));
            }
            _ => unreachable!("equal shapes have equal dtypes"),
        }
        Ok(())
    }

    /// The cache on a GPU.
    pub(crate) fn on_device(&self) -> Result<&DeviceKv> {
        match &self.data {
            KvData::Device(device) => Ok(device),
            _ => Err(KernelError::shape("attention", "a KV cache on the GPU", "one on the CPU")),
        }
    }

    /// The shape it was made with.
    #[must_use]
    pub fn shape(&self) -> KvShape {
        self.shape
    }
}

fn copy<C: Plain>(to: &Cells<C>, to_shape: KvShape, from: &Cells<C>, from_shape: KvShape, blocks: &[(u32, u32)]) {
    let cells = to_shape.kv_heads * 2 * to_shape.page();
    for layer in 0..to_shape.layers {
        for &(source, target) in blocks {
            let source = from_shape.page_start(layer, source as usize, 0);
            let target = to_shape.page_start(layer, target as usize, 0);
            // SAFETY: both ranges are one block's of one layer; nobody else uses the target, as `&mut self` and the
            // promise of `share` say, and nobody writes the source.
            unsafe { to.write(target..target + cells).copy_from_slice(from.read(source..source + cells)) };
        }
    }
}

impl KvShape {
    /// Where K of this layer, block and head starts in the cells; V follows after [`page`](Self::page) elements.
    pub(crate) fn page_start(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.blocks + block) * self.kv_heads + head) * 2 * self.page()
    }
}
