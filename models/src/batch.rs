//! Checks of a forward pass's input, done once for all layers: O(tokens + sequences).

use kvern_kernels::{HeadLayout, KNOWN, KernelError, KvShape};

use crate::{ForwardBatch, StepLimits};

/// What a model accepts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchBounds {
    pub(crate) limits: StepLimits,
    pub(crate) vocab_size: usize,
    pub(crate) layers: usize,
    pub(crate) heads: HeadLayout,
}

/// Errors name the first field that is wrong. After it, every index that an op forms from `batch` is in range: ids in the
/// vocabulary, positions in the context, slots in the block that their sequence's table names for their position.
pub(crate) fn check(batch: &ForwardBatch<'_>, bounds: &BatchBounds, kv: &KvShape) -> Result<(), KernelError> {
    check_cache(bounds, kv)?;
    check_lengths(batch, bounds)?;
    for sequence in 0..batch.context_lens.len() {
        check_sequence(batch, bounds, kv, sequence)?;
    }
    let tokens = batch.input_ids.len();
    let mut next = 0;
    for &row in batch.sample_rows {
        ensure(row >= next && (row as usize) < tokens, "sample_rows", || {
            (format!("ascending rows below {tokens}"), format!("{row} where {next} is the least"))
        })?;
        next = row + 1;
    }
    Ok(())
}

fn check_cache(bounds: &BatchBounds, kv: &KvShape) -> Result<(), KernelError> {
    let expected = (bounds.layers, bounds.heads.kv_heads, bounds.heads.head_dim);
    let found = (kv.layers, kv.kv_heads, kv.head_dim);
    ensure(expected == found, "kv cache", || {
        (format!("(layers, kv heads, head dim) {expected:?}"), format!("{found:?}"))
    })
}

fn check_lengths(batch: &ForwardBatch<'_>, bounds: &BatchBounds) -> Result<(), KernelError> {
    let StepLimits { tokens_max, sequences_max, .. } = bounds.limits;
    let (tokens, sequences) = (batch.input_ids.len(), batch.context_lens.len());
    let within = |name, count: usize, least: usize, most: usize| {
        ensure((least..=most).contains(&count), name, || (format!("{least} to {most} entries"), count.to_string()))
    };
    let exactly = |name, count: usize, wanted: usize| within(name, count, wanted, wanted);
    within("input_ids", tokens, 1, tokens_max)?;
    within("context_lens", sequences, 1, sequences_max)?;
    within("sample_rows", batch.sample_rows.len(), 0, sequences_max)?;
    exactly("positions", batch.positions.len(), tokens)?;
    exactly("slot_mapping", batch.slot_mapping.len(), tokens)?;
    exactly("cu_seqlens_q", batch.cu_seqlens_q.len(), sequences + 1)?;
    exactly("block_tables", batch.block_tables.len(), sequences.saturating_mul(batch.block_table_stride))?;
    if !batch.last_sampled.is_empty() {
        exactly("last_sampled", batch.last_sampled.len(), sequences)?;
    }
    let (first, last) = (batch.cu_seqlens_q[0], batch.cu_seqlens_q[sequences]);
    ensure(first == 0 && last as usize == tokens, "cu_seqlens_q", || {
        (format!("0 to {tokens}"), format!("{first} to {last}"))
    })
}

