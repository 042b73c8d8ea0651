//! Reader of GGUF files, versions 2 and 3, over memory maps: metadata are copied, tensors are borrowed from the map.
//!
//! Layout, all little-endian (source: `docs/gguf.md` of ggml):
//!
//! ```text
//! magic "GGUF" | u32 version | u64 tensors | u64 entries
//! entries x { string key | u32 type | value }
//! tensors x { string name | u32 n | n x u64 size, fastest first | u32 type | u64 offset }
//! padding to the alignment
//! data: each tensor at its offset from here
//! ```
//!
//! Files are untrusted. Everything is checked once, in [`Gguf::open`]: afterwards each tensor of a known type lies inside
//! its file, aligned, on its own bytes. Opening costs O(header); data are not touched. A set that was split into
//! `NAME-00001-of-00003.gguf` and so on is opened by its first file and reads as one.

mod cursor;
mod split;
mod tensor;
mod value;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{LoadError, quoted};
use crate::map;
use cursor::Cursor;
use tensor::TensorEntry;

pub use tensor::{TensorInfo, TensorType};
pub use value::{Array, Value};

const MAGIC: &[u8; 4] = b"GGUF";
const ALIGNMENT_KEY: &str = "general.alignment";
const ALIGNMENT_DEFAULT: usize = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;
/// Most entries of metadata and most tensors in a file; real files have tens and thousands.
const ENTRIES_MAX: usize = 1 << 16;

/// An open GGUF file, or a split set of them.
#[derive(Debug)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    parts: Vec<Part>,
}

/// One file of the set.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    map: Mmap,
}

impl Gguf {
    /// Maps and checks a file, and the rest of its set when it is the first of a split one.
    ///
    /// # Errors
    /// The file cannot be read, is not a sound little-endian GGUF file of version 2 or 3, or its set is not complete.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        let first = PartContents::open(path, 0)?;
        let rest = split::rest_of_set(path, &first.metadata)?;
        let PartContents { part, metadata, mut tensors } = first;
        let mut parts = vec![part];
        for (index, path) in rest.iter().enumerate() {
            let next = PartContents::open(path, index + 1)?;
            split::check_member(path, &next.metadata, index + 1, rest.len() + 1)?;
            for (name, info) in next.tensors {
                if tensors.insert(name.clone(), info).is_some() {
                    return Err(LoadError::tensor(path, &name, "an earlier file of the set has it too"));
                }
            }
            parts.push(next.part);
        }
        split::check_tensor_count(path, &metadata, tensors.len())?;
        Ok(Gguf { metadata, tensors, parts })
    }

    /// The (first) file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// A metadata value.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The keys of the metadata, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Names and entries of all tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// A tensor with its name as it lives in this reader.
    pub(crate) fn tensor_entry(&self, name: &str) -> Option<(&str, &TensorInfo)> {
        self.tensors.get_key_value(name).map(|(name, info)| (name.as_str(), info))
    }

    /// The file that holds a tensor of this reader.
    #[must_use]
    pub fn tensor_path(&self, info: &TensorInfo) -> &Path {
        &self.parts[info.part].path
    }

    /// The data of a tensor of this reader: whole blocks, row by row. Empty for a type that Kvern does not have.
    #[must_use]
    pub fn tensor_bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.parts[info.part].map[info.bytes.clone()]
    }

    /// Asks the operating system to read the files ahead, before the weights are packed.
    pub(crate) fn read_ahead(&self) {
        self.parts.iter().for_each(|part| map::read_ahead(&part.map));
    }
}

