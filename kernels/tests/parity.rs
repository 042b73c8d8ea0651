//! Every op at every level of this machine against the scalar reference, bit for bit, over tables of shapes.

#![allow(clippy::unwrap_used)]

mod support;

use half::bf16;
use kvern_kernels::ops::{self, Attention, QkNorm, RopeAndStore};
use kvern_kernels::reference::{Attend, Products};
use kvern_kernels::{
    AttentionLimits, AttentionPlan, Device, Element, Format, HeadLayout, KernelError, KvCache, KvDType, KvShape,
    MatrixView, Precision, RopeTable, RowOrder, SequenceBatch, Tensor, Weight, dequantize, reference,
};
use support::{FORMATS, Random, assert_bits, devices, poisoned, view};

fn widened(format: Format, bytes: &[u8], elements: usize) -> Vec<f32> {
    let mut out = vec![0.0; elements];
    dequantize(format, bytes, &mut out).unwrap();
    out
}

fn check_matmul(device: &Device, format: Format, precision: Precision, [rows, cols, out_cols]: [usize; 3]) {
    let what = format!("{} {format:?} {precision:?} {rows} x {cols} x {out_cols}", device.describe());
    let mut random = Random((rows * 7 + cols * 3 + out_cols) as u64);
    let bytes = random.weights(format, cols * out_cols);
    let (x, bias) = (random.floats(rows * cols), random.floats(out_cols));
    let row_bytes = bytes.len() / out_cols;
    let mut values = widened(format, &bytes, cols * out_cols);
    if precision == Precision::BF16 {
        values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    let rounded = precision == Precision::BF16 || precision == Precision::AsStored && format == Format::BF16;
    let quantized = precision == Precision::AsStored && format.block_elements() > 1;
    let expected: Vec<f32> = (0..rows * out_cols)
        .map(|i| {
            let (row, col) = (i / out_cols, i % out_cols);
            let x = &x[row * cols..][..cols];
            let dot = match quantized {
                true => reference::dot_quantized(x, format, &bytes[col * row_bytes..][..row_bytes]),
                false if rounded => device.bf16_products().unwrap().dot(x, &values[col * cols..][..cols]),
                false => reference::dot(x, &values[col * cols..][..cols]),
            };
            dot + bias[col]
        })
        .collect();
    let weight = Weight::pack(device, &[view(format, out_cols, cols, &bytes)], precision).unwrap();
    assert_eq!((weight.rows(), weight.cols()), (out_cols, cols));
    let x = Tensor::from_f32(device, cols, &x).unwrap();
    let bias = Tensor::from_f32(device, out_cols, &bias).unwrap();
    let mut out = poisoned(device, rows + 1, out_cols);
    ops::matmul(device, &x, &weight, Some(&bias), &mut out).unwrap();
    assert_bits(out.host(), &expected, &what);
    out.set_rows(rows + 1);
    assert!(out.host()[rows * out_cols..].iter().all(|value| value.is_nan()), "{what}: wrote past the rows");

    // The packed rows read back as they were stored.
    let ids: Vec<u32> = (0..out_cols as u32).rev().collect();
    let mut table = poisoned(device, out_cols, cols);
    ops::embed(device, &weight, &ids, &mut table).unwrap();
    let reversed: Vec<f32> = values.chunks(cols).rev().flatten().copied().collect();
    assert_bits(table.host(), &reversed, &format!("{what}: embed"));
}

#[test]
fn matmul_and_embed() {
    for device in devices() {
        for format in FORMATS {
            let shapes: &[[usize; 3]] = match format.block_elements() {
                256 => &[[1, 256, 16], [3, 512, 33], [9, 768, 40]],
                32 => &[[1, 32, 1], [2, 64, 31], [3, 96, 48], [1, 576, 67], [8, 576, 34], [13, 1536, 18], [40, 64, 5]],
                _ => &[[1, 1, 1], [2, 7, 3], [3, 33, 50], [1, 576, 67], [8, 100, 34], [13, 577, 18], [40, 64, 5]],
            };
            for &shape in shapes {
                check_matmul(&device, format, Precision::AsStored, shape);
            }
            check_matmul(&device, format, Precision::F32, shapes[2]);
            check_matmul(&device, format, Precision::BF16, shapes[2]);
        }
    }
}

/// Parts of different formats side by side, one of them with its rows brought from interleaved to split-half order.
#[test]
fn stacked_weights() {
    const HEADS: usize = 3;
    for device in devices() {
        let mut random = Random(5);
        let (cols, q_rows) = (256, 36);
        let parts = [(Format::Q4_K, q_rows), (Format::Q6_K, 20), (Format::F16, 7), (Format::Q8_0, 16)];
        let stored: Vec<Vec<u8>> = parts.iter().map(|&(format, rows)| random.weights(format, rows * cols)).collect();
        let mut views: Vec<MatrixView<'_>> =
            parts.iter().zip(&stored).map(|(&(format, rows), bytes)| view(format, rows, cols, bytes)).collect();
        views[0].row_order = RowOrder::UnpermuteRope { heads: HEADS };
        let weight = Weight::pack(&device, &views, Precision::AsStored).unwrap();
        let x = random.floats(5 * cols);
        let mut expected = Vec::new();
        for x in x.chunks(cols) {
            for (part, &(format, rows)) in parts.iter().enumerate() {
                let row_bytes = stored[part].len() / rows;
                let mut results = vec![0.0; rows];
                for row in 0..rows {
                    let bytes = &stored[part][row * row_bytes..][..row_bytes];
                    let head_rows = q_rows / HEADS;
                    let (head, at) = (row / head_rows, row % head_rows);
                    let to = if part == 0 { head * head_rows + at / 2 + at % 2 * head_rows / 2 } else { row };
                    results[to] = match format {
                        Format::F16 => reference::dot(x, &widened(format, bytes, cols)),
                        _ => reference::dot_quantized(x, format, bytes),
                    };
                }
                expected.extend(results);
            }
        }
        let x = Tensor::from_f32(&device, cols, &x).unwrap();
        let mut out = poisoned(&device, 5, weight.rows());
        ops::matmul(&device, &x, &weight, None, &mut out).unwrap();
        assert_bits(out.host(), &expected, &device.describe());
    }
}

/// Extreme activations: zeros, tiny and huge groups; a NaN or an infinity stays visible and stays in its row.
#[test]
fn matmul_of_extreme_activations() {
    let (cols, out_cols) = (64, 20);
    let scales = [0.0, 1e-38, 1e-30, 1e-20, 1e20, 1e36, f32::NAN, f32::INFINITY];
    for device in devices() {
        for format in [Format::Q4_1, Format::Q8_0, Format::BF16] {
            let mut random = Random(1);
            let bytes = random.weights(format, cols * out_cols);
            let values = widened(format, &bytes, cols * out_cols);
            let weight = Weight::pack(&device, &[view(format, out_cols, cols, &bytes)], Precision::AsStored).unwrap();
            let x: Vec<f32> = (0..scales.len() * cols)
                .map(|i| if i % 3 == 0 { scales[i / cols] * random.unit() } else { random.unit() * 1e-3 })
                .collect();
            let tensor = Tensor::from_f32(&device, cols, &x).unwrap();
            let mut out = poisoned(&device, scales.len(), out_cols);
            ops::matmul(&device, &tensor, &weight, None, &mut out).unwrap();
            let row_bytes = bytes.len() / out_cols;
            for (i, (&found, row)) in out.host().iter().zip((0..scales.len()).flat_map(|r| [r; 20])).enumerate() {
                let (x, col) = (&x[row * cols..][..cols], i % out_cols);
                let expected = match format {
                    Format::BF16 => device.bf16_products().unwrap().dot(x, &values[col * cols..][..cols]),
                    _ => reference::dot_quantized(x, format, &bytes[col * row_bytes..][..row_bytes]),
                };
                assert_bits(&[found], &[expected], &format!("{} {format:?} scale {}", device.describe(), scales[row]));
                assert_eq!(found.is_finite(), scales[row].is_finite(), "{format:?} scale {}: {found}", scales[row]);
            }
        }
    }
}

#[test]
fn norms_activation_and_gather() {
    for device in devices() {
        for (rows, cols) in [(1, 1), (3, 15), (2, 16), (5, 17), (40, 576), (9, 1536)] {
            let what = format!("{} {rows} x {cols}", device.describe());
            let mut random = Random(cols as u64);
            let (x, delta, weight) = (random.floats(rows * cols), random.floats(rows * cols), random.floats(cols));
            let tensor = |values: &[f32]| Tensor::from_f32(&device, cols, values).unwrap();
            let norm = |x: &[f32]| -> Vec<f32> {
                x.chunks(cols).flat_map(|x| reference::rms_norm(x, &weight, 1e-5)).collect()
            };
            let mut out = poisoned(&device, rows, cols);
            ops::rms_norm(&device, &tensor(&x), &tensor(&weight), 1e-5, &mut out).unwrap();
            assert_bits(out.host(), &norm(&x), &what);

            let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
            let (mut residual, mut out) = (tensor(&x), poisoned(&device, rows, cols));
            ops::add_rms_norm(&device, &mut residual, &tensor(&delta), &tensor(&weight), 1e-5, &mut out).unwrap();
            assert_bits(residual.host(), &sum, &what);
            assert_bits(out.host(), &norm(&sum), &what);

            let gated: Vec<f32> = random.floats(2 * rows * cols).iter().map(|x| x * 100.0).collect();
            let expected: Vec<f32> = gated
                .chunks(2 * cols)
                .flat_map(|row| (0..cols).map(|i| reference::silu_mul(row[i], row[cols + i])))
                .collect();
            let mut out = poisoned(&device, rows, cols);
            ops::silu_mul(&device, &Tensor::from_f32(&device, 2 * cols, &gated).unwrap(), &mut out).unwrap();
            assert_bits(out.host(), &expected, &what);

            let picks: Vec<u32> = (0..7).map(|_| random.below(rows) as u32).collect();
            let expected: Vec<f32> = picks.iter().flat_map(|&row| x[row as usize * cols..][..cols].to_vec()).collect();
            let mut out = poisoned(&device, 7, cols);
            ops::gather_rows(&device, &tensor(&x), &picks, &mut out).unwrap();
            assert_bits(out.host(), &expected, &what);
        }
    }
}

/// The polynomials against the real functions, so that the reference itself is right.
#[test]
fn exp_exp2_and_silu_are_accurate() {
    assert_eq!(reference::exp(0.0), 1.0);
    assert_eq!(reference::exp(f32::NEG_INFINITY), 0.0);
    assert!(reference::exp(f32::NAN).is_nan());
    assert_eq!((reference::exp2(0.0), reference::exp2(f32::NEG_INFINITY)), (1.0, 0.0));
    assert!(reference::exp2(f32::NAN).is_nan());
    for i in -12600..12600 {
        let x = i as f32 / 100.0;
        let (found, expected) = (f64::from(reference::exp2(x)), f64::from(x).exp2());
        assert!((found / expected - 1.0).abs() < 2e-7, "2^{x} is {found}, expected {expected}");
    }
    for i in -8700..8800 {
        let x = i as f32 / 100.0;
        let (found, expected) = (f64::from(reference::exp(x)), f64::from(x).exp());
        assert!((found / expected - 1.0).abs() < 2e-7, "e^{x} is {found}, expected {expected}");
        let silu = f64::from(x) / (1.0 + (-f64::from(x)).exp());
        assert!((f64::from(reference::silu_mul(x, 1.0)) - silu).abs() <= 5e-7 * silu.abs() + 1e-35, "silu({x})");
    }
}

/// How attention multiplies with such a cache.
fn products(device: &Device, dtype: KvDType) -> Products {
    match dtype {
        KvDType::F32 => Products::F32,
        KvDType::BF16 => device.bf16_products().unwrap(),
        KvDType::F16 => panic!("a CPU has no cache of f16"),
    }
}

/// One batch of attention: context and queries of each sequence, in one call.
struct Case {
    heads: HeadLayout,
    block_size: usize,
    dtype: KvDType,
    window: Option<u32>,
    /// Context with queries, queries.
    sequences: &'static [(usize, usize)],
}

/// Stores K and V through `rope_and_store`, row by row as prefill would, then attends with the last rows of each sequence;
/// both ops against the reference.
fn check_attention(device: &Device, case: &Case) {
    let Case { heads, block_size, dtype, window, sequences } = *case;
    let HeadLayout { heads: q_heads, kv_heads, head_dim } = heads;
    let what = format!("{} {heads:?} blocks of {block_size} {dtype:?} window {window:?}", device.describe());
    let mut random = Random((head_dim * 100 + block_size) as u64);
    let row_len = (q_heads + 2 * kv_heads) * head_dim;
    let [q_start, k_start, v_start] = reference::fused_heads(heads);
    let contexts: Vec<usize> = sequences.iter().map(|sequence| sequence.0).collect();
    let stride = contexts.iter().max().unwrap().div_ceil(block_size) + 1;
    let blocks = sequences.len() * stride;
    // Blocks are dealt out in no order; entries past the context are not valid ones.
    let mut free: Vec<u32> = (0..blocks as u32).collect();
    let mut tables = vec![u32::MAX; blocks];
    for (sequence, &context) in contexts.iter().enumerate() {
        for entry in 0..context.div_ceil(block_size) {
            tables[sequence * stride + entry] = free.swap_remove(random.below(free.len()));
        }
    }
    let shape = KvShape { layers: 2, blocks, block_size, kv_heads, head_dim, dtype };
    let mut kv = KvCache::new(device, shape).unwrap();

    let (rotary, eps) = (head_dim / 4 * 2, 1e-6);
    let slots: Vec<u32> = (0..(blocks * block_size) as u32).collect();
    let inv_freq: Vec<f32> = (0..rotary / 2).map(|i| 0.5f32.powi(i as i32)).collect();
    let rope = RopeTable::new(device, &inv_freq, 1.25, 2000).unwrap();
    let (norm_q, norm_k) = (random.floats(head_dim), random.floats(head_dim));
    let tensor = |values: &[f32]| Tensor::from_f32(device, head_dim, values).unwrap();
    let (q_weight, k_weight) = (tensor(&norm_q), tensor(&norm_k));
    let norm = Some(QkNorm { q: &q_weight, k: &k_weight, eps });
    // What no sequence writes may be anything, and must not be read.
    let mut nan = poisoned(device, slots.len(), row_len);
    let first = vec![0; slots.len()];
    let args = RopeAndStore { heads, norm, rope: &rope, positions: (&first).into(), slots: (&slots).into(), layer: 1 };
    ops::rope_and_store(device, &args, &mut nan, &mut kv).unwrap();

    let mut queries = Vec::new();
    let (mut expected, mut sums) = (Vec::new(), vec![0u32]);
    for (sequence, &(context, query_rows)) in sequences.iter().enumerate() {
        let raw = random.floats(context * row_len);
        let positions: Vec<u32> = (0..context as u32).collect();
        let slots: Vec<u32> = (0..context)
            .map(|at| tables[sequence * stride + at / block_size] * block_size as u32 + (at % block_size) as u32)
            .collect();
        let mut rows = Tensor::from_f32(device, row_len, &raw).unwrap();
        let args =
            RopeAndStore { heads, norm, rope: &rope, positions: (&positions).into(), slots: (&slots).into(), layer: 1 };
        ops::rope_and_store(device, &args, &mut rows, &mut kv).unwrap();

        let mut wanted = raw;
        for (position, row) in wanted.chunks_mut(row_len).enumerate() {
            let angle = |i: usize| f64::from(position as f32 * inv_freq[i]);
            let cos: Vec<f32> = (0..rotary / 2).map(|i| angle(i).cos() as f32 * 1.25).collect();
            let sin: Vec<f32> = (0..rotary / 2).map(|i| angle(i).sin() as f32 * 1.25).collect();
            for (head, values) in row[..v_start].chunks_mut(head_dim).enumerate() {
                let weight = if head < q_heads { &norm_q } else { &norm_k };
                values.copy_from_slice(&reference::rms_norm(values, weight, eps));
                reference::rope(values, &cos, &sin);
            }
        }
        assert_bits(rows.host(), &wanted, &format!("{what}: rope"));
        queries.extend_from_slice(&wanted[(context - query_rows) * row_len..]);
        sums.push(sums[sequence] + query_rows as u32);

        let stored = |start: usize, head: usize| -> Vec<f32> {
            let value = |x: f32| if dtype == KvDType::BF16 { bf16::from_f32(x).to_f32() } else { x };
            let from = start + head * head_dim;
            wanted.chunks(row_len).flat_map(|row| row[from..from + head_dim].iter().map(|&x| value(x))).collect()
        };
        let k: Vec<Vec<f32>> = (0..kv_heads).map(|head| stored(k_start, head)).collect();
        let v: Vec<Vec<f32>> = (0..kv_heads).map(|head| stored(v_start, head)).collect();
        for position in context - query_rows..context {
            for head in 0..q_heads {
                let q = &wanted[position * row_len + q_start + head * head_dim..][..head_dim];
                let kv_head = head / (q_heads / kv_heads);
                let (k, v) = (&k[kv_head], &v[kv_head]);
                let attend = Attend { q, k, v, scale: 0.3, position, window, products: products(device, dtype) };
                expected.extend(reference::attention(&attend));
            }
        }
    }
    let batch = SequenceBatch {
        cu_seqlens_q: &sums,
        context_lens: &contexts.iter().map(|&context| context as u32).collect::<Vec<_>>(),
        block_tables: &tables,
        block_table_stride: stride,
    };
    let rows = queries.len() / row_len;
    let mut plan = AttentionPlan::new(device, heads, &AttentionLimits::new(rows, sequences.len(), 1024)).unwrap();
    plan.update(device, &batch, &kv, None).unwrap();
    let queries = Tensor::from_f32(device, row_len, &queries).unwrap();
    let mut out = poisoned(device, rows, q_heads * head_dim);
    let args = Attention { heads, layer: 1, scale: 0.3, window, plan: &plan };
    ops::attention(device, &args, &queries, &kv, &mut out).unwrap();
    assert_bits(out.host(), &expected, &what);
}

#[test]
fn rope_store_and_attention() {
    let heads = |heads, kv_heads, head_dim| HeadLayout { heads, kv_heads, head_dim };
    let (f32, bf16) = (KvDType::F32, KvDType::BF16);
    let ragged = &[(1, 1), (33, 33), (70, 1), (20, 7), (300, 2)];
    let cases = [
        Case { heads: heads(9, 3, 64), block_size: 16, dtype: bf16, window: None, sequences: ragged },
        Case { heads: heads(9, 3, 64), block_size: 16, dtype: f32, window: Some(40), sequences: ragged },
        Case { heads: heads(2, 2, 80), block_size: 32, dtype: bf16, window: None, sequences: ragged },
        Case { heads: heads(4, 2, 96), block_size: 1, dtype: f32, window: Some(1), sequences: ragged },
        Case { heads: heads(8, 1, 128), block_size: 7, dtype: bf16, window: Some(300), sequences: ragged },
        Case { heads: heads(3, 1, 256), block_size: 24, dtype: bf16, window: None, sequences: &[(40, 3), (2, 2)] },
        Case { heads: heads(1, 1, 4), block_size: 5, dtype: f32, window: None, sequences: &[(600, 1), (9, 9)] },
        Case { heads: heads(64, 1, 20), block_size: 8, dtype: bf16, window: None, sequences: &[(65, 40)] },
        Case { heads: heads(5, 1, 33), block_size: 1, dtype: bf16, window: Some(3), sequences: ragged },
        Case { heads: heads(2, 1, 64), block_size: 16, dtype: bf16, window: Some(1), sequences: ragged },
        Case { heads: heads(7, 1, 32), block_size: 16, dtype: bf16, window: Some(5), sequences: &[(600, 600)] },
        Case { heads: heads(6, 3, 64), block_size: 16, dtype: bf16, window: None, sequences: &[(1000, 1)] },
        Case { heads: heads(6, 3, 64), block_size: 16, dtype: bf16, window: Some(260), sequences: &[(1000, 1)] },
    ];
    for device in devices() {
        for case in &cases {
            check_attention(&device, case);
        }
    }
}

/// The reference of attention against softmax as it is defined, in f64: within f32's rounding, or that of the weights to bf16
/// (2^-9 of each, with q, k and v taken as rounded).
#[test]
fn attention_reference_is_softmax() {
    let mut random = Random(3);
    let cases = [(64, 0, None), (80, 31, None), (64, 700, None), (128, 600, Some(37)), (33, 257, Some(2))];
    let bf16_bound = 0.5f64.powi(9) * 1.01;
    for (products, bound) in
        [(Products::F32, 2e-5), (Products::Bf16Pairs, bf16_bound), (Products::Bf16Tiles, bf16_bound)]
    {
        let round = |x: f32| if products == Products::F32 { x } else { bf16::from_f32(x).to_f32() };
        for (head_dim, position, window) in cases {
            let mut floats = |len: usize| -> Vec<f32> { random.floats(len).iter().map(|&x| round(x)).collect() };
            let (k, v) = (floats((position + 1) * head_dim), floats((position + 1) * head_dim));
            let q: Vec<f32> = floats(head_dim).iter().map(|x| x * 8.0).collect();
            let first = window.map_or(0, |window| position + 1 - window as usize);
            let scaled: Vec<f64> = q.iter().map(|q| f64::from(round(q * (0.5 * std::f32::consts::LOG2_E)))).collect();
            let dot =
                |at: usize| -> f64 { scaled.iter().zip(&k[at * head_dim..]).map(|(q, &k)| q * f64::from(k)).sum() };
            let scores: Vec<f64> = (first..=position).map(dot).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp2()).collect();
            let sum: f64 = weights.iter().sum();
            let window = window.map(|window| window as u32);
            let attend = Attend { q: &q, k: &k, v: &v, scale: 0.5, position, window, products };
            for (i, &found) in reference::attention(&attend).iter().enumerate() {
                let values = (first..=position).map(|at| f64::from(v[at * head_dim + i]));
                let expected = weights.iter().zip(values).map(|(weight, value)| weight * value).sum::<f64>() / sum;
                assert!((f64::from(found) - expected).abs() < bound, "{products:?}: {found} against {expected}");
            }
        }
    }
}

