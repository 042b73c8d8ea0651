//! The committed description of the API is the one that the server gives.

use crate::fixture::Setup;

/// Where the document is committed. `KVERN_WRITE_OPENAPI=1 cargo test --test http openapi` writes it anew.
const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");

#[tokio::test]
async fn the_document_is_committed() {
    let server = Setup::saying("x").start().await;
    let response = server.get("/openapi.json").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let served = response.text().await.unwrap();
    if std::env::var_os("KVERN_WRITE_OPENAPI").is_some() {
        std::fs::write(COMMITTED, &served).unwrap();
    }
    let committed = std::fs::read_to_string(COMMITTED).unwrap_or_default();
    assert!(served == committed, "docs/openapi.json is not what the server serves: write it with `make openapi`");
}

#[test]
fn every_route_is_described() {
    let document: serde_json::Value = serde_json::from_str(&kvern::http::openapi_document()).unwrap();
    let paths: Vec<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    for route in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{id}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/metrics",
        "/openapi.json",
    ] {
        assert!(paths.contains(&route), "{route} is missing in {paths:?}");
    }
    let chat = &document["components"]["schemas"]["ChatRequest"]["properties"];
    for field in ["messages", "max_completion_tokens", "temperature", "stop", "stream_options", "logit_bias"] {
        assert!(chat[field].is_object(), "{field} is missing in {chat}");
    }
}
