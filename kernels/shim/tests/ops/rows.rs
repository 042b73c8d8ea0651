//! Embeddings, norms, gates, and rows that move.

use kvern_kernels::{CpuOptions, Device, Element, Precision, Tensor, Weight, dequantize, ops, reference};

use super::matrices::{FORMATS, Random, assert_bits, view};
use super::{ELEMENTS, Rig, as_ids, close};

#[test]
fn embeddings() {
    for element in ELEMENTS {
        let rig = Rig::new(element);
        for format in FORMATS {
            for cols in if format.block_elements() == 1 { [33, 64] } else { [256, 768] } {
                let (rows, ids) = (21, [20, 0, 7, 7, 19, 21, u32::MAX, 3]);
                let what = format!("{element} {format:?} of {cols}");
                let bytes = Random(cols as u64).weights(format, rows * cols);
                let mut values = vec![0.0; rows * cols];
                dequantize(format, &bytes, &mut values).unwrap();
                let table = Weight::table(&rig.device, view(format, rows, cols, &bytes), Precision::AsStored).unwrap();
                let mut out = rig.poisoned(ids.len() + 1, cols);
                rig.with_indices(&as_ids(&ids), |at| ops::embed(&rig.device, &table, at.ids, &mut out).unwrap());
                // Ids that the table does not have give zeros.
                let row =
                    |id: u32| values.get(id as usize * cols..).map_or(vec![0.0; cols], |row| row[..cols].to_vec());
                let valid = |id: u32| if (id as usize) < rows { row(id) } else { vec![0.0; cols] };
                let expected: Vec<f32> = ids.into_iter().flat_map(valid).collect();
                assert_bits(&rig.read(&out), &rig.rounded(expected), &what);
                out.set_rows(ids.len() + 1);
                assert!(rig.read(&out)[ids.len() * cols..].iter().all(|value| value.is_nan()), "{what}: a row more");
            }
        }
    }
}

/// The same numbers as on the CPU, which rounds them to bf16.
#[test]
fn random_weights() {
    let (rows, cols) = (37, 40);
    let ids: Vec<u32> = (0..rows as u32).collect();
    let cpu = Device::cpu(CpuOptions::default()).unwrap();
    let expected = {
        let table = Weight::random(&cpu, rows, cols, 5, 0.25).unwrap();
        let mut out = Tensor::zeros(&cpu, rows, cols).unwrap();
        ops::embed(&cpu, &table, &ids, &mut out).unwrap();
        out.host().to_vec()
    };
    for element in ELEMENTS {
        let rig = Rig::new(element);
        let table = Weight::random(&rig.device, rows, cols, 5, 0.25).unwrap();
        let mut out = rig.poisoned(rows, cols);
        rig.with_indices(&as_ids(&ids), |at| ops::embed(&rig.device, &table, at.ids, &mut out).unwrap());
        let bf16 = 1.0 / 256.0;
        let (relative, absolute) =
            if element == Element::BF16 { (0.0, 0.0) } else { (bf16 + rig.epsilon(), rig.tiny()) };
        close(&format!("{element} random weights"), &rig.read(&out), &expected, relative, absolute);
    }
}

#[test]
fn norms_gates_and_gathers() {
    for element in ELEMENTS {
        let rig = Rig::new(element);
        for (rows, cols) in [(1, 1), (3, 15), (2, 16), (5, 17), (33, 576), (9, 1536), (2, 8200), (1, 9001)] {
            check_norms(&rig, rows, cols);
            check_gate(&rig, rows, cols);
            check_gather(&rig, rows, cols);
        }
    }
}

/// Sums of squares are positive, so that each addition's 2^-24 counts once; 1e-6 has room for a hundred in a row, whose
/// square root is taken, and for three more roundings. What is left is the rounding of the result.
fn check_norms(rig: &Rig, rows: usize, cols: usize) {
    let what = format!("{} norm of {rows} x {cols}", rig.element);
    let mut random = Random(cols as u64);
    let [x, delta] = [(); 2].map(|()| rig.values(&mut random, rows * cols, 2.0));
    let weight = rig.values(&mut random, cols, 1.5);
    let norm =
        |x: &[f32]| -> Vec<f32> { x.chunks(cols).flat_map(|row| reference::rms_norm(row, &weight, 1e-5)).collect() };
    let (relative, absolute) = (rig.epsilon() + (1e-6 + cols as f32 / 16_777_216.0), rig.tiny());
    let (weights, mut out) = (rig.tensor(cols, &weight), rig.poisoned(rows + 1, cols));
    let x_tensor = rig.tensor(cols, &x);
    ops::rms_norm(&rig.device, &x_tensor, &weights, 1e-5, &mut out).unwrap();
    close(&what, &rig.read(&out), &norm(&x), relative, absolute);
    out.set_rows(rows + 1);
    assert!(rig.read(&out)[rows * cols..].iter().all(|value| value.is_nan()), "{what}: wrote past the rows");

    let sum = rig.rounded(x.iter().zip(&delta).map(|(x, delta)| x + delta).collect());
    let (mut residual, delta) = (rig.tensor(cols, &x), rig.tensor(cols, &delta));
    ops::add_rms_norm(&rig.device, &mut residual, &delta, &weights, 1e-5, &mut out).unwrap();
    assert_bits(&rig.read(&residual), &sum, &what);
    close(&what, &rig.read(&out), &norm(&sum), relative, absolute);
}

/// e^x is off by some units, of 2^-23 each.
fn check_gate(rig: &Rig, rows: usize, cols: usize) {
    let what = format!("{} gate of {rows} x {cols}", rig.element);
    let x = rig.values(&mut Random(cols as u64 + 1), rows * 2 * cols, 100.0);
    let gated = |row: &[f32]| (0..cols).map(|i| reference::silu_mul(row[i], row[cols + i])).collect::<Vec<f32>>();
    let expected: Vec<f32> = x.chunks(2 * cols).flat_map(gated).collect();
    let (x, mut out) = (rig.tensor(2 * cols, &x), rig.poisoned(rows + 1, cols));
    ops::silu_mul(&rig.device, &x, &mut out).unwrap();
    close(&what, &rig.read(&out), &expected, rig.epsilon() + 1e-6, rig.tiny() + 1e-30);
    out.set_rows(rows + 1);
    assert!(rig.read(&out)[rows * cols..].iter().all(|value| value.is_nan()), "{what}: wrote past the rows");
}

fn check_gather(rig: &Rig, rows: usize, cols: usize) {
    let what = format!("{} gather from {rows} x {cols}", rig.element);
    let mut random = Random(cols as u64 + 2);
    let x = rig.values(&mut random, rows * cols, 1.0);
    let picks: Vec<u32> = (0..7).map(|_| random.below(rows) as u32).collect();
    let expected: Vec<f32> = picks.iter().flat_map(|&row| x[row as usize * cols..][..cols].to_vec()).collect();
    let (x, mut out) = (rig.tensor(cols, &x), rig.poisoned(7, cols));
    rig.with_indices(&as_ids(&picks), |at| ops::gather_rows(&rig.device, &x, at.sample_rows, &mut out).unwrap());
    assert_bits(&rig.read(&out), &expected, &what);
}
