//! A commit of a repository on the Hub; files go through the Hub's cache layout, so that other tools share them.

use super::{HubError, RepoReference, Snapshot};
use crate::config::{HubConfig, Secret};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::path::PathBuf;

/// Attempts after the first one; each resumes where the last one stopped.
const RETRIES: usize = 5;

pub(super) struct Remote {
    repository: String,
    commit: String,
    files: Vec<String>,
    cache: Cache,
    api: ApiRepo,
}

impl Remote {
    /// Asks the Hub which commit the revision is and what is in it.
    pub(super) fn open(hub: &HubConfig, cache: Cache, repo: &RepoReference) -> Result<Remote, HubError> {
        let api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(hub.endpoint.clone())
            .with_token(hub.token.as_ref().map(Secret::reveal).map(str::to_owned))
            .with_retries(RETRIES)
            .with_user_agent("kvern", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| describe(&repo.id, "the file list", &error))?;
        let what = format!("revision `{}`", repo.revision);
        let info = api.repo(repo.hub_repo()).info().map_err(|error| describe(&repo.id, &what, &error))?;
        if info.sha.is_empty() || !info.sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            let reason = format!("expected a commit from the Hub, found `{}`", info.sha.escape_debug());
            return Err(HubError::Unusable { repository: repo.id.clone(), reason });
        }
        let pinned = Repo::with_revision(repo.id.clone(), RepoType::Model, info.sha.clone());
        Ok(Remote {
            repository: repo.id.clone(),
            files: info.siblings.into_iter().map(|file| file.rfilename).collect(),
            api: api.repo(pinned),
            commit: info.sha,
            cache,
        })
    }

    /// Lets the cache find this commit by the revision's name; called when all of it is there.
    pub(super) fn keep_revision(&self, repo: &RepoReference) -> Result<(), HubError> {
        let path = self.cache.path().clone();
        self.cache.repo(repo.hub_repo()).create_ref(&self.commit).map_err(|source| HubError::Io { path, source })
    }
}

impl Snapshot for Remote {
    fn files(&self) -> &[String] {
        &self.files
    }

    fn get(&self, file: &str) -> Result<PathBuf, HubError> {
        let folder = self.cache.repo(Repo::model(self.repository.clone())).pointer_path(&self.commit);
        let cached = folder.join(file);
        if cached.is_file() {
            return Ok(cached);
        }
        tracing::info!(repository = self.repository, file, "fetching");
        self.api.download(file).map_err(|error| describe(&self.repository, file, &error))
    }
}

/// The HTTP status of a refused request, from the client's message: its error type is not exported.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => error.to_string().strip_prefix("http status: ")?.trim().parse().ok(),
        ApiError::TooManyRetries(inner) => status(inner),
        _ => None,
    }
}

fn describe(repository: &str, what: &str, error: &ApiError) -> HubError {
    let (repository, what) = (repository.to_owned(), what.to_owned());
    match status(error) {
        Some(status @ (401 | 403)) => HubError::Refused { repository, status },
        Some(404) => HubError::Missing { repository, what },
        _ => HubError::Transfer { repository, what, reason: error.to_string() },
    }
}
