//! The division of one step's attention, made once per step and run once per layer. Pure and deterministic.
//!
//! How a row is cut depends on its own context alone, never on the batch, so that a row's bits do not depend on who else is in
//! it, unless there is no room for all partial results: then the shortest rows stay whole. What depends on the batch is only which block computes a piece: pieces go, longest first, to the worker with the least to
//! do (Graham's LPT rule), which is within a piece of even.
//!
//! Time O(pieces x log workers) per update; memory is kept from step to step.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::{CascadeRow, CascadeTile, DecodeItem, DecodeMerge, NONE, PrefillTile};

/// What a piece costs beside its positions, in positions: the start of its pipeline and its result.
const PIECE_COST: u32 = 32;

/// Positions per piece of a row that sees `context` of them. A short context makes short pieces, so that one sequence alone
/// keeps many blocks busy; a long one makes longer pieces, whose results are less to write and to merge.
#[must_use]
pub fn piece_len(context: u32) -> u32 {
    match context {
        0..=4096 => 256,
        4097..=32_768 => 512,
        _ => 1024,
    }
}

/// One query row of a decode step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeQuery {
    /// Row in the batch.
    pub row: u32,
    /// Row of the block tables.
    pub table: u32,
    /// Positions there are, the query's own included.
    pub context: u32,
}

/// Queries `first..first + count` of a step whose sequences begin with the same `len` positions, in the same blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPrefix {
    pub first: u32,
    pub count: u32,
    pub len: u32,
}

/// Positions per piece of a shared prefix.
const PREFIX_PIECE: u32 = 512;

/// Work of decode attention for `workers` blocks per KV head; the arrays are what the kernels read.
#[derive(Debug, Default)]
pub struct DecodePlan {
    /// Grouped by worker, longest first.
    pub items: Vec<DecodeItem>,
    /// `[workers + 1]`: worker `w` has the items `starts[w]..starts[w + 1]`.
    pub starts: Vec<u32>,
    pub merges: Vec<DecodeMerge>,
    /// Work on shared prefixes, for the cascade kernel.
    pub cascade_rows: Vec<CascadeRow>,
    pub cascade_tiles: Vec<CascadeTile>,
    /// Partial results written.
    pub partials: u32,
    /// Most of them; `None` is no bound.
    partials_max: Option<u32>,
    pieces: Vec<(u32, DecodeItem)>,
    /// Queries in the order in which they are cut.
    order: Vec<u32>,
    load: BinaryHeap<Reverse<(u32, u32)>>,
}

impl DecodePlan {
    /// A plan that writes at most `partials_max` partial results. Where that is too few the longest rows are cut first, and a row
    /// that would need more than are left is not cut.
    #[must_use]
    pub fn with_partials_max(partials_max: u32) -> DecodePlan {
        DecodePlan { partials_max: Some(partials_max), ..DecodePlan::default() }
    }

    /// Plans anew. A query at position p sees the last `window` positions up to p, or all.
    ///
    /// # Panics
    /// Without workers, with an empty context or an empty window.
    pub fn update(&mut self, queries: &[DecodeQuery], window: Option<u32>, workers: u32) {
        assert!(window != Some(0), "a window has at least one position");
        self.clear();
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend(0..queries.len() as u32);
        if !self.has_room(queries, &[]) {
            order.sort_by_key(|&at| Reverse(queries[at as usize].context));
        }
        for &at in &order {
            let query = &queries[at as usize];
            let seen = window.map_or(0, |window| query.context.saturating_sub(window));
            self.cut(query, seen, 0);
        }
        self.order = order;
        self.deal_out(workers);
    }

    /// Whether there is room for the partial results of a plan with these prefixes and no window.
    #[must_use]
    pub fn has_room(&self, queries: &[DecodeQuery], prefixes: &[SharedPrefix]) -> bool {
        let own = |query: &DecodeQuery| u64::from(query.context.div_ceil(piece_len(query.context)));
        let all: u64 = queries.iter().map(own).sum();
        let shared =
            prefixes.iter().map(|prefix| u64::from(prefix.count) * u64::from(prefix.len.div_ceil(PREFIX_PIECE)));
        self.partials_max.is_none_or(|most| all + shared.sum::<u64>() <= u64::from(most))
    }

