//! Keys of a file: who may ask, how much, and under which terms the engine gets it.

use crate::fixture::{PATIENCE, Server, Setup, chat_with, finished, says};
use crate::tiny_model::{IM_END, IM_START};
use kvern::keys::{HashedSecret, KeyringError};
use kvern::request::{NamedTenant, Request, SubmitError};
use kvern_core::{FinishReason, TenantId};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tempfile::NamedTempFile;
use tokio::sync::Notify;
use tokio::time::timeout;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Tokens of the prompt of `chat_with`, and of the answer `x` with its end; so many of them count as cached.
const PROMPT: u64 = 21;
const ANSWER: u64 = 2;
const CACHED: u64 = 5;

/// An entry of a key whose secret is `secret-NAME`.
fn key(name: &str, settings: &str) -> String {
    let salt = "000102030405060708090a0b0c0d0e0f".parse().unwrap();
    let secret = HashedSecret::new(salt, format!("secret-{name}").as_bytes());
    format!("[[key]]\nname = \"{name}\"\nsecret = \"{secret}\"\n{settings}\n")
}

fn file(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

/// A server with this keys file.
async fn serving(text: &str, setup: Setup) -> (Server, NamedTempFile) {
    let file = file(text);
    let server = Setup { keys_file: Some(file.path().into()), ..setup }.start().await;
    (server, file)
}

/// As a client with the secret of this key.
async fn send(server: &Server, key: &str, path: &str, body: Value) -> Response {
    let request = server.client.post(server.url(path)).header("content-type", "application/json");
    request.bearer_auth(format!("secret-{key}")).body(body.to_string()).send().await.unwrap()
}

async fn status(server: &Server, key: &str) -> u16 {
    let request = server.client.get(server.url("/v1/models")).bearer_auth(format!("secret-{key}"));
    request.send().await.unwrap().status().as_u16()
}

fn header<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().unwrap())
}

fn number(response: &Response, name: &str) -> u64 {
    header(response, name).unwrap_or_else(|| panic!("no {name}")).parse().unwrap()
}

async fn error_code(response: Response) -> (String, String) {
    let body: Value = response.json().await.unwrap();
    let word = |name: &str| body["error"][name].as_str().unwrap().to_owned();
    (word("type"), word("code"))
}

/// The terms of the next request that reached the engine.
async fn submitted(server: &mut Server) -> Request {
    server.next_submission().await.0
}

#[tokio::test]
async fn everything_but_health_wants_a_key() {
    let setup = Setup { keys: vec!["plain".into()], ..Setup::saying("x") };
    let (server, _file) = serving(&key("a", ""), setup).await;
    let paths = ["/v1/models", "/v1/models/tiny", "/openapi.json"];
    let headers = [
        (None, 401),
        (Some(("authorization", "Bearer secret-b")), 401),
        (Some(("authorization", "Basic secret-a")), 401),
        (Some(("x-api-key", "secret-b")), 401),
        (Some(("authorization", "Bearer secret-a")), 200),
        (Some(("authorization", "Bearer plain")), 200),
        (Some(("x-api-key", "secret-a")), 200),
        (Some(("x-api-key", "plain")), 200),
    ];
    for path in paths {
        for (header, expected) in headers {
            let mut request = server.client.get(server.url(path));
            if let Some((name, value)) = header {
                request = request.header(name, value);
            }
            assert_eq!(request.send().await.unwrap().status(), expected, "{path} {header:?}");
        }
    }
    for path in ["/health", "/health/live", "/health/ready", "/ping", "/version", "/metrics"] {
        assert_eq!(server.get(path).await.status(), 200, "{path}");
    }
    for path in [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/v1/models"] {
        let options = server.client.request(Method::OPTIONS, server.url(path)).send().await.unwrap();
        assert_eq!(options.status(), 405, "{path}: it is not asked for a key");
    }
}

