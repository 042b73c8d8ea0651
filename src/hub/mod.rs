//! Model name -> files on this machine.
//!
//! Owner: `main`, before anything is loaded. Order of the search: a path that exists; a file in the models folder; the
//! Hub's cache; the Hub. A cached snapshot that has what is needed is used without asking the network, so that a restart
//! neither waits for the Hub nor changes the model under a running fleet; another `--revision` fetches anew.
//!
//! A repository is pinned to one commit before its first file is fetched, and the branch's name is written into the cache
//! only after the last one: a reader never sees half of a model or files of two commits.

mod reference;
mod remote;
mod select;

pub use reference::{Reference, RepoReference};

use crate::config::ModelSource;
use remote::Remote;
use select::Selection;
use std::path::{Path, PathBuf};

/// The model that is served when none is named: small, Apache-2.0, and what `make model` fetches.
pub const DEFAULT_MODEL: &str = "SmolLM2-135M-Instruct";

/// Where the default model lives on the Hub.
const DEFAULT_REPOSITORY: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Most bytes of a safetensors index: a model of 100,000 tensors needs about 10 MiB.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// A model's files, all on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// A GGUF file, a safetensors file, or a folder with `config.json` and weights.
    pub path: PathBuf,
    /// What to call the model unless the operator chose another name.
    pub name: String,
}

/// Why a model's files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("`{0}` is neither a file or folder here, a file in the models folder, nor OWNER/NAME of a repository")]
    NotAModel(String),
    #[error("`{name}` fits several files of {folder}: {found}; name one of them", folder = .folder.display())]
    Ambiguous { name: String, folder: PathBuf, found: String },
    #[error("{repository} is not complete in the cache {cache} and HF_HUB_OFFLINE forbids to fetch it: {reason}", cache = .cache.display())]
    Offline { repository: String, cache: PathBuf, reason: String },
    #[error(
        "the Hub refused {repository} with status {status}: it does not exist, is private or wants its terms accepted; check \
         the name, or set HF_TOKEN to a token that may read it"
    )]
    Refused { repository: String, status: u16 },
    #[error("the Hub has no {what} of {repository} (status 404)")]
    Missing { repository: String, what: String },
    #[error("{repository}: {reason}")]
    Unusable { repository: String, reason: String },
    #[error("cannot fetch {what} of {repository}: {reason}")]
    Transfer { repository: String, what: String, reason: String },
    #[error("{path}: {source}", path = .path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

/// Finds the model, fetching it from the Hub where it must be; shows a progress bar on a terminal.
///
/// # Errors
/// When there is no such model, or it cannot be read or fetched.
pub fn locate(source: &ModelSource) -> Result<Located, HubError> {
    let name = source.name.as_deref().unwrap_or(DEFAULT_MODEL);
    if Path::new(name).exists() {
        return Ok(Located { path: PathBuf::from(name), name: name.to_owned() });
    }
    if let Some(path) = in_models_dir(&source.models_dir, name)? {
        return Ok(Located { path, name: name.to_owned() });
    }
    let Reference::Repo(mut repo) = Reference::parse(if name == DEFAULT_MODEL { DEFAULT_REPOSITORY } else { name })
    else {
        return Err(HubError::NotAModel(name.to_owned()));
    };
    if let Some(revision) = &source.revision {
        repo.revision.clone_from(revision);
    }
    let cache = hf_hub::Cache::new(source.hub.cache_dir.clone());
    let reason = match from_cache(&cache, &repo) {
        Ok(path) => return Ok(Located { path, name: shown_name(name, &repo) }),
        Err(reason) => reason.to_string(),
    };
    if source.hub.offline {
        return Err(HubError::Offline { repository: repo.id, cache: source.hub.cache_dir.clone(), reason });
    }
    let remote = Remote::open(&source.hub, cache, &repo)?;
    let path = gather(&repo, &remote)?;
    remote.keep_revision(&repo)?;
    Ok(Located { path, name: shown_name(name, &repo) })
}

fn shown_name(name: &str, repo: &RepoReference) -> String {
    if name == DEFAULT_MODEL { name.to_owned() } else { repo.id.clone() }
}

