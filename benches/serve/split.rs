//! The same requests against mixed and separate workers: their speed, and that the texts are the same.

use crate::answer::Answer;
use crate::load::closed_loop;
use crate::mixture::Mixture;
use crate::prompt::Wish;
use crate::report::{Aim, Report, all_whole};
use crate::server::{Access, Server, require};
use crate::stats::{median, quantile};
use crate::{Outcome, Setup, note};

const REQUESTS: f64 = 64.0;
const FLIGHT: usize = 12;
/// Names of the rows and their flags; each is measured [`ROUNDS`] times, in an order that changes.
const LAYOUTS: [(&str, &[&str]); 3] = [
    ("mixed", &["--workers=mixed"]),
    ("split, shared pool", &["--workers=split"]),
    ("split, pools apart", &["--workers=split", "--kv-pools=apart"]),
];
const ROUNDS: usize = 2;

#[derive(Default)]
struct Samples {
    rates: Vec<f64>,
    ttft_ms: Vec<f64>,
    gaps_ms: Vec<f64>,
    /// Of every round, by request.
    texts: Vec<Vec<Vec<u8>>>,
}

pub(crate) async fn run(setup: &Setup) -> Outcome<Report> {
    require(setup, &["--workers", "--kv-pools"])?;
    let mut mixture = Mixture::new(setup.seed, 1);
    let count = (REQUESTS * setup.scale).ceil() as usize;
    let work: Vec<Wish> = (0..count).map(|_| mixture.wish()).collect();
    let mut found: [Samples; LAYOUTS.len()] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..LAYOUTS.len() {
            let at = if round % 2 == 0 { turn } else { LAYOUTS.len() - 1 - turn };
            note(&format!("split: {}, {} of {ROUNDS}", LAYOUTS[at].0, round + 1));
            measure(setup, LAYOUTS[at].1, &work, &mut found[at]).await?;
        }
    }
    let mut report = Report::default();
    let expected = found[0].texts[0].clone();
    let length: usize = expected.iter().map(Vec::len).sum();
    for ((row, _), samples) in LAYOUTS.iter().zip(&found) {
        report.add_to(row, "prompt and output", "tokens/s", median(&samples.rates));
        report.add_to(row, "TTFT p50", "ms", median(&samples.ttft_ms));
        report.add_to(row, "TTFT p99", "ms", quantile(&samples.ttft_ms, 0.99));
        report.add_to(row, "ITL p50", "ms", median(&samples.gaps_ms));
        report.add_to(row, "ITL p99", "ms", quantile(&samples.gaps_ms, 0.99));
        let differ =
            |texts: &Vec<Vec<u8>>| texts.iter().zip(&expected).filter(|(text, expected)| text != expected).count();
        report.add_to(row, "texts that differ", "", samples.texts.iter().map(differ).sum::<usize>() as f64);
        report.aim(Aim::AtMost(0.0));
    }
    report.detail("texts", serde_json::json!({"requests": count, "bytes": length}));
    Ok(report)
}

async fn measure(setup: &Setup, flags: &[&str], work: &[Wish], samples: &mut Samples) -> Outcome<()> {
    let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    let server = Server::start(setup, &flags, Access::Open).await?;
    let mut warm = Mixture::new(!setup.seed, 2);
    let mut others = (0..2).map(|_| warm.wish().asked(0));
    all_whole("warm-up", &closed_loop(&server.client(), 1, || others.next()).await)?;
    let client = server.client();
    let mut asked = (0..).zip(work).map(|(tag, wish)| {
        let mut wish = wish.clone();
        wish.keep_text = true;
        wish.asked(tag)
    });
    let began = client.now();
    let mut answers = closed_loop(&client, FLIGHT, || asked.next()).await;
    let seconds = (client.now() - began) as f64 / 1e6;
    all_whole("mixed and split workers", &answers)?;
    server.stop().await?;
    samples.rates.push(work.iter().map(Wish::tokens).sum::<u64>() as f64 / seconds);
    samples.ttft_ms.extend(answers.iter().filter_map(Answer::ttft_ms));
    samples.gaps_ms.extend(answers.iter().flat_map(|answer| answer.gaps().map(|(_, gap)| gap)));
    answers.sort_unstable_by_key(|answer| answer.tag);
    samples.texts.push(answers.into_iter().filter_map(|answer| answer.text).collect());
    Ok(())
}
