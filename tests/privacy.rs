//! Another tenant's cached prompt cannot be told from one that nobody sent: not by the usage, not by the metrics, and not by the
//! time to the first token beyond its noise.
#![allow(clippy::unwrap_used)]

mod support;

use kvern::request::{Engine, NamedTenant, Terms};
use kvern::runtime::Runtime;
use kvern_core::{CacheSalt, TenantId, TenantSpec};
use std::time::{Duration, Instant};
use support::{Ask, collect, greedy, metric, options, prompt, start, submit_as};

const ROUNDS: u64 = 15;
/// Long enough that a hit takes a small part of a miss's time.
const PROMPT: usize = 400;

fn terms(tenant: u32) -> Terms {
    Terms { tenant: TenantId(tenant), salt: CacheSalt(u128::from(tenant) << 64 | 7), ..Terms::default() }
}

/// What a tenant sees of one request: cached tokens, growth of the hits' metric, time to the first token.
fn probe(runtime: &Runtime, tenant: u32, prompt: &[u32]) -> (u32, f64, Duration) {
    let hits = || metric(&runtime.handle, "vllm:prefix_cache_hits_total");
    let (before, started) = (hits(), Instant::now());
    let ask = Ask { prompt: prompt.to_vec(), sampling: greedy(), max_new_tokens: 1 };
    let answer = collect(submit_as(&runtime.handle, &ask, terms(tenant)));
    (answer.usage.cached_tokens, hits() - before, started.elapsed())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

#[test]
fn another_tenants_cache_is_as_good_as_empty() {
    let runtime = start(&options());
    let named = |tenant: u32| NamedTenant {
        name: format!("tenant {tenant}").into(),
        spec: TenantSpec::new(TenantId(tenant)),
    };
    assert!(runtime.handle.set_tenants(&[named(1), named(2)]));
    let (mut theirs, mut nobodys, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let (secret, fresh) = (prompt(round, PROMPT), prompt(1000 + round, PROMPT));
        assert_eq!(probe(&runtime, 1, &secret).0, 0, "the owner's first request is cold");
        // In turns, so that what else the machine does meets both alike.
        let order = if round % 2 == 0 { [true, false] } else { [false, true] };
        for is_secret in order {
            let (cached, hits, time) = probe(&runtime, 2, if is_secret { &secret } else { &fresh });
            assert_eq!((cached, hits), (0, 0.0), "round {round}: a hit on what tenant 2 never sent");
            if is_secret { theirs.push(time) } else { nobodys.push(time) }
        }
        let (cached, hits, time) = probe(&runtime, 1, &secret);
        assert!(cached as usize >= PROMPT - 16 && hits > 0.0, "round {round}: the owner finds its prompt");
        own.push(time);
    }
    let spread = {
        let mut sorted = nobodys.clone();
        sorted.sort_unstable();
        // Half of the quartiles' distance, for each of the two medians.
        let quartile = |part: usize| sorted[sorted.len() * part / 4].as_secs_f64();
        (quartile(3) - quartile(1)) / sorted[sorted.len() / 2].as_secs_f64()
    };
    let (theirs, nobodys, own) = (median(theirs), median(nobodys), median(own));
    println!(
        "TTFT of {PROMPT} tokens, medians of {ROUNDS}: {:.1} ms when another tenant has them cached, {:.1} ms when nobody \
         has, {:.1} ms when the tenant itself has; quartiles {:.0}% apart",
        theirs * 1e3,
        nobodys * 1e3,
        own * 1e3,
        spread * 100.0
    );
    let difference = (theirs / nobodys - 1.0).abs();
    assert!(difference <= spread.max(0.05), "{:.1}% differ, more than the noise", difference * 100.0);
    assert!(own * 3.0 < nobodys, "a hit must be told from a miss by this test, or it shows nothing");
    runtime.join();
}
