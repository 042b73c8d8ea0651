//! Reader of safetensors: one file, or the shards that an index names, over memory maps.
//!
//! Layout: `u64 n | n bytes of JSON header {name: {dtype, shape, data_offsets}} | data`, offsets from the start of the data.
//! Data types are the `safetensors` crate's. The header is read here: the crate's own reader names neither the tensor nor
//! the file that is wrong, keeps the last of two tensors of one name, buffers a hostile header at many times its size, and
//! adds up hostile offsets without a check. Afterwards each tensor lies inside its file, on its own bytes.

mod header;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use ::safetensors::Dtype;
use kvern_kernels::Format;
use memmap2::Mmap;
use serde::Deserialize;

use crate::error::{LoadError, quoted};
use crate::{json, map};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const INDEX_BYTES_MAX: u64 = 32 << 20;
const SHARDS_MAX: usize = 1 << 12;

/// The weights of a folder.
#[derive(Debug)]
pub struct SafeTensorsFiles {
    dir: PathBuf,
    /// The single file or the index: where a missing tensor is missing.
    main: PathBuf,
    tensors: BTreeMap<String, TensorInfo>,
    shards: Vec<Shard>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

/// A tensor of a safetensors file; its data are read by [`SafeTensorsFiles::bytes`].
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    /// Slowest first: `[rows, cols]`.
    pub shape: Vec<usize>,
    shard: usize,
    bytes: Range<usize>,
}

impl TensorInfo {
    /// The format that Kvern reads it as; `None` for types that it does not have.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        match self.dtype {
            Dtype::F32 => Some(Format::F32),
            Dtype::F16 => Some(Format::F16),
            Dtype::BF16 => Some(Format::BF16),
            _ => None,
        }
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafeTensorsFiles {
    /// Maps and checks `model.safetensors` of a folder, or all shards of its `model.safetensors.index.json`.
    ///
    /// # Errors
    /// A file is missing, unsound, or disagrees with the index.
    pub fn open(dir: &Path) -> Result<Self, LoadError> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let (shard, tensors) = open_shard(&single, 0)?;
            return Ok(SafeTensorsFiles { dir: dir.to_owned(), main: single, tensors, shards: vec![shard] });
        }
        Self::open_index(dir)
    }

    fn open_index(dir: &Path) -> Result<Self, LoadError> {
        let main = dir.join(INDEX);
        let mut index: Index = json::read(&main, INDEX_BYTES_MAX)?;
        let mut names: Vec<String> = index.weight_map.values().cloned().collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > SHARDS_MAX {
            return Err(LoadError::file(&main, format!("expected at most {SHARDS_MAX} files, found {}", names.len())));
        }
        let mut files = SafeTensorsFiles { dir: dir.to_owned(), main, tensors: BTreeMap::new(), shards: Vec::new() };
        for name in &names {
            if !is_file_name(name) {
                let reason = format!("in weight_map: expected the name of a .safetensors file, found {}", quoted(name));
                return Err(LoadError::file(&files.main, reason));
            }
            let path = dir.join(name);
            let (shard, tensors) = open_shard(&path, files.shards.len())?;
            files.shards.push(shard);
            for (tensor, info) in tensors {
                match index.weight_map.remove(&tensor) {
                    Some(mapped) if mapped == *name => {}
                    mapped => {
                        let mapped = mapped.map_or("no file".to_owned(), |mapped| quoted(&mapped));
                        let reason = format!("the index places it in {mapped}");
                        return Err(LoadError::tensor(&path, &tensor, reason));
                    }
                }
                files.tensors.insert(tensor, info);
            }
        }
        match index.weight_map.pop_first() {
            Some((tensor, file)) => Err(LoadError::tensor(&dir.join(file), &tensor, "missing, and the index names it")),
            None => Ok(files),
        }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The single file or the index.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.main
    }

    /// Names and entries of all tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// A tensor with its name as it lives in this reader.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<(&str, &TensorInfo)> {
        self.tensors.get_key_value(name).map(|(name, info)| (name.as_str(), info))
    }

    /// The file that holds a tensor of this reader.
    #[must_use]
    pub fn tensor_path(&self, info: &TensorInfo) -> &Path {
        &self.shards[info.shard].path
    }

    /// The data of a tensor of this reader, row by row, little-endian; not aligned.
    #[must_use]
    pub fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.shards[info.shard].map[info.bytes.clone()]
    }

    pub(crate) fn read_ahead(&self) {
        self.shards.iter().for_each(|shard| map::read_ahead(&shard.map));
    }
}

/// Whether a name of the index stays in its folder.
fn is_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name);
    plain && name.ends_with(".safetensors") && !name.contains(['\\', '\0'])
}

fn open_shard(path: &Path, shard: usize) -> Result<(Shard, BTreeMap<String, TensorInfo>), LoadError> {
    let map = map::map_file(path)?;
    let (entries, data_start) = header::read(path, &map)?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let bytes = entry.place(map.len() - data_start).map_err(|reason| LoadError::tensor(path, &name, reason))?;
        let bytes = data_start + bytes.start..data_start + bytes.end;
        tensors.insert(name, TensorInfo { dtype: entry.dtype, shape: entry.shape, shard, bytes });
    }
    check_overlaps(path, &tensors)?;
    Ok((Shard { path: path.to_owned(), map }, tensors))
}

fn check_overlaps(path: &Path, tensors: &BTreeMap<String, TensorInfo>) -> Result<(), LoadError> {
    let mut placed: Vec<_> = tensors.iter().filter(|(_, info)| !info.bytes.is_empty()).collect();
    placed.sort_by_key(|(_, info)| info.bytes.start);
    for pair in placed.windows(2) {
        if pair[1].1.bytes.start < pair[0].1.bytes.end {
            let reason = format!("its data overlap those of {}", quoted(pair[0].0));
            return Err(LoadError::tensor(path, pair[1].0, reason));
        }
    }
    Ok(())
}