#[tokio::test]
async fn metrics_want_a_key_where_the_operator_says_so() {
    let setup = Setup { guard_metrics: true, ..Setup::saying("x") };
    let (server, _file) = serving(&key("a", ""), setup).await;
    assert_eq!(server.get("/metrics").await.status(), 401);
    let request = server.client.get(server.url("/metrics")).bearer_auth("secret-a");
    assert!(request.send().await.unwrap().text().await.unwrap().contains("kvern_fake"));
    let open = Setup { guard_metrics: true, ..Setup::saying("x") }.start().await;
    assert_eq!(open.get("/metrics").await.status(), 200, "without keys there is nothing to guard with");
}

#[tokio::test]
async fn a_file_without_keys_lets_nobody_in() {
    let (server, _file) = serving("", Setup::saying("x")).await;
    assert_eq!((status(&server, "a").await, server.get("/v1/models").await.status().as_u16()), (401, 401));
}

#[tokio::test]
async fn requests_per_minute_are_limited_and_told() {
    let (server, _file) = serving(&(key("a", "requests_per_minute = 2") + &key("b", "")), Setup::saying("x")).await;
    let first = send(&server, "a", CHAT, chat_with(json!({}))).await;
    assert_eq!(first.status(), 200);
    assert_eq!(
        (number(&first, "x-ratelimit-limit-requests"), number(&first, "x-ratelimit-remaining-requests")),
        (2, 1)
    );
    assert!(header(&first, "x-ratelimit-reset-requests").unwrap().ends_with('s'));
    assert_eq!(header(&first, "x-ratelimit-limit-tokens"), None);
    // One that is no good counts too; looking does not.
    assert_eq!(send(&server, "a", CHAT, json!({})).await.status(), 400);
    assert_eq!(status(&server, "a").await, 200);
    let refused = send(&server, "a", "/tokenize", json!({"prompt": "x"})).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(number(&refused, "x-ratelimit-remaining-requests"), 0);
    let (after, after_ms) = (number(&refused, "retry-after"), number(&refused, "retry-after-ms"));
    assert!((1..=30).contains(&after) && after_ms.div_ceil(1000) == after, "{after} {after_ms}");
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["type"], "rate_limit_error");
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    assert_eq!(body["error"]["retry_in"].as_f64().unwrap() * 1e3, after_ms as f64);
    assert!(body["error"]["message"].as_str().unwrap().contains("limit of 2 requests per minute"), "{body}");
    let free = send(&server, "b", CHAT, chat_with(json!({}))).await;
    assert_eq!(free.status(), 200);
    assert_eq!(header(&free, "x-ratelimit-limit-requests"), None, "a key without limits is told none");
}

#[tokio::test]
async fn tokens_are_reserved_and_settled_by_what_was_used() {
    // A bucket of one token takes any request when it is full, and what is owed shows in the wait, at a minute a token.
    let (server, _file) = serving(&key("a", "tokens_per_minute = 1"), Setup::saying("x")).await;
    let first = send(&server, "a", CHAT, chat_with(json!({"max_tokens": 7}))).await;
    assert_eq!((first.status().as_u16(), number(&first, "x-ratelimit-remaining-tokens")), (200, 0));
    let refused = send(&server, "a", CHAT, chat_with(json!({"max_tokens": 7}))).await;
    assert_eq!(refused.status(), 429);
    let owed = 60 * (PROMPT - CACHED + ANSWER);
    let after = number(&refused, "retry-after");
    assert!((owed - 59..=owed).contains(&after), "expected up to {owed}, found {after}");
    let message = refused.text().await.unwrap();
    assert!(message.contains("limit of 1 tokens per minute") && message.contains("may take 28"), "{message}");
}

