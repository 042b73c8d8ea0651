//! Long prompts beside decoding streams: how much an answer stutters and how much prefill is left, for objectives of the
//! inter-token latency and for fixed sizes of a step.

use crate::answer::{Answer, Micros};
use crate::client::Client;
use crate::load::closed_loop;
use crate::prompt::{Shape, ids};
use crate::report::{Aim, Report, all_whole, lost};
use crate::server::{Access, Server, require};
use crate::stats::{Rng, median, quantile};
use crate::{Outcome, Setup, note};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::JoinHandle;

const STREAMS: usize = 8;
/// Short prompts, so that a stream that begins hardly counts, and lengths that keep the contexts stationary.
const STREAM: Shape = Shape { prompt: (32, 32), output: (200, 400) };
const PROMPT_TOKENS: u32 = 1500;
const SETTLE_S: f64 = 1.5;
const DECODE_S: f64 = 3.0;
/// Long prompts, one after the other, until so many are done or the time is over; the last one is waited for.
const PROMPTS: usize = 4;
const LAST_S: f64 = 36.0;
const BOTH_S: f64 = 12.0;
/// Without a flag.
const TOKENS_DEFAULT: u32 = 512;
const TOKENS: [u32; 4] = [64, 128, 256, 2048];
/// Objectives as multiples of the gap between tokens without prompts.
const OBJECTIVES: [f64; 3] = [1.25, 1.5, 2.0];
const AIMED: f64 = 1.5;
/// A step must have room for a token of every running request.
const RUNNING: &str = "--max-num-seqs=32";

pub(crate) async fn run(setup: &Setup) -> Outcome<Report> {
    require(setup, &["--class", "--max-num-batched-tokens", "--workers"])?;
    let mut report = Report::default();
    let row = format!("{TOKENS_DEFAULT} tokens a step");
    let first = measure(setup, &row, &[], None, &mut report).await?;
    let objective = |times: f64| format!("--class=normal:itl={:.1}ms", first.decode_ms * times);
    for times in OBJECTIVES {
        measure(setup, &format!("objective {times}x"), &[objective(times)], Some((first, times)), &mut report).await?;
    }
    for tokens in TOKENS {
        let flag = format!("--max-num-batched-tokens={tokens}");
        measure(setup, &format!("{tokens} tokens a step"), &[flag], Some((first, 0.0)), &mut report).await?;
    }
    let split = "--workers=split".to_owned();
    measure(setup, "split workers", std::slice::from_ref(&split), Some((first, 0.0)), &mut report).await?;
    let row = format!("split workers, objective {AIMED}x");
    measure(setup, &row, &[split, objective(AIMED)], Some((first, AIMED)), &mut report).await?;
    Ok(report)
}

/// What all settings are compared with.
#[derive(Clone, Copy)]
struct Reference {
    /// Median gap between tokens without prompts, milliseconds.
    decode_ms: f64,
    /// Prompt tokens per second without streams.
    solo: f64,
}