fn check_sequence(
    batch: &ForwardBatch<'_>,
    bounds: &BatchBounds,
    kv: &KvShape,
    sequence: usize,
) -> Result<(), KernelError> {
    let tokens = batch.input_ids.len();
    let (begin, end) = (batch.cu_seqlens_q[sequence] as usize, batch.cu_seqlens_q[sequence + 1] as usize);
    ensure(begin < end && end <= tokens, "cu_seqlens_q", || {
        (format!("ascending up to {tokens}"), format!("{begin}, then {end}"))
    })?;
    if let Some(&place) = batch.last_sampled.get(sequence).filter(|&&place| place != KNOWN) {
        let most = bounds.limits.sequences_max;
        ensure(end - begin == 1 && (place as usize) < most, "last_sampled", || {
            (format!("a place below {most} for one token"), format!("{place} for {}", end - begin))
        })?;
    }
    let context = batch.context_lens[sequence] as usize;
    let covered = batch.block_table_stride.saturating_mul(kv.block_size);
    let context_max = bounds.limits.context_max.min(covered);
    ensure((end - begin..=context_max).contains(&context), "context_lens", || {
        (format!("{} to {context_max} tokens", end - begin), context.to_string())
    })?;
    let table = &batch.block_tables[sequence * batch.block_table_stride..][..batch.block_table_stride];
    for row in begin..end {
        let id = batch.input_ids[row];
        ensure((id as usize) < bounds.vocab_size, "input_ids", || {
            (format!("ids below {}", bounds.vocab_size), id.to_string())
        })?;
        let position = context - (end - row);
        ensure(batch.positions[row] as usize == position, "positions", || {
            (format!("{position} in row {row}"), batch.positions[row].to_string())
        })?;
        let block = table[position / kv.block_size] as usize;
        ensure(block < kv.blocks, "block_tables", || (format!("blocks below {}", kv.blocks), block.to_string()))?;
        let slot = block * kv.block_size + position % kv.block_size;
        ensure(batch.slot_mapping[row] as usize == slot, "slot_mapping", || {
            (format!("{slot} in row {row}"), batch.slot_mapping[row].to_string())
        })?;
    }
    Ok(())
}

