//! Random traces with the lengths, the arrivals and the sharing of public ones, without their data. Endless, and the same at
//! every run.

use super::trace::{Arrival, BLOCK_TOKENS, Content, Row, mix};
use crate::config::Synthetic;
use kvern_core::Micros;

/// Conversations that may go on.
const CONVERSATIONS: usize = 1024;
/// In percent: arrivals that go on with one.
const FOLLOW_UPS: u64 = 60;
/// A prompt has no more blocks than this.
const BLOCKS_MAX: usize = 60;

pub(super) struct Generator {
    kind: Synthetic,
    state: u64,
    at_us: f64,
    conversations: Vec<Vec<u64>>,
    next_id: u64,
}

impl Generator {
    pub(super) fn new(kind: Synthetic) -> Self {
        Generator { kind, state: 1, at_us: 0.0, conversations: Vec::new(), next_id: 1 }
    }

    fn random(&mut self) -> u64 {
        self.state += 1;
        mix(self.state)
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.random() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// A log-normal number, by Box and Muller.
    fn lengths(&mut self, median: f64, sigma: f64, max: u32) -> u32 {
        let (a, b) = (self.uniform(), self.uniform());
        let normal = (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos();
        ((median * (sigma * normal).exp()) as u32).clamp(1, max)
    }

    /// Moves on by an exponential time.
    fn wait(&mut self, per_second: f64) {
        self.at_us += -self.uniform().ln() * 1e6 / per_second;
    }

    pub(super) fn next(&mut self) -> Row {
        let (prompt_tokens, output_tokens, content) = match self.kind {
            Synthetic::Azure => {
                self.wait(10.0);
                (self.lengths(900.0, 0.7, 8_000), self.lengths(130.0, 0.98, 2_000), Content::Unique)
            }
            Synthetic::Mooncake => {
                self.wait(2.0);
                let ids = self.conversation();
                let last = 1 + (self.random() % u64::from(BLOCK_TOKENS)) as u32;
                let prompt_tokens = (ids.len() as u32 - 1) * BLOCK_TOKENS + last;
                (prompt_tokens, self.lengths(200.0, 0.8, 2_000), Content::Blocks(ids))
            }
        };
        let arrival = Arrival {
            at: Micros(0),
            prompt_tokens,
            output_tokens,
            output_tokens_max: output_tokens,
            content,
            shared_tokens: 0,
            tenant: None,
            class: 0,
            timeout: None,
        };
        Row { at_us: self.at_us as i64, arrival }
    }

    /// The blocks of a new conversation, or of one that has grown. The last block of a prompt is not full, so that the next
    /// prompt has another in its place.
    fn conversation(&mut self) -> Vec<u64> {
        let goes_on = self.random() % 100 < FOLLOW_UPS && !self.conversations.is_empty();
        let at = self.random() as usize % CONVERSATIONS;
        let at = if goes_on { at % self.conversations.len() } else { at };
        let mut ids = if goes_on { self.conversations[at].clone() } else { vec![0] };
        let grown = if goes_on { self.lengths(2.0, 0.6, 8) } else { self.lengths(6.0, 0.9, 40) };
        if goes_on {
            ids.pop();
        }
        ids.extend((0..=grown).map(|block| self.next_id + u64::from(block)));
        self.next_id += u64::from(grown) + 1;
        if ids.len() > BLOCKS_MAX {
            ids.truncate(BLOCKS_MAX);
        }
        match self.conversations.get_mut(at) {
            Some(conversation) => conversation.clone_from(&ids),
            None => self.conversations.push(ids.clone()),
        }
        ids
    }
}