#[tokio::test]
async fn a_days_budget_is_kept() {
    let budget = PROMPT + 7 + 3;
    let (server, _file) = serving(&key("a", &format!("tokens_per_day = {budget}")), Setup::saying("x")).await;
    let first = send(&server, "a", CHAT, chat_with(json!({"max_tokens": 7}))).await;
    assert_eq!(first.status(), 200);
    let left = budget - (PROMPT - CACHED + ANSWER);
    assert_eq!(
        (number(&first, "x-ratelimit-limit-tokens"), number(&first, "x-ratelimit-remaining-tokens")),
        (budget, left)
    );
    let refused = send(&server, "a", CHAT, chat_with(json!({"max_tokens": 7}))).await;
    assert_eq!((refused.status().as_u16(), header(&refused, "x-should-retry")), (429, Some("false")));
    assert!(number(&refused, "retry-after") <= 86_400);
    assert_eq!(error_code(refused).await, ("rate_limit_error".into(), "insufficient_quota".into()));
    let impossible = send(&server, "a", CHAT, chat_with(json!({"max_tokens": 200}))).await;
    assert_eq!((impossible.status().as_u16(), header(&impossible, "retry-after")), (429, None));
    let small = send(&server, "a", COMPLETIONS, json!({"prompt": "p", "max_tokens": 5})).await;
    assert_eq!(small.status(), 200, "what is left can be used");
}

#[tokio::test]
async fn what_the_engine_refuses_costs_no_tokens() {
    let (server, _file) = serving(&key("a", "tokens_per_day = 600"), Setup::saying("x")).await;
    *server.engine.refusal.lock().unwrap() =
        Some(SubmitError::QueueFull { waiting: 1, limit: 1, retry_in: Duration::from_secs(1) });
    let refused = send(&server, "a", CHAT, chat_with(json!({}))).await;
    assert_eq!((refused.status().as_u16(), number(&refused, "x-ratelimit-remaining-tokens")), (503, 600));
}

#[tokio::test]
async fn a_client_that_leaves_gives_its_permit_and_its_tokens_back() {
    let limits = "concurrent_requests = 1\ntokens_per_day = 600";
    let (mut server, _file) = serving(&key("a", limits), Setup::default()).await;
    let running = send(&server, "a", CHAT, chat_with(json!({"stream": true}))).await;
    assert_eq!((running.status().as_u16(), number(&running, "x-ratelimit-remaining-tokens")), (200, 600 - 512));
    let (_, sender) = server.next_submission().await;
    let refused = send(&server, "a", CHAT, chat_with(json!({"max_tokens": 1}))).await;
    assert_eq!((refused.status().as_u16(), header(&refused, "retry-after")), (429, Some("1")));
    assert_eq!(error_code(refused).await.1, "rate_limit_exceeded");
    drop(running);
    timeout(PATIENCE, sender.closed()).await.expect("the request is given up");
    let left = timeout(PATIENCE, async {
        loop {
            let response = send(&server, "a", "/tokenize", json!({"prompt": "x"})).await;
            if response.status() == 200 {
                return number(&response, "x-ratelimit-remaining-tokens");
            }
        }
    });
    assert_eq!(left.await.expect("the permit comes back"), 600 - PROMPT, "the prompt was used, the answer was not");
}

#[tokio::test]
async fn a_reload_lets_others_in_and_drops_nobody() {
    let once = "requests_per_minute = 1";
    let (mut server, file) = serving(&(key("a", "") + &key("b", once)), Setup::default()).await;
    let running = send(&server, "a", CHAT, chat_with(json!({"stream": true}))).await;
    let (_, sender) = server.next_submission().await;
    assert_eq!(send(&server, "b", "/tokenize", json!({"prompt": "x"})).await.status(), 200);
    std::fs::write(file.path(), key("b", once) + &key("c", "")).unwrap();
    assert!(server.state.keys.reload().await.unwrap());
    assert!(!server.state.keys.reload().await.unwrap(), "it did not change again");
    let statuses = [status(&server, "a").await, status(&server, "b").await, status(&server, "c").await];
    assert_eq!(statuses, [401, 200, 200]);
    let again = send(&server, "b", "/tokenize", json!({"prompt": "x"})).await;
    assert_eq!(again.status(), 429, "the key stayed, and so did its count");
    sender.send(finished(FinishReason::Length, 0)).await.unwrap();
    let events = crate::fixture::events(&running.text().await.unwrap());
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length", "what was let in goes on");
}