/// `NAME`, `NAME.gguf` or the only `NAME.*.gguf` of the models folder.
fn in_models_dir(folder: &Path, name: &str) -> Result<Option<PathBuf>, HubError> {
    if name.contains(['/', '\\', ':', '@']) || name.starts_with('.') {
        return Ok(None);
    }
    for exact in [name.to_owned(), format!("{name}.gguf")] {
        let path = folder.join(exact);
        if path.exists() {
            return Ok(Some(path));
        }
    }
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(None) };
    let start = format!("{name}.");
    let mut found: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|file| file.starts_with(&start) && file.ends_with(".gguf"))
        .collect();
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(folder.join(only))),
        _ => Err(HubError::Ambiguous { name: name.to_owned(), folder: folder.to_owned(), found: found.join(", ") }),
    }
}

/// The files of one commit of a repository: in the cache or on the Hub.
trait Snapshot {
    /// Names of its files, relative to its root.
    fn files(&self) -> &[String];
    /// The local path of one of them, fetched if it must be.
    fn get(&self, file: &str) -> Result<PathBuf, HubError>;
}

/// Gets every needed file; the path of the GGUF file, or of the folder that holds the others.
fn gather(repo: &RepoReference, snapshot: &dyn Snapshot) -> Result<PathBuf, HubError> {
    let unusable = |reason: String| HubError::Unusable { repository: repo.id.clone(), reason };
    match select::select(snapshot.files(), repo.file.as_deref()).map_err(unusable)? {
        Selection::Gguf(file) => snapshot.get(&file),
        Selection::Checkpoint { config, metadata, weights } => {
            let config = snapshot.get(&config)?;
            for file in metadata {
                snapshot.get(&file)?;
            }
            let weights = match weights {
                select::Weights::Files(files) => files,
                select::Weights::Index(index) => {
                    let index = read_bounded(&snapshot.get(&index)?, INDEX_BYTES_MAX)?;
                    select::shards_of_index(&index, snapshot.files()).map_err(unusable)?
                }
            };
            for file in weights {
                snapshot.get(&file)?;
            }
            Ok(config.parent().expect("a file of a snapshot lies in its folder").to_owned())
        }
    }
}

fn read_bounded(path: &Path, bytes_max: u64) -> Result<String, HubError> {
    let io = |source| HubError::Io { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(io)?.len();
    if bytes > bytes_max {
        return Err(io(std::io::Error::other(format!("expected at most {bytes_max} bytes, found {bytes}"))));
    }
    std::fs::read_to_string(path).map_err(io)
}

/// A snapshot folder of the cache.
struct Cached {
    repository: String,
    folder: PathBuf,
    files: Vec<String>,
}

impl Snapshot for Cached {
    fn files(&self) -> &[String] {
        &self.files
    }

    fn get(&self, file: &str) -> Result<PathBuf, HubError> {
        let path = self.folder.join(file);
        // A link whose blob was deleted is listed but not there.
        if path.is_file() {
            return Ok(path);
        }
        Err(HubError::Missing { repository: self.repository.clone(), what: format!("cached {file}") })
    }
}

fn from_cache(cache: &hf_hub::Cache, repo: &RepoReference) -> Result<PathBuf, HubError> {
    let root = cache.path().join(repo.hub_repo().folder_name());
    let reference = root.join("refs").join(&repo.revision);
    // A branch or tag is a file with its commit; a commit is a snapshot by itself.
    let commit =
        std::fs::read_to_string(&reference).map_or_else(|_| repo.revision.clone(), |text| text.trim().to_owned());
    let folder = root.join("snapshots").join(&commit);
    let mut files = Vec::new();
    list(&folder, "", &mut files).map_err(|source| HubError::Io { path: folder.clone(), source })?;
    files.sort();
    let path = gather(repo, &Cached { repository: repo.id.clone(), folder, files })?;
    tracing::info!(repository = repo.id, commit, "using the cached model");
    Ok(path)
}

/// Files of a snapshot, two folders deep: nothing that is needed lies deeper.
fn list(folder: &Path, prefix: &str, files: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = format!("{prefix}{name}");
        if !entry.path().is_dir() {
            files.push(name);
        } else if prefix.is_empty() {
            list(&entry.path(), &format!("{name}/"), files)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
