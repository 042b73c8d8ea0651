//! What kernels do with the memory that their parameters name: which fields they read and write, and how far.
//!
//! A field that a kernel reads and writes is written. Where the number of bytes depends on data on the device, it is
//! unknown. A test holds the table against all parameter structs.

use kvern_kernels::Format;
use kvern_kernels::cuda::driver::{Layout, TensorMap};

use super::access::{Access, Extent, Kind, Place};

/// A launch, as far as extents depend on it.
pub(super) struct Launched<'a> {
    pub(super) kernel: &'a str,
    pub(super) grid: [u32; 2],
    pub(super) params: &'a [u8],
    pub(super) layout: &'static Layout,
}

/// What a kernel does with a field's memory.
enum Use {
    Read(u64),
    Write(u64),
    ReadSome,
    WriteSome,
    /// Of the scheduler's blocks.
    Cache,
    /// The kernel does not use the field.
    Nothing,
}

use Use::{Cache, Nothing, Read, ReadSome, Write, WriteSome};

/// Bytes of a tensor map, as no other field has.
const MAP_BYTES: usize = size_of::<TensorMap>();

type Field = (&'static str, fn(&Launched<'_>) -> Use);

/// Every pointer of every struct that kernels take.
const TABLE: &[(&str, &[Field])] = &[
    (
        "GatherParams",
        &[
            ("table", |l| Read(l.elements(&["table_rows", "columns"]))),
            ("ids", |l| Read(l.blocks() * 4)),
            ("out", |l| Write(l.blocks() * l.elements(&["columns"]))),
        ],
    ),
    (
        "RmsNormParams",
        &[
            ("x", |l| Read(l.blocks() * l.elements(&["columns"]))),
            ("residual", |l| match l.is("kvern_add_") {
                true => Write(l.blocks() * l.elements(&["columns"])),
                false => Nothing,
            }),
            ("weight", |l| Read(l.elements(&["columns"]))),
            ("out", |l| Write(l.blocks() * l.elements(&["columns"]))),
        ],
    ),
    (
        "GateParams",
        &[("x", |l| Read(2 * l.elements(&["rows", "columns"]))), ("out", |l| Write(l.elements(&["rows", "columns"])))],
    ),
    (
        "BlockCopyParams",
        &[
            // The pools that it lists are looked at when the kernel runs.
            ("pools", |l| Read(u64::from(l.grid[1]) * 8)),
            ("pairs", |l| Read(l.blocks() * 8)),
        ],
    ),
    (
        "StepInputsParams",
        &[
            ("slices", |l| Read(l.blocks() * 20)),
            ("block_tables", |_| ReadSome),
            ("last_sampled", |_| ReadSome),
            ("ids", |_| WriteSome),
            ("positions", |_| WriteSome),
            ("slots", |_| WriteSome),
        ],
    ),
    (
        "RopeStoreParams",
        &[
            ("qkv", |l| Write(l.elements(&["rows", "head_dim"]) * (l.number("heads") + 2 * l.number("kv_heads")))),
            ("k_cache", |_| Cache),
            ("v_cache", |_| Cache),
            ("q_weight", |l| Read(l.elements(&["head_dim"]))),
            ("k_weight", |l| Read(l.elements(&["head_dim"]))),
            ("cos", |_| ReadSome),
            ("sin", |_| ReadSome),
            ("positions", |l| Read(l.number("rows") * 4)),
            ("slots", |l| Read(l.number("rows") * 4)),
        ],
    ),
    (
        "DecodeParams",
        &[
            ("qkv", |l| l.unless_merge(ReadSome)),
            ("k_cache", |l| l.unless_merge(Cache)),
            ("v_cache", |l| l.unless_merge(Cache)),
            ("out", |_| WriteSome),
            ("items", |l| l.unless_merge(ReadSome)),
            ("starts", |l| l.unless_merge(Read((l.blocks() + 1) * 4))),
            ("merges", |l| if l.is_merge() { Read(l.blocks() * 12) } else { Nothing }),
            ("block_tables", |l| l.unless_merge(ReadSome)),
            ("sums", |l| if l.is_merge() { ReadSome } else { WriteSome }),
            ("values", |l| if l.is_merge() { ReadSome } else { WriteSome }),
        ],
    ),
    (
        "CascadeParams",
        &[
            ("qkv", |_| ReadSome),
            ("k_cache", |_| Cache),
            ("v_cache", |_| Cache),
            ("tiles", |l| Read(l.blocks() * 24)),
            ("rows", |_| ReadSome),
            ("block_tables", |_| ReadSome),
            ("sums", |_| WriteSome),
            ("values", |_| WriteSome),
        ],
    ),
    (
        "PrefillParams",
        &[
            ("qkv", |_| ReadSome),
            ("k_cache", |_| Cache),
            ("v_cache", |_| Cache),
            ("out", |_| WriteSome),
            ("tiles", |l| Read(l.blocks() * 16)),
            ("block_tables", |_| ReadSome),
        ],
    ),
    (
        "PrefillHopperParams",
        &[
            ("k_map", |_| Cache),
            ("v_map", |_| Cache),
            ("qkv", |_| ReadSome),
            ("out", |_| WriteSome),
            ("tiles", |l| Read(l.blocks() * 16)),
            ("block_tables", |_| ReadSome),
        ],
    ),
    (
        "GemvParams",
        &[
            ("x", |l| Read(l.elements(&["rows", "inner"]))),
            ("w", |l| Read(l.stored(l.number("outputs") * l.number("inner")))),
            ("bias", |l| Read(l.elements(&["outputs"]))),
            ("out", |l| Write(l.gemv_out())),
        ],
    ),
    (
        "DequantizeParams",
        &[("blocks", |l| Read(l.stored(l.number("elements")))), ("out", |l| Write(l.elements(&["elements"])))],
    ),
    ("FillParams", &[("out", |l| Write(l.elements(&["elements"])))]),
    (
        "SampleParams",
        &[
            ("logits", |l| Read(l.blocks() * l.number("vocab") * 4)),
            ("scratch", |l| Write(l.blocks() * l.number("vocab") * 4)),
            ("rows", |l| Read(l.blocks() * 72)),
            ("biases", |_| ReadSome),
            ("counts", |_| ReadSome),
            ("mask", |l| Read(l.blocks() * l.number("vocab").div_ceil(32) * 4)),
            ("tokens", |l| Write(l.blocks() * 4)),
            ("logprobs", |l| Write(l.blocks() * (l.number("top_stride") + 1) * 4)),
            ("top_tokens", |l| Write(l.blocks() * l.number("top_stride") * 4)),
            ("seen", |_| WriteSome),
            ("partials", |l| Write(l.blocks() * l.rows() * (4 + l.number("top_stride")) * 8)),
            ("bins", |l| Write(l.blocks() * 2048 * 16)),
            ("listed", |l| Write(l.blocks() * 8192 * 8)),
            ("counters", |l| Write(l.blocks() * 16)),
        ],
    ),
];

