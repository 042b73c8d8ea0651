//! Streamed answers, event by event.

use crate::fixture::{Server, Setup, chat_with, finished, token};
use futures_util::StreamExt;
use kvern::http::HttpLimits;
use kvern::request::TokenEvent;
use kvern_core::{CancelReason, FinishReason};
use serde_json::{Value, json};
use std::time::Duration;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// All content deltas of one choice, joined.
fn content(events: &[Value], index: u64) -> String {
    let of_choice = events.iter().filter_map(|event| event["choices"].get(0)).filter(|choice| choice["index"] == index);
    of_choice.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
}

#[tokio::test]
async fn a_chat_stream_opens_with_the_role_and_ends_with_reason_usage_done() {
    let server = Setup::saying("a✓b").start().await;
    let options = json!({"include_usage": true});
    let response = server.post_json(CHAT, chat_with(json!({"stream": true, "stream_options": options}))).await;
    let headers = response.headers().clone();
    assert_eq!(headers["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(headers["cache-control"], "no-cache");
    assert_eq!(headers["x-accel-buffering"], "no");
    assert!(!headers.contains_key("content-length"));
    let events = crate::fixture::events(&response.text().await.unwrap());
    let (id, created) = (&events[0]["id"], &events[0]["created"]);
    let chunk = |choices: Value, usage: Value| {
        json!({"id": id, "object": "chat.completion.chunk", "created": created, "model": "tiny", "choices": choices,
               "system_fingerprint": "fp_test", "usage": usage})
    };
    let choice =
        |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    let usage = json!({"prompt_tokens": 21, "total_tokens": 27, "completion_tokens": 6,
                       "prompt_tokens_details": {"cached_tokens": 5}});
    let expected = vec![
        chunk(choice(json!({"role": "assistant", "content": ""}), Value::Null), Value::Null),
        chunk(choice(json!({"content": "a"}), Value::Null), Value::Null),
        chunk(choice(json!({"content": "✓"}), Value::Null), Value::Null),
        chunk(choice(json!({"content": "b"}), Value::Null), Value::Null),
        chunk(choice(json!({}), json!("stop")), Value::Null),
        chunk(json!([]), usage),
    ];
    assert_eq!(events, expected);
}

#[tokio::test]
async fn usage_stays_out_of_streams_that_do_not_ask_for_it() {
    let server = Setup::saying("ab").start().await;
    let events = server.stream(CHAT, chat_with(json!({"stream": true}))).await;
    assert!(events.iter().all(|event| event.get("usage").is_none() && event["choices"][0].is_object()), "{events:?}");
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = json!({"prompt": "p", "stream": true, "stream_options": options});
    let events = server.stream(COMPLETIONS, body).await;
    let counts: Vec<u64> = events.iter().map(|event| event["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(counts, [1, 2, 3, 3]);
}

#[tokio::test]
async fn choices_are_interleaved_and_whole() {
    let script = |request: &kvern::request::Request| {
        crate::fixture::says(["zero", "one", "two"][request.sampling.seed as usize % 3])
    };
    let server = Setup { script: Some(Box::new(script)), ..Setup::default() }.start().await;
    let events = server.stream(CHAT, chat_with(json!({"stream": true, "n": 3, "seed": 0}))).await;
    for (index, text) in ["zero", "one", "two"].into_iter().enumerate() {
        assert_eq!(content(&events, index as u64), text);
        let finishes = events
            .iter()
            .filter(|event| event["choices"][0]["index"] == index && event["choices"][0]["finish_reason"] == "stop");
        assert_eq!(finishes.count(), 1, "choice {index}");
    }
}

/// Text, stop strings, whether they are kept; expected text and stop reason.
type StopCase = (&'static str, &'static [&'static str], bool, &'static str, Option<&'static str>);

#[tokio::test]
async fn no_part_of_a_stop_string_leaks() {
    let cases: &[StopCase] = &[
        ("one STOP two", &["STOP"], false, "one ", Some("STOP")),
        ("one STOP two", &["STOP"], true, "one STOP", Some("STOP")),
        ("one STO two", &["STOP"], false, "one STO two", None),
        ("one STO", &["STOP"], false, "one STO", None),
        ("ééé", &["éé"], false, "", Some("éé")),
        ("aab", &["ab", "b"], false, "a", Some("ab")),
    ];
    for &(said, stops, include, text, reason) in cases {
        let mut server = Setup::saying(said).start().await;
        let body = json!({"prompt": "p", "stop": stops, "include_stop_str_in_output": include, "max_tokens": 100});
        let mut streamed = body.clone();
        streamed["stream"] = true.into();
        let events = server.stream(COMPLETIONS, streamed).await;
        assert_eq!(content(&events, 0), text, "{said:?} streamed");
        assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], json!(reason), "{said:?} streamed");
        let (request, _) = server.next_submission().await;
        let cancelled = std::mem::take(&mut *server.engine.cancelled.lock().unwrap());
        let expected: &[_] = if reason.is_some() { &[(request.id, CancelReason::StopString)] } else { &[] };
        assert_eq!(cancelled, expected, "{said:?}");
        let whole = server.ask(COMPLETIONS, body).await;
        assert_eq!(whole["choices"][0]["text"], text, "{said:?} whole");
        assert_eq!(whole["choices"][0]["stop_reason"], json!(reason), "{said:?} whole");
    }
}

/// A server whose test answers by hand, with a stream open; what the client has read is in the reader.
async fn open_stream(limits: HttpLimits) -> (Server, Reader, tokio::sync::mpsc::Sender<TokenEvent>) {
    let mut server = Setup { limits, ..Setup::default() }.start().await;
    let response = server.post_json(CHAT, chat_with(json!({"stream": true}))).await;
    let (_, sender) = server.next_submission().await;
    (server, Reader { stream: response.bytes_stream().boxed(), text: String::new() }, sender)
}

struct Reader {
    stream: futures_util::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    text: String,
}

impl Reader {
    async fn until(&mut self, wanted: &str) {
        while !self.text.contains(wanted) {
            let next = self.stream.next().await.unwrap_or_else(|| panic!("no {wanted:?} in {:?}", self.text));
            self.text.push_str(std::str::from_utf8(&next.unwrap()).unwrap());
        }
    }

    async fn rest(mut self) -> String {
        while let Some(next) = self.stream.next().await {
            self.text.push_str(std::str::from_utf8(&next.unwrap()).unwrap());
        }
        self.text
    }
}

#[tokio::test]
async fn characters_are_never_cut() {
    let (_server, mut reader, sender) = open_stream(HttpLimits::default()).await;
    reader.until("assistant").await;
    for byte in "é".bytes().chain("x".bytes()) {
        sender.send(token(u32::from(byte))).await.unwrap();
    }
    reader.until("\"content\":\"x\"").await;
    // A character that stays incomplete becomes U+FFFD at the end.
    sender.send(token(0xc3)).await.unwrap();
    sender.send(finished(FinishReason::Length, 4)).await.unwrap();
    let events = crate::fixture::events(&reader.rest().await);
    let deltas: Vec<&str> =
        events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(deltas, ["", "é", "x", "\u{fffd}"]);
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive_by_one_line() {
    let limits = HttpLimits { keep_alive: Duration::from_millis(20), ..HttpLimits::default() };
    let (_server, mut reader, sender) = open_stream(limits).await;
    reader.until(": keep-alive\n: keep-alive\n").await;
    sender.send(token(u32::from(b'x'))).await.unwrap();
    reader.until("\"content\":\"x\"").await;
    assert!(reader.text.contains(": keep-alive\ndata: {"), "{}", reader.text);
    assert!(!reader.text.contains("keep-alive\n\n"), "{}", reader.text);
}

#[tokio::test]
async fn errors_inside_a_stream_are_events() {
    let cases = [
        (Some(FinishReason::Error), "internal_error"),
        (Some(FinishReason::Cancelled(CancelReason::SlowReader)), "slow_reader"),
        (Some(FinishReason::Cancelled(CancelReason::Shutdown)), "shutting_down"),
        (None, "slow_reader"),
    ];
    for (reason, code) in cases {
        let (_server, reader, sender) = open_stream(HttpLimits::default()).await;
        sender.send(token(u32::from(b'x'))).await.unwrap();
        if let Some(reason) = reason {
            sender.send(finished(reason, 1)).await.unwrap();
        }
        drop(sender);
        let events = crate::fixture::events(&reader.rest().await);
        assert_eq!(events[1]["choices"][0]["delta"]["content"], "x", "{reason:?}");
        assert_eq!(events.last().unwrap()["error"]["code"], code, "{reason:?}");
    }
}
