//! Secrets of keys, which the file holds as hashes.
//!
//! `sha256:SALT:HASH`, both in hex; the hash is SHA-256 over the 16 bytes of the salt and the secret. A secret made here has
//! 160 random bits, which nobody guesses however fast the hash is; a slow hash would cost each request its time
//! (`docs/adr/0018-keys-and-limits.md`).

use ring::digest;
use std::fmt;
use std::str::FromStr;

/// Letters and digits without those that look alike: 32, so that each takes five bits.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
const RANDOM_CHARS: usize = 32;
const PREFIX: &str = "kv-";
const SALT_BYTES: usize = 16;
const HASH_BYTES: usize = digest::SHA256_OUTPUT_LEN;
/// Longer ones open nothing: a head full of bytes must not be hashed once per salt.
pub(super) const SECRET_BYTES_MAX: usize = 256;
const FORM: &str = "sha256:SALT:HASH with 32 and 64 hex digits";

/// What is hashed before a secret. Keys of one salt are checked with one hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Salt([u8; SALT_BYTES]);

impl Salt {
    /// A new one.
    ///
    /// # Errors
    /// When the operating system gives no random numbers.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; SALT_BYTES];
        getrandom::fill(&mut bytes)?;
        Ok(Salt(bytes))
    }

    /// The hash of a secret.
    pub(super) fn hash(&self, secret: &[u8]) -> [u8; HASH_BYTES] {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&self.0);
        context.update(secret);
        let mut hash = [0; HASH_BYTES];
        hash.copy_from_slice(context.finish().as_ref());
        hash
    }
}

impl FromStr for Salt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("expected a salt of 32 hex digits, found `{}`", clipped(text));
        unhex(text).map(Salt).ok_or_else(expected)
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// A secret as the file knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HashedSecret {
    pub(super) salt: Salt,
    pub(super) hash: [u8; HASH_BYTES],
}

impl HashedSecret {
    #[must_use]
    pub fn new(salt: Salt, secret: &[u8]) -> Self {
        HashedSecret { salt, hash: salt.hash(secret) }
    }
}

impl FromStr for HashedSecret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let parsed = match parts[..] {
            ["sha256", salt, hash] => unhex(salt).map(Salt).zip(unhex(hash)),
            _ => None,
        };
        // What stands there may be a secret that somebody forgot to hash.
        let found = || format!("expected {FORM}, as `kvern key` prints it, found something else");
        parsed.map(|(salt, hash)| HashedSecret { salt, hash }).ok_or_else(found)
    }
}

impl fmt::Display for HashedSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}:{}", hex(&self.salt.0), hex(&self.hash))
    }
}

/// A new secret.
///
/// # Errors
/// When the operating system gives no random numbers.
pub(super) fn random_secret() -> Result<String, getrandom::Error> {
    let mut bytes = [0; RANDOM_CHARS];
    getrandom::fill(&mut bytes)?;
    let letters = bytes.map(|byte| char::from(ALPHABET[usize::from(byte % 32)]));
    Ok(PREFIX.chars().chain(letters).collect())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Exactly `N` bytes, or nothing.
fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}

fn clipped(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_sha256_of_salt_and_secret() {
        // printf 'saltsaltsaltsaltkv-secret' | sha256sum
        let salt: Salt = hex(b"saltsaltsaltsalt").parse().expect("a salt");
        let expected = "sha256:73616c7473616c7473616c7473616c74:\
                        a677d57c5d131051ec85500efc645fa251533f87e7d2dd8d6189de78c5ef69a2";
        let hashed = HashedSecret::new(salt, b"kv-secret");
        assert_eq!(hashed.to_string(), expected);
        assert_eq!(expected.parse(), Ok(hashed));
        assert_eq!(expected.to_uppercase().replace("SHA", "sha").parse(), Ok(hashed));
    }

    #[test]
    fn what_is_no_hash_is_refused_and_not_repeated() {
        let (salt, hash) = ("0".repeat(32), "a".repeat(64));
        let cases = [
            "kv-secret".to_owned(),
            String::new(),
            format!("sha256:{salt}"),
            format!("sha256:{salt}:{hash}:"),
            format!("sha256:{salt}0:{hash}"),
            format!("sha256:{salt}:{}", "é".repeat(32)),
            format!("sha256:{salt}:+{}", "a".repeat(63)),
            format!("md5:{salt}:{hash}"),
        ];
        for text in cases {
            let error = text.parse::<HashedSecret>().expect_err(&text);
            assert!(error.starts_with("expected sha256:SALT:HASH") && !error.contains("kv-secret"), "{error}");
        }
        assert!("xyz".parse::<Salt>().is_err_and(|error| error.contains("32 hex digits, found `xyz`")));
    }

    #[test]
    fn secrets_are_random_words() {
        let (one, other) = (random_secret().expect("random bytes"), random_secret().expect("random bytes"));
        assert_ne!(one, other);
        assert_eq!((one.len(), &one[..3]), (35, "kv-"));
        assert!(one.bytes().skip(3).all(|byte| ALPHABET.contains(&byte)), "{one}");
    }
}