impl Launched<'_> {
    /// The operands of the launch; null pointers are none.
    ///
    /// # Errors
    /// If the struct is not one that kernels take.
    pub(super) fn accesses(&self) -> Result<Vec<Access>, String> {
        let entry = TABLE.iter().find(|(name, _)| *name == self.layout.name);
        let (_, fields) =
            entry.ok_or_else(|| format!("expected parameters of a kernel, found {}", self.layout.name))?;
        let mut accesses = Vec::with_capacity(fields.len());
        for (name, usage) in *fields {
            let (extent, kind) = match usage(self) {
                Read(bytes) => (Extent::Bytes(bytes), Kind::Read),
                Write(bytes) => (Extent::Bytes(bytes), Kind::Write),
                ReadSome => (Extent::Unknown, Kind::Read),
                WriteSome => (Extent::Unknown, Kind::Write),
                Cache | Nothing => (Extent::Unknown, Kind::Unordered),
            };
            let at = self.address(name);
            if at != 0 {
                accesses.push(Access { name, at, extent, kind, place: Place::Device });
            }
        }
        Ok(accesses)
    }

    /// The addresses that `kvern_block_copy` finds in its list of pools.
    pub(super) fn pools(&self) -> Option<(u64, u64)> {
        (self.layout.name == "BlockCopyParams").then(|| (self.number("pools"), u64::from(self.grid[1])))
    }

    /// The memory that a field names: a pointer, or a map, whose second word it is.
    fn address(&self, name: &str) -> u64 {
        let field = self.layout.fields.iter().find(|(field, ..)| *field == name);
        match *field.expect("the table names fields of the struct") {
            (_, offset, MAP_BYTES) => {
                u64::from_le_bytes(self.params[offset + 8..offset + 16].try_into().expect("8 bytes are 8 bytes"))
            }
            _ => self.number(name),
        }
    }

    /// A field of 4 or 8 bytes.
    fn number(&self, name: &str) -> u64 {
        let field = self.layout.fields.iter().find(|(field, ..)| *field == name);
        let (_, offset, bytes) = *field.expect("the table names fields of the struct");
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.params[offset..offset + bytes]);
        u64::from_le_bytes(value)
    }

    fn blocks(&self) -> u64 {
        u64::from(self.grid[0])
    }

    /// Of blocks, in the grid's second dimension.
    fn rows(&self) -> u64 {
        u64::from(self.grid[1])
    }

    fn is(&self, prefix: &str) -> bool {
        self.kernel.starts_with(prefix)
    }

    fn is_merge(&self) -> bool {
        self.is("kvern_decode_merge_")
    }

    fn unless_merge(&self, usage: Use) -> Use {
        if self.is_merge() { Nothing } else { usage }
    }

    /// Bytes of as many elements as the product of these fields.
    fn elements(&self, sizes: &[&str]) -> u64 {
        sizes.iter().map(|size| self.number(size)).product::<u64>() * self.element_bytes()
    }

    /// Of the element type that the kernel's name names last.
    fn element_bytes(&self) -> u64 {
        let types = self.kernel.rsplit('_').filter(|part| ["f32", "f16", "bf16"].contains(part));
        if types.take(1).any(|part| part == "f32") { 4 } else { 2 }
    }

    /// Bytes of weights as stored: blocks of the format that the kernel's name names, or elements.
    fn stored(&self, elements: u64) -> u64 {
        let formats = [
            ("_q4_0_", Format::Q4_0),
            ("_q4_1_", Format::Q4_1),
            ("_q8_0_", Format::Q8_0),
            ("_q4_k_", Format::Q4_K),
            ("_q6_k_", Format::Q6_K),
        ];
        match formats.iter().find(|(name, _)| self.kernel.contains(name)) {
            Some((_, format)) => elements / format.block_elements() as u64 * format.block_bytes() as u64,
            None => elements * self.element_bytes(),
        }
    }

    fn gemv_out(&self) -> u64 {
        let element = if self.number("out_f32") != 0 { 4 } else { self.element_bytes() };
        let rows_before = self.number("rows").saturating_sub(1);
        (rows_before * self.number("out_stride") + self.number("outputs")) * element
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use kvern_cuda_abi::{DecodeMerge, KernelParams, LAYOUTS, PrefillTile, SampleRow, SequenceSlice};

    use super::*;

    /// Fields of 8 bytes that are no pointers.
    const NUMBERS: [(&str, &str); 4] = [
        ("BlockCopyParams", "block_bytes"),
        ("DequantizeParams", "elements"),
        ("FillParams", "elements"),
        ("FillParams", "seed"),
    ];

    #[test]
    fn every_pointer_is_in_the_table() {
        let mut pointers = BTreeSet::new();
        for layout in LAYOUTS.iter().filter(|layout| layout.name.ends_with("Params")) {
            let wide = layout.fields.iter().filter(|(_, _, bytes)| [8, MAP_BYTES].contains(bytes));
            pointers.extend(wide.map(|(field, ..)| (layout.name, *field)));
        }
        for number in NUMBERS {
            assert!(pointers.remove(&number), "{number:?} is no field");
        }
        let told = TABLE.iter().flat_map(|(name, fields)| fields.iter().map(move |(field, _)| (*name, *field)));
        assert_eq!(told.collect::<BTreeSet<_>>(), pointers);
    }

    /// Kernels by name and grid, and the bytes of some of their fields.
    #[test]
    fn extents_are_those_of_the_kernels() {
        assert_eq!(size_of::<SequenceSlice>(), 20);
        assert_eq!(size_of::<SampleRow>(), 72);
        assert_eq!(size_of::<DecodeMerge>(), 12);
        assert_eq!(size_of::<PrefillTile>(), 16);
        let gemv = kvern_cuda_abi::GemvParams {
            x: kvern_cuda_abi::Ptr(16),
            w: kvern_cuda_abi::Ptr(32),
            bias: kvern_cuda_abi::Ptr::NULL,
            out: kvern_cuda_abi::Ptr(48),
            rows: 3,
            inner: 512,
            outputs: 10,
            out_stride: 100,
            out_f32: 1,
            prefetch: 0,
        };
        let check = |kernel: &str, expected: [(&str, u64); 3]| {
            // SAFETY: plain data without padding.
            let params = unsafe {
                std::slice::from_raw_parts(
                    std::ptr::from_ref(&gemv).cast::<u8>(),
                    size_of::<kvern_cuda_abi::GemvParams>(),
                )
            };
            const LAYOUT: &Layout = &kvern_cuda_abi::GemvParams::LAYOUT;
            let launched = Launched { kernel, grid: [3, 1], params, layout: LAYOUT };
            let accesses = launched.accesses().expect("a struct of kernels");
            let found = accesses.iter().map(|access| (access.name, access.extent));
            assert!(found.eq(expected.map(|(name, bytes)| (name, Extent::Bytes(bytes)))), "{kernel}: {accesses:?}");
        };
        check("kvern_gemv_bf16_r4", [("x", 3072), ("w", 10240), ("out", 840)]);
        check("kvern_gemv_f32_r4", [("x", 6144), ("w", 20480), ("out", 840)]);
        check("kvern_gemv_q4_k_f16_r8", [("x", 3072), ("w", 10 * 2 * 144), ("out", 840)]);
    }
}
