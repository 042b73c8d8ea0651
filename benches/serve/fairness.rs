//! Between tenants: what a flood does to a light one, how even equal ones are served, and what that costs.

use crate::answer::{Answer, End, Micros};
use crate::client::Client;
use crate::keys::Tenant;
use crate::load::{closed_loop, for_seconds};
use crate::prompt::{Shape, Wish, ids};
use crate::report::{Aim, Report, all_whole};
use crate::server::{Access, Server, require};
use crate::stats::{Rng, jain, median, quantile};
use crate::{Outcome, Setup, note};
use std::rc::Rc;
use std::time::Duration;

/// Few output tokens, so that there are many first ones.
const LIGHT: Shape = Shape::exact(200, 4);
/// Between an answer and the next request of the light tenant, so that requests meet steps anywhere.
const LIGHT_PAUSE_MS: (u32, u32) = (0, 60);
const FLOOD: Shape = Shape::exact(512, 64);
const FLIGHT: usize = 32;
const ALONE_S: f64 = 10.0;
const BESIDE_S: f64 = 30.0;
/// The flood runs this long before it counts.
const SETTLE_S: f64 = 4.0;
const ROUNDS: u64 = 2;

/// Tenants of equal weight with unequal requests: shares are of tokens, not of requests.
const EQUAL: [(Tenant, Shape); 4] = [
    (Tenant::A, Shape::exact(96, 48)),
    (Tenant::B, Shape::exact(192, 24)),
    (Tenant::C, Shape::exact(256, 16)),
    (Tenant::D, Shape::exact(128, 32)),
];
const EQUAL_FLIGHT: usize = 16;
/// Fewer running requests than each tenant alone keeps in flight, so that all are backlogged.
const EQUAL_FLAGS: [&str; 1] = ["--max-num-seqs=16"];
const EQUAL_S: f64 = 24.0;

pub(crate) async fn run(setup: &Setup) -> Outcome<Report> {
    require(setup, &["--keys"])?;
    let mut report = Report::default();
    let server = Server::start(setup, &[], Access::Tenants).await?;
    warm_up(&server, setup.seed).await?;
    light_beside_flood(setup, &server, &mut report).await?;
    server.stop().await?;
    let server = Server::start(setup, &EQUAL_FLAGS.map(str::to_owned), Access::Tenants).await?;
    warm_up(&server, setup.seed).await?;
    equal_tenants(setup, &server, &mut report).await?;
    server.stop().await?;
    price(setup, &mut report).await?;
    Ok(report)
}

/// Two requests that do not count.
async fn warm_up(server: &Server, seed: u64) -> Outcome<()> {
    let mut rng = Rng::new(!seed, 0);
    let mut wishes = (0..2).map(|tag| LIGHT.wish(&mut rng).of(Tenant::A.secret()).asked(tag));
    all_whole("warm-up", &closed_loop(&server.client(), 1, || wishes.next()).await)
}

/// One request at a time for `seconds`; times to the first token. The last one is waited for, however late it is.
async fn light(server: &Server, rng: &mut Rng, seconds: f64) -> Outcome<Vec<f64>> {
    let client = server.client();
    let end = client.now() + (seconds * 1e6) as Micros;
    let make = || {
        let mut wish = LIGHT.wish(rng).of(Tenant::Light.secret());
        wish.pause = Duration::from_millis(u64::from(rng.between(LIGHT_PAUSE_MS)));
        (client.now() < end).then(|| wish.asked(0))
    };
    let answers = closed_loop(&client, 1, make).await;
    all_whole("the light tenant", &answers)?;
    Ok(answers.iter().filter_map(Answer::ttft_ms).collect())
}

