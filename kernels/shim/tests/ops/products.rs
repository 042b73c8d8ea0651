//! Products with weights of every format, alone and stacked, in few rows and many.

use kvern_kernels::{Element, Format, MatrixView, Precision, RowOrder, Tensor, Weight, dequantize, ops};

use super::matrices::{FORMATS, Random, view};
use super::{ELEMENTS, Rig, close, epsilon};

/// The formats whose blocks stay on a device as they are, and the most rows of products that take them as such.
const KEPT: [Format; 5] = [Format::Q4_0, Format::Q4_1, Format::Q8_0, Format::Q4_K, Format::Q6_K];
const KEPT_ROWS_MAX: usize = 8;

/// A stored matrix of a stacked weight; with `heads`, its rows are in the order of interleaved RoPE.
#[derive(Clone, Copy, Debug)]
struct Part {
    format: Format,
    rows: usize,
    heads: Option<usize>,
}

const fn part(format: Format, rows: usize) -> Part {
    Part { format, rows, heads: None }
}

const fn permuted(format: Format, rows: usize, heads: usize) -> Part {
    Part { format, rows, heads: Some(heads) }
}

/// `cols` in features of a product with stacked parts.
struct Stack<'a> {
    parts: &'a [Part],
    cols: usize,
}

/// A weight on the device, and what it means there: the values of its rows, in products of few and of many rows.
struct Packed {
    weight: Weight,
    few: Vec<f32>,
    many: Vec<f32>,
}

impl Packed {
    fn new(rig: &Rig, random: &mut Random, stack: &Stack<'_>) -> Packed {
        let stored: Vec<Vec<u8>> =
            stack.parts.iter().map(|part| random.weights(part.format, part.rows * stack.cols)).collect();
        let natural = |(part, bytes): (&Part, _)| view(part.format, part.rows, stack.cols, bytes);
        let views: Vec<MatrixView<'_>> =
            stack.parts.iter().zip(stored.iter().map(Vec::as_slice)).map(natural).collect();
        let (mut few, mut many) = (Vec::new(), Vec::new());
        for (part, own) in stack.parts.iter().zip(&views) {
            let values = meant(part, own);
            let rounded = rig.rounded(values.clone());
            few.extend(if KEPT.contains(&part.format) { values } else { rounded.clone() });
            many.extend(rounded);
        }
        let views: Vec<MatrixView<'_>> = views
            .into_iter()
            .zip(stack.parts)
            .map(|(own, part)| {
                let row_order = part.heads.map_or(RowOrder::Natural, |heads| RowOrder::UnpermuteRope { heads });
                MatrixView { row_order, ..own }
            })
            .collect();
        let weight = Weight::pack(&rig.device, &views, Precision::AsStored).unwrap();
        rig.device.synchronize().unwrap();
        Packed { weight, few, many }
    }
}

/// The values of a part's rows, in the order that products have them.
fn meant(part: &Part, view: &MatrixView<'_>) -> Vec<f32> {
    let mut stored = vec![0.0; view.rows * view.cols];
    dequantize(view.format, view.bytes, &mut stored).unwrap();
    let Some(heads) = part.heads else { return stored };
    let mut values = vec![f32::NAN; stored.len()];
    let head_rows = part.rows / heads;
    for (row, own) in stored.chunks(view.cols).enumerate() {
        // Stored row 2i + j of a head is row i + j * head_rows / 2 of it.
        let (head, at) = (row / head_rows, row % head_rows);
        let to = head * head_rows + at / 2 + at % 2 * (head_rows / 2);
        values[to * view.cols..][..view.cols].copy_from_slice(own);
    }
    values
}

/// The weight's product with random rows. Results are of the activations' type, or of F32.
fn check(rig: &Rig, packed: &Packed, rows: usize, with_bias: bool, logits: bool) {
    let Packed { weight, few, many } = packed;
    let (cols, outputs) = (weight.cols(), weight.rows());
    let what = format!("{} {rows} x {cols} x {outputs}, bias {with_bias}, logits {logits}", rig.element);
    let mut random = Random((rows * 7 + cols * 3 + outputs) as u64);
    let (x, bias) = (rig.values(&mut random, rows * cols, 1.0), rig.values(&mut random, outputs, 4.0));
    let (x_tensor, bias_tensor) = (rig.tensor(cols, &x), rig.tensor(outputs, &bias));
    let mut out = match logits {
        true => Tensor::f32(&rig.device, rows, outputs).unwrap(),
        false => rig.poisoned(rows + 1, outputs),
    };
    ops::matmul(&rig.device, &x_tensor, weight, with_bias.then_some(&bias_tensor), &mut out).unwrap();
    assert_eq!(out.rows(), rows, "{what}");
    let found = rig.read(&out);
    let values = if rows <= KEPT_ROWS_MAX { few } else { many };
    for (at, found) in found.iter().enumerate() {
        let (row, output) = (at / outputs, at % outputs);
        let bias = if with_bias { f64::from(bias[output]) } else { 0.0 };
        let products = x[row * cols..][..cols].iter().zip(&values[output * cols..][..cols]);
        let terms = products.map(|(x, w)| f64::from(*x) * f64::from(*w));
        let (sum, size) = terms.fold((bias, bias.abs()), |(sum, size), term| (sum + term, size + term.abs()));
        // Sums of f32 in any order, each addition off by 2^-23 of what there is, where matrix units cut off; then one
        // rounding.
        let tolerance = (size * (cols + 1) as f64 / 8_388_608.0) as f32;
        let rounding = epsilon(if logits { Element::F32 } else { rig.element });
        close(&format!("{what} at {row}, {output}"), &[*found], &[sum as f32], rounding, tolerance + rig.tiny());
    }
    if !logits {
        out.set_rows(rows + 1);
        assert!(rig.read(&out)[rows * outputs..].iter().all(|value| value.is_nan()), "{what}: wrote past the rows");
    }
}

