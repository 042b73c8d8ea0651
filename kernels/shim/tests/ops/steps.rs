//! Whole decode steps of a model of one layer: a step that is laid out for more rows than it has, eager or captured,
//! has the bits of one that is not, and rows have those that they have alone.

use kvern_cuda_shim::device::Call;
use kvern_kernels::ops::{self, Attention, QkNorm, RopeAndStore};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, Element, Format, HeadLayout, KvCache, KvShape, Precision, RopeTable, SequenceBatch,
    StepGraphs, StepIndices, StepInputs, StepRows, Tensor, Weight,
};

use super::matrices::{Random, assert_bits, view};
use super::{ELEMENTS, Rig, layout, shuffled};

const HEADS: [usize; 3] = [4, 2, 64];
const ROW: usize = (4 + 2 * 2) * 64;
const OUT: usize = 4 * 64;
const VOCAB: usize = 50;
const BLOCK: usize = 16;
/// Blocks of each sequence, and the most sequences of a step.
const STRIDE: usize = 40;
const SEQUENCES: usize = 6;

/// Embeddings that are fused rows, norms, one attention, a product.
struct Layer {
    heads: HeadLayout,
    table: Weight,
    head: Weight,
    norms: [Tensor; 3],
    rope: RopeTable,
    inputs: StepInputs,
    plan: AttentionPlan,
    graphs: StepGraphs,
    kv: KvCache,
    tables: Vec<u32>,
    qkv: Tensor,
    attended: Tensor,
    normed: Tensor,
    sampled: Tensor,
    logits: Tensor,
}

impl Layer {
    fn new(rig: &Rig) -> Layer {
        let (device, heads, mut random) = (&rig.device, layout(HEADS), Random(9));
        let (table, head) = (random.weights(Format::BF16, VOCAB * ROW), random.weights(Format::Q8_0, VOCAB * OUT));
        let norms = [64, 64, OUT].map(|cols| rig.tensor(cols, &rig.values(&mut random, cols, 1.5)));
        let blocks = SEQUENCES * STRIDE;
        // A sequence has slot 0, so that a row that was not asked for shows if it is written there.
        let mut tables = shuffled(&mut random, blocks);
        let first = tables.iter().position(|&block| block == 0).unwrap();
        tables.swap(first, STRIDE);
        let shape = KvShape { layers: 1, blocks, block_size: BLOCK, kv_heads: 2, head_dim: 64, dtype: rig.kv_dtype() };
        let limits = AttentionLimits::new(STRIDE * BLOCK, SEQUENCES, STRIDE * BLOCK);
        let tensor = |rows: usize, cols: usize| Tensor::zeros(device, rows, cols).unwrap();
        Layer {
            heads,
            table: Weight::table(device, view(Format::BF16, VOCAB, ROW, &table), Precision::AsStored).unwrap(),
            head: Weight::pack(device, &[view(Format::Q8_0, VOCAB, OUT, &head)], Precision::AsStored).unwrap(),
            norms,
            rope: RopeTable::new(device, &[1.0, 0.1, 0.01], 1.0, STRIDE * BLOCK).unwrap(),
            inputs: StepInputs::new(device, STRIDE * BLOCK, SEQUENCES).unwrap(),
            plan: AttentionPlan::new(device, heads, &limits).unwrap(),
            graphs: StepGraphs::new(device, SEQUENCES),
            kv: KvCache::new(device, shape).unwrap(),
            tables,
            qkv: tensor(STRIDE * BLOCK, ROW),
            attended: tensor(STRIDE * BLOCK, OUT),
            normed: tensor(STRIDE * BLOCK, OUT),
            sampled: tensor(SEQUENCES, OUT),
            logits: Tensor::f32(device, SEQUENCES, VOCAB).unwrap(),
        }
    }

