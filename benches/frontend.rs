//! CPU time of the front end with a null model: per streamed token at 256 streams, and per request.
//!
//! The server runs in this process over loopback sockets, kernel time included; the clients run in a child process (this
//! program again), so that `getrusage` counts the server alone. The null model is a thread that gives each stream one token
//! a step, as a worker does; its own CPU time is part of the figure and is shown.
#![allow(clippy::unwrap_used)]

#[path = "../tests/http/tiny_model.rs"]
mod tiny_model;

use kvern::admission::GenerationDefaults;
use kvern::http::{ApiKeys, AppState, HttpLimits, ServedModel, serve};
use kvern::request::{Engine, EngineHealth, NamedTenant, Request, SubmitError, TokenEvent, TokenRx};
use kvern_core::{CancelReason, FinishReason, RequestId, Usage};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::mpsc as channel;

const STREAMS: usize = 256;
const TOKENS: u32 = 200;
/// Time between two tokens of a stream.
const STEP: Duration = Duration::from_millis(10);
const CONNECTIONS: usize = 16;
const REQUESTS_PER_CONNECTION: usize = 2_000;
const CHANNEL: usize = 256;

/// Gives every stream one token a step; answers requests for one token at once.
struct NullEngine {
    ids: AtomicU64,
    streams: mpsc::Sender<(u32, channel::Sender<TokenEvent>)>,
}

fn word(index: u32) -> TokenEvent {
    TokenEvent::Token { token: u32::from(b'a') + index % 26, logprobs: None }
}

fn end(tokens: u32) -> TokenEvent {
    let usage = Usage { completion_tokens: tokens, ..Usage::default() };
    TokenEvent::Finished { reason: FinishReason::Length, usage }
}

impl Engine for NullEngine {
    fn submit(&self, request: Request) -> Result<TokenRx, SubmitError> {
        let (sender, receiver) = channel::channel(CHANNEL);
        sender.try_send(TokenEvent::Accepted).unwrap();
        if request.max_new_tokens == 1 {
            sender.try_send(word(0)).unwrap();
            sender.try_send(end(1)).unwrap();
        } else {
            self.streams.send((request.max_new_tokens, sender)).unwrap();
        }
        Ok(receiver)
    }
    fn cancel(&self, _: RequestId, _: CancelReason) {}
    fn next_id(&self) -> RequestId {
        RequestId(self.ids.fetch_add(1, Ordering::Relaxed))
    }
    fn health(&self) -> EngineHealth {
        EngineHealth { ready: true, live: true, draining: false }
    }
    fn metrics_text(&self) -> String {
        String::new()
    }
    fn saturation(&self) -> f32 {
        0.0
    }
    fn set_tenants(&self, _: &[NamedTenant]) -> bool {
        true
    }
}

/// Steps once all streams are there; returns the CPU time that stepping took.
fn step_all(streams: &mpsc::Receiver<(u32, channel::Sender<TokenEvent>)>) -> Duration {
    let streams: Vec<_> = streams.iter().take(STREAMS).collect();
    let before = cpu(libc::RUSAGE_THREAD);
    for index in 0..TOKENS {
        for (_, sender) in &streams {
            sender.try_send(word(index)).unwrap();
        }
        std::thread::sleep(STEP);
    }
    for (tokens, sender) in &streams {
        sender.try_send(end(*tokens)).unwrap();
    }
    let after = cpu(libc::RUSAGE_THREAD);
    after.0 + after.1 - before.0 - before.1
}

/// User and system time of the process or the thread.
fn cpu(who: libc::c_int) -> (Duration, Duration) {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to a whole rusage, which the call fills.
    let result = unsafe { libc::getrusage(who, usage.as_mut_ptr()) };
    assert_eq!(result, 0, "getrusage fails only for unknown targets");
    // SAFETY: zeroed and then filled; every field is a plain number.
    let usage = unsafe { usage.assume_init() };
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    (time(usage.ru_utime), time(usage.ru_stime))
}

fn request(body: &str) -> String {
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n";
    format!("{head}content-length: {}\r\n\r\n{body}", body.len())
}