#[test]
fn dense_products() {
    for element in ELEMENTS {
        let rig = Rig::new(element);
        for format in [Format::F32, Format::BF16, Format::F16] {
            // The kernels of few rows take whole packs of 8; others go to the library.
            for (cols, outputs) in [(64, 7), (264, 67), (100, 33), (577, 18), (1, 5)] {
                let packed = Packed::new(&rig, &mut Random(3), &Stack { parts: &[part(format, outputs)], cols });
                for rows in [1, 2, 3, 4, 5, 8, 9, 33] {
                    check(&rig, &packed, rows, rows % 2 == 0, false);
                    check(&rig, &packed, rows, rows % 2 == 1, true);
                }
            }
        }
    }
}

#[test]
fn quantized_products() {
    for element in ELEMENTS {
        let rig = Rig::new(element);
        for format in FORMATS.into_iter().filter(|format| format.block_elements() > 1) {
            let shapes = if format.block_elements() == 32 { [(96, 5), (576, 35)] } else { [(256, 5), (768, 35)] };
            for (cols, outputs) in shapes {
                let packed = Packed::new(&rig, &mut Random(4), &Stack { parts: &[part(format, outputs)], cols });
                for rows in [1, 3, 4, 5, 8, 9, 33] {
                    check(&rig, &packed, rows, rows % 2 == 1, rows % 4 == 1);
                }
            }
        }
    }
}

#[test]
fn stacked_products() {
    use Format::*;
    let stacks: [Stack<'_>; 6] = [
        Stack { parts: &[permuted(Q4_K, 36, 3), permuted(Q4_K, 24, 2), part(Q6_K, 21)], cols: 512 },
        Stack { parts: &[part(Q8_0, 13), part(F16, 22)], cols: 96 },
        Stack { parts: &[part(BF16, 9), part(F32, 3), part(Q5_0, 6), part(Q4_0, 7)], cols: 320 },
        Stack { parts: &[part(Q2_K, 11), part(Q4_1, 5), part(Q4_1, 6), permuted(Q8_0, 8, 2)], cols: 256 },
        Stack { parts: &[permuted(BF16, 40, 2), part(BF16, 24), part(BF16, 11)], cols: 100 },
        Stack { parts: &[permuted(F32, 8, 2), permuted(F16, 8, 4)], cols: 64 },
    ];
    for element in ELEMENTS {
        let rig = Rig::new(element);
        for stack in &stacks {
            let packed = Packed::new(&rig, &mut Random(5), stack);
            for rows in [1, 4, 8, 9, 40] {
                check(&rig, &packed, rows, true, false);
                check(&rig, &packed, rows, false, rows > 4);
            }
        }
    }
}

/// A quantized weight that, widened, is larger than the room for it, behind another one.
#[test]
fn products_in_stretches() {
    let rig = Rig::new(Element::F32);
    let stack = Stack { parts: &[part(Format::F16, 3), part(Format::Q4_0, 900)], cols: 8192 };
    check(&rig, &Packed::new(&rig, &mut Random(6), &stack), 9, true, false);
}

/// A table of embeddings is a weight too.
#[test]
fn tables_multiply() {
    for element in ELEMENTS {
        let rig = Rig::new(element);
        for format in [Format::Q6_K, Format::Q4_0, Format::BF16] {
            let (rows, cols) = (40, 256);
            let bytes = Random(7).weights(format, rows * cols);
            let stored = view(format, rows, cols, &bytes);
            let values = rig.rounded(meant(&part(format, rows), &stored));
            let weight = Weight::table(&rig.device, stored, Precision::AsStored).unwrap();
            let packed = Packed { weight, few: values.clone(), many: values };
            for rows in [1, 6, 9] {
                check(&rig, &packed, rows, false, true);
            }
        }
    }
}
