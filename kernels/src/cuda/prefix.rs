//! Which sequences of a decode step begin with the same blocks, so that attention may read those once for all of them.
//!
//! Blocks tell: two sequences have the same block only where they have the same tokens up to its end. O(n log n + entries
//! compared) per step.

use kvern_cuda_abi::{DecodeQuery, SharedPrefix};

/// Sequences that have to share a prefix for it to pay.
const SEQUENCES_MIN: usize = 4;
/// Tokens of the shortest prefix that pays: a piece of the kernel's.
const TOKENS_MIN: usize = 512;

/// Where reads are saved, and how many.
#[derive(Debug, Default)]
pub(super) struct SharedPrefixes {
    /// In the order of the queries.
    pub(super) found: Vec<SharedPrefix>,
    /// Positions that need not be read again, over all sequences.
    pub(super) saved_tokens: u64,
}

impl SharedPrefixes {
    /// Looks for prefixes; brings queries that share one together. `tables` holds the tables that queries name by their first
    /// entry, in blocks of `block_size` tokens.
    pub(super) fn find(&mut self, queries: &mut [DecodeQuery], tables: &[u32], block_size: usize) {
        self.found.clear();
        self.saved_tokens = 0;
        let first_block = |query: &DecodeQuery| tables[query.table as usize];
        queries.sort_by_key(first_block);
        let mut first = 0;
        for run in queries.chunk_by(|a, b| first_block(a) == first_block(b)) {
            if run.len() >= SEQUENCES_MIN {
                let len = shared_blocks(run, tables, block_size) * block_size;
                if len >= TOKENS_MIN {
                    self.found.push(SharedPrefix { first: first as u32, count: run.len() as u32, len: len as u32 });
                    self.saved_tokens += (run.len() as u64 - 1) * len as u64;
                }
            }
            first += run.len();
        }
    }
}

/// Whole blocks that all begin with; each has a position after them.
fn shared_blocks(run: &[DecodeQuery], tables: &[u32], block_size: usize) -> usize {
    let before_last = |query: &DecodeQuery| (query.context as usize - 1) / block_size;
    let table = |query: &DecodeQuery| &tables[query.table as usize..][..before_last(query)];
    let first = table(&run[0]);
    run[1..].iter().fold(first.len(), |shared, query| {
        let same = first[..shared].iter().zip(table(query)).take_while(|(a, b)| a == b);
        same.count()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contexts, and blocks that each sequence shares with the others of its group; groups by a number.
    fn check(sequences: &[(u32, usize, u32)], expected: &[SharedPrefix]) {
        const BLOCK_SIZE: usize = 128;
        let (mut tables, mut queries) = (Vec::new(), Vec::new());
        for (row, &(context, shared, group)) in sequences.iter().enumerate() {
            let table = tables.len() as u32;
            let own = |at: usize| 1_000 * (row as u32 + 1) + at as u32;
            let blocks = (context as usize).div_ceil(BLOCK_SIZE);
            tables.extend((0..blocks).map(|at| if at < shared { 100_000 * group + at as u32 } else { own(at) }));
            queries.push(DecodeQuery { row: row as u32, table, context });
        }
        let mut prefixes = SharedPrefixes::default();
        prefixes.find(&mut queries, &tables, BLOCK_SIZE);
        assert_eq!(prefixes.found, expected);
        let saved = expected.iter().map(|prefix| u64::from(prefix.count - 1) * u64::from(prefix.len)).sum::<u64>();
        assert_eq!(prefixes.saved_tokens, saved);
        let mut rows: Vec<u32> = queries.iter().map(|query| query.row).collect();
        rows.sort_unstable();
        assert!(rows.iter().copied().eq(0..sequences.len() as u32), "every row once");
    }

    #[test]
    fn prefixes_are_found_among_others() {
        let prefix = |first, count, len| SharedPrefix { first, count, len };
        check(&[], &[]);
        // Three are too few; four are enough, in any order among others.
        check(&[(700, 5, 1), (800, 5, 1), (900, 5, 1)], &[]);
        check(&[(700, 5, 1), (800, 5, 1), (90, 0, 9), (900, 5, 1), (1000, 5, 1)], &[prefix(1, 4, 640)]);
        // The shortest decides, and keeps a position of its own: 641 tokens end one after the fifth block, 640 with it.
        check(&[(641, 5, 1), (800, 6, 1), (900, 6, 1), (1000, 6, 1)], &[prefix(0, 4, 640)]);
        check(&[(640, 5, 1), (800, 6, 1), (900, 6, 1), (1000, 6, 1)], &[prefix(0, 4, 512)]);
        check(&[(639, 3, 1), (800, 6, 1), (900, 6, 1), (1000, 6, 1)], &[]);
        // Two groups.
        let groups: Vec<_> = (0..10).map(|row| (1500 + row, 4 + row as usize % 2 * 4, row % 2 + 1)).collect();
        check(&groups, &[prefix(0, 5, 512), prefix(5, 5, 1024)]);
    }
}
