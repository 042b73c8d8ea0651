#![allow(clippy::unwrap_used)]

use super::bytes::crc32;
use super::input::REASONS;
use super::*;
use crate::{
    CacheSalt, ClassId, ClassSpec, CostModel, Micros, PoolId, RequestId, Role, Sampled, StepId, Submission, TenantId,
    TenantSpec, TransferId, WorkerSpec,
};
use proptest::prelude::*;

fn config() -> CoreConfig {
    CoreConfig {
        workers: [(Role::Mixed, 0), (Role::Prefill, 1), (Role::Decode, 0)]
            .map(|(role, pool)| WorkerSpec { role, pool: PoolId(pool) })
            .to_vec(),
        pools: vec![1000, 77],
        classes: vec![
            ClassSpec { ttft: Some(Micros(0)), itl: None },
            ClassSpec { ttft: None, itl: Some(Micros(u64::MAX)) },
        ],
        quarantine: Micros(5),
        bypasses_max: 3,
        overtakes_max: 4,
        chunk_tokens_min: 5,
        ride_along_tokens_max: 6,
        plan_ahead: true,
        device_parts: true,
        cost: CostModel {
            step_ps: 1,
            prefill_token_ps: 2,
            prefill_context_ps: 3,
            decode_sequence_ps: 4,
            decode_context_ps: u64::MAX,
        },
        ..CoreConfig::mixed(1000, 16)
    }
}

/// Wide and narrow numbers alike.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..300u64, any::<u64>(), Just(u64::MAX)]
}

fn token() -> impl Strategy<Value = u32> {
    prop_oneof![0..300u32, any::<u32>()]
}

fn sampled() -> impl Strategy<Value = (RequestId, Sampled)> {
    let result = prop_oneof![Just(Sampled::Failed), token().prop_map(Sampled::Token)];
    (number().prop_map(RequestId), result)
}

fn submission() -> impl Strategy<Value = Submission> {
    let tokens = || prop::collection::vec(token(), 0..20);
    let numbers = (number(), token(), token(), any::<u128>());
    let place = (token(), any::<u8>(), prop::option::of(number()), token(), any::<bool>());
    (numbers, place, tokens(), tokens()).prop_map(|(numbers, place, prompt, stop_tokens)| Submission {
        request: RequestId(numbers.0),
        prompt,
        max_new_tokens: numbers.1,
        min_new_tokens: numbers.2,
        needs_tokens: place.4,
        stop_tokens,
        salt: CacheSalt(numbers.3),
        shared_tokens: place.3,
        tenant: TenantId(place.0),
        class: ClassId(place.1),
        deadline: place.2.map(Micros),
    })
}

fn tenant() -> impl Strategy<Value = TenantSpec> {
    (token(), token(), token(), prop::option::of(token())).prop_map(|(tenant, weight, floor_blocks, ceiling_blocks)| {
        TenantSpec { tenant: TenantId(tenant), weight, floor_blocks, ceiling_blocks }
    })
}

