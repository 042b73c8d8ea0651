//! The JSON header of a safetensors file, read into entries and nothing else, so that memory stays a small multiple of it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use ::safetensors::Dtype;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};

use crate::error::{LoadError, quoted};

/// Real headers take about 100 bytes per tensor.
const HEADER_BYTES_MAX: u64 = 32 << 20;
const DIMENSIONS_MAX: usize = 8;
const NAME_BYTES_MAX: usize = 65_535;
/// A key of the header that is not a tensor.
const METADATA_KEY: &str = "__metadata__";

#[derive(Deserialize)]
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    #[serde(deserialize_with = "shape")]
    pub(super) shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Entry {
    /// Where the tensor lies in `data_bytes` of data.
    pub(super) fn place(&self, data_bytes: usize) -> Result<Range<usize>, String> {
        let (start, end) = self.data_offsets;
        if start > end || end > data_bytes as u64 {
            return Err(format!(
                "expected offsets within the file's {data_bytes} bytes of data, found {start} to {end} (is the file truncated?)"
            ));
        }
        let elements = self.shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
        let bits = elements.and_then(|elements| elements.checked_mul(self.dtype.bitsize()));
        let bits = bits.ok_or("the product of the shape overflows")?;
        if !bits.is_multiple_of(8) || (bits / 8) as u64 != end - start {
            let (dtype, shape) = (self.dtype, &self.shape);
            return Err(format!("expected {} bytes for {dtype:?} {shape:?}, found {}", bits.div_ceil(8), end - start));
        }
        Ok(start as usize..end as usize)
    }
}

/// The entries of a file, and where its data start.
pub(super) fn read(path: &Path, file: &[u8]) -> Result<(BTreeMap<String, Entry>, usize), LoadError> {
    let invalid = |reason: String| LoadError::file(path, format!("in the safetensors header: {reason}"));
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(invalid(format!("expected 8 bytes of its length, found {}", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_BYTES_MAX {
        return Err(invalid(format!("expected a length of at most {HEADER_BYTES_MAX} bytes, found {length}")));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length) else {
        return Err(invalid(format!("expected {length} bytes, found {} (is the file truncated?)", rest.len())));
    };
    let entries = serde_json::from_slice(header).map_err(|error| invalid(error.to_string()))?;
    let Entries(entries) = entries;
    Ok((entries, 8 + length))
}

struct Entries(BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if name.is_empty() || name.len() > NAME_BYTES_MAX {
                        let expected = format!("a tensor name of 1 to {NAME_BYTES_MAX} bytes");
                        return Err(Error::custom(format!("expected {expected}, found {} bytes", name.len())));
                    }
                    let entry = map.next_value_seed(Named(&name))?;
                    if entries.insert(name.clone(), entry).is_some() {
                        return Err(Error::custom(format!("tensor {}: the file has it twice", quoted(&name))));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// Reads an entry; an error names the tensor.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = Entry;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entry, D::Error> {
        Entry::deserialize(deserializer).map_err(|error| Error::custom(format!("tensor {}: {error}", quoted(self.0))))
    }
}

/// A list of at most [`DIMENSIONS_MAX`] sizes, counted while it is read.
fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct ShapeVisitor;
    impl<'de> Visitor<'de> for ShapeVisitor {
        type Value = Vec<usize>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a shape of at most {DIMENSIONS_MAX} sizes")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<usize>, A::Error> {
            let mut shape = Vec::new();
            while let Some(size) = list.next_element()? {
                if shape.len() == DIMENSIONS_MAX {
                    return Err(de::Error::invalid_length(DIMENSIONS_MAX + 1, &self));
                }
                shape.push(size);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(ShapeVisitor)
}
