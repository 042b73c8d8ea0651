//! What a GPU cannot do is refused before anything is put on it.

use kvern_kernels::ops::{self, Attention, RopeAndStore};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, CpuOptions, Device, DeviceSampler, Element, Format, GpuOptions, KernelError,
    KvCache, KvDType, KvShape, Precision, PrefillKernel, Result, RopeTable, SequenceBatch, StepInputs, StepRows,
    Tensor, Weight,
};

use super::matrices::{Random, view};
use super::support::sampling::plain;
use super::{Rig, layout};

#[track_caller]
fn refused<T>(result: Result<T>, words: &str) {
    match result.map(drop) {
        Err(error @ KernelError::Shape { .. }) => {
            assert!(error.to_string().contains(words), "expected {words:?}, found {error}");
        }
        other => panic!("expected to be refused for {words:?}, found {other:?}"),
    }
}

fn shape(dtype: KvDType, head_dim: usize) -> KvShape {
    KvShape { layers: 1, blocks: 4, block_size: 4, kv_heads: 1, head_dim, dtype }
}

/// Who asks for the kernel for sm_90a does not get another one in silence.
#[test]
fn caches_that_the_kernel_for_sm_90a_does_not_take() {
    let Some(rig) = Rig::hopper(Element::BF16) else { return };
    let cache =
        |head_dim, block_size| KvCache::new(&rig.device, KvShape { block_size, ..shape(KvDType::BF16, head_dim) });
    for (head_dim, block_size) in [(64, 7), (64, 4), (128, 256), (256, 128), (80, 16)] {
        refused(cache(head_dim, block_size), "for attention by wgmma");
    }
    for (head_dim, block_size) in [(64, 8), (128, 128), (256, 64)] {
        assert!(cache(head_dim, block_size).is_ok(), "heads of {head_dim}, blocks of {block_size}");
    }
    let portable = Rig::with(Element::BF16, (9, 0), PrefillKernel::Auto).expect("any GPU has some kernel");
    assert!(KvCache::new(&portable.device, shape(KvDType::BF16, 64)).is_ok(), "it was not asked for");
    let f32 = GpuOptions { prefill: PrefillKernel::Hopper, ..Element::F32.into() };
    let Some(shim) = &rig.shim else { return };
    let error = Device::gpu(std::sync::Arc::clone(shim) as _, f32).map(drop).unwrap_err().to_string();
    assert!(error.ends_with("for attention by wgmma, found activations in f32"), "{error}");
}

#[test]
fn indices_and_tables() {
    let rig = Rig::new(Element::BF16);
    let device = &rig.device;
    let bytes = Random(1).weights(Format::Q4_0, 64 * 4);
    let stored = view(Format::Q4_0, 4, 64, &bytes);
    let blocks = Weight::pack(device, &[stored], Precision::AsStored).unwrap();
    let table = Weight::table(device, stored, Precision::AsStored).unwrap();
    let (x, mut out) = (rig.tensor(64, &[0.0; 128]), rig.poisoned(2, 64));
    refused(ops::embed(device, &table, &[0, 1], &mut out), "indices on the GPU");
    refused(ops::gather_rows(device, &x, &[0, 1], &mut out), "indices on the GPU");
    let (mut short, mut narrow) = (rig.poisoned(1, 64), rig.poisoned(2, 32));
    rig.with_indices(&super::as_ids(&[0, 1]), |at| {
        refused(ops::embed(device, &blocks, at.ids, &mut out), "a dense table");
        refused(ops::embed(device, &table, at.ids, &mut short), "room for 2 output rows");
        refused(ops::embed(device, &table, at.ids, &mut narrow), "64 output columns");
    });
    let mut inputs = StepInputs::new(device, 2, 3).unwrap();
    let rows = |ids| StepRows { ids, positions: ids, slots: ids, sample_rows: &[0], last_sampled: &[] };
    let kv = KvCache::new(device, shape(KvDType::BF16, 64)).unwrap();
    let mut plan = AttentionPlan::new(device, layout([2, 1, 64]), &AttentionLimits::new(4, 4, 16)).unwrap();
    let mut update = |rows: &StepRows<'_>, sequences: usize, padded| {
        let batch = SequenceBatch {
            cu_seqlens_q: &[0, 1, 2, 3][..=sequences],
            context_lens: &[1; 3][..sequences],
            block_tables: &[0; 3][..sequences],
            block_table_stride: 1,
        };
        plan.update(device, &batch, &kv, None)?;
        inputs.update(device, rows, &batch, &plan, padded).map(drop)
    };
    refused(update(&rows(&[0]), 2, None), "2 ids, as planned");
    refused(update(&rows(&[0, 1]), 2, Some(1)), "2 ids, as planned");
    refused(update(&rows(&[0; 3]), 3, None), "at most 2 entries");
    rig.device.synchronize().unwrap();
}