async fn light_beside_flood(setup: &Setup, server: &Server, report: &mut Report) -> Outcome<()> {
    let (mut alone, mut beside, mut ratios, mut flooded) = (Vec::new(), Vec::new(), Vec::new(), 0.0);
    for round in 0..ROUNDS {
        let mut rng = Rng::new(setup.seed, 10 + round);
        note(&format!("fairness: light tenant alone, {} of {ROUNDS}", round + 1));
        let first = light(server, &mut rng, ALONE_S * setup.scale).await?;
        note(&format!("fairness: light tenant beside a flood, {} of {ROUNDS}", round + 1));
        let client = server.client();
        let mut flood_rng = Rng::new(setup.seed, 20 + round);
        let mut make = || Some(FLOOD.wish(&mut flood_rng).of(Tenant::Flood.secret()).asked(0));
        let flood = closed_loop(&client, FLIGHT, &mut make);
        let light = async {
            tokio::time::sleep(Duration::from_secs_f64(SETTLE_S * setup.scale)).await;
            let from = client.now();
            let found = light(server, &mut rng, BESIDE_S * setup.scale).await;
            let until = client.now();
            client.leave_all();
            (found, from, until)
        };
        let (flood, (second, from, until)) = tokio::join!(flood, light);
        let second = second?;
        let served: u64 = flood.iter().map(|answer| served(answer, FLOOD.prompt.0, from, until)).sum();
        flooded += served as f64 / ((until - from) as f64 / 1e6) / ROUNDS as f64;
        ratios.push(quantile(&second, 0.99) / quantile(&first, 0.99));
        alone.extend(first);
        beside.extend(second);
    }
    for (samples, name) in [(&alone, "alone"), (&beside, "beside a flood")] {
        report.add(&format!("light tenant {name}: TTFT p50"), "ms", median(samples));
        report.add(&format!("light tenant {name}: TTFT p99"), "ms", quantile(samples, 0.99));
    }
    report.add(
        "light tenant: TTFT p99 beside a flood over alone",
        "",
        quantile(&beside, 0.99) / quantile(&alone, 0.99),
    );
    report.aim(Aim::AtMost(1.5));
    report.add("light tenant beside a flood: requests", "requests", beside.len() as f64);
    report.add("flood meanwhile: prompt and output tokens", "tokens/s", flooded);
    report.detail("light_p99_ratio_by_round", ratios);
    report.detail("light_ttft_ms_alone_beside", [alone, beside]);
    Ok(())
}

/// Tokens that the tenant got of this answer within a window: the prompt's when the first token came, then each token.
fn served(answer: &Answer, prompt: u32, from: Micros, until: Micros) -> u64 {
    let within = |at: &&Micros| (from..until).contains(*at);
    let prompt = answer.tokens.first().iter().filter(|at| within(at)).count() as u64 * u64::from(prompt);
    prompt + answer.tokens.iter().filter(within).count() as u64
}

async fn equal_tenants(setup: &Setup, server: &Server, report: &mut Report) -> Outcome<()> {
    note("fairness: four equal tenants");
    let settle = SETTLE_S * setup.scale;
    let window = EQUAL_S * setup.scale;
    let from = setup.epoch.elapsed().as_micros() as Micros + (settle * 1e6) as Micros;
    let until = from + (window * 1e6) as Micros;
    let mut floods = tokio::task::JoinSet::new();
    for (at, (tenant, shape)) in EQUAL.into_iter().enumerate() {
        let client = server.client();
        let mut rng = Rng::new(setup.seed, 30 + at as u64);
        floods.spawn_local(async move {
            let make = || Some(shape.wish(&mut rng).of(tenant.secret()).asked(0));
            let answers = for_seconds(&client, settle + window, closed_loop(&client, EQUAL_FLIGHT, make)).await;
            let refused = answers.iter().filter(|answer| matches!(answer.end, End::Refused(_) | End::Lost(_))).count();
            let tokens: u64 = answers.iter().map(|answer| served(answer, shape.prompt.0, from, until)).sum();
            (at, tokens, refused)
        });
    }
    let mut found = floods.join_all().await;
    found.sort_unstable();
    if found.iter().any(|(_, _, refused)| *refused > 0) {
        return Err(format!("four equal tenants: refused or lost requests: {found:?}").into());
    }
    let tokens: Vec<f64> = found.iter().map(|(_, tokens, _)| *tokens as f64).collect();
    report.add("four equal tenants: Jain index of served tokens", "", jain(&tokens));
    report.aim(Aim::AtLeast(0.98));
    report.add("four equal tenants: prompt and output tokens", "tokens/s", tokens.iter().sum::<f64>() / window);
    report.detail("equal_tenants_tokens", tokens);
    Ok(())
}

