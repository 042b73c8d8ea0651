//! More than the server can do: what it still gets done, how fast it refuses the rest, whether those come back when they were
//! told to, and whether anything is lost or grows.

use crate::answer::{Answer, End, Micros};
use crate::client::{Asked, Client};
use crate::load::{closed_loop, for_seconds, open_loop};
use crate::prompt::Shape;
use crate::report::{Aim, Report, ends, lost};
use crate::retry::{Returns, follow_up};
use crate::server::{Access, Server};
use crate::stats::{Rng, arrivals, median, quantile};
use crate::{Outcome, Setup, note};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::JoinSet;

const SHAPE: Shape = Shape { prompt: (32, 128), output: (8, 24) };
/// The deadline of each request, seconds.
const TIMEOUT_S: f64 = 2.5;
/// A small cache, so that every page of it is in use before memory counts.
const FLAGS: [&str; 2] = ["--max-model-len=2048", "--kv-cache-memory-bytes=128MiB"];
const CAPACITY_FLIGHT: usize = 32;
const CAPACITY_S: f64 = 12.0;
/// Rates as parts of the capacity of the closed loop, and how long each is kept up. A rate's first seconds do not count: its
/// queue fills. The last ones are for when all requests of those before were done in time.
const SWEEP: [f64; 6] = [0.8, 1.0, 1.2, 1.5, 2.0, 2.5];
const SWEEP_LEAST: usize = 3;
/// Part of a rate that is its whole, but for the ends of the window.
const ALL: f64 = 0.93;
const SWEEP_S: f64 = 18.0;
const OVER: f64 = 2.0;
const OVER_S: f64 = 50.0;
const HEALTH_PERIOD: Duration = Duration::from_millis(50);
const MEMORY_PERIOD: Duration = Duration::from_millis(500);
/// Requests of the burst, as a multiple of what can be done within the deadline.
const BURST: f64 = 3.0;

pub(crate) async fn run(setup: &Setup) -> Outcome<Report> {
    let mut report = Report::default();
    let mut server = Server::start(setup, &FLAGS.map(str::to_owned), Access::Open).await?;
    server.requires_field("timeout").await?;
    let capacity = capacity(setup, &server).await?;
    report.add("capacity by a closed loop", "requests/s", capacity);
    let (peak, mut lost_count) = sweep(setup, &server, capacity, &mut report).await;
    note(&format!("overload: {OVER} times the peak"));
    let over = phase(setup, &server, peak * OVER, OVER_S, 20).await;
    report.add(&format!("goodput at {OVER} times the peak"), "requests/s", over.goodput);
    report.add("goodput at twice the peak over the peak", "", over.goodput / peak);
    report.aim(Aim::AtLeast(0.95));
    refusals(&over, &mut report);
    returns("twice the peak", &over.returns, &mut report);
    report.add("came back as told and was taken", "of all", over.returns.taken_share());
    memory(&over, &mut report);
    lost_count += lost(&over.answers) + lost(&over.returns.answers);

    note("overload: a burst");
    let burst = burst(setup, &server, peak).await;
    returns("a burst", &burst.returns, &mut report);
    report.detail("ends_of_the_burst", ends(&burst.answers));
    lost_count += lost(&burst.answers) + lost(&burst.returns.answers);
    report.add("requests without a word at their end", "", lost_count as f64);
    report.aim(Aim::AtMost(0.0));
    if !server.is_running() {
        return Err("the server ended during the load".into());
    }
    server.stop().await?;
    Ok(report)
}

async fn capacity(setup: &Setup, server: &Server) -> Outcome<f64> {
    note("overload: the capacity");
    let client = server.client();
    let mut rng = Rng::new(setup.seed, 1);
    let seconds = CAPACITY_S * setup.scale;
    let began = client.now();
    let answers =
        for_seconds(&client, seconds, closed_loop(&client, CAPACITY_FLIGHT, || Some(SHAPE.wish(&mut rng).asked(0))));
    let answers = answers.await;
    // The first sixth fills the queue.
    let from = began + (seconds / 6.0 * 1e6) as Micros;
    let finished = answers.iter().filter(|answer| answer.whole() && answer.ended >= from).count();
    if finished == 0 {
        return Err(format!("no request finished in {seconds} s: {:?}", ends(&answers)).into());
    }
    Ok(finished as f64 / (seconds * 5.0 / 6.0))
}

/// The best goodput of rates around the capacity, and requests that were lost.
async fn sweep(setup: &Setup, server: &Server, capacity: f64, report: &mut Report) -> (f64, usize) {
    let (mut peak, mut lost_count) = (0.0_f64, 0);
    for (at, part) in SWEEP.into_iter().enumerate() {
        note(&format!("overload: {part} of the closed loop's capacity"));
        let phase = phase(setup, server, capacity * part, SWEEP_S, 10 + at as u64).await;
        report.add(&format!("goodput at {part} of it"), "requests/s", phase.goodput);
        report.detail(&format!("ends_at_{part}"), ends(&phase.answers));
        lost_count += lost(&phase.answers);
        peak = peak.max(phase.goodput);
        if at + 1 >= SWEEP_LEAST && phase.goodput < ALL * capacity * part {
            break;
        }
    }
    (peak, lost_count)
}

/// What came of one rate.
struct Phase {
    answers: Vec<Answer>,
    /// Requests per second that were complete within their deadline.
    goodput: f64,
    returns: Returns,
    /// Milliseconds that a GET of /health took meanwhile: what the loop back and the wake-ups cost by themselves.
    health_ms: Vec<f64>,
    memory_bytes: Vec<f64>,
}

