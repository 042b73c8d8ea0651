//! The GGUF reader against the default model and against small sound and unsound files.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::gguf_writer::{GgufWriter, Meta};
use kvern_models::gguf::{Array, Gguf, Value};

/// Opens these bytes as a file.
fn open(bytes: &[u8]) -> Result<Gguf, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Gguf::open(&path).map_err(|error| {
        let message = error.to_string();
        assert!(message.contains(path.to_str().unwrap()), "the message names the file: {message}");
        message
    })
}

#[test]
fn default_model_has_its_tensors() {
    let gguf = Gguf::open(&common::default_model()).unwrap();
    let mut counts = BTreeMap::new();
    for (_, info) in gguf.tensors() {
        *counts.entry(info.tensor_type.name()).or_insert(0) += 1;
    }
    let expected = [("F32", 61), ("Q4_1", 210), ("Q8_0", 1)].map(|(name, count)| (name.to_owned(), count));
    assert_eq!(counts, BTreeMap::from(expected));
    assert_eq!(gguf.tensor("token_embd.weight").unwrap().dims, [576, 49152]);
    assert_eq!(gguf.metadata("general.architecture").unwrap().as_str(), Some("llama"));
    assert_eq!(gguf.metadata("llama.block_count").unwrap().as_u64(), Some(30));
    assert_eq!(gguf.metadata("tokenizer.ggml.tokens").unwrap().as_strings().unwrap().len(), 49152);
    assert_eq!(gguf.metadata("tokenizer.ggml.token_type").unwrap().as_ints().unwrap()[..3], [3, 3, 3]);
    let norm = gguf.tensor_bytes(gguf.tensor("output_norm.weight").unwrap());
    assert_eq!(norm.len(), 576 * 4);
    let embedding = gguf.tensor_bytes(gguf.tensor("token_embd.weight").unwrap());
    assert_eq!(embedding.len(), 49152 * 576 / 32 * 34);
}

#[test]
fn every_value_type_is_read() {
    let nested = Meta::Array(9, vec![Meta::i32s(&[1, -2]), Meta::strings(&["x"])]);
    let table = [
        (Meta::U8(200), Value::Unsigned(200)),
        (Meta::I8(-5), Value::Signed(-5)),
        (Meta::U16(60_000), Value::Unsigned(60_000)),
        (Meta::I16(-6), Value::Signed(-6)),
        (Meta::U32(u32::MAX), Value::Unsigned(u32::MAX.into())),
        (Meta::I32(-7), Value::Signed(-7)),
        (Meta::F32(1.5), Value::F32(1.5)),
        (Meta::Bool(true), Value::Bool(true)),
        (Meta::str("é"), Value::String("é".to_owned())),
        (Meta::U64(u64::MAX), Value::Unsigned(u64::MAX)),
        (Meta::I64(-8), Value::Signed(-8)),
        (Meta::F64(2.5), Value::F64(2.5)),
        (Meta::f32s(&[0.5, 1.0]), Value::Array(Array::F32(vec![0.5, 1.0]))),
        (Meta::Array(7, vec![Meta::Bool(true), Meta::Bool(false)]), Value::Array(Array::Bool(vec![true, false]))),
        (Meta::Array(10, vec![]), Value::Array(Array::U64(vec![]))),
        (nested, Value::Array(Array::Array(vec![Array::I32(vec![1, -2]), Array::String(vec!["x".to_owned()])]))),
    ];
    let mut writer = GgufWriter::new("llama");
    for (index, (meta, _)) in table.iter().enumerate() {
        writer = writer.meta(&format!("key.{index}"), meta.clone());
    }
    let gguf = open(&writer.to_bytes()).unwrap();
    assert_eq!(gguf.keys().count(), table.len() + 1);
    for (index, (meta, expected)) in table.iter().enumerate() {
        assert_eq!(gguf.metadata(&format!("key.{index}")), Some(expected), "{meta:?}");
    }
}