/// The comparison with the unfair order: shared prefixes that do not all fit the cache, so that the order decides how much is
/// computed again.
const GROUPS: usize = 16;
const PREFIX_TOKENS: u32 = 384;
const OWN_TOKENS: u32 = 48;
const PRICE_OUTPUT: u32 = 12;
const PRICE_REQUESTS: usize = 80;
const PRICE_FLIGHT: usize = 64;
const PRICE_FLAGS: [&str; 3] = ["--max-num-seqs=8", "--max-model-len=2048", "--kv-cache-memory-bytes=160MiB"];
const PRICE_ROUNDS: u64 = 2;

async fn price(setup: &Setup, report: &mut Report) -> Outcome<()> {
    let (mut fair, mut unfair) = (Vec::new(), Vec::new());
    let mut cached = [0, 0];
    for round in 0..PRICE_ROUNDS {
        let work = price_work(setup, round);
        // Who goes first changes from round to round.
        for turn in 0..2 {
            let is_fair = (turn + round) % 2 == 0;
            note(&format!(
                "fairness: {} order, {} of {PRICE_ROUNDS}",
                if is_fair { "fair" } else { "unfair" },
                round + 1
            ));
            let server = Server::start(setup, &PRICE_FLAGS.map(str::to_owned), Access::Tenants).await?;
            warm_up(&server, setup.seed).await?;
            let owner = |group: usize| if is_fair { EQUAL[group % EQUAL.len()].0 } else { Tenant::A };
            let wishes = work.iter().map(|(group, wish)| wish.clone().of(owner(*group).secret()));
            let client = server.client();
            let began = client.now();
            let answers = all_at_once(&client, wishes.collect()).await;
            let seconds = (client.now() - began) as f64 / 1e6;
            all_whole("the comparison with the unfair order", &answers)?;
            server.stop().await?;
            let tokens: u64 = work.iter().map(|(_, wish)| wish.tokens()).sum();
            cached[usize::from(!is_fair)] += answers.iter().map(|answer| answer.cached_tokens).sum::<u64>();
            if is_fair { &mut fair } else { &mut unfair }.push(tokens as f64 / seconds);
        }
    }
    report.add("fair order: prompt and output tokens", "tokens/s", median(&fair));
    report.add("unfair longest-prefix order: prompt and output tokens", "tokens/s", median(&unfair));
    report.add("throughput of the fair order over the unfair one", "", median(&fair) / median(&unfair));
    report.aim(Aim::AtLeast(0.97));
    report.detail("order_rates_fair_unfair", [fair, unfair]);
    report.detail("order_cached_tokens_fair_unfair", cached);
    Ok(())
}

/// Requests with the number of the group whose prefix they share, in a random order.
fn price_work(setup: &Setup, round: u64) -> Vec<(usize, Wish)> {
    let mut rng = Rng::new(setup.seed, 40 + round);
    let prefixes: Vec<Vec<u32>> = (0..GROUPS).map(|_| ids(&mut rng, PREFIX_TOKENS)).collect();
    let count = (PRICE_REQUESTS as f64 * setup.scale).ceil() as usize;
    let mut work: Vec<(usize, Wish)> = (0..count)
        .map(|number| {
            let group = number % GROUPS;
            let mut prompt = prefixes[group].clone();
            prompt.extend(ids(&mut rng, OWN_TOKENS));
            (group, Wish::new(prompt, PRICE_OUTPUT))
        })
        .collect();
    for at in (1..work.len()).rev() {
        work.swap(at, rng.between((0, at as u32)) as usize);
    }
    work
}

/// All requests in their order, [`PRICE_FLIGHT`] of them in flight.
async fn all_at_once(client: &Rc<Client>, wishes: Vec<Wish>) -> Vec<Answer> {
    let mut asked = (0..).zip(wishes).map(|(tag, wish)| wish.asked(tag));
    closed_loop(client, PRICE_FLIGHT, || asked.next()).await
}
