//! Loading, serving, draining; clients that leave; engines that refuse.

use crate::fixture::{CHANNEL, PATIENCE, Setup, chat_with, finished, token};
use kvern::http::HttpLimits;
use kvern::request::{EngineHealth, SubmitError};
use kvern_core::FinishReason;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const CHAT: &str = "/v1/chat/completions";

/// The bytes of a chat request.
fn raw_chat(fields: Value) -> Vec<u8> {
    let body = chat_with(fields).to_string();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

#[tokio::test]
async fn probes_follow_the_state() {
    const PATHS: [&str; 5] = ["/health", "/ping", "/v1/models", "/health/ready", "/health/live"];
    let mut server = Setup { loaded: false, ..Setup::default() }.start().await;
    let statuses = async |server: &crate::fixture::Server| {
        let mut statuses = Vec::new();
        for path in PATHS {
            statuses.push(server.get(path).await.status().as_u16());
        }
        statuses
    };
    assert_eq!(statuses(&server).await, [503, 503, 503, 503, 200], "loading");
    let refused = server.post_json(CHAT, chat_with(json!({}))).await;
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "model_loading");
    assert_eq!(server.get("/metrics").await.text().await.unwrap(), "");
    server.publish().await;
    assert_eq!(statuses(&server).await, [200, 200, 200, 200, 200], "serving");
    assert!(server.get("/metrics").await.text().await.unwrap().contains("kvern_fake 1"));
    assert_eq!(server.get("/version").await.json::<Value>().await.unwrap()["version"], env!("CARGO_PKG_VERSION"));
    let set = |health| *server.engine.health.lock().unwrap() = health;
    set(EngineHealth { ready: false, live: true, draining: false });
    assert_eq!(statuses(&server).await, [503, 503, 503, 503, 200], "warming up");
    set(EngineHealth { ready: true, live: false, draining: false });
    assert_eq!(statuses(&server).await, [503, 503, 200, 503, 503], "stuck");
    set(EngineHealth { ready: true, live: true, draining: true });
    assert_eq!(statuses(&server).await, [200, 200, 200, 503, 200], "the engine drains");
    set(EngineHealth { ready: true, live: true, draining: false });
    server.shut_down();
    assert!(server.ended().await);
}

#[tokio::test]
async fn a_drain_finishes_what_runs_and_refuses_what_comes() {
    let mut server = Setup::default().start().await;
    let running = server.post_json(CHAT, chat_with(json!({"stream": true}))).await;
    let (_, sender) = server.next_submission().await;
    server.shut_down();
    timeout(PATIENCE, async {
        while server.get("/health/ready").await.status() != 503 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(server.get("/health").await.status(), 200);
    let refused = server.post_json(CHAT, chat_with(json!({}))).await;
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["connection"], "close");
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "shutting_down");
    sender.send(token(u32::from(b'x'))).await.unwrap();
    sender.send(finished(FinishReason::Length, 1)).await.unwrap();
    let events = crate::fixture::events(&running.text().await.unwrap());
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(server.ended().await, "everything ended in time");
}

#[tokio::test]
async fn a_drain_that_takes_too_long_cuts_off() {
    let limits = HttpLimits { drain_timeout: Duration::from_millis(50), ..HttpLimits::default() };
    let mut server = Setup { limits, ..Setup::default() }.start().await;
    let _running = server.post_json(CHAT, chat_with(json!({"stream": true}))).await;
    let (_, sender) = server.next_submission().await;
    server.shut_down();
    timeout(PATIENCE, sender.closed()).await.expect("the request is given up");
    assert!(!server.ended().await);
}

#[tokio::test]
async fn a_client_that_leaves_drops_its_channel() {
    for stream in [true, false] {
        let mut server = Setup::default().start().await;
        let mut client = TcpStream::connect(server.address).await.unwrap();
        client.write_all(&raw_chat(json!({"stream": stream, "n": 2}))).await.unwrap();
        let (_, first) = server.next_submission().await;
        let (_, second) = server.next_submission().await;
        first.send(token(u32::from(b'x'))).await.unwrap();
        drop(client);
        timeout(PATIENCE, first.closed()).await.unwrap_or_else(|_| panic!("stream {stream}: still open"));
        timeout(PATIENCE, second.closed()).await.unwrap_or_else(|_| panic!("stream {stream}: still open"));
    }
}

#[tokio::test]
async fn a_slow_reader_holds_bounded_memory_and_is_told() {
    let mut server = Setup::default().start().await;
    let mut client = TcpStream::connect(server.address).await.unwrap();
    client.write_all(&raw_chat(json!({"stream": true}))).await.unwrap();
    let (_, sender) = server.next_submission().await;
    // The kernel's buffers take some megabytes; then the body is polled no more and the channel stays full.
    let mut sent = 0_usize;
    while timeout(Duration::from_millis(500), sender.reserve()).await.is_ok_and(|slot| slot.is_ok()) {
        sender.try_send(token(u32::from(b'x'))).unwrap();
        sent += 1;
        assert!(sent < 1_000_000, "the server buffers without bound");
    }
    assert_eq!(sender.capacity(), 0);
    assert!(sent > CHANNEL);
    // The engine gives up by dropping its end; a client that reads after all is told.
    drop(sender);
    let mut text = Vec::new();
    timeout(PATIENCE, async {
        let mut buffer = vec![0; 1 << 16];
        while !text.ends_with(b"0\r\n\r\n") {
            let read = client.read(&mut buffer).await.unwrap();
            assert!(read > 0, "the connection ended without an end of the body");
            text.extend_from_slice(&buffer[..read]);
        }
    })
    .await
    .unwrap();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches("\"content\":\"x\"").count(), sent);
    assert!(text.contains("\"code\":\"slow_reader\""), "{}", &text[text.len() - 400..]);
}