    /// Runs the last `queries` tokens of some sequences with these contexts; the logits of their last rows, last
    /// sequence first.
    fn step(&mut self, rig: &Rig, sequences: &[(usize, usize)], queries: usize, padding: Padding) -> Vec<f32> {
        let (mut ids, mut positions, mut slots, mut tables) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for &(sequence, context) in sequences {
            let table = &self.tables[sequence * STRIDE..][..STRIDE];
            tables.extend_from_slice(table);
            for position in context - queries..context {
                ids.push(((position * 7 + sequence * 11) % VOCAB) as u32);
                positions.push(position as u32);
                slots.push(table[position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32);
            }
        }
        let sums: Vec<u32> = (0..=sequences.len()).map(|at| (at * queries) as u32).collect();
        let contexts: Vec<u32> = sequences.iter().map(|(_, context)| *context as u32).collect();
        let batch = SequenceBatch {
            cu_seqlens_q: &sums,
            context_lens: &contexts,
            block_tables: &tables,
            block_table_stride: STRIDE,
        };
        let sample_rows: Vec<u32> = sums[1..].iter().rev().map(|end| end - 1).collect();
        let rows =
            StepRows { ids: &ids, positions: &positions, slots: &slots, sample_rows: &sample_rows, last_sampled: &[] };
        let padded =
            if padding == Padding::None { None } else { self.graphs.padded_rows(&rig.device, &batch, &self.kv) };
        assert!(padding == Padding::None || padded.is_some_and(|padded| padded >= sequences.len()), "{padded:?}");
        assert_eq!(self.plan.update(&rig.device, &batch, &self.kv, padded).unwrap(), padded);
        let at = self.inputs.update(&rig.device, &rows, &batch, &self.plan, padded).unwrap();
        let Layer { heads, table, head, norms, rope, inputs, plan, graphs, kv, .. } = self;
        let out = (&mut self.qkv, &mut self.attended, &mut self.normed, &mut self.sampled, &mut self.logits);
        let model = (*heads, &*table, &*head, &*norms, &*rope, &*plan);
        let work = |kv: &mut KvCache| {
            inputs.build(&rig.device)?;
            forward(rig, model, &at, kv, out)
        };
        if padding == Padding::Captured {
            graphs.run(&rig.device, padded, kv, work).unwrap();
        } else {
            work(kv).unwrap();
        }
        // A replay leaves the tensors' rows as they were.
        self.logits.set_rows(sequences.len());
        rig.read(&self.logits)
    }
}

type Parts<'a> = (HeadLayout, &'a Weight, &'a Weight, &'a [Tensor; 3], &'a RopeTable, &'a AttentionPlan);
type Outputs<'a> = (&'a mut Tensor, &'a mut Tensor, &'a mut Tensor, &'a mut Tensor, &'a mut Tensor);

fn forward(
    rig: &Rig,
    (heads, table, head, [q, k, norm], rope, plan): Parts<'_>,
    at: &StepIndices<'_>,
    kv: &mut KvCache,
    (qkv, attended, normed, sampled, logits): Outputs<'_>,
) -> kvern_kernels::Result<()> {
    let device = &rig.device;
    ops::embed(device, table, at.ids, qkv)?;
    let qk = Some(QkNorm { q, k, eps: 1e-6 });
    let args = RopeAndStore { heads, norm: qk, rope, positions: at.positions, slots: at.slots, layer: 0 };
    ops::rope_and_store(device, &args, qkv, kv)?;
    ops::attention(device, &Attention { heads, layer: 0, scale: 0.125, window: None, plan }, qkv, kv, attended)?;
    ops::rms_norm(device, attended, norm, 1e-5, normed)?;
    ops::gather_rows(device, normed, at.sample_rows, sampled)?;
    ops::matmul(device, sampled, head, None, logits)
}

/// How a step is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Padding {
    None,
    Eager,
    Captured,
}

/// Sequences and their contexts, step after step.
const STEPS: [&[(usize, usize)]; 6] = [
    &[(0, 5), (1, 301), (2, 40)],
    &[(0, 6), (1, 302), (2, 41)],
    &[(3, 600)],
    &[(3, 601), (1, 303), (0, 7), (2, 42), (4, 1)],
    &[(4, 2), (3, 602), (5, 257)],
    &[(2, 43), (5, 258)],
];

