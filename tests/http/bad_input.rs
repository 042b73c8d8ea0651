//! Bad requests: each gets the right status, type, code and parameter, and a message that says what was found.

use crate::fixture::{CONTEXT, Server, Setup, chat_with};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What an error must be; `message` is a part of it.
struct Expected {
    status: u16,
    kind: &'static str,
    code: &'static str,
    param: Option<&'static str>,
    message: &'static str,
}

const fn bad(code: &'static str, param: &'static str, message: &'static str) -> Expected {
    Expected { status: 400, kind: "invalid_request_error", code, param: Some(param), message }
}

async fn check(server: &Server, path: &str, body: impl Into<Vec<u8>>, expected: &Expected) {
    let body = body.into();
    let shown = String::from_utf8_lossy(&body).chars().take(200).collect::<String>();
    let response = server.post(path, body).await;
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    let error: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{shown}: {error}: {text}"));
    let error = &error["error"];
    assert_eq!(status, expected.status, "{shown}: {error}");
    assert_eq!(error["type"], expected.kind, "{shown}: {error}");
    assert_eq!(error["code"], expected.code, "{shown}: {error}");
    assert_eq!(error["param"], json!(expected.param), "{shown}: {error}");
    assert!(error["message"].as_str().unwrap().contains(expected.message), "{shown}: {error}");
}

/// Every case is refused before it reaches the engine, and the next good request is answered.
async fn check_all(path: &str, cases: Vec<(Vec<u8>, Expected)>) {
    let mut server = Setup::saying("fine").start().await;
    for (body, expected) in cases {
        check(&server, path, body, &expected).await;
    }
    assert!(server.submissions.try_recv().is_err(), "a bad request reached the engine");
    server.ask(CHAT, chat_with(json!({}))).await;
}

#[tokio::test]
async fn what_is_no_json_request() {
    let malformed =
        |message| Expected { status: 400, kind: "invalid_request_error", code: "invalid_json", param: None, message };
    let deep = "[".repeat(100_000);
    let cases: Vec<(&[u8], Expected)> = vec![
        (b"", malformed("EOF while parsing")),
        (b"{\"messages\": ", malformed("line 1 column 13")),
        (b"{\"messages\": [}", malformed("line 1 column 15")),
        (b"{} trailing", malformed("trailing characters")),
        (b"{\"model\": \"\xff\"}", malformed("UTF-8, found a byte that is not at offset 11")),
        (b"[]", malformed("expected a JSON object")),
        (b"\"text\"", malformed("expected a JSON object")),
        (b"null", malformed("expected a JSON object")),
        (b"{\"temperature\": NaN}", malformed("expected value")),
        (b"{\"temperature\": 1e999}", malformed("number out of range")),
        (b"{\"model\": \"\\ud800\"}", malformed("malformed JSON: unexpected end of hex escape")),
        (deep.as_bytes(), malformed("")),
    ];
    check_all(CHAT, cases.into_iter().map(|(body, expected)| (body.to_vec(), expected)).collect()).await;
}