#[tokio::test]
async fn a_reader_that_never_reads_is_cut_off() {
    let limits = HttpLimits { write_timeout: Duration::from_millis(100), ..HttpLimits::default() };
    let mut server = Setup { limits, ..Setup::default() }.start().await;
    let mut client = TcpStream::connect(server.address).await.unwrap();
    client.write_all(&raw_chat(json!({"stream": true}))).await.unwrap();
    let (_, sender) = server.next_submission().await;
    let flood = async { while sender.send(token(u32::from(b'x'))).await.is_ok() {} };
    timeout(PATIENCE, flood).await.expect("the channel is dropped");
}

#[tokio::test]
async fn refusals_of_the_engine() {
    let server = Setup::default().start().await;
    let retry_in = std::time::Duration::from_millis(1_250);
    let cases = [
        (SubmitError::QueueFull { waiting: 7, limit: 7, retry_in }, 503, "server_error", "queue_full", true),
        (SubmitError::Draining, 503, "server_error", "shutting_down", true),
        (SubmitError::Stopped, 503, "server_error", "engine_stopped", false),
    ];
    for (error, status, kind, code, retry) in cases {
        *server.engine.refusal.lock().unwrap() = Some(error);
        for stream in [false, true] {
            let response = server.post_json(CHAT, chat_with(json!({"stream": stream}))).await;
            assert_eq!(response.status(), status, "{error}");
            assert_eq!(response.headers().contains_key("retry-after"), retry, "{error}");
            let body: Value = response.json().await.unwrap();
            assert_eq!((&body["error"]["type"], &body["error"]["code"]), (&json!(kind), &json!(code)), "{error}");
        }
    }
}

#[tokio::test]
async fn failures_of_a_whole_answer() {
    use kvern_core::CancelReason;
    let cases = [
        (FinishReason::Error, 500, "internal_error"),
        (FinishReason::Deadline, 504, "deadline_exceeded"),
        (FinishReason::Cancelled(CancelReason::Shutdown), 503, "shutting_down"),
    ];
    for (reason, status, code) in cases {
        let script = move |_: &kvern::request::Request| vec![token(120), finished(reason, 1)];
        let server = Setup { script: Some(Box::new(script)), ..Setup::default() }.start().await;
        let response = server.post_json(CHAT, chat_with(json!({}))).await;
        assert_eq!(response.status(), status, "{reason:?}");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], code, "{reason:?}");
    }
}

#[tokio::test]
async fn refusals_of_the_scheduler() {
    use kvern_core::{Backoff, Micros, Refusal};
    let backoff = Backoff { retry_in: Micros(1_250_400), queue_depth: 9 };
    let cases = [
        (Refusal::QueueFull(backoff), 503, "queue_full", true),
        (Refusal::QueueTokens(backoff), 503, "queue_full", true),
        (Refusal::Deadline(backoff), 503, "would_be_late", true),
        (Refusal::Quarantined(backoff), 500, "quarantined", true),
        (Refusal::TooLong, 400, "context_length_exceeded", false),
    ];
    for (refusal, status, code, retry) in cases {
        let script = move |_: &kvern::request::Request| vec![finished(FinishReason::Refused(refusal), 0)];
        let server = Setup { script: Some(Box::new(script)), ..Setup::default() }.start().await;
        // A stream hears of it before its head is sent.
        for stream in [false, true] {
            let response = server.post_json(CHAT, chat_with(json!({"stream": stream}))).await;
            assert_eq!(response.status(), status, "{refusal:?}");
            let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
            let expected = retry.then_some(["2", "1250"]).map(|texts| texts.map(str::to_owned));
            assert_eq!(header("retry-after").zip(header("retry-after-ms")).map(<[String; 2]>::from), expected);
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["error"]["code"], code, "{refusal:?}");
            let wait = retry.then_some((1.251, 9));
            assert_eq!(body["error"]["retry_in"].as_f64().zip(body["error"]["queue_depth"].as_u64()), wait);
        }
    }
}

#[tokio::test]
async fn request_ids_are_echoed_or_made() {
    let mut server = Setup::saying("x").start().await;
    let request = server.client.post(server.url(CHAT)).header("x-request-id", "abc-1");
    let response = request.header("content-type", "application/json").body(chat_with(json!({})).to_string());
    let response = response.send().await.unwrap();
    assert_eq!(response.headers()["x-request-id"], "abc-1");
    assert_eq!(response.json::<Value>().await.unwrap()["id"], "chatcmpl-abc-1");
    assert_eq!(&*server.next_submission().await.0.external_id, "chatcmpl-abc-1");
    assert_eq!(server.get("/nothing").await.headers()["x-request-id"].len(), 32);
}
