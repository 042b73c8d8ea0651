//! Checks of a forward pass's input, done once for all layers: O(tokens + sequences).

use kvern_kernels::{HeadLayout, KernelError, KvShape};

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
