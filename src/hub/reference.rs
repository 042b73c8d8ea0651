//! How a model is named on the command line.

use hf_hub::{Repo, RepoType};

/// A model name, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    Repo(RepoReference),
    /// Not the name of a repository; it can only be a path.
    Other,
}

/// `OWNER/NAME[@REVISION][:FILE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoReference {
    pub id: String,
    pub revision: String,
    /// A GGUF file of the repository, or the name of a quantization such as `Q4_K_M`.
    pub file: Option<String>,
}

/// Longest repository id, as the Hub has it.
const ID_CHARS_MAX: usize = 96;

impl Reference {
    /// Never fails: what is no repository's name is [`Reference::Other`].
    #[must_use]
    pub fn parse(text: &str) -> Reference {
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (id, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        if !is_id(id) || !is_path(revision) || file.is_some_and(|file| !is_path(file)) {
            return Reference::Other;
        }
        Reference::Repo(RepoReference {
            id: id.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

impl RepoReference {
    pub(super) fn hub_repo(&self) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone())
    }
}

/// `OWNER/NAME`, or the bare `NAME` of the Hub's oldest repositories.
fn is_id(text: &str) -> bool {
    let part = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        !part.is_empty() && !part.starts_with(['.', '-']) && !part.contains("..") && part.bytes().all(plain)
    };
    let is_file = [".gguf", ".safetensors"].iter().any(|end| text.ends_with(end));
    text.len() <= ID_CHARS_MAX && !is_file && text.split('/').count() <= 2 && text.split('/').all(part)
}

/// A relative path that stays below where it starts; also what a revision may look like, for it names a file in the cache.
pub(super) fn is_path(text: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', '\0', ':']);
    text.split('/').all(plain)
}
