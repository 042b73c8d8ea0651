//! The bytes that each token stands for, side by side in one allocation.
//!
//! Owner: [`super::tokenizer::Tokenizer`]. Looking up a token is O(1) and allocates nothing; detokenizing is copying.

use kvern_core::TokenId;

/// Bytes and flags of every token id below `len`. A hole in the ids is an empty token.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    /// `[len + 1]`: token `id` is `bytes[starts[id]..starts[id + 1]]`.
    starts: Vec<u32>,
    special: Vec<bool>,
    longest_bytes: usize,
}

impl TokenTable {
    /// Takes the tokens in order of their ids, each with whether it is special. Fails past 4 GiB of text.
    pub(super) fn new(tokens: impl Iterator<Item = (Vec<u8>, bool)>) -> Result<Self, std::num::TryFromIntError> {
        let mut table = Self { starts: vec![0], ..Self::default() };
        for (bytes, special) in tokens {
            table.longest_bytes = table.longest_bytes.max(bytes.len());
            table.bytes.extend_from_slice(&bytes);
            table.starts.push(u32::try_from(table.bytes.len())?);
            table.special.push(special);
        }
        Ok(table)
    }

    /// Ids are below this.
    pub(super) fn len(&self) -> usize {
        self.special.len()
    }

    /// Nothing for an id outside the vocabulary.
    pub(super) fn bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        if id >= self.len() {
            return &[];
        }
        &self.bytes[self.starts[id] as usize..self.starts[id + 1] as usize]
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    pub(super) fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }
}