    /// Plans anew, where the K and V of shared prefixes are read once for all rows that share one, `tile_rows` of them at a
    /// time. How such a row is cut depends on its prefix too: its bits are those of any batch in which it shares as much.
    ///
    /// # Panics
    /// Without workers, or where prefixes overlap, are not in the order of queries, or leave a sequence no position of its own.
    pub fn update_shared(&mut self, queries: &[DecodeQuery], prefixes: &[SharedPrefix], tile_rows: u32, workers: u32) {
        self.clear();
        let mut next = 0;
        for prefix in prefixes {
            let (first, end) = (prefix.first as usize, (prefix.first + prefix.count) as usize);
            assert!(next <= first && prefix.count > 0 && prefix.len > 0, "prefixes in the order of queries");
            queries[next..first].iter().for_each(|query| self.cut(query, 0, 0));
            self.share(&queries[first..end], prefix.len, tile_rows);
            next = end;
        }
        queries[next..].iter().for_each(|query| self.cut(query, 0, 0));
        self.deal_out(workers);
    }

    fn clear(&mut self) {
        self.partials = 0;
        self.pieces.clear();
        self.merges.clear();
        self.cascade_rows.clear();
        self.cascade_tiles.clear();
    }

    /// Cuts a prefix for the rows that share it, and what is left of each row.
    fn share(&mut self, queries: &[DecodeQuery], len: u32, tile_rows: u32) {
        let (first_row, pieces) = (self.cascade_rows.len() as u32, len.div_ceil(PREFIX_PIECE));
        for query in queries {
            assert!(query.context > len, "a sequence has a position after its prefix");
            self.cascade_rows.push(CascadeRow { row: query.row, partial: self.partials });
            self.cut(query, len, pieces);
        }
        for first in (0..queries.len() as u32).step_by(tile_rows as usize) {
            let rows = tile_rows.min(queries.len() as u32 - first);
            self.cascade_tiles.extend((0..pieces).map(|piece| CascadeTile {
                first_row: first_row + first,
                rows,
                first: piece * PREFIX_PIECE,
                end: len.min((piece + 1) * PREFIX_PIECE),
                table: queries[0].table,
                piece,
            }));
        }
    }

    /// Gives the pieces to workers.
    fn deal_out(&mut self, workers: u32) {
        assert!(workers > 0, "a plan needs workers");
        // Stable, so that equal pieces stay in the order of rows and positions.
        self.pieces.sort_by_key(|(_, item)| Reverse(item.end - item.first));
        self.load.clear();
        self.load.extend((0..workers).map(|worker| Reverse((0, worker))));
        for (worker, item) in &mut self.pieces {
            let Reverse((load, least)) = self.load.pop().expect("there are workers");
            *worker = least;
            self.load.push(Reverse((load + item.end - item.first + PIECE_COST, least)));
        }
        self.pieces.sort_by_key(|(worker, _)| *worker);
        self.items.clear();
        self.items.extend(self.pieces.iter().map(|(_, item)| *item));
        self.starts.clear();
        let end = |worker| self.pieces.partition_point(|(owner, _)| *owner < worker) as u32;
        self.starts.extend((0..=workers).map(end));
    }

    /// Cuts what one row sees from position `seen` on, at multiples of its piece length counted from position 0, so that a
    /// window moves over fixed cuts. Before these pieces go the `before` of a shared prefix.
    fn cut(&mut self, query: &DecodeQuery, seen: u32, before: u32) {
        let DecodeQuery { row, table, context } = *query;
        assert!(context > seen, "a query sees itself");
        let len = piece_len(context);
        let (first, end) = (seen / len, context.div_ceil(len));
        let count = before + end - first;
        let left = self.partials_max.map_or(u32::MAX, |most| most - self.partials);
        if count > 1 && count > left {
            assert!(before == 0, "a shared prefix has room for its partial results");
            return self.pieces.push((0, DecodeItem { row, table, first: seen, end: context, partial: NONE }));
        }
        if count > 1 {
            self.merges.push(DecodeMerge { row, first: self.partials, count });
        }
        for piece in first..end {
            let partial = if count > 1 { self.partials + before + piece - first } else { NONE };
            let item =
                DecodeItem { row, table, first: seen.max(piece * len), end: context.min((piece + 1) * len), partial };
            self.pieces.push((0, item));
        }
        self.partials += if count > 1 { count } else { 0 };
    }
}

/// The query rows of one sequence in a prefill step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillQuery {
    /// First row in the batch.
    pub row: u32,
    pub rows: u32,
    /// Position of the first row's token.
    pub position: u32,
    /// Row of the block tables.
    pub table: u32,
}

/// Tiles of prefill attention, those that see most first, so that the last ones to start are short.
#[derive(Debug, Default)]
pub struct PrefillPlan {
    pub tiles: Vec<PrefillTile>,
}