#[tokio::test]
async fn a_broken_file_changes_nothing() {
    let (server, file) = serving(&key("a", ""), Setup::saying("x")).await;
    std::fs::write(file.path(), key("b", "weight = 3")).unwrap();
    for _ in 0..2 {
        let error = server.state.keys.reload().await.unwrap_err();
        assert!(matches!(&error, KeyringError::File { source, .. } if source.line == 4), "{error}");
    }
    assert_eq!([status(&server, "a").await, status(&server, "b").await], [200, 401]);
    std::fs::remove_file(file.path()).unwrap();
    assert!(matches!(server.state.keys.reload().await, Err(KeyringError::Read { .. })));
    assert_eq!(status(&server, "a").await, 200);
    std::fs::write(file.path(), key("b", "")).unwrap();
    assert!(server.state.keys.reload().await.unwrap());
    assert_eq!([status(&server, "a").await, status(&server, "b").await], [401, 200]);
}

#[tokio::test]
async fn the_file_is_followed() {
    let (server, file) = serving(&key("a", ""), Setup::saying("x")).await;
    let (keys, asked) = (Arc::clone(&server.state.keys), Arc::new(Notify::new()));
    let mut swaps = keys.swaps();
    swaps.mark_unchanged();
    let ears = Arc::clone(&asked);
    // Once by the clock, once by being asked.
    for (every, secret) in [(Duration::from_millis(1), "b"), (PATIENCE * 9, "c")] {
        let (keys, ears) = (Arc::clone(&keys), Arc::clone(&ears));
        let following = tokio::spawn(async move { keys.follow(every, &ears).await });
        std::fs::write(file.path(), key(secret, "")).unwrap();
        if every > PATIENCE {
            asked.notify_one();
        }
        timeout(PATIENCE, swaps.changed()).await.expect("the change is seen").unwrap();
        assert_eq!(status(&server, secret).await, 200);
        following.abort();
    }
}

fn named(tenants: &[NamedTenant]) -> Vec<(String, u32, u32, u32, Option<u32>)> {
    let row = |tenant: &NamedTenant| {
        let spec = &tenant.spec;
        (tenant.name.to_string(), spec.tenant.0, spec.weight, spec.floor_blocks, spec.ceiling_blocks)
    };
    tenants.iter().map(row).collect()
}

#[tokio::test]
async fn the_engine_knows_the_tenants_before_their_requests() {
    let tenant = |name: &str, settings: &str| format!("[[tenant]]\nname = \"{name}\"\n{settings}\n");
    let acme = tenant("acme", "weight = 3\nkv_floor = 100\nkv_ceiling = 1000");
    let text = acme + &key("a", "tenant = \"acme\"") + &key("b", "") + &key("c", "tenant = \"acme\"");
    let setup = Setup { loaded: false, ..Setup::saying("x") };
    let (mut server, file) = serving(&text, setup).await;
    assert_eq!(status(&server, "a").await, 503, "keys are known while the model loads");
    assert_eq!(status(&server, "z").await, 401);
    server.engine.tenants_refused.store(3, Ordering::Relaxed);
    server.publish().await;
    let row = |name: &str, number, weight, floor, ceiling| (name.to_owned(), number, weight, floor, ceiling);
    let expected = [row("acme", 1, 3, 7, Some(63)), row("b", 2, 1, 0, None)];
    assert_eq!(named(&server.engine.tenants.lock().unwrap()), expected);
    for (key, number) in [("a", 1), ("b", 2), ("c", 1)] {
        assert_eq!(send(&server, key, CHAT, chat_with(json!({}))).await.status(), 200);
        assert_eq!(submitted(&mut server).await.terms.tenant, TenantId(number), "{key}");
    }
    // Numbers are for ever, and a tenant that is gone may still have a request on its way.
    std::fs::write(file.path(), tenant("aaa", "weight = 2") + &key("b", "") + &key("z", "tenant = \"aaa\"")).unwrap();
    server.engine.tenants_refused.store(2, Ordering::Relaxed);
    assert!(server.state.keys.reload().await.unwrap());
    let expected = [row("acme", 1, 1, 0, None), row("b", 2, 1, 0, None), row("aaa", 3, 2, 0, None)];
    assert_eq!(named(&server.engine.tenants.lock().unwrap()), expected);
}

