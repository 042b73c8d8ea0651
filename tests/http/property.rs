//! Random and mutated requests: never a panic, never a 5xx, always an answer, and always JSON.

use crate::fixture::{Server, Setup, chat_with};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Names that the parser knows, so that random values reach every field's code.
const FIELDS: [&str; 42] = [
    "messages",
    "prompt",
    "tokens",
    "model",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "n",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "echo",
    "user",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "role",
    "content",
    "type",
    "text",
    "tools",
    "tool_calls",
    "response_format",
    "priority",
    "service_tier",
    "cache_salt",
    "timeout",
];

fn any_json() -> impl Strategy<Value = Value> {
    let key = prop_oneof![3 => prop::sample::select(&FIELDS[..]).prop_map(str::to_owned), 1 => ".{0,8}"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3_i64..300).prop_map(Value::from),
        any::<f64>().prop_map(|number| json!(number)),
        prop::sample::select(&["user", "assistant", "system", "text", "tiny", "flex", ""][..]).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..6).prop_map(|fields| Value::Object(Map::from_iter(fields))),
        ]
    })
}

/// A good request with some fields replaced, then some bytes replaced, cut or inserted.
fn any_body() -> impl Strategy<Value = Vec<u8>> {
    let fields = prop::collection::vec((prop::sample::select(&FIELDS[..]), any_json()), 0..4);
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3), 0..3);
    (fields, edits, any::<bool>()).prop_map(|(fields, edits, mutate)| {
        let mut body = chat_with(json!({"prompt": "p", "tokens": [1]}));
        for (key, value) in fields {
            body[key] = value;
        }
        let mut bytes = body.to_string().into_bytes();
        for (at, byte, edit) in edits.into_iter().filter(|_| mutate) {
            let at = at.index(bytes.len());
            match edit {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => bytes.truncate(at.max(1)),
            }
        }
        bytes
    })
}

/// Runs a property on its own runtime, a bounded number of times.
fn check<S: Strategy>(cases: u32, strategy: S, property: impl AsyncFn(&Server, S::Value)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = runtime.block_on(Setup::saying("x").start());
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&strategy, |input| {
        runtime.block_on(property(&server, input));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn bodies() {
    check(500, any_body(), async |server, body| {
        for path in ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"] {
            let response = server.post(path, body.clone()).await;
            let status = response.status();
            let streamed = response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream");
            let text = response.text().await.unwrap();
            assert!(status == 200 || status.is_client_error(), "{status} {text}");
            if streamed {
                crate::fixture::events(&text);
            } else {
                let answer: Value = serde_json::from_str(&text).unwrap();
                assert_eq!(status == 200, answer.get("error").is_none(), "{text}");
            }
        }
    });
}

#[test]
fn bytes_on_the_socket() {
    let head = prop_oneof![
        Just("GET /health HTTP/1.1\r\nhost: x\r\n\r\n".to_owned()),
        Just("POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}".to_owned()),
        ".{0,64}",
    ];
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    check(300, (head, edits), async |server, (head, edits)| {
        let mut bytes = head.into_bytes();
        for (at, byte) in edits {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
        }
        let mut client = TcpStream::connect(server.address).await.unwrap();
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // A reset is as good an end as any; a 5xx or silence without an end is not.
        let _ = tokio::time::timeout(crate::fixture::PATIENCE, client.read_to_end(&mut answer)).await.expect("an end");
        assert!(!answer.starts_with(b"HTTP/1.1 5"), "{}", String::from_utf8_lossy(&answer));
    });
}

/// Whatever tokens come, a stream says what a whole answer says, in whole characters, with and without stop strings.
#[test]
fn streams_equal_whole_answers() {
    let tokens = prop_oneof![
        any::<u8>().prop_map(u32::from),
        Just(u32::from(b'a')),
        Just(u32::from(b'b')),
        Just(0xc3),
        Just(0xa9),
        Just(256)
    ];
    let request = (prop::collection::vec(tokens, 0..40), prop::collection::vec("[abé]{1,3}", 0..3), any::<bool>());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // The prompt is what the engine says.
    let script = |request: &kvern::request::Request| {
        let mut events: Vec<_> = request.prompt.iter().map(|&token| crate::fixture::token(token)).collect();
        events.push(crate::fixture::finished(kvern_core::FinishReason::Length, events.len() as u32));
        events
    };
    let server = runtime.block_on(Setup { script: Some(Box::new(script)), ..Setup::default() }.start());
    let mut runner = TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&request, |(mut prompt, stops, include)| {
        prompt.push(u32::from(b'.'));
        let mut body =
            json!({"prompt": prompt, "stop": stops, "include_stop_str_in_output": include, "max_tokens": 64});
        runtime.block_on(async {
            let whole = server.ask("/v1/completions", body.clone()).await;
            body["stream"] = true.into();
            let events = server.stream("/v1/completions", body).await;
            let said: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
            assert_eq!(whole["choices"][0]["text"], said);
            assert!(
                include || stops.iter().all(|stop| !said.contains(stop.as_str())),
                "{said:?} holds one of {stops:?}"
            );
        });
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}