impl PrefillPlan {
    /// Plans anew, with at most `tile_rows` rows per tile.
    ///
    /// # Panics
    /// If `tile_rows` is 0.
    pub fn update(&mut self, queries: &[PrefillQuery], tile_rows: u32) {
        assert!(tile_rows > 0, "a tile has rows");
        self.tiles.clear();
        for query in queries {
            for first in (0..query.rows).step_by(tile_rows as usize) {
                let rows = tile_rows.min(query.rows - first);
                let (row, position) = (query.row + first, query.position + first);
                self.tiles.push(PrefillTile { row, rows, position, table: query.table });
            }
        }
        self.tiles.sort_by_key(|tile| Reverse(tile.position + tile.rows));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Contexts and how many of each, a window, workers, and the most that the busiest worker may have, in shares of an even
    /// division.
    type Row = (&'static [(u32, u32)], Option<u32>, u32, f64);

    /// Contexts, each times its number, for some workers: every position once, merges in order, and how uneven the load is.
    fn check(batch: &[(u32, u32)], window: Option<u32>, workers: u32) -> f64 {
        let contexts = batch.iter().flat_map(|&(context, times)| std::iter::repeat_n(context, times as usize));
        let query = |(row, context)| DecodeQuery { row: row as u32, table: 7 + row as u32, context };
        let queries: Vec<DecodeQuery> = contexts.enumerate().map(query).collect();
        let mut plan = DecodePlan::default();
        plan.update(&queries, window, workers);
        assert_eq!(plan.starts.len(), workers as usize + 1);
        assert_eq!((plan.starts[0], plan.starts[workers as usize]), (0, plan.items.len() as u32));
        assert!(plan.starts.is_sorted());
        let mut partials = vec![0; plan.partials as usize];
        for query in &queries {
            let mut own: Vec<_> = plan.items.iter().filter(|item| item.row == query.row).collect();
            own.sort_by_key(|item| item.first);
            let seen = window.map_or(0, |window| query.context.saturating_sub(window));
            assert!(own.iter().all(|item| item.table == query.table && item.first < item.end));
            assert_eq!((own[0].first, own[own.len() - 1].end), (seen, query.context));
            assert!(own.windows(2).all(|pair| pair[0].end == pair[1].first), "a gap or an overlap");
            let merge = plan.merges.iter().find(|merge| merge.row == query.row);
            match merge {
                None => assert!(own.len() == 1 && own[0].partial == NONE),
                Some(merge) => {
                    assert_eq!(merge.count as usize, own.len());
                    for (place, item) in (merge.first..).zip(own) {
                        assert_eq!(item.partial, place);
                        partials[place as usize] += 1;
                    }
                }
            }
        }
        assert!(partials.iter().all(|&writers| writers == 1), "each partial result has one writer");
        let loads: Vec<u32> = plan
            .starts
            .windows(2)
            .map(|range| {
                plan.items[range[0] as usize..range[1] as usize].iter().map(|item| item.end - item.first).sum()
            })
            .collect();
        let (most, all) = (loads.iter().max().unwrap(), loads.iter().map(|&load| u64::from(load)).sum::<u64>());
        f64::from(*most) * f64::from(workers) / all as f64
    }

    #[test]
    fn every_position_is_read_once_and_the_load_is_even() {
        let table: &[Row] = &[
            (&[(1, 1)], None, 1, 1.0),
            (&[(256, 1), (257, 1), (1, 3)], None, 4, 3.0),
            (&[(4096, 32)], None, 33, 1.04),
            (&[(1024, 256)], None, 33, 1.04),
            (&[(131_072, 1), (4096, 31)], None, 33, 1.04),
            (&[(131_072, 1), (200, 63)], None, 33, 1.06),
            (&[(131_072, 1)], None, 33, 1.04),
            (&[(131_072, 1), (4096, 31)], None, 264, 1.07),
            (&[(131_072, 2), (300, 5)], Some(4096), 8, 1.1),
            (&[(5000, 1), (40, 1)], Some(1), 3, 3.0),
        ];
        for (batch, window, workers, limit) in table {
            let uneven = check(batch, *window, *workers);
            assert!(uneven <= *limit, "{batch:?} for {workers} workers: {uneven}");
        }
    }

    #[test]
    fn rows_without_room_are_not_cut() {
        let contexts = [600, 601, 700, 90, 5000];
        let query = |(row, context): (u32, u32)| DecodeQuery { row, table: row, context };
        let queries: Vec<DecodeQuery> = (0..).zip(contexts).map(query).collect();
        let whole = |partials_max| {
            let mut plan = DecodePlan::with_partials_max(partials_max);
            plan.update(&queries, None, 2);
            assert!(plan.partials <= partials_max);
            let whole = plan.items.iter().filter(|item| item.partial == NONE);
            let mut whole: Vec<_> = whole.map(|item| (item.row, item.first, item.end)).collect();
            whole.sort_unstable();
            whole
        };
        // The fourth needs none, the last one ten, the others three each.
        let [first, second, third, short] = [(0, 0, 600), (1, 0, 601), (2, 0, 700), (3, 0, 90)];
        assert_eq!(whole(19), [short]);
        assert_eq!(whole(18), [first, short]);
        assert_eq!(whole(15), [first, second, short]);
        assert_eq!(whole(10), [first, second, third, short]);
        assert_eq!(whole(9), [short, (4, 0, 5000)]);
    }

    #[test]
    fn a_rows_pieces_do_not_depend_on_the_batch() {
        let query = DecodeQuery { row: 0, table: 0, context: 9000 };
        let alone_and_among = [1, 40].map(|rows| {
            let others = (1..rows).map(|row| DecodeQuery { row, table: row, context: 77 * row });
            let queries: Vec<_> = std::iter::once(query).chain(others).collect();
            let mut plan = DecodePlan::default();
            plan.update(&queries, None, 10 * rows);
            let mut own: Vec<_> =
                plan.items.iter().filter(|item| item.row == 0).map(|item| (item.first, item.end)).collect();
            own.sort_unstable();
            own
        });
        assert_eq!(alone_and_among[0], alone_and_among[1]);
    }

    #[test]
    fn tiles_cover_every_row_once() {
        let queries = [(0, 1, 40, 0), (1, 64, 0, 3), (65, 33, 100, 1), (98, 7, 0, 2)]
            .map(|(row, rows, position, table)| PrefillQuery { row, rows, position, table });
        let mut plan = PrefillPlan::default();
        plan.update(&queries, 16);
        let mut covered = vec![0; 105];
        for tile in &plan.tiles {
            let query = queries.iter().find(|query| query.table == tile.table).unwrap();
            assert_eq!(tile.position - query.position, tile.row - query.row);
            assert!(tile.rows <= 16 && tile.row >= query.row && tile.row + tile.rows <= query.row + query.rows);
            covered[tile.row as usize..(tile.row + tile.rows) as usize].iter_mut().for_each(|rows| *rows += 1);
        }
        assert!(covered.iter().all(|&rows| rows == 1));
        assert!(plan.tiles.is_sorted_by_key(|tile| Reverse(tile.position + tile.rows)));
    }

    #[test]
    fn shared_prefixes_are_read_once() {
        let contexts = [50, 1600, 1545, 1561, 20, 90, 95];
        let query = |(row, &context): (usize, &u32)| DecodeQuery { row: row as u32, table: 9 + row as u32, context };
        let queries: Vec<DecodeQuery> = contexts.iter().enumerate().map(query).collect();
        let prefixes = [(1, 3, 1536), (5, 2, 64)].map(|(first, count, len)| SharedPrefix { first, count, len });
        let mut plan = DecodePlan::default();
        plan.update_shared(&queries, &prefixes, 2, 4);
        let mut writers = vec![0; plan.partials as usize];
        // Per row, the positions that somebody reads for it.
        let mut read = contexts.map(|context| vec![0; context as usize]);
        for item in &plan.items {
            read[item.row as usize][item.first as usize..item.end as usize].iter_mut().for_each(|reads| *reads += 1);
            if item.partial != NONE {
                writers[item.partial as usize] += 1;
            }
        }
        for tile in &plan.cascade_tiles {
            assert!(tile.rows <= 2 && tile.first.is_multiple_of(64));
            for row in &plan.cascade_rows[tile.first_row as usize..(tile.first_row + tile.rows) as usize] {
                read[row.row as usize][tile.first as usize..tile.end as usize].iter_mut().for_each(|reads| *reads += 1);
                writers[(row.partial + tile.piece) as usize] += 1;
            }
        }
        assert!(read.iter().flatten().all(|&reads| reads == 1), "every position once");
        assert!(writers.iter().all(|&writers| writers == 1), "each partial result has one writer");
        let merged: u32 = plan.merges.iter().map(|merge| merge.count).sum();
        assert_eq!(merged, plan.partials);
    }
}
