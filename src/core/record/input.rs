//! The inputs as entries of a recording: a tag, the time, the fields.

use super::RecordError;
use super::bytes::{Reader, put_varint, put_varint128};
use super::config::{put_option, read_option};
use crate::{
    CacheSalt, CancelReason, ClassId, Input, Micros, RequestId, Sampled, StepId, Submission, TenantId, TenantSpec,
    Timed, TransferId, WorkerId,
};

const TAG_SUBMIT: u64 = 0;
const TAG_CANCEL: u64 = 1;
const TAG_STEP_DONE: u64 = 2;
/// Not an input: [`super::write_plan`].
pub(super) const TAG_PLAN: u64 = 3;
const TAG_STEP_FAILED: u64 = 4;
const TAG_SET_TENANTS: u64 = 5;
const TAG_TICK: u64 = 6;
const TAG_TRANSFER_DONE: u64 = 7;
const TAG_TRANSFER_FAILED: u64 = 8;
const TAG_WORKER_LOST: u64 = 9;
const TAG_WORKER_BACK: u64 = 10;
/// Not an input: [`super::write_digest`].
pub(super) const TAG_DIGEST: u64 = 11;
/// Not an input: [`super::write_plan_ahead`].
pub(super) const TAG_PLAN_AHEAD: u64 = 12;

/// Their numbers in a recording; append only.
pub(super) const REASONS: [CancelReason; 4] =
    [CancelReason::ClientGone, CancelReason::SlowReader, CancelReason::StopString, CancelReason::Shutdown];

fn tag_of(input: &Input) -> u64 {
    match input {
        Input::Submit(_) => TAG_SUBMIT,
        Input::Cancel { .. } => TAG_CANCEL,
        Input::StepDone { .. } => TAG_STEP_DONE,
        Input::StepFailed { .. } => TAG_STEP_FAILED,
        Input::SetTenants(_) => TAG_SET_TENANTS,
        Input::Tick => TAG_TICK,
        Input::TransferDone { .. } => TAG_TRANSFER_DONE,
        Input::TransferFailed { .. } => TAG_TRANSFER_FAILED,
        Input::WorkerLost { .. } => TAG_WORKER_LOST,
        Input::WorkerBack { .. } => TAG_WORKER_BACK,
    }
}

pub(super) fn put_input(out: &mut Vec<u8>, input: &Timed<Input>) {
    put_varint(out, tag_of(&input.input));
    put_varint(out, input.at.0);
    match &input.input {
        Input::Submit(submission) => put_submission(out, submission),
        Input::Cancel { request, reason } => {
            put_varint(out, request.0);
            put_varint(out, REASONS.iter().position(|other| other == reason).expect("every reason is listed") as u64);
        }
        Input::StepDone { worker, step, device_us, sampled } => {
            for field in [u64::from(worker.0), step.0, *device_us, sampled.len() as u64] {
                put_varint(out, field);
            }
            for (request, result) in sampled {
                let token = match result {
                    Sampled::Failed => 0,
                    Sampled::Token(token) => u64::from(*token) + 1,
                };
                put_varint(out, request.0);
                put_varint(out, token);
            }
        }
        Input::StepFailed { worker, step } => {
            put_varint(out, u64::from(worker.0));
            put_varint(out, step.0);
        }
        Input::SetTenants(specs) => {
            put_varint(out, specs.len() as u64);
            for spec in specs {
                let ceiling = spec.ceiling_blocks.map_or(0, |blocks| u64::from(blocks) + 1);
                for field in [u64::from(spec.tenant.0), spec.weight.into(), spec.floor_blocks.into(), ceiling] {
                    put_varint(out, field);
                }
            }
        }
        Input::Tick => {}
        Input::TransferDone { transfer } | Input::TransferFailed { transfer } => put_varint(out, transfer.0),
        Input::WorkerLost { worker } | Input::WorkerBack { worker } => put_varint(out, u64::from(worker.0)),
    }
}