#[tokio::test]
async fn prefixes_are_shared_within_a_tenant_and_a_salt() {
    let text = key("a", "tenant = \"t\"") + &key("b", "tenant = \"t\"") + &key("c", "");
    let (mut server, _file) = serving(&text, Setup::saying("x")).await;
    let mut salts = Vec::new();
    let with = |salt: &str| json!({"cache_salt": salt});
    let cases =
        [("a", json!({})), ("b", json!({})), ("c", json!({})), ("a", with("s")), ("b", with("s")), ("c", with("s"))];
    for (key, fields) in cases {
        assert_eq!(send(&server, key, CHAT, chat_with(fields)).await.status(), 200);
        salts.push(submitted(&mut server).await.terms.salt);
    }
    assert_eq!((salts[0], salts[3]), (salts[1], salts[4]), "one tenant, one cache");
    let different = [salts[0], salts[2], salts[3], salts[5]];
    assert!(different.iter().enumerate().all(|(at, salt)| !different[..at].contains(salt)), "{salts:?}");
    let mut open = Setup::saying("x").start().await;
    open.ask(CHAT, chat_with(json!({}))).await;
    open.ask(CHAT, chat_with(json!({}))).await;
    let (first, second) = (submitted(&mut open).await.terms, submitted(&mut open).await.terms);
    assert_eq!((first, first.tenant), (second, TenantId(0)));
    assert!(first.salt.0 != 0 && !salts.contains(&first.salt), "a salt of its own for each process");
}

#[tokio::test]
async fn public_prefixes_are_found() {
    let shared = |field: &str, text: &str| format!("[[shared_prefix]]\n{field} = \"{text}\"\n");
    let text = key("a", "") + &shared("system", "be kind") + &shared("text", "Once") + &shared("text", "Once upon");
    let (mut server, file) = serving(&text, Setup::saying("x")).await;
    let messages =
        |system: &str| json!({"messages": [{"role": "system", "content": system}, {"role": "user", "content": "hi"}]});
    // <|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n
    let head = 1 + "system\nbe kind".len() + 2 + 1 + "user\n".len();
    let cases = [
        (CHAT, messages("be kind"), head),
        (CHAT, messages("be kinder"), 0),
        (CHAT, chat_with(json!({})), 0),
        (COMPLETIONS, json!({"prompt": "Once upon a time"}), 9),
        (COMPLETIONS, json!({"prompt": "Once more"}), 4),
        (COMPLETIONS, json!({"prompt": "Onc"}), 0),
        (COMPLETIONS, json!({"prompt": [79, 110, 99, 101, IM_START, IM_END]}), 4),
    ];
    for (path, body, expected) in cases {
        assert_eq!(send(&server, "a", path, body.clone()).await.status(), 200, "{body}");
        assert_eq!(submitted(&mut server).await.terms.shared_tokens as usize, expected, "{body}");
    }
    let both = json!({"prompt": ["Once more", "never", "Once upon a"]});
    assert_eq!(send(&server, "a", COMPLETIONS, both).await.status(), 200);
    for expected in [4, 0, 9] {
        assert_eq!(submitted(&mut server).await.terms.shared_tokens, expected, "each prompt for itself");
    }
    std::fs::write(file.path(), key("a", "") + &shared("text", "never")).unwrap();
    assert!(server.state.keys.reload().await.unwrap());
    send(&server, "a", COMPLETIONS, json!({"prompt": ["Once upon", "never more"]})).await;
    assert_eq!(submitted(&mut server).await.terms.shared_tokens, 0);
    assert_eq!(submitted(&mut server).await.terms.shared_tokens, 5);
}