#[tokio::test]
async fn chat_fields_out_of_range_or_of_a_wrong_type() {
    let messages = |value: Value| json!({"messages": value});
    let too_many: Vec<String> = (0..17).map(|stop| stop.to_string()).collect();
    let cases: Vec<(Value, Expected)> = vec![
        (json!({}), bad("missing_parameter", "messages", "expected a value, found none")),
        (messages(Value::Null), bad("missing_parameter", "messages", "found none")),
        (messages(json!([])), bad("invalid_value", "messages", "at least one message")),
        (messages(json!("hi")), bad("invalid_type", "messages", "invalid type: string \"hi\", expected a sequence")),
        (messages(json!([{"content": "x"}])), bad("invalid_type", "messages[0]", "missing field `role`")),
        (messages(json!([["user", "x"]])), bad("invalid_type", "messages[0]", "expected an object")),
        (
            messages(json!([{"role": "king", "content": "x"}])),
            bad("invalid_type", "messages[0].role", "unknown variant `king`"),
        ),
        (
            messages(json!([{"role": "user", "content": 5}])),
            bad("invalid_type", "messages[0].content", "expected a string or a list of content parts"),
        ),
        (messages(json!([{"role": "user"}])), bad("invalid_value", "messages[0].content", "found none")),
        (
            messages(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
            bad("unsupported_parameter", "messages[0].content[0]", "found `image_url`"),
        ),
        (
            messages(json!([{"role": "user", "content": [{"type": "text"}]}])),
            bad("invalid_value", "messages[0].content[0].text", "found none"),
        ),
        (
            messages(json!([{"role": "tool", "content": "x", "tool_call_id": "1"}])),
            bad("chat_template_failed", "messages", "no tools here"),
        ),
        (chat_with(json!({"temperature": "hot"})), bad("invalid_type", "temperature", "string \"hot\"")),
        (chat_with(json!({"temperature": -0.1})), bad("invalid_value", "temperature", "[0, 2], found -0.1")),
        (chat_with(json!({"temperature": 2.5})), bad("invalid_value", "temperature", "found 2.5")),
        (chat_with(json!({"temperature": 1e300})), bad("invalid_value", "temperature", "found inf")),
        (chat_with(json!({"top_p": 0})), bad("invalid_value", "top_p", "(0, 1], found 0")),
        (chat_with(json!({"top_p": 1.5})), bad("invalid_value", "top_p", "found 1.5")),
        (chat_with(json!({"top_k": -2})), bad("invalid_value", "top_k", "found -2")),
        (chat_with(json!({"top_k": 0.5})), bad("invalid_type", "top_k", "floating point")),
        (chat_with(json!({"min_p": 1.1})), bad("invalid_value", "min_p", "found 1.1")),
        (chat_with(json!({"presence_penalty": 3})), bad("invalid_value", "presence_penalty", "found 3")),
        (chat_with(json!({"frequency_penalty": -3})), bad("invalid_value", "frequency_penalty", "found -3")),
        (chat_with(json!({"repetition_penalty": 0})), bad("invalid_value", "repetition_penalty", "found 0")),
        (chat_with(json!({"n": 0})), bad("invalid_value", "n", "[1, 128], found 0")),
        (chat_with(json!({"n": 129})), bad("invalid_value", "n", "found 129")),
        (chat_with(json!({"seed": "x"})), bad("invalid_type", "seed", "string \"x\"")),
        (chat_with(json!({"max_tokens": 0})), bad("invalid_value", "max_tokens", "found 0")),
        (chat_with(json!({"max_tokens": -1})), bad("invalid_value", "max_tokens", "found -1")),
        (chat_with(json!({"max_tokens": true})), bad("invalid_type", "max_tokens", "boolean")),
        (chat_with(json!({"max_completion_tokens": 0})), bad("invalid_value", "max_completion_tokens", "found 0")),
        (
            chat_with(json!({"max_tokens": 492})),
            bad(
                "context_length_exceeded",
                "max_tokens",
                "context is 512 tokens, but 513 were asked for: 21 in `messages` and 492",
            ),
        ),
        (
            chat_with(json!({"max_completion_tokens": 4_000_000_000_u32})),
            bad("context_length_exceeded", "max_completion_tokens", "4000000021"),
        ),
        (
            chat_with(json!({"min_tokens": 9, "max_tokens": 8})),
            bad("invalid_value", "min_tokens", "limit of 8, found 9"),
        ),
        (chat_with(json!({"stop": 5})), bad("invalid_type", "stop", "expected a string or a list of strings")),
        (chat_with(json!({"stop": ["a", 5]})), bad("invalid_type", "stop[1]", "expected a string")),
        (chat_with(json!({"stop": ["a", ""]})), bad("invalid_value", "stop", "index 1")),
        (chat_with(json!({"stop": too_many})), bad("invalid_value", "stop", "at most 16 strings, found 17")),
        (chat_with(json!({"stop": "x".repeat(1025)})), bad("invalid_value", "stop", "found 1025")),
        (
            chat_with(json!({"stop_token_ids": [258]})),
            bad("invalid_value", "stop_token_ids", "below the vocabulary's size of 258, found 258"),
        ),
        (chat_with(json!({"logit_bias": {"x": 1}})), bad("invalid_value", "logit_bias", "found `x`")),
        (chat_with(json!({"logit_bias": {"258": 1}})), bad("invalid_value", "logit_bias", "found `258`")),
        (chat_with(json!({"logit_bias": {"1": 101}})), bad("invalid_value", "logit_bias", "found 101")),
        (chat_with(json!({"top_logprobs": 2})), bad("invalid_value", "top_logprobs", "`logprobs` to be true")),
        (
            chat_with(json!({"logprobs": true, "top_logprobs": 21})),
            bad("invalid_value", "top_logprobs", "[0, 20], found 21"),
        ),
        (chat_with(json!({"logprobs": 1})), bad("invalid_type", "logprobs", "expected a boolean")),
        (
            chat_with(json!({"stream_options": {"include_usage": true}})),
            bad("invalid_value", "stream_options", "`stream` to be true"),
        ),
        (
            chat_with(json!({"stream": true, "stream_options": []})),
            bad("invalid_type", "stream_options", "expected an object"),
        ),
        (
            chat_with(json!({"add_generation_prompt": true, "continue_final_message": true})),
            bad("invalid_value", "continue_final_message", "found both"),
        ),
        (
            chat_with(json!({"tools": [{"type": "function", "function": {"name": "f"}}]})),
            bad("unsupported_parameter", "tools", "`tools` is not supported"),
        ),
        (
            chat_with(json!({"response_format": {"type": "json_object"}})),
            bad("unsupported_parameter", "response_format", ""),
        ),
        (chat_with(json!({"guided_json": {}})), bad("unsupported_parameter", "guided_json", "")),
        (chat_with(json!({"priority": 0.5})), bad("invalid_type", "priority", "floating point")),
        (chat_with(json!({"service_tier": "gold"})), bad("invalid_type", "service_tier", "unknown variant `gold`")),
        (chat_with(json!({"cache_salt": ""})), bad("invalid_value", "cache_salt", "1 to 1024 characters, found 0")),
        (chat_with(json!({"cache_salt": "é".repeat(1025)})), bad("invalid_value", "cache_salt", "found 1025")),
        (chat_with(json!({"cache_salt": 5})), bad("invalid_type", "cache_salt", "expected a string")),
        (chat_with(json!({"timeout": 0})), bad("invalid_value", "timeout", "[0.001, 86400], found 0")),
        (chat_with(json!({"timeout": -1.5})), bad("invalid_value", "timeout", "found -1.5")),
        (chat_with(json!({"timeout": 86_401})), bad("invalid_value", "timeout", "found 86401")),
        (chat_with(json!({"timeout": "1s"})), bad("invalid_type", "timeout", "string \"1s\"")),
    ];
    check_all(CHAT, cases.into_iter().map(|(body, expected)| (body.to_string().into_bytes(), expected)).collect())
        .await;
}

#[tokio::test]
async fn completion_fields_out_of_range_or_of_a_wrong_type() {
    let prompt = |value: Value| json!({"prompt": value});
    let with = |field: &str, value: Value| json!({"prompt": "p", field: value});
    let cases: Vec<(Value, Expected)> = vec![
        (json!({}), bad("missing_parameter", "prompt", "")),
        (prompt(json!("")), bad("invalid_value", "prompt", "at least one token")),
        (prompt(json!([])), bad("invalid_value", "prompt", "at least one token")),
        (prompt(json!(5)), bad("invalid_type", "prompt", "expected a string, a list of strings")),
        (prompt(json!(["a", 5])), bad("invalid_type", "prompt", "elements of one kind")),
        (prompt(json!([-1])), bad("invalid_type", "prompt[0]", "at least 0")),
        (prompt(json!([258])), bad("invalid_value", "prompt", "below the vocabulary's size of 258, found 258")),
        (prompt(json!([4_294_967_296_u64])), bad("invalid_type", "prompt[0]", "below 2^32")),
        (prompt(json!(vec!["a"; 129])), bad("invalid_value", "prompt", "at most 128 prompts, found 129")),
        (json!({"prompt": vec!["a"; 65], "n": 2}), bad("invalid_value", "n", "at most 128 answers in all, found 130")),
        (
            prompt(json!("x".repeat(CONTEXT as usize))),
            bad("context_length_exceeded", "prompt", "context is 512 tokens, but `prompt` has 512"),
        ),
        (prompt(json!("x".repeat(1_000_000))), bad("context_length_exceeded", "prompt", "has at least")),
        (with("max_tokens", json!(512)), bad("context_length_exceeded", "max_tokens", "513 were asked for")),
        (with("logprobs", json!(21)), bad("invalid_value", "logprobs", "[0, 20], found 21")),
        (with("logprobs", json!(true)), bad("invalid_type", "logprobs", "boolean")),
        (
            json!({"prompt": "p", "logprobs": 1, "echo": true}),
            bad("unsupported_parameter", "echo", "together with `logprobs`"),
        ),
        (with("suffix", json!("x")), bad("unsupported_parameter", "suffix", "")),
        (with("best_of", json!(2)), bad("unsupported_parameter", "best_of", "")),
    ];
    check_all(
        COMPLETIONS,
        cases.into_iter().map(|(body, expected)| (body.to_string().into_bytes(), expected)).collect(),
    )
    .await;
}

#[tokio::test]
async fn token_endpoints() {
    let server = Setup::saying("x").start().await;
    let cases: Vec<(&str, Value, Expected)> = vec![
        ("/tokenize", json!({}), bad("missing_parameter", "prompt", "")),
        ("/tokenize", json!({"prompt": "a", "messages": []}), bad("invalid_value", "messages", "found both")),
        ("/tokenize", json!({"messages": []}), bad("invalid_value", "messages", "at least one")),
        ("/detokenize", json!({}), bad("missing_parameter", "tokens", "")),
        ("/detokenize", json!({"tokens": [1, 999]}), bad("invalid_value", "tokens", "found 999")),
        ("/detokenize", json!({"tokens": "a"}), bad("invalid_type", "tokens", "expected a sequence")),
    ];
    for (path, body, expected) in cases {
        check(&server, path, body.to_string(), &expected).await;
    }
}

#[tokio::test]
async fn unknown_models_routes_and_methods() {
    let server = Setup::saying("x").start().await;
    let unknown = Expected {
        status: 404,
        kind: "invalid_request_error",
        code: "model_not_found",
        param: Some("model"),
        message: "`gpt-9` does not exist: this server has `tiny`, `org/tiny`",
    };
    for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize"] {
        check(&server, path, r#"{"model": "gpt-9"}"#, &unknown).await;
    }
    let route = Expected { code: "not_found", param: None, message: "there is no POST /v1/nothing", ..unknown };
    check(&server, "/v1/nothing", "{}", &route).await;
    let method =
        Expected { status: 405, code: "method_not_allowed", message: "does not take the method POST", ..route };
    check(&server, "/v1/models", "{}", &method).await;
    let response = server.get("/v1/models/gpt-9").await;
    assert_eq!(response.status(), 404);
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "model_not_found");
    let plain =
        server.client.post(server.url(CHAT)).body("{}").header("content-type", "text/plain").send().await.unwrap();
    assert_eq!(plain.status(), 415);
    assert_eq!(plain.json::<Value>().await.unwrap()["error"]["code"], "unsupported_media_type");
}
