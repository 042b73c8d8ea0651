//! A long mixed load of several tenants with cancels, deadlines and preemptions, recorded; then the record is replayed.

use crate::answer::{Answer, Micros};
use crate::client::Asked;
use crate::keys::Tenant;
use crate::load::{closed_loop, for_seconds, open_loop};
use crate::mixture::Mixture;
use crate::report::{Aim, Report, ends, lost};
use crate::server::{Access, Server, require};
use crate::stats::{Rng, arrivals, median, quantile};
use crate::{Outcome, Setup, note};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

const TENANTS: [Tenant; 4] = [Tenant::A, Tenant::B, Tenant::C, Tenant::D];
/// Room for one of the longest requests and a few others, so that running ones are preempted.
const FLAGS: [&str; 2] = ["--max-model-len=2048", "--kv-cache-memory-bytes=56MiB"];
const CAPACITY_S: f64 = 15.0;
const CAPACITY_FLIGHT: usize = 16;
/// Parts of the requests that leave before their first token, in the middle of their answer, and that have a deadline.
const LEAVE_FIRST: f64 = 0.04;
const LEAVE_LATER: f64 = 0.10;
const DEADLINE: f64 = 0.2;
const TIMEOUT_S: (u32, u32) = (3, 20);
/// Part of the requests whose answers grow by so many tokens: what outgrows the cache is preempted.
const GROWS: f64 = 0.3;
const GROWTH: (u32, u32) = (100, 300);
const NOTE_PERIOD: Duration = Duration::from_secs(10);

pub(crate) async fn run(setup: &Setup) -> Outcome<Report> {
    require(setup, &["--keys", "--record"])?;
    let folder = tempfile::tempdir()?;
    let record = setup.record.clone().unwrap_or_else(|| folder.path().join("record"));
    let mut flags: Vec<String> = FLAGS.map(str::to_owned).into();
    flags.push(format!("--record={}", record.display()));
    let mut server = Server::start(setup, &flags, Access::Tenants).await?;
    let mut report = Report::default();

    note("load: the capacity");
    let mut mixture = Mixture::new(setup.seed, 1);
    let client = server.client();
    let seconds = CAPACITY_S * setup.scale;
    let first =
        for_seconds(&client, seconds, closed_loop(&client, CAPACITY_FLIGHT, || Some(mixed(&mut mixture)))).await;
    // Those in flight at the end were not done.
    let rate = first.len().saturating_sub(CAPACITY_FLIGHT).max(1) as f64 / seconds;

    let load_s = setup.seconds;
    let mut rng = Rng::new(setup.seed, 2);
    let times = arrivals(&mut rng, (rate * load_s).ceil() as usize, load_s);
    note(&format!("load: {} requests in {load_s} s", times.len()));
    let (answers, memory) = drive(&server, &mut mixture, &times, load_s).await;

    let preemptions = server.metric("vllm:num_preemptions_total").await?;
    if !server.is_running() {
        return Err("the server ended during the load".into());
    }
    server.stop().await?;
    summarize(&answers, &memory, load_s, &mut report);
    report.add("requests without a word at their end", "", (lost(&answers) + lost(&first)) as f64);
    report.aim(Aim::AtMost(0.0));
    report.add("preemptions", "", preemptions);
    report.aim(Aim::AtLeast(1.0));
    replay(setup, &record, &mut report)?;
    Ok(report)
}

fn mixed(mixture: &mut Mixture) -> Asked {
    let mut wish = mixture.wish();
    let rng = mixture.rng();
    wish = wish.of(TENANTS[rng.between((0, 3)) as usize].secret());
    if rng.chance(GROWS) {
        wish.new_tokens += rng.between(GROWTH);
    }
    let fate = rng.unit();
    if fate < LEAVE_FIRST {
        wish.leave_after = Some(0);
    } else if fate < LEAVE_FIRST + LEAVE_LATER {
        wish.leave_after = Some(rng.between((1, wish.new_tokens)) as usize);
    } else if fate < LEAVE_FIRST + LEAVE_LATER + DEADLINE {
        wish.timeout_s = Some(f64::from(rng.between(TIMEOUT_S)));
    }
    wish.asked(0)
}

async fn drive(server: &Server, mixture: &mut Mixture, times: &[f64], load_s: f64) -> (Vec<Answer>, Vec<f64>) {
    let client = server.client();
    let began = client.now();
    let load = open_loop(times, |number| {
        let (client, asked) = (Rc::clone(&client), mixed(mixture));
        let due = began + (times[number] * 1e6) as Micros;
        async move { client.ask_due(&asked, due).await }
    });
    let mut memory = Vec::new();
    let watch = async {
        loop {
            tokio::time::sleep(NOTE_PERIOD).await;
            memory.push(server.memory_bytes());
            let passed = (client.now() - began) as f64 / 1e6;
            note(&format!("load: {passed:.0} s of {load_s:.0} s"));
        }
    };
    let answers = tokio::select! { answers = load => answers, () = watch => Vec::new() };
    (answers, memory)
}

fn summarize(answers: &[Answer], memory: &[f64], load_s: f64, report: &mut Report) {
    let ttft: Vec<f64> = answers.iter().filter_map(Answer::ttft_ms).collect();
    let gaps: Vec<f64> = answers.iter().flat_map(|answer| answer.gaps().map(|(_, gap)| gap)).collect();
    report.add("time of the load", "s", load_s);
    report.add("requests", "", answers.len() as f64);
    for (end, count) in ends(answers) {
        report.add(&end, "requests", count as f64);
    }
    report.add("TTFT p50", "ms", median(&ttft));
    report.add("TTFT p99", "ms", quantile(&ttft, 0.99));
    report.add("ITL p50", "ms", median(&gaps));
    report.add("ITL p99", "ms", quantile(&gaps, 0.99));
    let third = memory.len().div_ceil(3).max(1);
    let thirds: Vec<f64> = memory.chunks(third).map(|part| median(part) / f64::from(1 << 20)).collect();
    if let [start, .., end] = thirds[..] {
        report.add("memory, first third", "MiB", start);
        report.add("memory, last third", "MiB", end);
    }
    report.detail("memory_bytes", memory);
}

/// Runs `kvern replay`; it fails when a decision differs.
fn replay(setup: &Setup, record: &Path, report: &mut Report) -> Outcome<()> {
    note("load: the replay");
    let began = std::time::Instant::now();
    let done = Command::new(&setup.kvern).arg("replay").arg(record).output()?;
    let said = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
    said.iter().flat_map(|text| text.lines()).for_each(note);
    let bytes = std::fs::metadata(record).map_or(0, |found| found.len());
    report.add("record", "MiB", bytes as f64 / f64::from(1 << 20));
    report.add("replay", "s", began.elapsed().as_secs_f64());
    report.add("replays with a difference", "", f64::from(u8::from(!done.status.success())));
    report.aim(Aim::AtMost(0.0));
    report.detail("replay", said);
    Ok(())
}
