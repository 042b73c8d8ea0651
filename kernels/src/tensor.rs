//! Devices, tensors, packed weights and the KV cache: what ops work on.

use thiserror::Error;

#[derive(Debug, Error)]
pub enum KernelError {
    #[error("{op}: expected {expected}, found {found}")]
    Shape { op: &'static str, expected: String, found: String },
    #[error("this binary was built without CUDA")]
    BuiltWithoutCuda,
    #[error("{0}")]
    Unsupported(String),
}

pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// Instruction-set level of the CPU backend, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuIsa {
    Scalar,
    Avx2,
    Avx512,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Compute threads, the caller's included; `None` is one per available core.
    pub threads: Option<usize>,
    /// Forces a level; `None` is the best that the machine has. A level that the machine lacks is an error.
    pub isa: Option<CpuIsa>,
}

/// A device and its execution resources; cloning shares them. Ops on one device are issued by one thread at a time.
#[derive(Clone)]
pub struct Device {}

impl Device {
    pub fn cpu(_options: CpuOptions) -> Result<Device> {
        todo!()
    }
    pub fn cuda(_ordinal: usize) -> Result<Device> {
        Err(KernelError::BuiltWithoutCuda)
    }
    /// Host threads that compute, the caller's included; 1 on a device without them.
    #[must_use]
    pub fn threads(&self) -> usize {
        todo!()
    }
    /// For the start-up banner: `cpu (avx512, 2 threads)`.
    #[must_use]
    pub fn describe(&self) -> String {
        todo!()
    }
    /// Runs `work(i)` for `i in 0..tasks` on the device's host threads; returns when all are done. For host-side work
    /// that belongs to a step (sampling). `work` must not call an op.
    pub fn parallel_for(&self, _tasks: usize, _work: &(dyn Fn(usize) + Sync)) {
        todo!()
    }
}

/// How weights are stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types)]
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Format {
    /// Elements per block: 1, 32 or 256.
    #[must_use]
    pub fn block_elements(self) -> usize {
        match self {
            Format::F32 | Format::F16 | Format::BF16 => 1,
            Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => 32,
            Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => 256,
        }
    }
    /// Bytes per block.
    #[must_use]
    pub fn block_bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::BF16 => 2,
            Format::Q4_0 => 18,
            Format::Q4_1 => 20,
            Format::Q5_0 => 22,
            Format::Q5_1 => 24,
            Format::Q8_0 => 34,
            Format::Q2_K => 84,
            Format::Q3_K => 110,
            Format::Q4_K => 144,
            Format::Q5_K => 176,
            Format::Q6_K => 210,
        }
    }
}

/// Widens stored elements to f32: the readable scalar reference of every format. `bytes` holds whole blocks and
/// `out.len()` is their number of elements; anything else is [`KernelError::Shape`]. Layouts as in ggml's `ggml-quants.c`.
pub fn dequantize(_format: Format, _bytes: &[u8], _out: &mut [f32]) -> Result<()> {
    todo!()
}

/// How the rows of a stored matrix map to the rows of the packed one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    Natural,
    /// The rows of each of `heads` heads are stored for interleaved RoPE (GGUF's llama q and k) and are brought back to
    /// the order for split-half RoPE: of a head's `d` rows, stored row `2i + j` becomes row `i + j * d / 2`.
    UnpermuteRope {
        heads: usize,
    },
}

/// A matrix in a file: `rows` (out features) by `cols` (in features), row-major, in whole blocks per row.
#[derive(Clone, Copy, Debug)]
pub struct MatrixView<'a> {
    /// Name for messages.
    pub name: &'a str,
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    pub bytes: &'a [u8],
    pub row_order: RowOrder,
}

/// What a packed weight computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// As stored: quantized formats keep their quantization (activations are quantized per 32 to int8), BF16 and F16
    /// stay 16-bit in memory and are widened in registers.
    #[default]
    AsStored,
    /// Dequantized to F32 at load; the oracle.
    F32,
    /// Rounded to BF16 at load.
    BF16,
}

/// A weight matrix in the layout that the device's kernels want. Several stored matrices of equal `cols` may be stacked
/// along the out features (q, k, v; gate, up), each keeping its own format.
pub struct Weight {}

impl Weight {
    pub fn pack(_device: &Device, _parts: &[MatrixView<'_>], _precision: Precision) -> Result<Weight> {
        todo!()
    }
    /// Out features.
    #[must_use]
    pub fn rows(&self) -> usize {
        todo!()
    }
    /// In features.
    #[must_use]
    pub fn cols(&self) -> usize {
        todo!()
    }
    /// Bytes held on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        todo!()
    }
}

