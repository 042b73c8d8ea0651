//! The settings in use and their replacement.
//!
//! Owner: the front end's state. Requests read the table behind one pointer; a reload builds the next one aside and swaps it,
//! so that no request sees half of a file and none is dropped: whoever was let in goes on with what it got. One reload runs
//! at a time. Tenants keep their numbers for the life of the process and are never taken back from the engine, so that a
//! request that was let in by the file before is not unknown there.

use super::bucket::Moment;
use super::classes::ClassNames;
use super::file::{KeyFile, KeyFileError};
use super::prefixes::SharedPrefixes;
use super::table::{ApiKeys, Asked, Caller, Table, TenantSettings};
use crate::request::{Engine, NamedTenant, Terms};
use crate::text::TextModel;
use kvern_core::{CacheSalt, ClassId, TenantId, TenantSpec, TokenId};
use ring::{digest, hmac};
use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Mutex, Notify, watch};

/// Most bytes of a keys file.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Most tenants that one process comes to know, those of earlier files included.
const TENANTS_MAX: usize = 50_000;
/// Until a busy engine is asked again.
const ENGINE_PAUSE: Duration = Duration::from_millis(5);

/// What a keyring is made of.
#[derive(Clone, Debug, Default)]
pub struct KeyringOptions {
    pub api_keys: ApiKeys,
    /// The keys file.
    pub file: Option<PathBuf>,
    pub classes: ClassNames,
    /// `/metrics` needs a key too.
    pub guard_metrics: bool,
}

/// Why the settings cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    #[error("cannot read the keys file {path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("{path}: expected at most {FILE_BYTES_MAX} bytes, found more")]
    TooLarge { path: String },
    #[error("{path}, {source}")]
    File { path: String, source: KeyFileError },
    #[error("expected at most {TENANTS_MAX} tenants in the life of a process, found {found}: restart it")]
    TooManyTenants { found: usize },
    #[error("the engine has stopped and takes no settings")]
    EngineStopped,
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// A loaded model, as far as keys and tenants touch it.
pub struct Site {
    pub engine: Arc<dyn Engine>,
    pub text: Arc<TextModel>,
    /// Tokens of a block of the KV cache.
    pub block_size: u32,
}

/// All keys, what their callers may, and what they have used.
pub struct Keyring {
    api_keys: ApiKeys,
    file: Option<PathBuf>,
    classes: ClassNames,
    guard_metrics: bool,
    /// Of this process: nobody outside can compute block hashes, and so none can be made to collide.
    salt_key: hmac::Key,
    started: Instant,
    table: RwLock<Arc<Table>>,
    book: Mutex<Book>,
    swaps: watch::Sender<u64>,
}

/// What only a reload needs.
#[derive(Default)]
struct Book {
    /// Every tenant that was ever named; number `i + 1` is called `names[i]`.
    numbers: HashMap<Arc<str>, TenantId>,
    names: Vec<Arc<str>>,
    /// Hash of the file in use.
    content: Option<Vec<u8>>,
    site: Option<Site>,
}

impl Keyring {
    /// Reads the file, if there is one.
    pub fn open(options: KeyringOptions) -> Result<Self, KeyringError> {
        let KeyringOptions { api_keys, file, classes, guard_metrics } = options;
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(KeyringError::Random)?;
        let (mut book, mut table) = (Book::default(), Table::default());
        if let Some(path) = &file {
            let text = read(path)?;
            table = next_table(&mut book, &parse(path, &text, &classes)?, &table)?;
            book.content = Some(digest_of(&text));
            tracing::info!(keys = table.num_keys(), tenants = table.tenants.len(), "keys");
        }
        Ok(Keyring {
            api_keys,
            file,
            classes,
            guard_metrics,
            salt_key: hmac::Key::new(hmac::HMAC_SHA256, &secret),
            started: Instant::now(),
            table: RwLock::new(Arc::new(table)),
            book: Mutex::new(book),
            swaps: watch::Sender::new(0),
        })
    }