#[test]
fn version_2_and_other_alignments_are_read() {
    let mut writer = GgufWriter::new("llama").meta("general.alignment", Meta::U32(128));
    (writer.version, writer.alignment) = (2, 128);
    let gguf = open(&writer.f32("a", &[3], &[1.0, 2.0, 3.0]).f32("b", &[1, 2], &[4.0, 5.0]).to_bytes()).unwrap();
    let bytes = gguf.tensor_bytes(gguf.tensor("b").unwrap());
    assert_eq!(bytes, [4.0_f32.to_le_bytes(), 5.0_f32.to_le_bytes()].concat());
    assert_eq!(gguf.tensor("b").unwrap().dims, [2, 1]);
}

fn raw(name: &str, shape: &[usize], type_number: u32, bytes: usize, offset: Option<u64>) -> Vec<u8> {
    let mut writer = GgufWriter::new("llama").f32("first", &[8], &[0.0; 8]);
    writer.push_raw(name, shape, type_number, vec![0; bytes], offset);
    writer.to_bytes()
}

fn meta(value: Meta) -> Vec<u8> {
    GgufWriter::new("llama").meta("a.key", value).to_bytes()
}

#[test]
fn unsound_files_are_refused_by_name() {
    let patched = |offset: usize, bytes: &[u8]| {
        let mut file = GgufWriter::new("llama").to_bytes();
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
        file
    };
    // An array of one array of one array, a hundred thousand times.
    let deep = Meta::Raw(9, [9_u32.to_le_bytes().as_slice(), &1_u64.to_le_bytes()].concat().repeat(100_000));
    let twice = GgufWriter::new("llama").meta("a.key", Meta::U8(1)).meta("a.key", Meta::U8(1)).to_bytes();
    let bad_bool = {
        let mut file = meta(Meta::Bool(true));
        *file.last_mut().unwrap() = 2;
        file
    };
    let table: &[(&str, Vec<u8>)] = &[
        ("the file is empty", vec![]),
        ("expected a GGUF file", b"PK\x03\x04rest".to_vec()),
        ("in the GGUF header", b"GGUF".to_vec()),
        ("big-endian", patched(4, &3_u32.to_be_bytes())),
        ("found version 1", patched(4, &1_u32.to_le_bytes())),
        ("found version 4", patched(4, &4_u32.to_le_bytes())),
        ("a count of 18446744073709551615", patched(8, &u64::MAX.to_le_bytes())),
        ("a count of 1099511627776", patched(16, &(1_u64 << 40).to_le_bytes())),
        ("in the name of metadata entry 0", patched(24, &u64::MAX.to_le_bytes())),
        ("key `a.key`: the file has it twice", twice),
        ("key `a.key`: expected a value type", meta(Meta::Array(13, vec![]))),
        ("key `a.key`: arrays are nested deeper", meta(deep)),
        ("key `a.key`: expected UTF-8", meta(Meta::Str(vec![0xff]))),
        ("key `a.key`: expected UTF-8", meta(Meta::Array(8, vec![Meta::Str(vec![b'a', 0xc3])]))),
        ("key `a.key`: expected a bool of 0 or 1, found 2", bad_bool),
        ("key `general.alignment`", GgufWriter::new("x").meta("general.alignment", Meta::U32(0)).to_bytes()),
        ("key `general.alignment`", GgufWriter::new("x").meta("general.alignment", Meta::U32(48)).to_bytes()),
        ("key `general.alignment`", GgufWriter::new("x").meta("general.alignment", Meta::str("32")).to_bytes()),
        ("tensor `first`: the file has it twice", raw("first", &[8], 0, 32, None)),
        ("tensor `t`: expected at most 4 dimensions", raw("t", &[1; 5], 0, 4, None)),
        ("tensor `t`: expected dimensions of at least 1", raw("t", &[4, 0], 0, 0, None)),
        ("tensor `t`: the product of the dimensions overflows", raw("t", &[1 << 40, 1 << 40], 0, 4, None)),
        ("tensor `t`: its size in bytes overflows", raw("t", &[1 << 31, 1 << 31], 0, 4, None)),
        ("tensor `t`: expected rows of whole Q4_1 blocks", raw("t", &[32, 33], 3, 660, None)),
        ("tensor `t`: expected 40 bytes at offset 32, found 8", raw("t", &[10], 0, 8, None)),
        ("tensor `t`: expected an offset aligned to 32", raw("t", &[1], 0, 4, Some(4))),
        ("tensor `t`: expected an offset within", raw("t", &[1], 0, 4, Some(1 << 20))),
        ("tensor `t`: expected an offset within", raw("t", &[1], 0, 4, Some(u64::MAX - 31))),
        ("tensor `t`: its data overlap those of `first`", raw("t", &[8], 0, 32, Some(0))),
        ("in the name of tensor 1", raw("", &[8], 0, 32, None)),
    ];
    for (expected, bytes) in table {
        let message = open(bytes).err().unwrap_or_else(|| panic!("{expected}: the file was accepted"));
        assert!(message.contains(expected), "expected `{expected}`, found `{message}`");
    }
}