#[tokio::test]
async fn urgency_is_capped_by_the_key() {
    let text =
        key("a", "highest_class = \"high\"") + &key("b", "") + &key("c", "class = \"low\"\nhighest_class = \"normal\"");
    let (mut server, _file) = serving(&text, Setup::saying("x")).await;
    let cases = [
        (json!({}), [1, 1, 2]),
        (json!({"priority": 0, "service_tier": "auto"}), [1, 1, 2]),
        (json!({"priority": -1}), [0, 1, 1]),
        (json!({"priority": -9_000_000_000_i64}), [0, 1, 1]),
        (json!({"priority": 1}), [2, 2, 2]),
        (json!({"service_tier": "priority"}), [0, 1, 1]),
        (json!({"service_tier": "flex"}), [2, 2, 2]),
        (json!({"service_tier": "flex", "priority": -1}), [1, 1, 2]),
        (json!({"service_tier": null, "priority": null}), [1, 1, 2]),
    ];
    for (fields, classes) in cases {
        for (key, class) in ["a", "b", "c"].into_iter().zip(classes) {
            assert_eq!(send(&server, key, CHAT, chat_with(fields.clone())).await.status(), 200);
            assert_eq!(submitted(&mut server).await.terms.class.0, class, "{key} {fields}");
        }
    }
}

#[tokio::test]
async fn time_limits_reach_the_engine() {
    let mut server = Setup::saying("x").start().await;
    let cases = [
        (json!({}), None, None),
        (json!({"timeout": 2.5}), None, Some(2_500)),
        (json!({}), Some("1200"), Some(1_200)),
        (json!({"timeout": 2}), Some("1200"), Some(1_200)),
        (json!({"timeout": 1}), Some("1200"), Some(1_000)),
        (json!({"timeout": null}), Some(" 86400000 "), Some(86_400_000)),
    ];
    let ask = async |server: &Server, path: &str, body: Value, header: Option<&str>| {
        let mut request = server.client.post(server.url(path)).header("content-type", "application/json");
        if let Some(value) = header {
            request = request.header("x-request-timeout-ms", value);
        }
        request.body(body.to_string()).send().await.unwrap()
    };
    for (fields, header, expected) in cases {
        assert_eq!(ask(&server, CHAT, chat_with(fields.clone()), header).await.status(), 200);
        let found = submitted(&mut server).await.terms.timeout;
        assert_eq!(found, expected.map(Duration::from_millis), "{fields} {header:?}");
    }
    for header in ["0", "-1", "1.5", "soon", "", "86400001"] {
        let response = ask(&server, COMPLETIONS, json!({"prompt": "p"}), Some(header)).await;
        assert_eq!(response.status(), 400, "{header:?}");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["param"], "x-request-timeout-ms");
    }
}

#[tokio::test]
async fn every_answer_tells_the_pressure() {
    let script = |_: &Request| says("x");
    let setup = Setup { script: Some(Box::new(script)), loaded: false, ..Setup::default() };
    let (server, _file) = serving(&key("a", "requests_per_minute = 2"), setup).await;
    let loading = send(&server, "z", CHAT, chat_with(json!({}))).await;
    assert_eq!((loading.status().as_u16(), header(&loading, "x-backpressure-level")), (401, Some("1.00")));
    server.publish().await;
    let cases = [
        ("a", CHAT, chat_with(json!({})), 0.0, 200, "0.00"),
        ("a", COMPLETIONS, json!({}), 0.256, 400, "0.26"),
        ("a", COMPLETIONS, json!({}), 7.0, 429, "1.00"),
        ("z", CHAT, json!({}), 1.0, 401, "1.00"),
    ];
    for (key, path, body, saturation, status, told) in cases {
        *server.engine.saturation.lock().unwrap() = saturation;
        let response = send(&server, key, path, body).await;
        assert_eq!((response.status().as_u16(), header(&response, "x-backpressure-level")), (status, Some(told)));
    }
    assert_eq!(header(&server.get("/health").await, "x-backpressure-level"), None);
}