/// One file, read and checked.
struct PartContents {
    part: Part,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl PartContents {
    fn open(path: &Path, index: usize) -> Result<Self, LoadError> {
        let map = map::map_file(path)?;
        let mut cursor = Cursor::new(&map);
        let (tensor_count, entry_count) = read_header(path, &mut cursor)?;
        let metadata = read_metadata(path, &mut cursor, entry_count)?;
        let entries = read_entries(path, &mut cursor, tensor_count)?;
        let alignment = alignment(path, &metadata)?;
        let data_start = cursor.position().next_multiple_of(alignment);

        let mut tensors = BTreeMap::new();
        for (name, entry) in entries {
            let bytes = entry
                .place(data_start, alignment, map.len())
                .map_err(|reason| LoadError::tensor(path, &name, reason))?;
            let TensorEntry { dims, tensor_type, .. } = entry;
            tensors.insert(name, TensorInfo { dims, tensor_type, part: index, bytes });
        }
        check_overlaps(path, &tensors)?;
        Ok(PartContents { part: Part { path: path.to_owned(), map }, metadata, tensors })
    }
}

/// Magic, version and the two counts.
fn read_header(path: &Path, cursor: &mut Cursor<'_>) -> Result<(usize, usize), LoadError> {
    let in_header = |reason: String| LoadError::file(path, format!("in the GGUF header: {reason}"));
    let magic = cursor.number::<u32>().map_err(in_header)?.to_le_bytes();
    if &magic != MAGIC {
        return Err(LoadError::file(path, format!("expected a GGUF file, found the first bytes {magic:02x?}")));
    }
    let version: u32 = cursor.number().map_err(in_header)?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err(LoadError::unsupported(path, "expected a little-endian GGUF file, found a big-endian one"));
        }
        other => {
            return Err(LoadError::unsupported(path, format!("expected GGUF version 2 or 3, found version {other}")));
        }
    }
    let tensors = cursor.count(TensorEntry::BYTES_MIN).map_err(in_header)?;
    // Smallest entry: a key of one byte, a type, a value of one byte.
    let entries = cursor.count(8 + 1 + 4 + 1).map_err(in_header)?;
    if tensors > ENTRIES_MAX || entries > ENTRIES_MAX {
        return Err(in_header(format!(
            "expected at most {ENTRIES_MAX} tensors and {ENTRIES_MAX} metadata entries, found {tensors} and {entries}"
        )));
    }
    Ok((tensors, entries))
}

fn read_metadata(path: &Path, cursor: &mut Cursor<'_>, count: usize) -> Result<BTreeMap<String, Value>, LoadError> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = cursor
            .name()
            .map_err(|reason| LoadError::file(path, format!("in the name of metadata entry {index}: {reason}")))?;
        let value = cursor.value().map_err(|reason| LoadError::key(path, key, reason))?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(LoadError::key(path, key, "the file has it twice"));
        }
    }
    Ok(metadata)
}

fn read_entries(
    path: &Path,
    cursor: &mut Cursor<'_>,
    count: usize,
) -> Result<BTreeMap<String, TensorEntry>, LoadError> {
    let mut entries = BTreeMap::new();
    for index in 0..count {
        let name = cursor
            .name()
            .map_err(|reason| LoadError::file(path, format!("in the name of tensor {index}: {reason}")))?;
        let entry = TensorEntry::read(cursor).map_err(|reason| LoadError::tensor(path, name, reason))?;
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(LoadError::tensor(path, name, "the file has it twice"));
        }
    }
    Ok(entries)
}

fn alignment(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<usize, LoadError> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else {
        return Ok(ALIGNMENT_DEFAULT);
    };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= ALIGNMENT_MAX => Ok(alignment as usize),
        _ => Err(LoadError::key(
            path,
            ALIGNMENT_KEY,
            format!("expected a power of two up to {ALIGNMENT_MAX}, found {}", value.describe()),
        )),
    }
}

/// Two tensors on the same bytes are a broken or hostile file: writers place them one after the other.
fn check_overlaps(path: &Path, tensors: &BTreeMap<String, TensorInfo>) -> Result<(), LoadError> {
    let mut placed: Vec<_> = tensors.iter().filter(|(_, info)| !info.bytes.is_empty()).collect();
    placed.sort_by_key(|(_, info)| info.bytes.start);
    for pair in placed.windows(2) {
        let ((before, before_info), (after, after_info)) = (pair[0], pair[1]);
        if after_info.bytes.start < before_info.bytes.end {
            return Err(LoadError::tensor(path, after, format!("its data overlap those of {}", quoted(before))));
        }
    }
    Ok(())
}