    /// Whether everyone may ask: there are neither keys nor a keys file.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.api_keys.is_empty() && self.file.is_none()
    }

    #[must_use]
    pub fn guards_metrics(&self) -> bool {
        self.guard_metrics
    }

    /// A caller without a key of the file: tenant 0, any class, no limits.
    #[must_use]
    pub fn anyone(&self) -> Caller {
        Caller {
            tenant: TenantId::default(),
            class: self.classes.default_class(),
            highest: ClassId::default(),
            account: None,
        }
    }

    /// Whose secret this is.
    #[must_use]
    pub fn find(&self, secret: &[u8]) -> Option<Caller> {
        let listed = self.table().find(secret).cloned();
        let plain = self.api_keys.contains(secret);
        listed.or_else(|| plain.then(|| self.anyone()))
    }

    /// What a request runs under; its shared tokens are its prompt's ([`Self::shared_tokens`]).
    #[must_use]
    pub fn terms(&self, caller: &Caller, asked: &Asked) -> Terms {
        let class = i64::from(caller.class.0).saturating_add(asked.class_steps);
        let class = class.min(self.classes.last().0.into()).max(caller.highest.0.into());
        Terms {
            tenant: caller.tenant,
            class: ClassId(class as u8),
            salt: self.salt(caller.tenant, asked.cache_salt.as_deref()),
            shared_tokens: 0,
            timeout: asked.timeout,
        }
    }

    /// How many first tokens of a prompt the operator made public.
    #[must_use]
    pub fn shared_tokens(&self, prompt: &[TokenId]) -> u32 {
        self.table().prefixes.shared_tokens(prompt)
    }

    #[must_use]
    pub fn now(&self) -> Moment {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment { uptime: self.started.elapsed(), unix }
    }

    /// Counts the tables that came into use.
    #[must_use]
    pub fn swaps(&self) -> watch::Receiver<u64> {
        self.swaps.subscribe()
    }

    /// The model is there: tells its engine the tenants and works out the shared prefixes. Requests must wait for it.
    pub async fn attach(&self, site: Site) {
        let mut book = self.book.lock().await;
        book.site = Some(site);
        let table = Table::clone(&self.table());
        if let Err(error) = self.install(&book, table).await {
            tracing::error!(%error, "the engine does not know the tenants");
        }
    }

    /// Reads the file again; `true` if it changed and is now in use. On an error all stays as it was.
    pub async fn reload(&self) -> Result<bool, KeyringError> {
        let Some(path) = self.file.clone() else { return Ok(false) };
        let mut book = self.book.lock().await;
        let (before, classes, known) = (self.table(), self.classes.clone(), book.content.clone());
        let read = move || {
            let text = read(&path)?;
            let content = digest_of(&text);
            if known.as_ref() == Some(&content) {
                return Ok(None);
            }
            Ok(Some((parse(&path, &text, &classes)?, content)))
        };
        let Some((file, content)) = blocking(read).await? else { return Ok(false) };
        let table = next_table(&mut book, &file, &before)?;
        tracing::info!(keys = table.num_keys(), tenants = table.tenants.len(), "the keys file has changed");
        self.install(&book, table).await?;
        book.content = Some(content);
        Ok(true)
    }

    /// Reloads the file when it has changed: looks every `every`, and at once when `asked`. Never returns. The content is
    /// compared, not the file's time, which a quick second change need not move.
    pub async fn follow(&self, every: Duration, asked: &Notify) {
        let mut last_error = None;
        loop {
            let was_asked = tokio::select! {
                () = asked.notified() => true,
                () = tokio::time::sleep(every) => false,
            };
            match self.reload().await {
                Ok(changed) => {
                    last_error = None;
                    if was_asked && !changed {
                        tracing::info!("the keys file has not changed");
                    }
                }
                // A file that stays broken is told once.
                Err(error) => {
                    let error = error.to_string();
                    if was_asked || last_error.as_ref() != Some(&error) {
                        tracing::error!(%error, "the keys in use stay as they were");
                    }
                    last_error = Some(error);
                }
            }
        }
    }

    /// Puts a table in use, once the engine knows its tenants.
    async fn install(&self, book: &Book, mut table: Table) -> Result<(), KeyringError> {
        if let Some(site) = &book.site {
            if !table.shared.is_empty() {
                let (shared, text) = (table.shared.clone(), Arc::clone(&site.text));
                table.prefixes = blocking(move || SharedPrefixes::new(&shared, &text)).await;
                tracing::info!(prefixes = table.prefixes.len(), "shared by all tenants");
            }
            let specs = specs(book, &table.tenants, site.block_size);
            while !specs.is_empty() && !site.engine.set_tenants(&specs) {
                if !site.engine.health().live {
                    return Err(KeyringError::EngineStopped);
                }
                tokio::time::sleep(ENGINE_PAUSE).await;
            }
        }
        table.apply_limits();
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        self.swaps.send_modify(|count| *count += 1);
        Ok(())
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The first 128 bits of HMAC-SHA256 over tenant and `cache_salt` under this process's random key.
    fn salt(&self, tenant: TenantId, cache_salt: Option<&str>) -> CacheSalt {
        let mut context = hmac::Context::with_key(&self.salt_key);
        context.update(&tenant.0.to_le_bytes());
        if let Some(text) = cache_salt {
            context.update(b":");
            context.update(text.as_bytes());
        }
        let tag = context.sign();
        let half = tag.as_ref().first_chunk().expect("a tag of SHA-256 has 32 bytes");
        CacheSalt(u128::from_le_bytes(*half))
    }
}