/// One setting; with a reference, the objective as a multiple, 0 where there is none.
async fn measure(
    setup: &Setup,
    row: &str,
    flags: &[String],
    reference: Option<(Reference, f64)>,
    report: &mut Report,
) -> Outcome<Reference> {
    note(&format!("itl: {row} {}", flags.join(" ")));
    let flags: Vec<String> = flags.iter().cloned().chain([RUNNING.to_owned()]).collect();
    let server = Server::start(setup, &flags, Access::Open).await?;
    let mut rng = Rng::new(setup.seed, 1);
    let solo = match reference {
        Some((reference, _)) => reference.solo,
        None => {
            prefill(setup, &server, &mut rng, 1).await?;
            prefill(setup, &server, &mut rng, PROMPTS).await?
        }
    };
    let (client, streams) = begin_streams(setup, &server);
    tokio::time::sleep(Duration::from_secs_f64(SETTLE_S * setup.scale)).await;
    let from = client.now();
    tokio::time::sleep(Duration::from_secs_f64(DECODE_S * setup.scale)).await;
    let between = client.now();
    let rate = prefill(setup, &server, &mut rng, PROMPTS).await?;
    let until = client.now();
    client.leave_all();
    let answers = streams.await.expect("the streams' task does not panic");
    if lost(&answers) > 0 {
        return Err(format!("{row}: {} streams were lost", lost(&answers)).into());
    }
    server.stop().await?;
    let alone = gaps(&answers, from, between);
    let with = gaps(&answers, between, until);
    if alone.is_empty() || with.is_empty() {
        return Err(
            format!("{row}: expected tokens in both phases, found none in one: give it a larger --scale").into()
        );
    }
    let decode_ms = median(&alone);
    let times = reference.map_or(0.0, |(_, times)| times);
    report.add_to(row, "objective", "ms", reference.map_or(0.0, |(reference, times)| reference.decode_ms * times));
    report.add_to(row, "ITL p50 decoding alone", "ms", decode_ms);
    report.add_to(row, "ITL p50 with prompts", "ms", median(&with));
    report.add_to(row, "ITL p99 with prompts", "ms", quantile(&with, 0.99));
    report.add_to(row, "p99 over p50 alone", "", quantile(&with, 0.99) / decode_ms);
    if times == AIMED {
        report.aim(Aim::AtMost(1.5));
    }
    report.add_to(row, "prefill", "tokens/s", rate);
    report.add_to(row, "prefill over solo", "", rate / solo);
    if times == AIMED {
        report.aim(Aim::AtLeast(0.8));
    }
    report.add_to(row, "output", "tokens/s", with.len() as f64 / ((until - between) as f64 / 1e6));
    Ok(Reference { decode_ms, solo })
}

/// Streams that decode until their client leaves.
fn begin_streams(setup: &Setup, server: &Server) -> (Rc<Client>, JoinHandle<Vec<Answer>>) {
    let client = server.client();
    let mut rng = Rng::new(setup.seed, 2);
    let streams = Rc::clone(&client);
    let task = async move {
        let mut tag = 0;
        let make = || {
            let mut wish = STREAM.wish(&mut rng);
            // The first ones end at different times.
            if tag < STREAMS as u32 {
                wish.new_tokens = STREAM.output.1 * (tag + 1) / STREAMS as u32;
            }
            tag += 1;
            Some(wish.asked(tag))
        };
        closed_loop(&streams, STREAMS, make).await
    };
    (client, tokio::task::spawn_local(task))
}

fn gaps(answers: &[Answer], from: Micros, until: Micros) -> Vec<f64> {
    let within = |(at, gap): (Micros, f64)| (from..until).contains(&at).then_some(gap);
    answers.iter().flat_map(|answer| answer.gaps().filter_map(within)).collect()
}

/// Prompt tokens per second of up to `count` long prompts, one after the other; 0 when the first took too long.
async fn prefill(setup: &Setup, server: &Server, rng: &mut Rng, count: usize) -> Outcome<f64> {
    let client = server.client();
    let began = client.now();
    let end = began + (BOTH_S * setup.scale * 1e6) as Micros;
    let mut left = count;
    let make = || {
        left = left.checked_sub(1)?;
        (client.now() < end).then(|| crate::prompt::Wish::new(ids(rng, PROMPT_TOKENS), 1).asked(0))
    };
    let load = closed_loop(&client, 1, make);
    let timer = async {
        tokio::time::sleep(Duration::from_secs_f64(BOTH_S * setup.scale + LAST_S)).await;
        client.leave_all();
        std::future::pending::<()>().await;
    };
    let answers = tokio::select! { answers = load => answers, () = timer => Vec::new() };
    let done: Vec<Answer> = answers.into_iter().filter(|answer| answer.end != crate::answer::End::Left).collect();
    all_whole("long prompts", &done)?;
    let last = done.iter().map(|answer| answer.ended).max();
    Ok(last.map_or(0.0, |last| done.len() as f64 * f64::from(PROMPT_TOKENS) / ((last - began) as f64 / 1e6)))
}