#[test]
fn padded_and_captured_steps_have_the_bits_of_others() {
    for element in ELEMENTS {
        let rig = Rig::new(element);
        let mut layer = Layer::new(&rig);
        for (sequence, cached) in [(0, 4), (1, 300), (2, 39), (3, 599), (5, 256)] {
            layer.step(&rig, &[(sequence, cached)], cached, Padding::None);
        }
        let plain: Vec<_> = STEPS.iter().map(|step| layer.step(&rig, step, 1, Padding::None)).collect();
        assert!(plain.iter().flatten().all(|logit| logit.is_finite()));
        for (step, expected) in STEPS.iter().zip(&plain) {
            for (at, &sequence) in step.iter().rev().enumerate() {
                let alone = layer.step(&rig, &[sequence], 1, Padding::None);
                let what = format!("{element} {sequence:?} alone");
                assert_bits(&alone, &expected[at * VOCAB..(at + 1) * VOCAB], &what);
            }
        }
        layer.graphs.begin_capture();
        for padding in [Padding::Eager, Padding::Captured, Padding::Captured] {
            for (step, expected) in STEPS.iter().zip(&plain) {
                let found = layer.step(&rig, step, 1, padding);
                assert_bits(&found, expected, &format!("{element} {padding:?} {step:?}"));
            }
            if padding == Padding::Captured {
                layer.graphs.end_capture();
            }
        }
    }
}

/// What goes wrong with a captured step says with which.
#[test]
fn a_graph_that_fails_is_named_by_its_rows() {
    let rig = Rig::new(Element::F32);
    let Some(shim) = &rig.shim else { return };
    let mut layer = Layer::new(&rig);
    rig.device.synchronize().unwrap();
    layer.graphs.begin_capture();
    let mut run = || {
        let done = layer.graphs.run(&rig.device, Some(4), &mut layer.kv, |_| Ok(()));
        done.map_err(|error| error.to_string())
    };
    assert_eq!(run(), Ok(()));
    shim.fail(Call::LaunchGraph, 1, "planted", false);
    assert_eq!(run(), Err("launch_graph in a graph of 4 rows: planted".to_owned()));
    assert_eq!(run(), Ok(()));
    shim.fail(Call::LaunchGraph, 1, "planted", true);
    assert_eq!(run(), Err("the GPU is lost, as launch_graph in a graph of 4 rows found: planted".to_owned()));
}

/// The ladder ends with the most sequences, and prefill is never padded.
#[test]
fn only_decode_steps_are_padded() {
    let rig = Rig::new(Element::F32);
    let layer = Layer::new(&rig);
    rig.device.synchronize().unwrap();
    let mut graphs = StepGraphs::new(&rig.device, SEQUENCES);
    assert_eq!(graphs.ladder(), [1, 2, 4, 6]);
    let tables = [0; 7];
    let padded = |graphs: &StepGraphs, sums: &[u32]| {
        let sequences = sums.len() - 1;
        let batch = SequenceBatch {
            cu_seqlens_q: sums,
            context_lens: &vec![2; sequences],
            block_tables: &tables[..sequences],
            block_table_stride: 1,
        };
        graphs.padded_rows(&rig.device, &batch, &layer.kv)
    };
    assert_eq!(padded(&graphs, &[0, 1]), None, "nothing is captured");
    graphs.begin_capture();
    let sums = [0, 1, 2, 3, 4, 5, 6, 7];
    let found: Vec<_> = (1..=7).map(|sequences| padded(&graphs, &sums[..=sequences])).collect();
    assert_eq!(found, [Some(1), Some(2), Some(4), Some(4), Some(6), Some(6), None]);
    assert_eq!(padded(&graphs, &[0]), None);
    assert_eq!(padded(&graphs, &[0, 2]), None);
    graphs.end_capture();
    assert_eq!(padded(&graphs, &[0, 1]), None);
}