/// A row-major matrix of activations, `[rows, cols]`, with room for `capacity` rows. F32 on the CPU.
pub struct Tensor {}

impl Tensor {
    /// Zeros; `rows` starts at `capacity`.
    pub fn zeros(_device: &Device, _capacity: usize, _cols: usize) -> Result<Tensor> {
        todo!()
    }
    /// A `[values.len() / cols, cols]` matrix with these values.
    pub fn from_f32(_device: &Device, _cols: usize, _values: &[f32]) -> Result<Tensor> {
        todo!()
    }
    #[must_use]
    pub fn rows(&self) -> usize {
        todo!()
    }
    #[must_use]
    pub fn cols(&self) -> usize {
        todo!()
    }
    #[must_use]
    pub fn capacity(&self) -> usize {
        todo!()
    }
    /// Sets the number of live rows, at most `capacity`; panics beyond it (a caller's bug). Contents are kept.
    pub fn set_rows(&mut self, _rows: usize) {
        todo!()
    }
    /// Live rows, on the host. CPU: a borrow of the buffer.
    #[must_use]
    pub fn host(&self) -> &[f32] {
        todo!()
    }
    #[must_use]
    pub fn host_mut(&mut self) -> &mut [f32] {
        todo!()
    }
    #[must_use]
    pub fn bytes(&self) -> usize {
        todo!()
    }
}

/// cos and sin of every position, `[positions, rotary_dim / 2]`, F32.
pub struct RopeTable {}

impl RopeTable {
    /// `inv_freq[i]` in radians per position, `rotary_dim = 2 * inv_freq.len()`; cos and sin are multiplied by `scale`
    /// (1 except for yarn and longrope). Angles are computed as transformers does: the f32 product of position and
    /// frequency.
    pub fn new(_device: &Device, _inv_freq: &[f32], _scale: f32, _positions: usize) -> Result<RopeTable> {
        todo!()
    }
    #[must_use]
    pub fn positions(&self) -> usize {
        todo!()
    }
    #[must_use]
    pub fn rotary_dim(&self) -> usize {
        todo!()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum KvDType {
    F32,
    #[default]
    BF16,
}

impl KvDType {
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            KvDType::F32 => 4,
            KvDType::BF16 => 2,
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
    /// Bytes of one block over all layers, K and V.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        2 * self.layers * self.block_size * self.kv_heads * self.head_dim * self.dtype.bytes()
    }
}

/// K and V of all layers in blocks. A slot is `block * block_size + offset`.
pub struct KvCache {}

impl KvCache {
    /// Zeros. Memory is touched lazily by the operating system on the CPU.
    pub fn new(_device: &Device, _shape: KvShape) -> Result<KvCache> {
        todo!()
    }
    #[must_use]
    pub fn shape(&self) -> KvShape {
        todo!()
    }
}

/// Sizes of attention heads within a fused q, k, v row: `[q: heads * head_dim | k: kv_heads * head_dim | v: same]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// Where each sequence of a batch stands; borrowed for one step.
#[derive(Clone, Copy, Debug)]
pub struct SequenceBatch<'a> {
    /// `[B + 1]`: query rows of sequence `b` are `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`.
    pub cu_seqlens_q: &'a [u32],
    /// `[B]`: tokens of the sequence with this step's queries included; query row `r` of `b` (from 0) stands at
    /// position `context_lens[b] - queries(b) + r` and sees positions up to its own.
    pub context_lens: &'a [u32],
    /// `[B, block_table_stride]` block ids; entries past the context are not read.
    pub block_tables: &'a [u32],
    pub block_table_stride: usize,
}

/// Work of paged attention, divided once per step and run once per layer. Reused, so that planning allocates nothing.
pub struct AttentionPlan {}

impl AttentionPlan {
    /// Room for `tokens_max` query rows of `sequences_max` sequences of `context_max` tokens.
    pub fn new(
        _device: &Device,
        _heads: HeadLayout,
        _tokens_max: usize,
        _sequences_max: usize,
        _context_max: usize,
    ) -> Result<Self> {
        todo!()
    }
    /// Checks the batch against `kv` (block ids in range, tables long enough) and plans it.
    pub fn update(&mut self, _device: &Device, _batch: &SequenceBatch<'_>, _kv: &KvCache) -> Result<()> {
        todo!()
    }
}
