//! Mirrors of `kernels/cuda/params.h`, which says what the fields mean; a test of the shim compares the layouts.

/// An address in device memory, or null.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Ptr(pub u64);

impl Ptr {
    pub const NULL: Ptr = Ptr(0);
}

/// Where an optional number is absent.
pub const NONE: u32 = u32::MAX;

/// Most often that a token counts as seen in an output.
pub const SEEN_COUNT_MAX: u32 = 0x7fff;

/// A struct that kernels take by value.
///
/// # Safety
/// The type is `#[repr(C)]`, plain data without padding, and laid out as its namesake in `params.h`.
pub unsafe trait KernelParams: Copy {
    const LAYOUT: Layout;
}

/// A struct of `params.h`: name, size, and name, offset and size of its fields.
#[derive(Debug)]
pub struct Layout {
    pub name: &'static str,
    pub bytes: usize,
    pub fields: &'static [(&'static str, usize, usize)],
}

/// Declares the structs and a list of their layouts.
macro_rules! params {
    ($($(#[$attribute:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$attribute])*
            #[derive(Clone, Copy, Debug, PartialEq)]
            #[repr(C)]
            pub struct $name { $(pub $field: $type),* }

            // SAFETY: `#[repr(C)]`, of numbers alone; the shim's test compares sizes and offsets, and padding would show as a gap.
            unsafe impl KernelParams for $name {
                const LAYOUT: Layout = Layout {
                    name: stringify!($name),
                    bytes: size_of::<$name>(),
                    fields: &[$((stringify!($field), std::mem::offset_of!($name, $field), size_of::<$type>())),*],
                };
            }
        )*

        /// Every struct, in the order of `params.h`.
        pub const LAYOUTS: &[Layout] = &[$($name::LAYOUT),*];
    };
}

params! {
    /// Embedding, and gather of rows.
    GatherParams {
        table: Ptr,
        ids: Ptr,
        out: Ptr,
        rows: u32,
        columns: u32,
        table_rows: u32,
        pad: u32,
    }
    /// RMSNorm, alone or after adding the residual.
    RmsNormParams {
        x: Ptr,
        residual: Ptr,
        weight: Ptr,
        out: Ptr,
        rows: u32,
        columns: u32,
        eps: f32,
        pad: u32,
    }
    /// SiLU or GELU with product.
    GateParams {
        x: Ptr,
        out: Ptr,
        rows: u32,
        columns: u32,
    }
    /// Copies of KV blocks.
    BlockCopyParams {
        pools: Ptr,
        pairs: Ptr,
        block_bytes: u64,
        pair_count: u32,
        pool_count: u32,
    }
    /// One sequence's rows of a step.
    SequenceSlice {
        row: u32,
        rows: u32,
        start: u32,
        table: u32,
        sampled: u32,
    }
    /// Slices to rows.
    StepInputsParams {
        slices: Ptr,
        block_tables: Ptr,
        last_sampled: Ptr,
        ids: Ptr,
        positions: Ptr,
        slots: Ptr,
        sequences: u32,
        table_stride: u32,
        block_size: u32,
        pad: u32,
    }
    /// Norm per head, RoPE and the KV write.
    RopeStoreParams {
        qkv: Ptr,
        k_cache: Ptr,
        v_cache: Ptr,
        q_weight: Ptr,
        k_weight: Ptr,
        cos: Ptr,
        sin: Ptr,
        positions: Ptr,
        slots: Ptr,
        rows: u32,
        heads: u32,
        kv_heads: u32,
        block_size: u32,
        rotary_dim: u32,
        head_dim: u32,
        eps: f32,
        pad: u32,
    }
    /// A piece of decode attention.
    DecodeItem {
        row: u32,
        table: u32,
        first: u32,
        end: u32,
        partial: u32,
    }
    /// The pieces of one row.
    DecodeMerge {
        row: u32,
        first: u32,
        count: u32,
    }
    /// Decode attention and its merge.
    DecodeParams {
        qkv: Ptr,
        k_cache: Ptr,
        v_cache: Ptr,
        out: Ptr,
        items: Ptr,
        starts: Ptr,
        merges: Ptr,
        block_tables: Ptr,
        sums: Ptr,
        values: Ptr,
        heads: u32,
        kv_heads: u32,
        block_size: u32,
        table_stride: u32,
        qkv_stride: u32,
        scale_log2: f32,
    }
    /// A query row of sequences that share a prefix.
    CascadeRow {
        row: u32,
        partial: u32,
    }
    /// A piece of a shared prefix, for some rows.
    CascadeTile {
        first_row: u32,
        rows: u32,
        first: u32,
        end: u32,
        table: u32,
        piece: u32,
    }
    /// Decode over shared prefixes.
    CascadeParams {
        qkv: Ptr,
        k_cache: Ptr,
        v_cache: Ptr,
        tiles: Ptr,
        rows: Ptr,
        block_tables: Ptr,
        sums: Ptr,
        values: Ptr,
        heads: u32,
        kv_heads: u32,
        block_size: u32,
        table_stride: u32,
        qkv_stride: u32,
        scale_log2: f32,
    }
    /// Query rows of one sequence.
    PrefillTile {
        row: u32,
        rows: u32,
        position: u32,
        table: u32,
    }
    /// Prefill attention.
    PrefillParams {
        qkv: Ptr,
        k_cache: Ptr,
        v_cache: Ptr,
        out: Ptr,
        tiles: Ptr,
        block_tables: Ptr,
        heads: u32,
        kv_heads: u32,
        block_size: u32,
        table_stride: u32,
        qkv_stride: u32,
        window: u32,
        scale_log2: f32,
        head_dim: u32,
    }
    /// A tensor for copies of boxes, as the driver describes it.
    #[repr(align(128))]
    TensorMap {
        words: [u64; 16],
    }
    /// Prefill attention for sm_90a.
    PrefillHopperParams {
        k_map: TensorMap,
        v_map: TensorMap,
        qkv: Ptr,
        out: Ptr,
        tiles: Ptr,
        block_tables: Ptr,
        heads: u32,
        kv_heads: u32,
        block_size: u32,
        table_stride: u32,
        qkv_stride: u32,
        window: u32,
        scale_log2: f32,
        pad: u32,
        unused: [u64; 8],
    }
    /// A product of 1 to 8 rows.
    GemvParams {
        x: Ptr,
        w: Ptr,
        bias: Ptr,
        out: Ptr,
        rows: u32,
        inner: u32,
        outputs: u32,
        out_stride: u32,
        out_f32: u32,
        prefetch: u32,
    }
    /// GGUF blocks to values.
    DequantizeParams {
        blocks: Ptr,
        out: Ptr,
        elements: u64,
    }
    /// Random values.
    FillParams {
        out: Ptr,
        elements: u64,
        seed: u64,
        limit: f32,
        pad: u32,
    }
    /// How one row is sampled.
    SampleRow {
        seed: u64,
        position: u32,
        temperature: f32,
        top_p: f32,
        min_p: f32,
        top_k: u32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        bias_first: u32,
        bias_count: u32,
        count_first: u32,
        count_count: u32,
        top_logprobs: u32,
        wants_logprob: u32,
        seen_slot: u32,
        seen_anew: u32,
    }
    /// How often a token was seen.
    TokenCount {
        token: u32,
        count: u32,
    }
    /// What is added to a logit.
    TokenBias {
        token: u32,
        bias: f32,
    }
    /// Weights of one bin.
    SampleBin {
        mass: u64,
        count: u32,
        pad: u32,
    }
    /// Sampling.
    SampleParams {
        logits: Ptr,
        scratch: Ptr,
        rows: Ptr,
        biases: Ptr,
        counts: Ptr,
        mask: Ptr,
        tokens: Ptr,
        logprobs: Ptr,
        top_tokens: Ptr,
        seen: Ptr,
        partials: Ptr,
        bins: Ptr,
        listed: Ptr,
        counters: Ptr,
        vocab: u32,
        top_stride: u32,
    }
}

impl SampleRow {
    /// The likeliest token for `position`, without biases, penalties and log-probabilities.
    #[must_use]
    pub const fn greedy(position: u32) -> Self {
        SampleRow {
            seed: 0,
            position,
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            top_k: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias_first: 0,
            bias_count: 0,
            count_first: 0,
            count_count: 0,
            top_logprobs: 0,
            wants_logprob: 0,
            seen_slot: NONE,
            seen_anew: 0,
        }
    }
}