fn put_submission(out: &mut Vec<u8>, submission: &Submission) {
    put_varint(out, submission.request.0);
    put_varint(out, u64::from(submission.max_new_tokens));
    put_varint(out, u64::from(submission.min_new_tokens));
    put_varint(out, u64::from(submission.needs_tokens));
    put_varint128(out, submission.salt.0);
    put_varint(out, u64::from(submission.shared_tokens));
    put_varint(out, u64::from(submission.tenant.0));
    put_varint(out, u64::from(submission.class.0));
    put_option(out, submission.deadline);
    for tokens in [&submission.prompt, &submission.stop_tokens] {
        put_varint(out, tokens.len() as u64);
        tokens.iter().for_each(|token| put_varint(out, u64::from(*token)));
    }
}

/// Reads the rest of an entry whose tag was read.
pub(super) fn read_input(body: &mut Reader<'_>, tag: u64) -> Result<Timed<Input>, RecordError> {
    let at = Micros(body.varint()?);
    let input = match tag {
        TAG_SUBMIT => Input::Submit(read_submission(body)?),
        TAG_CANCEL => {
            let request = RequestId(body.varint()?);
            let number = usize::try_from(body.varint()?).unwrap_or(usize::MAX);
            let reason = *REASONS.get(number).ok_or(body.malformed("a cancel reason"))?;
            Input::Cancel { request, reason }
        }
        TAG_STEP_DONE => read_step_done(body)?,
        TAG_STEP_FAILED => Input::StepFailed { worker: read_worker(body)?, step: StepId(body.varint()?) },
        TAG_SET_TENANTS => Input::SetTenants(read_tenants(body)?),
        TAG_TICK => Input::Tick,
        TAG_TRANSFER_DONE => Input::TransferDone { transfer: TransferId(body.varint()?) },
        TAG_TRANSFER_FAILED => Input::TransferFailed { transfer: TransferId(body.varint()?) },
        TAG_WORKER_LOST => Input::WorkerLost { worker: read_worker(body)? },
        TAG_WORKER_BACK => Input::WorkerBack { worker: read_worker(body)? },
        _ => return Err(body.malformed("a kind of entry")),
    };
    body.end()?;
    Ok(Timed { at, input })
}

pub(super) fn read_worker(body: &mut Reader<'_>) -> Result<WorkerId, RecordError> {
    u8::try_from(body.varint()?).map(WorkerId).map_err(|_| body.malformed("a worker below 256"))
}

fn read_submission(body: &mut Reader<'_>) -> Result<Submission, RecordError> {
    Ok(Submission {
        request: RequestId(body.varint()?),
        max_new_tokens: body.u32()?,
        min_new_tokens: body.u32()?,
        needs_tokens: body.flag()?,
        salt: CacheSalt(body.varint128()?),
        shared_tokens: body.u32()?,
        tenant: TenantId(body.u32()?),
        class: ClassId(u8::try_from(body.varint()?).map_err(|_| body.malformed("a class below 256"))?),
        deadline: read_option(body)?,
        prompt: body.tokens()?,
        stop_tokens: body.tokens()?,
    })
}

fn read_step_done(body: &mut Reader<'_>) -> Result<Input, RecordError> {
    let worker = read_worker(body)?;
    let step = StepId(body.varint()?);
    let device_us = body.varint()?;
    let len = body.len()?;
    let mut sampled = Vec::with_capacity(len);
    for _ in 0..len {
        let request = RequestId(body.varint()?);
        let result = match body.varint()? {
            0 => Sampled::Failed,
            token => Sampled::Token(u32::try_from(token - 1).map_err(|_| body.malformed("a token below 2^32"))?),
        };
        sampled.push((request, result));
    }
    Ok(Input::StepDone { worker, step, device_us, sampled })
}

fn read_tenants(body: &mut Reader<'_>) -> Result<Vec<TenantSpec>, RecordError> {
    let len = body.len()?;
    let mut specs = Vec::with_capacity(len);
    for _ in 0..len {
        let (tenant, weight, floor_blocks) = (TenantId(body.u32()?), body.u32()?, body.u32()?);
        let ceiling = body.varint()?.checked_sub(1).map(u32::try_from).transpose();
        let ceiling_blocks = ceiling.map_err(|_| body.malformed("a ceiling below 2^32"))?;
        specs.push(TenantSpec { tenant, weight, floor_blocks, ceiling_blocks });
    }
    Ok(specs)
}
