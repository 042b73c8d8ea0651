//! The settings in use, as one immutable value: which secrets open the server, and what their callers may.
//!
//! Owner: [`super::Keyring`], which replaces it whole; a request reads one table from its first byte to its last.

use super::account::{Account, Limits};
use super::file::{KeyEntry, SharedText};
use super::prefixes::SharedPrefixes;
use super::secret::{HashedSecret, SECRET_BYTES_MAX, Salt};
use kvern_core::{ClassId, TenantId};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// Keys without limits, given by flag.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<String>);

impl ApiKeys {
    /// Empty keys are dropped: an unset variable must not become a key that everyone knows.
    #[must_use]
    pub fn new(keys: Vec<String>) -> Self {
        ApiKeys(keys.into_iter().filter(|key| !key.is_empty()).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Compares with every key in full, so that time tells nothing about a key but its length.
    pub(super) fn contains(&self, key: &[u8]) -> bool {
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.as_bytes().ct_eq(key));
        found.into()
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({} keys)", self.0.len())
    }
}

/// On whose behalf a request is made, and what that allows.
#[derive(Clone, Debug)]
pub struct Caller {
    pub tenant: TenantId,
    /// Of a request that asks for none.
    pub class: ClassId,
    /// The most urgent one that it may ask for.
    pub highest: ClassId,
    /// `None` for callers without limits.
    pub account: Option<Arc<Account>>,
}

/// What a request asks for beside its prompt, in range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Classes above (negative) or below the caller's own.
    pub class_steps: i64,
    /// Narrows the sharing of prefixes to requests with the same.
    pub cache_salt: Option<String>,
    pub timeout: Option<Duration>,
}

/// One key and what it stands for.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) limits: Limits,
    pub(super) caller: Caller,
}

/// What the core must know of a tenant, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TenantSettings {
    pub(super) tenant: TenantId,
    pub(super) weight: u32,
    pub(super) kv_floor: u64,
    pub(super) kv_ceiling: Option<u64>,
}

/// All that a keys file says, with numbers for its names.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    keys: Vec<Key>,
    /// The secrets by their salts, each with its key's index.
    secrets: Vec<(Salt, Vec<(HashedSecret, u32)>)>,
    pub(super) tenants: Vec<TenantSettings>,
    pub(super) shared: Vec<SharedText>,
    pub(super) prefixes: SharedPrefixes,
}

impl Table {
    /// `accounts` are those of the table before: a key of the same name goes on with its own.
    pub(super) fn new(
        entries: &[KeyEntry],
        tenants: Vec<TenantSettings>,
        shared: Vec<SharedText>,
        number: impl Fn(&str) -> TenantId,
        before: &Table,
    ) -> Self {
        let accounts: BTreeMap<&str, &Arc<Account>> =
            before.keys.iter().filter_map(|key| Some((key.name.as_str(), key.caller.account.as_ref()?))).collect();
        let mut secrets: BTreeMap<Salt, Vec<(HashedSecret, u32)>> = BTreeMap::new();
        let mut keys = Vec::with_capacity(entries.len());
        for (at, entry) in (0..).zip(entries) {
            secrets.entry(entry.secret.salt).or_default().push((entry.secret, at));
            let account = accounts.get(entry.name.as_str()).map(|account| Arc::clone(account));
            let caller = Caller {
                tenant: number(&entry.tenant),
                class: entry.class,
                highest: entry.highest,
                account: Some(account.unwrap_or_else(|| Arc::new(Account::new(&entry.limits)))),
            };
            keys.push(Key { name: entry.name.clone(), limits: entry.limits, caller });
        }
        Table { keys, secrets: secrets.into_iter().collect(), tenants, shared, prefixes: SharedPrefixes::default() }
    }

    /// From now on the limits of this table count.
    pub(super) fn apply_limits(&self) {
        for key in &self.keys {
            if let Some(account) = &key.caller.account {
                account.set_limits(&key.limits);
            }
        }
    }

    /// Whose secret this is. Every entry is compared in full, whichever it is.
    pub(super) fn find(&self, secret: &[u8]) -> Option<&Caller> {
        if secret.len() > SECRET_BYTES_MAX {
            return None;
        }
        let (mut found, mut at) = (Choice::from(0), 0_u32);
        for (salt, entries) in &self.secrets {
            let hash = salt.hash(secret);
            for (known, index) in entries {
                let equal = known.hash.ct_eq(&hash);
                at.conditional_assign(index, equal);
                found |= equal;
            }
        }
        bool::from(found).then(|| &self.keys[at as usize].caller)
    }

    pub(super) fn num_keys(&self) -> usize {
        self.keys.len()
    }
}