/// Opens all streams at once and reads each to its end.
fn client_streams(address: &str) {
    let body = format!(
        r#"{{"model":"null","messages":[{{"role":"user","content":"Say something."}}],"stream":true,"max_tokens":{TOKENS}}}"#
    );
    let threads: Vec<_> = (0..STREAMS)
        .map(|_| {
            let mut socket = TcpStream::connect(address).unwrap();
            socket.write_all(request(&body).as_bytes()).unwrap();
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    let mut text = Vec::new();
                    let mut buffer = [0; 4096];
                    while !text.ends_with(b"0\r\n\r\n") {
                        let read = socket.read(&mut buffer).unwrap();
                        assert!(read > 0, "the stream ended early");
                        text.extend_from_slice(&buffer[..read]);
                    }
                    let events = text.windows(11).filter(|window| window == b"\"content\":\"").count();
                    assert_eq!(events, TOKENS as usize + 1);
                })
                .unwrap()
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Keeps some connections busy with requests for one token.
fn client_requests(address: &str) {
    let body =
        r#"{"model":"null","messages":[{"role":"user","content":"Say something."}],"max_tokens":1,"temperature":0.5}"#;
    let threads: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let mut socket = BufReader::new(TcpStream::connect(address).unwrap());
            std::thread::spawn(move || {
                for _ in 0..REQUESTS_PER_CONNECTION {
                    socket.get_mut().write_all(request(body).as_bytes()).unwrap();
                    let mut length = 0;
                    loop {
                        let mut line = String::new();
                        socket.read_line(&mut line).unwrap();
                        if let Some(value) = line.strip_prefix("content-length: ") {
                            length = value.trim().parse().unwrap();
                        }
                        if line == "\r\n" {
                            break;
                        }
                    }
                    let mut answer = vec![0; length];
                    socket.read_exact(&mut answer).unwrap();
                    assert!(answer.starts_with(b"{\"id\""));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Runs this program as a client.
fn run_client(mode: &str, address: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap()).args([mode, address]).stdin(Stdio::null()).spawn().unwrap()
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("client-streams") => return client_streams(&arguments[2]),
        Some("client-requests") => return client_requests(&arguments[2]),
        _ => {}
    }
    let (streams, received) = mpsc::channel();
    let engine = Arc::new(NullEngine { ids: AtomicU64::new(1), streams });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let state = AppState::new(HttpLimits::default(), ApiKeys::default());
    let model = ServedModel {
        engine,
        text: Arc::clone(&tiny_model::TEXT),
        names: vec!["null".into()],
        root: "null".into(),
        context_tokens_max: 4096,
        block_size: 16,
        vocab_size: tiny_model::VOCAB_SIZE,
        defaults: GenerationDefaults::default(),
        created: 0,
        fingerprint: "null".into(),
        log_prompts: false,
    };
    runtime.block_on(state.publish(model));
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    runtime.spawn(serve(listener, state, std::future::pending()));

    // `cargo bench --bench frontend -- streams` runs one part alone, for a profiler.
    let only = arguments.iter().skip(1).find(|argument| !argument.starts_with('-'));
    if only.is_none_or(|part| part == "streams") {
        let mut client = run_client("client-streams", &address);
        let before = cpu(libc::RUSAGE_SELF);
        let stepping = step_all(&received);
        assert!(client.wait().unwrap().success());
        let tokens = STREAMS as f64 * f64::from(TOKENS);
        report("streamed token", "4 us", before, tokens);
        println!("  of which in the engine's thread: {:.2} us", stepping.as_secs_f64() * 1e6 / tokens);
    }
    if only.is_none_or(|part| part == "requests") {
        let before = cpu(libc::RUSAGE_SELF);
        assert!(run_client("client-requests", &address).wait().unwrap().success());
        report("request", "40 us", before, (CONNECTIONS * REQUESTS_PER_CONNECTION) as f64);
    }
}

fn report(what: &str, aim: &str, before: (Duration, Duration), count: f64) {
    let after = cpu(libc::RUSAGE_SELF);
    let micros = |after: Duration, before: Duration| (after - before).as_secs_f64() * 1e6 / count;
    let (user, system) = (micros(after.0, before.0), micros(after.1, before.1));
    println!("CPU per {what}: {:.2} us (user {user:.2}, system {system:.2}); aim {aim} or less", user + system);
}
