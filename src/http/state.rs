//! What all handlers share. Owner: an `Arc` made at start; immutable but for the model, which arrives once, and the drain.

use super::drain::Drain;
use super::limits::HttpLimits;
use crate::admission::GenerationDefaults;
use crate::error::ServeError;
use crate::keys::{Keyring, Site};
use crate::request::Engine;
use crate::text::TextModel;
use std::sync::{Arc, OnceLock};
use tokio::sync::Semaphore;

/// The front end's state: complete at construction, except that the model is published once it is loaded and warm, so that
/// the port answers probes before.
pub struct AppState {
    pub limits: HttpLimits,
    pub keys: Arc<Keyring>,
    model: OnceLock<Arc<ServedModel>>,
    pub(crate) drain: Drain,
    /// Bounds how many large texts are tokenized at once.
    pub(crate) text_permits: Arc<Semaphore>,
}

/// A loaded model with its engine.
pub struct ServedModel {
    pub engine: Arc<dyn Engine>,
    pub text: Arc<TextModel>,
    /// What clients call it, the first one in answers that name none; at least one.
    pub names: Vec<String>,
    /// What was loaded: a path or a repository.
    pub root: String,
    /// Most tokens (prompt and answer) of one request.
    pub context_tokens_max: u32,
    /// Tokens of a block of the KV cache.
    pub block_size: u32,
    /// Token ids are below this; no more than the tokenizer's and the model's vocabularies.
    pub vocab_size: u32,
    pub defaults: GenerationDefaults,
    /// When the model was loaded, unix time in seconds.
    pub created: u64,
    /// Names the build and the weights: equal fingerprints and seeds give equal texts.
    pub fingerprint: String,
    /// The text of each prompt goes to the log.
    pub log_prompts: bool,
}

impl AppState {
    #[must_use]
    pub fn new(limits: HttpLimits, keys: impl Into<Keyring>) -> Arc<Self> {
        let text_permits = Arc::new(Semaphore::new(limits.text_tasks_max));
        let keys = Arc::new(keys.into());
        Arc::new(AppState { limits, keys, model: OnceLock::new(), drain: Drain::default(), text_permits })
    }

    /// Publishes the model, once its engine knows the tenants.
    ///
    /// # Panics
    /// When called twice, or with a model that has no name.
    pub async fn publish(&self, model: ServedModel) {
        assert!(!model.names.is_empty(), "a served model has at least one name");
        let (engine, text) = (Arc::clone(&model.engine), Arc::clone(&model.text));
        self.keys.attach(Site { engine, text, block_size: model.block_size }).await;
        assert!(self.model.set(Arc::new(model)).is_ok(), "the model is published once");
    }

    /// The model, for requests that only read it.
    pub(crate) fn model(&self) -> Result<&Arc<ServedModel>, ServeError> {
        let model = self.model.get().ok_or(ServeError::Loading)?;
        if model.engine.health().ready { Ok(model) } else { Err(ServeError::Loading) }
    }

    /// The model, for requests that bring work: refused once the server drains.
    pub(crate) fn model_for_work(&self) -> Result<&Arc<ServedModel>, ServeError> {
        if self.draining() { Err(ServeError::Draining) } else { self.model() }
    }

    /// The model as soon as it is published, ready or not.
    pub(crate) fn published(&self) -> Option<&Arc<ServedModel>> {
        self.model.get()
    }

    /// New work is refused: shutdown was asked for here or in the engine.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.drain.started() || self.model.get().is_some_and(|model| model.engine.health().draining)
    }
}

impl ServedModel {
    /// The name to answer with, if the model that the client asked for is served here.
    pub(crate) fn resolve(&self, asked: Option<&str>) -> Result<&str, ServeError> {
        let Some(asked) = asked else { return Ok(&self.names[0]) };
        self.names.iter().map(String::as_str).find(|name| *name == asked).ok_or_else(|| ServeError::ModelNotFound {
            asked: asked.chars().take(128).collect(),
            served: self.names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
        })
    }
}