/// A keyring without a file.
///
/// # Panics
/// When the operating system gives no random numbers.
impl From<ApiKeys> for Keyring {
    fn from(api_keys: ApiKeys) -> Self {
        let options = KeyringOptions { api_keys, ..KeyringOptions::default() };
        Keyring::open(options).expect("the operating system gives random bytes, and there is no file to read")
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("reading keys and texts does not panic, and is not cancelled")
}

fn read(path: &Path) -> Result<String, KeyringError> {
    let shown = || path.display().to_string();
    let failed = |source| KeyringError::Read { path: shown(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX { Err(KeyringError::TooLarge { path: shown() }) } else { Ok(text) }
}

fn parse(path: &Path, text: &str, classes: &ClassNames) -> Result<KeyFile, KeyringError> {
    KeyFile::parse(text, classes).map_err(|source| KeyringError::File { path: path.display().to_string(), source })
}

fn digest_of(text: &str) -> Vec<u8> {
    digest::digest(&digest::SHA256, text.as_bytes()).as_ref().to_vec()
}

/// The table of a file, after numbering its tenants. The book keeps the numbers even if the table never comes into use.
fn next_table(book: &mut Book, file: &KeyFile, before: &Table) -> Result<Table, KeyringError> {
    let declared = file.tenants.iter().map(|tenant| tenant.name.as_str());
    let named: BTreeSet<&str> = declared.chain(file.keys.iter().map(|key| key.tenant.as_str())).collect();
    let new: Vec<Arc<str>> =
        named.into_iter().filter(|name| !book.numbers.contains_key(*name)).map(Arc::from).collect();
    let found = book.names.len() + new.len();
    if found > TENANTS_MAX {
        return Err(KeyringError::TooManyTenants { found });
    }
    for name in new {
        book.names.push(Arc::clone(&name));
        // 0 is whoever has no key of a file.
        book.numbers.insert(name, TenantId(book.names.len() as u32));
    }
    let number = |name: &str| book.numbers[name];
    let tenants = file.tenants.iter().map(|entry| TenantSettings {
        tenant: number(&entry.name),
        weight: entry.weight,
        kv_floor: entry.kv_floor,
        kv_ceiling: entry.kv_ceiling,
    });
    Ok(Table::new(&file.keys, tenants.collect(), file.shared.clone(), number, before))
}

/// What the engine is told: every tenant ever named, with its settings or with none; ordered by number.
fn specs(book: &Book, settings: &[TenantSettings], block_size: u32) -> Vec<NamedTenant> {
    let named = |(name, number)| NamedTenant { name: Arc::clone(name), spec: TenantSpec::new(TenantId(number)) };
    let mut specs: Vec<NamedTenant> = book.names.iter().zip(1..).map(named).collect();
    let blocks = |tokens: u64| u32::try_from(tokens.div_ceil(block_size.max(1).into())).unwrap_or(u32::MAX);
    for tenant in settings {
        let spec = &mut specs[tenant.tenant.0 as usize - 1].spec;
        spec.weight = tenant.weight;
        spec.floor_blocks = blocks(tenant.kv_floor);
        spec.ceiling_blocks = tenant.kv_ceiling.map(blocks);
    }
    specs
}