#[test]
fn heads_and_windows() {
    let rig = Rig::new(Element::BF16);
    let device = &rig.device;
    let limits = AttentionLimits { windows: &[None, Some(9)], ..AttentionLimits::new(4, 2, 16) };
    refused(AttentionPlan::new(device, layout([2, 1, 80]), &limits), "heads of 64, 96, 128 or 256");
    refused(AttentionPlan::new(device, layout([65, 1, 256]), &limits), "at most 64 per KV head");
    refused(KvCache::new(device, shape(KvDType::F32, 64)), "as activations on the GPU");
    let kv = KvCache::new(device, shape(KvDType::BF16, 64)).unwrap();
    let heads = layout([2, 1, 64]);
    let mut plan = AttentionPlan::new(device, heads, &limits).unwrap();
    let batch = SequenceBatch { cu_seqlens_q: &[0, 1], context_lens: &[3], block_tables: &[2], block_table_stride: 1 };
    let bad = SequenceBatch { block_tables: &[4], ..batch };
    refused(plan.update(device, &bad, &kv, None), "blocks below 4");
    plan.update(device, &batch, &kv, None).unwrap();
    let (qkv, mut out) = (rig.tensor(256, &[0.0; 256]), rig.poisoned(1, 128));
    let args = Attention { heads, layer: 0, scale: 1.0, window: Some(8), plan: &plan };
    refused(ops::attention(device, &args, &qkv, &kv, &mut out), "a window of [None, Some(9)]");
    rig.device.synchronize().unwrap();
}

/// The f32 kernels take heads of any even size up to 256: rope takes pairs.
#[test]
fn heads_of_f32() {
    let rig = Rig::new(Element::F32);
    let device = &rig.device;
    let rope = RopeTable::new(device, &[1.0], 1.0, 4).unwrap();
    for head_dim in [33, 258] {
        let heads = layout([2, 1, head_dim]);
        let plan = AttentionPlan::new(device, heads, &AttentionLimits::new(4, 2, 16));
        refused(plan, "an even number of values, at most 256");
        let mut kv = KvCache::new(device, shape(KvDType::F32, head_dim)).unwrap();
        let mut qkv = rig.tensor(4 * head_dim, &vec![0.0; 4 * head_dim]);
        rig.with_indices(&super::as_ids(&[0]), |at| {
            let (positions, slots) = (at.positions, at.slots);
            let args = RopeAndStore { heads, norm: None, rope: &rope, positions, slots, layer: 0 };
            refused(ops::rope_and_store(device, &args, &mut qkv, &mut kv), "an even number of values, at most 256");
        });
    }
}

/// What is on the CPU stays there, and logits are of F32 and as wide as the sampler was made for.
#[test]
fn other_devices_and_logits() {
    let rig = Rig::new(Element::BF16);
    let (device, cpu) = (&rig.device, Device::cpu(CpuOptions::default()).unwrap());
    let bytes = Random(1).weights(Format::F32, 8 * 4);
    let stored = view(Format::F32, 4, 8, &bytes);
    let weight = Weight::pack(&cpu, &[stored], Precision::AsStored).unwrap();
    let (x, mut out) = (rig.tensor(8, &[0.0; 8]), rig.poisoned(1, 4));
    refused(ops::matmul(device, &x, &weight, None, &mut out), "a weight on the GPU");
    let tokens = |device| StepInputs::new(device, 1, 2).unwrap().sampled_tokens();
    assert!(DeviceSampler::new(&cpu, tokens(&cpu), 1, 4, 0).unwrap().is_none());
    refused(
        DeviceSampler::new(device, tokens(device), 1000, 4, 0).map(|_| ()),
        "sizes in range, as of the model's steps",
    );
    let mut sampler = DeviceSampler::new(device, tokens(device), 2, 4, 0).unwrap().unwrap();
    let f32 = |rows, cols| Tensor::f32(device, rows, cols).unwrap();
    for logits in [rig.tensor(4, &[0.0; 4]), f32(1, 5), f32(0, 4)] {
        sampler.begin();
        sampler.push(plain(1, 0.0).params, [].into_iter(), None, [].into_iter()).unwrap();
        sampler.upload().unwrap();
        refused(sampler.launch(device, &logits), "1 rows of 4 F32 logits");
        refused(sampler.finish().map(|_| ()), "a step under way");
        rig.device.synchronize().unwrap();
    }
}