#[test]
fn truncation_at_every_byte_is_refused() {
    let mut writer = GgufWriter::new("llama").meta("tokens", Meta::strings(&["a", "b"])).meta("x", Meta::F64(0.5));
    writer.push_raw("quantized", &[2, 32], 3, vec![7; 40], None);
    let bytes = writer.f32("plain", &[8], &[1.0; 8]).to_bytes();
    assert!(open(&bytes).is_ok());
    for length in 0..bytes.len() {
        assert!(open(&bytes[..length]).is_err(), "cut to {length} of {} bytes", bytes.len());
    }
}

#[test]
fn long_names_are_cut_in_messages() {
    let message = open(&raw(&"\u{1b}long".repeat(1000), &[4, 0], 0, 0, None)).unwrap_err();
    assert!(message.len() < 1000 && !message.contains('\u{1b}'), "{message}");
}

/// A set of two files, the second with these split entries.
fn split_set(second: &[(&str, Meta)]) -> Result<Gguf, String> {
    let dir = tempfile::tempdir().unwrap();
    let first_path = dir.path().join("m-00001-of-00002.gguf");
    GgufWriter::new("llama")
        .meta("split.no", Meta::U16(0))
        .meta("split.count", Meta::U16(2))
        .meta("split.tensors.count", Meta::I32(2))
        .f32("a", &[1], &[1.0])
        .write(&first_path);
    let mut writer = GgufWriter::new("llama").f32("b", &[1], &[2.0]);
    for (key, value) in second {
        writer = writer.meta(key, value.clone());
    }
    writer.write(&dir.path().join("m-00002-of-00002.gguf"));
    Gguf::open(&first_path).map_err(|error| error.to_string())
}

#[test]
fn split_sets_read_as_one() {
    let gguf = split_set(&[("split.no", Meta::U16(1)), ("split.count", Meta::U16(2))]).unwrap();
    for (name, value) in [("a", 1.0_f32), ("b", 2.0)] {
        let info = gguf.tensor(name).unwrap();
        assert_eq!(gguf.tensor_bytes(info), value.to_le_bytes(), "{name}");
    }
    assert!(gguf.tensor_path(gguf.tensor("b").unwrap()).ends_with("m-00002-of-00002.gguf"));
}

#[test]
fn broken_split_sets_are_refused() {
    let message = split_set(&[("split.no", Meta::U16(5)), ("split.count", Meta::U16(2))]).unwrap_err();
    assert!(message.contains("m-00002-of-00002.gguf: key `split.no`: expected 1, found 5"), "{message}");
    let message = split_set(&[]).unwrap_err();
    assert!(message.contains("key `split.no`: expected 1, found nothing"), "{message}");
    let lonely = GgufWriter::new("llama").meta("split.no", Meta::U16(1)).meta("split.count", Meta::U16(2));
    let message = open(&lonely.to_bytes()).unwrap_err();
    assert!(message.contains("expected the first of the 2 files"), "{message}");
}
