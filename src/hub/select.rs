//! Which files of a repository a model needs: names in, names out, nothing touched.

use super::reference::is_path;
use std::collections::BTreeSet;

/// The files to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Selection {
    /// All in one file.
    Gguf(String),
    Checkpoint {
        config: String,
        /// Tokenizer, chat template and generation defaults, as far as there are any.
        metadata: Vec<String>,
        weights: Weights,
    },
}

/// The weights of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    Files(Vec<String>),
    /// The file that names the others.
    Index(String),
}

const INDEX: &str = "model.safetensors.index.json";

const METADATA: [&str; 11] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Names shown of a list that is too long for a message.
const SHOWN_MAX: usize = 12;

/// Chooses among `files`; `wanted` is a GGUF file's name or a quantization's. The error says what was found instead.
pub(super) fn select(files: &[String], wanted: Option<&str>) -> Result<Selection, String> {
    // Names come from the network and become paths.
    let files: Vec<&str> = files.iter().map(String::as_str).filter(|file| is_path(file)).collect();
    // Projectors of vision models are no language models.
    let ggufs: Vec<&str> =
        files.iter().copied().filter(|file| file.ends_with(".gguf") && !base(file).starts_with("mmproj")).collect();
    if let Some(wanted) = wanted {
        if ggufs.contains(&wanted) {
            return whole(wanted);
        }
        let fits: Vec<&str> = ggufs.iter().copied().filter(|file| has_quant(file, wanted)).collect();
        return match fits.as_slice() {
            [only] => whole(only),
            [first, ..] if part_of_many(first) => whole(first),
            [] => Err(format!("no GGUF file is or fits `{wanted}`; there are: {}", shown(&ggufs))),
            _ => Err(format!("`{wanted}` fits several GGUF files: {}; name one as OWNER/NAME:FILE", shown(&fits))),
        };
    }
    if files.contains(&"config.json") && files.iter().any(|file| file.ends_with(".safetensors")) {
        let metadata = files.iter().filter(|file| METADATA.contains(file)).map(|file| (*file).to_owned()).collect();
        return Ok(Selection::Checkpoint { config: "config.json".to_owned(), metadata, weights: weights(&files)? });
    }
    match ggufs.as_slice() {
        [only] => whole(only),
        [] => Err(format!(
            "expected config.json with safetensors weights, or a GGUF file, found: {}",
            if files.is_empty() { "no file".to_owned() } else { shown(&files) }
        )),
        _ => Err(format!(
            "has several GGUF files: {}; choose one as OWNER/NAME:QUANTIZATION or OWNER/NAME:FILE",
            shown(&ggufs)
        )),
    }
}

fn weights(files: &[&str]) -> Result<Weights, String> {
    if files.contains(&INDEX) {
        return Ok(Weights::Index(INDEX.to_owned()));
    }
    if files.contains(&"model.safetensors") {
        return Ok(Weights::Files(vec!["model.safetensors".to_owned()]));
    }
    let roots = files.iter().copied().filter(|file| file.ends_with(".safetensors") && !file.contains('/'));
    match roots.collect::<Vec<_>>().as_slice() {
        [only] => Ok(Weights::Files(vec![(*only).to_owned()])),
        found => Err(format!("expected {INDEX} or one safetensors file, found: {}", shown(found))),
    }
}

/// The shards that an index names, each once and in order.
pub(super) fn shards_of_index(index: &str, files: &[String]) -> Result<Vec<String>, String> {
    let json: serde_json::Value = serde_json::from_str(index).map_err(|error| format!("{INDEX}: {error}"))?;
    let map = json.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| format!("{INDEX}: expected an object `weight_map`, found none"))?;
    let shards: Option<BTreeSet<&str>> = map.values().map(serde_json::Value::as_str).collect();
    let shards = shards.ok_or_else(|| format!("{INDEX}: expected file names in `weight_map`, found another value"))?;
    if shards.is_empty() {
        return Err(format!("{INDEX}: `weight_map` names no file"));
    }
    for shard in &shards {
        if !is_path(shard) || !files.iter().any(|file| file == shard) {
            return Err(format!("{INDEX} names `{shard}`, which is not in the repository"));
        }
    }
    Ok(shards.into_iter().map(str::to_owned).collect())
}

fn whole(file: &str) -> Result<Selection, String> {
    if part_of_many(file) {
        return Err(format!(
            "`{file}` is one part of a split GGUF file, which is not supported; use a repository with one file"
        ));
    }
    Ok(Selection::Gguf(file.to_owned()))
}

/// `...-00001-of-00003.gguf`
fn part_of_many(file: &str) -> bool {
    let Some((rest, total)) = file.strip_suffix(".gguf").and_then(|stem| stem.rsplit_once("-of-")) else {
        return false;
    };
    let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    number(total) && rest.rsplit_once('-').is_some_and(|(_, part)| number(part))
}

fn base(file: &str) -> &str {
    file.rsplit_once('/').map_or(file, |(_, base)| base)
}

/// Whether a file's name holds the quantization as a word: `Q4_K` is in `m-Q4_K.gguf`, not in `m-Q4_K_M.gguf`.
fn has_quant(file: &str, quant: &str) -> bool {
    let (name, quant) = (base(file).to_ascii_lowercase(), quant.to_ascii_lowercase());
    let joins = |byte: Option<&u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    name.match_indices(&quant).any(|(at, found)| {
        let bytes = name.as_bytes();
        !joins(bytes.get(at.wrapping_sub(1))) && !joins(bytes.get(at + found.len()))
    })
}

fn shown(files: &[&str]) -> String {
    let more = files.len().saturating_sub(SHOWN_MAX);
    let mut text = files.iter().take(SHOWN_MAX).copied().collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    if text.is_empty() { "none".to_owned() } else { text }
}