/// Asks; follows a refusal up if `returns` are wanted.
async fn ask(client: Rc<Client>, asked: Asked, due: Micros, returns: Option<Rc<RefCell<Returns>>>) -> Answer {
    let answer = client.ask_due(&asked, due).await;
    if let Some(returns) = returns {
        follow_up(client, asked, &answer, returns).await;
    }
    answer
}

async fn phase(setup: &Setup, server: &Server, rate: f64, seconds: f64, stream: u64) -> Phase {
    let seconds = (seconds * setup.scale).max(2.0 * TIMEOUT_S);
    let mut rng = Rng::new(setup.seed, stream);
    let times = arrivals(&mut rng, (rate * seconds).round() as usize, seconds);
    let asked: Vec<Asked> = times.iter().map(|_| deadlined(&mut rng)).collect();
    let client = server.client();
    let returns = Rc::new(RefCell::new(Returns::default()));
    let began = client.now();
    let load = open_loop(&times, |number| {
        let due = began + (times[number] * 1e6) as Micros;
        // Only where the server is overloaded on purpose.
        let returns = (stream >= 20).then(|| Rc::clone(&returns));
        ask(Rc::clone(&client), asked[number].clone(), due, returns)
    });
    let watch = async {
        let (mut health_ms, mut memory_bytes) = (Vec::new(), Vec::new());
        let end = began + (seconds * 1e6) as Micros;
        let mut memory_due = began;
        while client.now() < end {
            tokio::time::sleep(HEALTH_PERIOD).await;
            health_ms.extend(client.get("/health", None).await.ok().map(|(_, _, took)| took));
            if client.now() >= memory_due {
                memory_due += MEMORY_PERIOD.as_micros() as Micros;
                memory_bytes.push(server.memory_bytes());
            }
        }
        (health_ms, memory_bytes)
    };
    let (answers, (health_ms, memory_bytes)) = tokio::join!(load, watch);
    let (from, until) = (began + (TIMEOUT_S * 1e6) as Micros, began + (seconds * 1e6) as Micros);
    let good =
        |answer: &&Answer| answer.whole() && answer.seconds() <= TIMEOUT_S && (from..until).contains(&answer.ended);
    let goodput = answers.iter().filter(good).count() as f64 / ((until - from) as f64 / 1e6);
    Phase { answers, goodput, returns: returns.take(), health_ms, memory_bytes }
}

fn deadlined(rng: &mut Rng) -> Asked {
    let mut wish = SHAPE.wish(rng);
    wish.timeout_s = Some(TIMEOUT_S);
    wish.asked(0)
}

fn refusals(over: &Phase, report: &mut Report) {
    let refused = |answer: &&Answer| matches!(answer.end, End::Refused(_));
    let times: Vec<f64> = over.answers.iter().filter(refused).map(Answer::head_ms).collect();
    report.add("refused", "of all", times.len() as f64 / over.answers.len() as f64);
    report.add("refusal: time to the answer p50", "ms", median(&times));
    report.add("refusal: time to the answer p99", "ms", quantile(&times, 0.99));
    report.aim(Aim::AtMost(2.0));
    report.add("GET /health meanwhile p50", "ms", median(&over.health_ms));
    report.add("GET /health meanwhile p99", "ms", quantile(&over.health_ms, 0.99));
    let accepted = over.answers.iter().filter(|answer| answer.accepted()).count();
    let stopped = over.answers.iter().filter(|answer| matches!(answer.end, End::Told(_))).count();
    report.add("taken and stopped at the deadline", "of the taken", stopped as f64 / accepted.max(1) as f64);
    let disagree = over.answers.iter().filter(|answer| match &answer.end {
        End::Refused(refusal) => !refusal.headers_agree || refusal.retry_in.is_none() || refusal.queue_depth.is_none(),
        _ => false,
    });
    report.add("refusals whose headers or fields are missing or disagree", "", disagree.count() as f64);
    report.aim(Aim::AtMost(0.0));
    report.detail("ends_at_2", ends(&over.answers));
}

fn returns(when: &str, returns: &Returns, report: &mut Report) {
    let ratios = returns.ratios();
    report.add(&format!("Retry-After at {when}, over what proved right, median"), "", median(&ratios));
    report.add(&format!("Retry-After at {when}, distance from what proved right, median"), "", returns.error_median());
    report.aim(Aim::AtMost(0.3));
    report.detail(&format!("returns_at_{}", when.replace(' ', "_")), returns.summary());
}

fn memory(over: &Phase, report: &mut Report) {
    let all = &over.memory_bytes;
    let third = all.len().div_ceil(3).max(1);
    let mib = |part: Option<&[f64]>| median(part.unwrap_or_default()) / f64::from(1 << 20);
    let mut parts = all.chunks(third);
    let (start, middle, end) = (mib(parts.next()), mib(parts.next()), mib(parts.next()));
    report.add("memory, first third", "MiB", start);
    report.add("memory, middle third", "MiB", middle);
    report.add("memory, last third", "MiB", end);
    report.add("memory, last third over first", "", end / start);
    report.aim(Aim::AtMost(1.01));
}

/// Everything at once, then nothing more: how long the excess takes to go is then the server's to know.
async fn burst(setup: &Setup, server: &Server, peak: f64) -> Phase {
    let mut rng = Rng::new(setup.seed, 30);
    let client = server.client();
    let returns = Rc::new(RefCell::new(Returns::probing_only()));
    let count = (peak * TIMEOUT_S * BURST).ceil() as usize;
    let mut running = JoinSet::new();
    for _ in 0..count {
        running.spawn_local(ask(Rc::clone(&client), deadlined(&mut rng), client.now(), Some(Rc::clone(&returns))));
    }
    let answers = running.join_all().await;
    Phase { answers, goodput: 0.0, returns: returns.take(), health_ms: Vec::new(), memory_bytes: Vec::new() }
}