fn step_done() -> impl Strategy<Value = Input> {
    let fields = (any::<u8>(), number(), number(), prop::collection::vec(sampled(), 0..20));
    fields.prop_map(|(worker, step, device_us, sampled)| Input::StepDone {
        worker: WorkerId(worker),
        step: StepId(step),
        device_us,
        sampled,
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let worker = || any::<u8>().prop_map(WorkerId);
    let transfer = || number().prop_map(TransferId);
    let input = prop_oneof![
        submission().prop_map(Input::Submit),
        (number(), 0..4usize)
            .prop_map(|(request, at)| Input::Cancel { request: RequestId(request), reason: REASONS[at] }),
        step_done(),
        (worker(), number()).prop_map(|(worker, step)| Input::StepFailed { worker, step: StepId(step) }),
        prop::collection::vec(tenant(), 0..9).prop_map(Input::SetTenants),
        Just(Input::Tick),
        transfer().prop_map(|transfer| Input::TransferDone { transfer }),
        transfer().prop_map(|transfer| Input::TransferFailed { transfer }),
        worker().prop_map(|worker| Input::WorkerLost { worker }),
        worker().prop_map(|worker| Input::WorkerBack { worker }),
    ];
    prop_oneof![
        (number(), input).prop_map(|(at, input)| Entry::Input(Timed { at: Micros(at), input })),
        any::<u8>().prop_map(|worker| Entry::Plan(WorkerId(worker))),
        any::<u8>().prop_map(|worker| Entry::PlanAhead(WorkerId(worker))),
        number().prop_map(Entry::Digest),
    ]
}

fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    write_header(&config(), &mut out);
    for entry in entries {
        match entry {
            Entry::Input(input) => write_input(input, &mut out),
            Entry::Plan(worker) => write_plan(*worker, &mut out),
            Entry::PlanAhead(worker) => write_plan_ahead(*worker, &mut out),
            Entry::Digest(digest) => write_digest(*digest, &mut out),
        }
    }
    out
}

fn decode(bytes: &[u8]) -> Result<Vec<Entry>, RecordError> {
    Recording::open(bytes)?.collect()
}

proptest! {
    #[test]
    fn round_trips(entries in prop::collection::vec(entry(), 0..20)) {
        let bytes = encode(&entries);
        let recording = Recording::open(&bytes).unwrap();
        prop_assert_eq!(recording.config(), &config());
        prop_assert_eq!(decode(&bytes).unwrap(), entries);
    }

    /// Bytes that are no recording, with and without a good header before them.
    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 1..200)) {
        prop_assert!(decode(&bytes).is_err());
        let mut with_header = encode(&[]);
        with_header.extend_from_slice(&bytes);
        prop_assert!(decode(&with_header).is_err());
    }

    /// A CRC-32 sees every single changed byte, and a cut never passes for a whole entry.
    #[test]
    fn damage_is_seen(entries in prop::collection::vec(entry(), 1..8), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let bytes = encode(&entries);
        let mut changed = bytes.clone();
        changed[at.index(bytes.len())] ^= flip;
        prop_assert!(decode(&changed).is_err());
        let whole = decode(&bytes[..at.index(bytes.len())]);
        prop_assert!(whole.map_or(true, |some| some.len() < entries.len() && some == entries[..some.len()]));
    }

    /// A body with a good checksum and any content is read or refused; what is read is written back as it was.
    #[test]
    fn hostile_bodies_are_read_strictly(body in prop::collection::vec(prop_oneof![0u8..8, any::<u8>()], 0..60)) {
        let mut bytes = encode(&[]);
        write_entry(&mut bytes, |out| out.extend_from_slice(&body));
        if let Ok(entries) = decode(&bytes) {
            prop_assert_eq!(encode(&entries), bytes);
        }
    }
}

/// An entry that may follow others of its kind: few requests, workers, steps and tokens.
fn plausible() -> impl Strategy<Value = Entry> {
    let (worker, request, step) = (0..3u8, 0..6u64, 0..9u64);
    let sampled = (request.clone(), prop_oneof![Just(Sampled::Failed), (0..3u32).prop_map(Sampled::Token)]);
    let sampled = prop::collection::vec(sampled.prop_map(|(request, result)| (RequestId(request), result)), 0..3);
    let submission = (request.clone(), submission(), 0..40u32, prop::collection::vec(0..3u32, 0..40));
    let input = prop_oneof![
        4 => submission.prop_map(|(request, submission, max_new_tokens, prompt)| {
            Input::Submit(Submission { request: RequestId(request), prompt, max_new_tokens, ..submission })
        }),
        1 => (request, 0..4usize)
            .prop_map(|(request, at)| Input::Cancel { request: RequestId(request), reason: REASONS[at] }),
        4 => (worker.clone(), step.clone(), number(), sampled).prop_map(|(worker, step, device_us, sampled)| {
            Input::StepDone { worker: WorkerId(worker), step: StepId(step), device_us, sampled }
        }),
        2 => (worker.clone(), step)
            .prop_map(|(worker, step)| Input::StepFailed { worker: WorkerId(worker), step: StepId(step) }),
        1 => prop::collection::vec(tenant(), 0..5).prop_map(Input::SetTenants),
        1 => Just(Input::Tick),
        1 => (0..3u64).prop_map(|transfer| Input::TransferDone { transfer: TransferId(transfer) }),
        1 => (0..3u64).prop_map(|transfer| Input::TransferFailed { transfer: TransferId(transfer) }),
        1 => worker.clone().prop_map(|worker| Input::WorkerLost { worker: WorkerId(worker) }),
        1 => worker.clone().prop_map(|worker| Input::WorkerBack { worker: WorkerId(worker) }),
    ];
    prop_oneof![
        3 => (number(), input).prop_map(|(at, input)| Entry::Input(Timed { at: Micros(at), input })),
        3 => worker.clone().prop_map(|worker| Entry::Plan(WorkerId(worker))),
        2 => worker.prop_map(|worker| Entry::PlanAhead(WorkerId(worker))),
    ]
}

