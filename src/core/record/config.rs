//! The configuration as the first entry of a recording.

use super::RecordError;
use super::bytes::{Reader, put_varint};
use crate::{ClassSpec, CoreConfig, CostModel, Micros, PoolId, Role, WorkerSpec};

/// Their numbers in a recording; append only.
const ROLES: [Role; 3] = [Role::Mixed, Role::Prefill, Role::Decode];

pub(super) fn put_config(out: &mut Vec<u8>, config: &CoreConfig) {
    put_varint(out, config.pools.len() as u64);
    config.pools.iter().for_each(|num_blocks| put_varint(out, u64::from(*num_blocks)));
    put_varint(out, config.workers.len() as u64);
    for worker in &config.workers {
        put_varint(out, ROLES.iter().position(|role| *role == worker.role).expect("every role is listed") as u64);
        put_varint(out, u64::from(worker.pool.0));
    }
    put_varint(out, config.classes.len() as u64);
    for class in &config.classes {
        put_option(out, class.ttft);
        put_option(out, class.itl);
    }
    let CoreConfig { block_size, step_tokens_max, running_max, waiting_max, request_tokens_max, hash_bits, .. } =
        *config;
    let CoreConfig { bypasses_max, overtakes_max, chunk_tokens_min, ride_along_tokens_max, .. } = *config;
    let limits = [block_size, step_tokens_max, running_max, waiting_max, request_tokens_max, hash_bits];
    let order = [bypasses_max, overtakes_max, chunk_tokens_min, ride_along_tokens_max];
    limits.into_iter().chain(order).for_each(|field| put_varint(out, u64::from(field)));
    let CostModel { step_ps, prefill_token_ps, prefill_context_ps, decode_sequence_ps, decode_context_ps } =
        config.cost;
    let cost = [step_ps, prefill_token_ps, prefill_context_ps, decode_sequence_ps, decode_context_ps];
    let flags = [config.prefix_caching, config.plan_ahead, config.device_parts].map(u64::from);
    let wide = [config.queue_tokens_max, config.quarantine.0].into_iter().chain(flags);
    wide.chain(cost).for_each(|field| put_varint(out, field));
}

pub(super) fn read_config(body: &mut Reader<'_>) -> Result<CoreConfig, RecordError> {
    let num_pools = body.len()?;
    let mut pools = Vec::with_capacity(num_pools);
    for _ in 0..num_pools {
        pools.push(body.u32()?);
    }
    let num_workers = body.len()?;
    let mut workers = Vec::with_capacity(num_workers);
    for _ in 0..num_workers {
        let role = usize::try_from(body.varint()?).ok().and_then(|at| ROLES.get(at)).copied();
        let role = role.ok_or(body.malformed("a role"))?;
        let pool = u8::try_from(body.varint()?).map_err(|_| body.malformed("a pool below 256"))?;
        workers.push(WorkerSpec { role, pool: PoolId(pool) });
    }
    let num_classes = body.len()?;
    let mut classes = Vec::with_capacity(num_classes);
    for _ in 0..num_classes {
        classes.push(ClassSpec { ttft: read_option(body)?, itl: read_option(body)? });
    }
    let config = CoreConfig {
        pools,
        workers,
        classes,
        block_size: body.u32()?,
        step_tokens_max: body.u32()?,
        running_max: body.u32()?,
        waiting_max: body.u32()?,
        request_tokens_max: body.u32()?,
        hash_bits: body.u32()?,
        bypasses_max: body.u32()?,
        overtakes_max: body.u32()?,
        chunk_tokens_min: body.u32()?,
        ride_along_tokens_max: body.u32()?,
        queue_tokens_max: body.varint()?,
        quarantine: Micros(body.varint()?),
        prefix_caching: body.flag()?,
        plan_ahead: body.flag()?,
        device_parts: body.flag()?,
        cost: CostModel {
            step_ps: body.varint()?,
            prefill_token_ps: body.varint()?,
            prefill_context_ps: body.varint()?,
            decode_sequence_ps: body.varint()?,
            decode_context_ps: body.varint()?,
        },
    };
    body.end()?;
    Ok(config)
}

/// A time, or 0 for none: one more than its microseconds.
pub(super) fn put_option(out: &mut Vec<u8>, time: Option<Micros>) {
    super::bytes::put_varint128(out, time.map_or(0, |time| u128::from(time.0) + 1));
}

pub(super) fn read_option(body: &mut Reader<'_>) -> Result<Option<Micros>, RecordError> {
    let time = body.varint128()?;
    let below = |time: u128| u64::try_from(time).map(Micros).map_err(|_| body.malformed("a time below 2^64"));
    time.checked_sub(1).map(below).transpose()
}