/// Shapes that do not fit are errors that say so, not panics.
#[test]
fn hostile_shapes_are_refused() {
    let device = devices().remove(0);
    let bytes = vec![0u8; 20 * 8];
    let pack = |view: MatrixView<'_>| Weight::pack(&device, &[view], Precision::AsStored).err().unwrap().to_string();
    let good = view(Format::Q4_1, 4, 64, &bytes);
    let bad = [
        (MatrixView { bytes: &bytes[1..], ..good }, "expected tensor \"test\" with 160 bytes"),
        (MatrixView { cols: 63, ..good }, "blocks of 32"),
        (MatrixView { rows: 0, ..good }, "positive rows"),
        (MatrixView { rows: usize::MAX, ..good }, "size in range"),
        (MatrixView { rows: usize::MAX / 64, cols: 64, ..good }, "size in range"),
        (MatrixView { row_order: RowOrder::UnpermuteRope { heads: 3 }, ..good }, "even number of rows"),
        (MatrixView { row_order: RowOrder::UnpermuteRope { heads: 0 }, ..good }, "even number of rows"),
    ];
    for (view, text) in bad {
        let message = pack(view);
        assert!(message.contains(text) && message.contains("test"), "{message:?} lacks {text:?}");
    }
    assert!(Weight::pack(&device, &[], Precision::AsStored).is_err());
    let other = view(Format::Q4_1, 2, 32, &bytes[..40]);
    assert!(Weight::pack(&device, &[good, other], Precision::AsStored).is_err());

    let weight = Weight::pack(&device, &[good], Precision::AsStored).unwrap();
    let mut out = Tensor::zeros(&device, 2, 64).unwrap();
    assert!(matches!(ops::embed(&device, &weight, &[4], &mut out), Err(KernelError::Shape { .. })));
    assert!(ops::embed(&device, &weight, &[0, 1, 2], &mut out).is_err());
    assert!(Tensor::zeros(&device, usize::MAX, 2).is_err());
    assert!(Tensor::zeros(&device, 1 << 60, 2).is_err());
    assert!(dequantize(Format::Q4_0, &bytes[..18], &mut [0.0; 31]).is_err());

    let shape = KvShape { layers: 1, blocks: 4, block_size: 4, kv_heads: 1, head_dim: 8, dtype: KvDType::F32 };
    assert!(KvCache::new(&device, KvShape { blocks: usize::MAX, ..shape }).is_err());
    assert!(KvCache::new(&device, KvShape { block_size: 0, ..shape }).is_err());
    let f16 = KvCache::new(&device, KvShape { dtype: KvDType::F16, ..shape }).map(drop).unwrap_err();
    assert_eq!(f16.to_string(), "kv cache: expected f32 or bf16 on the CPU, found f16");
    let kv = KvCache::new(&device, shape).unwrap();
    let heads = HeadLayout { heads: 2, kv_heads: 1, head_dim: 8 };
    let mut plan = AttentionPlan::new(&device, heads, &AttentionLimits::new(8, 2, 16)).unwrap();
    let batches: [[&[u32]; 3]; 8] = [
        [&[0, 1], &[1], &[4]],
        [&[0, 2], &[1], &[0]],
        [&[0, 1], &[5], &[0]],
        [&[1, 1], &[1], &[0]],
        [&[0, 2, 1], &[2, 2], &[0, 0]],
        [&[0, 9], &[9], &[0]],
        [&[0, 1], &[1], &[0, 1]],
        [&[], &[], &[]],
    ];
    for [cu_seqlens_q, context_lens, block_tables] in batches {
        let batch = SequenceBatch { cu_seqlens_q, context_lens, block_tables, block_table_stride: 1 };
        assert!(plan.update(&device, &batch, &kv, None).is_err(), "{batch:?}");
    }
    assert!(
        AttentionPlan::new(&device, HeadLayout { heads: 3, kv_heads: 2, head_dim: 8 }, &AttentionLimits::new(1, 1, 1))
            .is_err()
    );
    assert!(Device::cuda(0, Element::BF16).is_err());
}