proptest! {
    /// Entries that nobody recorded, whatever they say: each is done, or told and not done.
    #[test]
    fn hostile_recordings_do_not_panic_the_core(
        likely in prop::collection::vec(plausible(), 1..60),
        wild in prop::collection::vec(entry(), 1..20),
        block_size in prop_oneof![1..20u32, 1..5_000u32],
    ) {
        let mut config = CoreConfig { block_size, pools: vec![20, 30], ..config() };
        config.request_tokens_max = config.request_tokens_max.min(1 << 20);
        let mut replay = crate::replay::Replay::new(config).unwrap();
        let mut num_done = 0;
        for entry in likely.into_iter().chain(wild) {
            num_done += usize::from(replay.take(entry).is_ok());
        }
        let replayed = *replay.replayed();
        prop_assert!(replayed.inputs + replayed.plans + replayed.plans_ahead >= num_done as u64 - replayed.compared);
        prop_assert!(replay.engine().stats().blocks_live <= 50);
    }
}

#[test]
fn engines_larger_than_a_server_s_are_not_made() {
    let check = |config: CoreConfig, expected: &str| {
        assert_eq!(crate::replay::Replay::new(config).err().as_deref(), Some(expected));
    };
    let mixed = CoreConfig::mixed(100, 16);
    check(CoreConfig { block_size: 0, ..mixed.clone() }, "expected 1 to 4294967295 tokens in a block, found 0");
    let large = CoreConfig { pools: vec![1 << 25], request_tokens_max: 5, ..mixed.clone() };
    check(large, "expected at most 16777216 blocks in a pool, found 33554432");
    let wide = CoreConfig { block_size: 1 << 22, request_tokens_max: 5, ..mixed.clone() };
    check(wide, "expected a pool of at most 268435456 tokens, found 419430400");
    let long = CoreConfig { block_size: 1 << 20, ..mixed };
    check(long, "expected requests of at most 16777216 tokens, found 104857601");
}

#[test]
fn crc_is_the_standard_one() {
    // The check value that every catalogue of CRCs gives for these bytes.
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn errors_say_what_is_wrong() {
    let good = encode(&[Entry::Plan(WorkerId(0))]);
    let mut other_version = good.clone();
    other_version[8] = 9;
    let mut unusable = Vec::new();
    write_header(&CoreConfig { block_size: 0, ..config() }, &mut unusable);
    let mut long_list = encode(&[]);
    write_entry(&mut long_list, |out| out.extend_from_slice(&[2, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f]));
    let table: [(&[u8], &str); 5] = [
        (b"", "expected a recording that starts with KVERNREC, found other bytes"),
        (&other_version, "expected a recording of version 7, found 9"),
        (&good[..good.len() - 1], "expected a whole entry at byte 91, found the end"),
        (&unusable, "the recorded configuration is unusable: expected 1 to 4294967295 tokens in a block, found 0"),
        (&long_list, "expected a list within the entry in the entry at byte 91, found something else"),
    ];
    for (bytes, expected) in table {
        assert_eq!(decode(bytes).unwrap_err().to_string(), expected);
    }
}
