//! Moves blocks from one KV pool to another: the hand-over from a prefill to a decode worker with memory of its own.
//!
//! Owner: one thread. The core pins the blocks of both sides until it is told that the move is done.

use kvern_core::{BlockId, TransferId, WorkerId};
use kvern_kernels::{KernelError, KvCache};

/// One request's blocks on their way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub transfer: TransferId,
    pub from: WorkerId,
    pub to: WorkerId,
    /// Each first block is copied to the second.
    pub blocks: Vec<(BlockId, BlockId)>,
}

/// Handles on each worker's pool, by the worker's number.
pub struct Mover {
    caches: Vec<KvCache>,
    pairs: Vec<(u32, u32)>,
}

impl Mover {
    #[must_use]
    pub fn new(caches: Vec<KvCache>) -> Self {
        Mover { caches, pairs: Vec::new() }
    }

    /// Copies the blocks. O(bytes).
    ///
    /// # Errors
    /// When a worker or a block does not exist; nothing was copied then.
    pub fn run(&mut self, transfer: &Transfer) -> Result<(), KernelError> {
        let Transfer { from, to, blocks, .. } = transfer;
        self.pairs.clear();
        self.pairs.extend(blocks.iter().map(|(source, target)| (source.0, target.0)));
        let ends = self.caches.get_disjoint_mut([usize::from(from.0), usize::from(to.0)]);
        let Ok([source, target]) = ends else {
            let found = format!("from worker {} to {}", from.0, to.0);
            return Err(KernelError::Unsupported(format!("expected a move between two workers, found one {found}")));
        };
        target.copy_blocks(source, &self.pairs)
    }
}
