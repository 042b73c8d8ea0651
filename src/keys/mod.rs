//! Who may ask, on whose behalf, how much: the keys file, the limits of each key, and the terms that a request gets by them.
//!
//! Owner: one [`Keyring`] in the front end's state. It knows no HTTP: what a refusal looks like is said in `error.rs` and
//! `http/`. Settings are an immutable `Table` behind one pointer that a reload replaces; what was used is in an
//! [`Account`] per key, which outlives reloads. A request costs one hash per salt in the file and one comparison per key.
//!
//! ```text
//! keys.toml -> file (checked, with lines) -> table (numbers, accounts, shared prefixes) -> Engine::set_tenants -> in use
//! ```

mod account;
mod bucket;
mod classes;
mod command;
mod file;
mod keyring;
mod prefixes;
mod secret;
mod table;

pub use account::{Account, Charge, Denied, Limits, Permit, Standing};
pub use bucket::{Moment, Window};
pub use classes::ClassNames;
pub use command::{KeyCommandError, run as run_command};
pub use file::{KeyEntry, KeyFile, KeyFileError, PublicText, SharedText, TenantEntry};
pub use keyring::{Keyring, KeyringError, KeyringOptions, Site};
pub use secret::{HashedSecret, Salt};
pub use table::{ApiKeys, Asked, Caller};

#[cfg(test)]
mod tests;