/// The texts are made only for an error.
fn ensure(holds: bool, field: &'static str, texts: impl FnOnce() -> (String, String)) -> Result<(), KernelError> {
    if holds {
        return Ok(());
    }
    let (expected, found) = texts();
    Err(KernelError::Shape { op: field, expected, found })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use kvern_kernels::KvDType;

    use super::*;

    const BOUNDS: BatchBounds = BatchBounds {
        limits: StepLimits { tokens_max: 8, sequences_max: 2, context_max: 12 },
        vocab_size: 100,
        layers: 2,
        heads: HeadLayout { heads: 4, kv_heads: 2, head_dim: 8 },
    };
    const KV: KvShape = KvShape { layers: 2, blocks: 9, block_size: 4, kv_heads: 2, head_dim: 8, dtype: KvDType::F32 };

    /// Two sequences: the prompt 7, 8, 9 in block 5, and a decode at position 4 in blocks 3 and 8.
    const GOOD: ForwardBatch<'_> = ForwardBatch {
        input_ids: &[7, 8, 9, 10],
        positions: &[0, 1, 2, 4],
        slot_mapping: &[20, 21, 22, 32],
        cu_seqlens_q: &[0, 3, 4],
        context_lens: &[3, 5],
        block_tables: &[5, u32::MAX, 3, 8],
        block_table_stride: 2,
        sample_rows: &[2, 3],
        last_sampled: &[],
    };

    #[test]
    fn a_right_batch_passes() {
        check(&GOOD, &BOUNDS, &KV).unwrap();
        check(&ForwardBatch { sample_rows: &[], ..GOOD }, &BOUNDS, &KV).unwrap();
    }

    #[test]
    fn each_wrong_field_is_named() {
        let table: &[(ForwardBatch<'_>, &str)] = &[
            (ForwardBatch { input_ids: &[], ..GOOD }, "input_ids: expected 1 to 8 entries, found 0"),
            (ForwardBatch { input_ids: &[0; 9], ..GOOD }, "input_ids: expected 1 to 8 entries, found 9"),
            (ForwardBatch { input_ids: &[7, 8, 9, 100], ..GOOD }, "input_ids: expected ids below 100, found 100"),
            (ForwardBatch { positions: &[0, 1, 2], ..GOOD }, "positions: expected 4 to 4 entries, found 3"),
            (ForwardBatch { positions: &[0, 1, 2, 5], ..GOOD }, "positions: expected 4 in row 3, found 5"),
            (ForwardBatch { slot_mapping: &[20], ..GOOD }, "slot_mapping: expected 4 to 4 entries, found 1"),
            (ForwardBatch { slot_mapping: &[20, 21, 23, 32], ..GOOD }, "slot_mapping: expected 22 in row 2, found 23"),
            (ForwardBatch { cu_seqlens_q: &[0, 4], ..GOOD }, "cu_seqlens_q: expected 3 to 3 entries, found 2"),
            (ForwardBatch { cu_seqlens_q: &[0, 3, 5], ..GOOD }, "cu_seqlens_q: expected 0 to 4, found 0 to 5"),
            (
                ForwardBatch { cu_seqlens_q: &[0, 9, 4], ..GOOD },
                "cu_seqlens_q: expected ascending up to 4, found 0, then 9",
            ),
            (ForwardBatch { cu_seqlens_q: &[0, 4, 4], ..GOOD }, "context_lens: expected 4 to 8 tokens, found 3"),
            (ForwardBatch { context_lens: &[], ..GOOD }, "context_lens: expected 1 to 2 entries, found 0"),
            (ForwardBatch { context_lens: &[2, 5], ..GOOD }, "context_lens: expected 3 to 8 tokens, found 2"),
            (ForwardBatch { context_lens: &[3, 9], ..GOOD }, "context_lens: expected 1 to 8 tokens, found 9"),
            (ForwardBatch { block_tables: &[5, 3], ..GOOD }, "block_tables: expected 4 to 4 entries, found 2"),
            (ForwardBatch { block_tables: &[9, 0, 3, 8], ..GOOD }, "block_tables: expected blocks below 9, found 9"),
            (ForwardBatch { block_table_stride: usize::MAX, ..GOOD }, "block_tables: expected 18446744073709551615"),
            (ForwardBatch { sample_rows: &[0, 1, 2], ..GOOD }, "sample_rows: expected 0 to 2 entries, found 3"),
            (ForwardBatch { sample_rows: &[3, 2], ..GOOD }, "sample_rows: expected ascending rows below 4, found 2"),
            (ForwardBatch { sample_rows: &[4], ..GOOD }, "sample_rows: expected ascending rows below 4, found 4"),
            (ForwardBatch { last_sampled: &[0], ..GOOD }, "last_sampled: expected 2 to 2 entries, found 1"),
            (
                ForwardBatch { last_sampled: &[0, KNOWN], ..GOOD },
                "last_sampled: expected a place below 2 for one token, found 0 for 3",
            ),
            (
                ForwardBatch { last_sampled: &[KNOWN, 2], ..GOOD },
                "last_sampled: expected a place below 2 for one token, found 2 for 1",
            ),
        ];
        for (batch, expected) in table {
            let message = check(batch, &BOUNDS, &KV).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message} instead of {expected}");
        }
    }

    #[test]
    fn a_context_beyond_the_limit_is_refused() {
        let tables: Vec<u32> = (0..8).collect();
        let batch = ForwardBatch { context_lens: &[3, 13], block_tables: &tables, block_table_stride: 4, ..GOOD };
        let batch = ForwardBatch { slot_mapping: &[0, 1, 2, 32], ..batch };
        let message = check(&batch, &BOUNDS, &KV).unwrap_err().to_string();
        assert_eq!(message, "context_lens: expected 1 to 12 tokens, found 13");
    }

    #[test]
    fn a_cache_of_another_model_is_refused() {
        let message = check(&GOOD, &BOUNDS, &KvShape { head_dim: 16, ..KV }).unwrap_err().to_string();
        assert_eq!(message, "kv cache: expected (layers, kv heads, head dim) (2, 2, 8), found (2, 2, 16)");
    }
}
