//! `kvern key`: secrets and their entries for the keys file.

use super::file::check_name;
use super::secret::{HashedSecret, SECRET_BYTES_MAX, Salt, random_secret};
use crate::config::{KeyConfig, KeyTask};
use std::io::{self, BufRead, Write};

/// Shorter ones can be tried out by whoever reads the file.
const GUESSABLE_BYTES_MAX: usize = 19;

#[derive(Debug, thiserror::Error)]
pub enum KeyCommandError {
    #[error("{0}")]
    Name(String),
    #[error("expected a secret of 1 to {SECRET_BYTES_MAX} bytes on standard input, found {found}")]
    Secret { found: usize },
    #[error("the system gives no random numbers: {0}")]
    Random(#[from] getrandom::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Writes the `[[key]]` entry to `out` and what is for eyes only to `notes`, so that `kvern key new NAME >> keys.toml` shows
/// the secret and keeps its hash.
pub fn run(
    config: &KeyConfig,
    input: &mut dyn BufRead,
    out: &mut dyn Write,
    notes: &mut dyn Write,
) -> Result<(), KeyCommandError> {
    check_name("name", &config.name).map_err(KeyCommandError::Name)?;
    let salt = config.salt.map_or_else(Salt::random, Ok)?;
    let secret = match config.task {
        KeyTask::New => {
            let secret = random_secret()?;
            writeln!(notes, "the secret of `{}`, shown this once: {secret}", config.name)?;
            secret
        }
        KeyTask::Hash => {
            let secret = first_line(input)?;
            if !(1..=SECRET_BYTES_MAX).contains(&secret.len()) {
                return Err(KeyCommandError::Secret { found: secret.len() });
            }
            if secret.len() <= GUESSABLE_BYTES_MAX {
                writeln!(notes, "this secret is short: who reads its hash may find it by trying")?;
            }
            secret
        }
    };
    let hashed = HashedSecret::new(salt, secret.as_bytes());
    writeln!(out, "[[key]]\nname = \"{}\"\nsecret = \"{hashed}\"", config.name)?;
    out.flush()?;
    Ok(())
}

/// Without its end.
fn first_line(input: &mut dyn BufRead) -> io::Result<String> {
    let mut line = String::new();
    io::Read::take(input, SECRET_BYTES_MAX as u64 + 2).read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
