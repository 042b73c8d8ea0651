//! Keys, sizes and times.

use crate::fixture::{PATIENCE, Server, Setup, chat_with};
use kvern::http::HttpLimits;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const CHAT: &str = "/v1/chat/completions";

/// Writes these bytes on a new connection and reads until the server closes it.
async fn exchange(server: &Server, bytes: &[u8]) -> String {
    let mut client = TcpStream::connect(server.address).await.unwrap();
    // The server may answer and close before it has taken all bytes.
    let _ = client.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, client.read_to_end(&mut answer)).await.expect("the server closes the connection");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn keys_guard_the_api_and_not_the_probes() {
    let keys = vec!["secret".to_owned(), "other".to_owned()];
    let server = Setup { keys, ..Setup::saying("x") }.start().await;
    for path in ["/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"] {
        assert_eq!(server.get(path).await.status(), 200, "{path}");
    }
    let cases = [
        (None, 401),
        (Some("Bearer wrong"), 401),
        (Some("Basic secret"), 401),
        (Some("Bearer "), 401),
        (Some("Bearer secret"), 200),
        (Some("bearer other"), 200),
    ];
    for (header, status) in cases {
        let mut request = server.client.get(server.url("/v1/models"));
        if let Some(header) = header {
            request = request.header("authorization", header);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status, "{header:?}");
        if status == 401 {
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["error"]["type"], "authentication_error");
            assert_eq!(body["error"]["code"], "invalid_api_key");
        }
    }
    for path in [CHAT, "/v1/completions", "/tokenize", "/detokenize"] {
        assert_eq!(server.post(path, "{}").await.status(), 401, "{path}");
    }
    assert_eq!(server.get("/openapi.json").await.status(), 401);
}

#[tokio::test]
async fn bodies_over_the_limit() {
    let limits = HttpLimits { body_bytes_max: 1000, ..HttpLimits::default() };
    let server = Setup { limits, ..Setup::saying("x") }.start().await;
    let response = server.post(CHAT, vec![b' '; 1001]).await;
    assert_eq!(response.status(), 413);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "body_too_large");
    assert!(body["error"]["message"].as_str().unwrap().contains("1000 bytes"));
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n");
    // A promise alone is enough to refuse.
    let promised = exchange(&server, format!("{head}content-length: 99999999999\r\n\r\n").as_bytes()).await;
    assert!(promised.starts_with("HTTP/1.1 413 "), "{promised}");
    // Without a promise, what arrives counts.
    let chunk = format!("3e9\r\n{}\r\n", " ".repeat(1001));
    let chunked = exchange(&server, format!("{head}transfer-encoding: chunked\r\n\r\n{chunk}").as_bytes()).await;
    assert!(chunked.starts_with("HTTP/1.1 413 "), "{chunked}");
    let padded = format!("{}{}", chat_with(json!({})), " ".repeat(500));
    assert_eq!(server.post(CHAT, padded).await.status(), 200);
}

#[tokio::test]
async fn lies_about_the_length() {
    let server = Setup::saying("x").start().await;
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n");
    for lengths in ["content-length: -1", "content-length: 1x", "content-length: 1\r\ncontent-length: 2"] {
        let answer = exchange(&server, format!("{head}{lengths}\r\n\r\n{{}}").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{lengths:?}: {answer}");
    }
    let chunk = format!("{head}transfer-encoding: chunked\r\n\r\nzz\r\n");
    let answer = exchange(&server, chunk.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn heads_over_the_limit() {
    let limits = HttpLimits { head_bytes_max: 16 << 10, ..HttpLimits::default() };
    let server = Setup { limits, ..Setup::saying("x") }.start().await;
    let many: String = (0..200).map(|header| format!("x-{header}: a\r\n")).collect();
    let large = format!("x-large: {}\r\n", "a".repeat(17 << 10));
    for headers in [many, large] {
        let answer = exchange(&server, format!("GET /health HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    let endless = exchange(&server, &vec![b'G'; 64 << 10]).await;
    assert!(endless.is_empty() || endless.starts_with("HTTP/1.1 4"), "{endless}");
    assert_eq!(server.get("/health").await.status(), 200);
}

#[tokio::test]
async fn slow_clients_are_let_go() {
    let quick = Duration::from_millis(250);
    let limits = HttpLimits { head_timeout: quick, body_timeout: quick, ..HttpLimits::default() };
    let server = Setup { limits, ..Setup::saying("x") }.start().await;
    for silent in ["", "GET /health HTT", "GET /health HTTP/1.1\r\nhost: x\r\n"] {
        assert_eq!(exchange(&server, silent.as_bytes()).await, "", "{silent:?}");
    }
    let head =
        format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{");
    let answer = exchange(&server, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("body_timeout"), "{answer}");
}

#[tokio::test]
async fn connections_over_the_limit_wait() {
    let limits = HttpLimits { connections_max: 1, ..HttpLimits::default() };
    let server = Setup { limits, ..Setup::saying("x") }.start().await;
    let mut first = TcpStream::connect(server.address).await.unwrap();
    first.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(first.read(&mut [0; 1024]).await.unwrap() > 0);
    let mut second = TcpStream::connect(server.address).await.unwrap();
    second.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = [0; 1024];
    assert!(timeout(Duration::from_millis(100), second.read(&mut answer)).await.is_err(), "it was served");
    drop(first);
    assert!(timeout(PATIENCE, second.read(&mut answer)).await.unwrap().unwrap() > 0);
}
