//! A running server with a tokenizer of bytes and an engine that says what a test tells it to.

use crate::tiny_model::{IM_END, TEXT, VOCAB_SIZE};
use kvern::admission::GenerationDefaults;
use kvern::http::{ApiKeys, AppState, HttpLimits, ServedModel, serve};
use kvern::keys::{Keyring, KeyringOptions};
use kvern::request::{Engine, EngineHealth, NamedTenant, Request, SubmitError, TokenEvent, TokenRx};
use kvern_core::{CancelReason, FinishReason, RequestId, TokenId, Usage};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

pub(crate) const CONTEXT: u32 = 512;
pub(crate) const BLOCK_SIZE: u32 = 16;
/// Capacity of a token channel: small, so that a slow reader shows soon.
pub(crate) const CHANNEL: usize = 8;
/// An upper bound for whatever a test waits for; nothing is measured against it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What the engine says to a request.
type Script = Box<dyn Fn(&Request) -> Vec<TokenEvent> + Send + Sync>;
/// A request and the channel that its owner listens to.
pub(crate) type Submission = (Request, mpsc::Sender<TokenEvent>);

/// An engine without a model.
pub(crate) struct FakeEngine {
    ids: AtomicU64,
    /// `None`: the test answers by hand.
    script: Option<Script>,
    submissions: mpsc::UnboundedSender<Submission>,
    pub(crate) refusal: Mutex<Option<SubmitError>>,
    pub(crate) health: Mutex<EngineHealth>,
    pub(crate) cancelled: Mutex<Vec<(RequestId, CancelReason)>>,
    pub(crate) saturation: Mutex<f32>,
    pub(crate) tenants: Mutex<Vec<NamedTenant>>,
    /// So many times tenants are not taken.
    pub(crate) tenants_refused: AtomicU64,
}

impl Engine for FakeEngine {
    fn submit(&self, request: Request) -> Result<TokenRx, SubmitError> {
        if let Some(error) = *self.refusal.lock().unwrap() {
            return Err(error);
        }
        let (sender, receiver) = mpsc::channel(CHANNEL);
        let events = self.script.as_ref().map(|script| script(&request));
        let refuses = |events: &Vec<TokenEvent>| {
            matches!(events.first(), Some(TokenEvent::Finished { reason: FinishReason::Refused(_), .. }))
        };
        if !events.as_ref().is_some_and(refuses) {
            sender.try_send(TokenEvent::Accepted).expect("a new channel has room");
        }
        if let Some(events) = events {
            let speaker = sender.clone();
            tokio::spawn(async move {
                for event in events {
                    if speaker.send(event).await.is_err() {
                        return;
                    }
                }
            });
        }
        // Nobody may be left to look at it.
        let _ = self.submissions.send((request, sender));
        Ok(receiver)
    }

    fn cancel(&self, id: RequestId, reason: CancelReason) {
        self.cancelled.lock().unwrap().push((id, reason));
    }

    fn next_id(&self) -> RequestId {
        RequestId(self.ids.fetch_add(1, Ordering::Relaxed))
    }

    fn health(&self) -> EngineHealth {
        *self.health.lock().unwrap()
    }

    fn metrics_text(&self) -> String {
        "# TYPE kvern_fake gauge\nkvern_fake 1\n".into()
    }

    fn saturation(&self) -> f32 {
        *self.saturation.lock().unwrap()
    }

    fn set_tenants(&self, tenants: &[NamedTenant]) -> bool {
        let refuses =
            self.tenants_refused.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if refuses.is_ok() {
            return false;
        }
        *self.tenants.lock().unwrap() = tenants.to_vec();
        true
    }
}

/// One token without log-probabilities.
pub(crate) fn token(token: TokenId) -> TokenEvent {
    TokenEvent::Token { token, logprobs: None }
}

/// The last event of an answer of so many tokens.
pub(crate) fn finished(reason: FinishReason, completion_tokens: u32) -> TokenEvent {
    let usage = Usage { cached_tokens: 5, completion_tokens, ..Usage::default() };
    TokenEvent::Finished { reason, usage }
}

/// Says `text`, one byte a token, then the end-of-sequence token.
pub(crate) fn says(text: &str) -> Vec<TokenEvent> {
    let mut events: Vec<TokenEvent> = text.bytes().map(|byte| token(u32::from(byte))).collect();
    events.push(token(IM_END));
    events.push(finished(FinishReason::Stop, text.len() as u32 + 1));
    events
}

/// A server on a port of its own.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<AppState>,
    pub(crate) engine: Arc<FakeEngine>,
    pub(crate) submissions: mpsc::UnboundedReceiver<Submission>,
    pub(crate) client: reqwest::Client,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<bool>,
}

/// How a test wants its server.
pub(crate) struct Setup {
    pub(crate) limits: HttpLimits,
    pub(crate) keys: Vec<String>,
    pub(crate) keys_file: Option<PathBuf>,
    pub(crate) guard_metrics: bool,
    pub(crate) script: Option<Script>,
    pub(crate) loaded: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            limits: HttpLimits::default(),
            keys: Vec::new(),
            keys_file: None,
            guard_metrics: false,
            script: None,
            loaded: true,
        }
    }
}

impl Setup {
    /// Every request gets this text.
    pub(crate) fn saying(text: &'static str) -> Self {
        Setup { script: Some(Box::new(move |_| says(text))), ..Setup::default() }
    }

    pub(crate) async fn start(self) -> Server {
        let (submissions, received) = mpsc::unbounded_channel();
        let engine = Arc::new(FakeEngine {
            ids: AtomicU64::new(1),
            script: self.script,
            submissions,
            refusal: Mutex::new(None),
            health: Mutex::new(EngineHealth { ready: true, live: true, draining: false }),
            cancelled: Mutex::default(),
            saturation: Mutex::default(),
            tenants: Mutex::default(),
            tenants_refused: AtomicU64::new(0),
        });
        let keys = Keyring::open(KeyringOptions {
            api_keys: ApiKeys::new(self.keys),
            file: self.keys_file,
            guard_metrics: self.guard_metrics,
            ..KeyringOptions::default()
        });
        let state = AppState::new(self.limits, keys.unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, asked) = oneshot::channel::<()>();
        let serving = tokio::spawn(serve(listener, Arc::clone(&state), async move {
            // A test that ends without asking drops the sender; the runtime then ends the server.
            if asked.await.is_err() {
                std::future::pending::<()>().await;
            }
        }));
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        let server =
            Server { address, state, engine, submissions: received, client, shutdown: Some(shutdown), serving };
        if self.loaded {
            server.publish().await;
        }
        server
    }
}

impl Server {
    /// Makes the model known, as the end of loading does.
    pub(crate) async fn publish(&self) {
        let model = ServedModel {
            engine: Arc::clone(&self.engine) as Arc<dyn Engine>,
            text: Arc::clone(&TEXT),
            names: vec!["tiny".into(), "org/tiny".into()],
            root: "models/tiny".into(),
            context_tokens_max: CONTEXT,
            block_size: BLOCK_SIZE,
            vocab_size: VOCAB_SIZE,
            defaults: GenerationDefaults::default(),
            created: 1_700_000_000,
            fingerprint: "fp_test".into(),
            log_prompts: false,
        };
        self.state.publish(model).await;
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Vec<u8>>) -> reqwest::Response {
        let request = self.client.post(self.url(path)).header("content-type", "application/json");
        request.body(body.into()).send().await.unwrap()
    }

    pub(crate) async fn post_json(&self, path: &str, body: Value) -> reqwest::Response {
        self.post(path, body.to_string()).await
    }

    /// The JSON of a successful answer.
    pub(crate) async fn ask(&self, path: &str, body: Value) -> Value {
        let response = self.post_json(path, body).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The events of a successful streamed answer, `[DONE]` checked and left out.
    pub(crate) async fn stream(&self, path: &str, body: Value) -> Vec<Value> {
        let response = self.post_json(path, body).await;
        assert_eq!(response.status(), 200);
        events(&response.text().await.unwrap())
    }

    pub(crate) async fn next_submission(&mut self) -> Submission {
        tokio::time::timeout(PATIENCE, self.submissions.recv()).await.expect("a request arrives").unwrap()
    }

    /// Asks for the end; the result of [`serve`] comes from [`Self::ended`].
    pub(crate) fn shut_down(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    pub(crate) async fn ended(self) -> bool {
        tokio::time::timeout(PATIENCE, self.serving).await.expect("the server ends").unwrap()
    }
}

/// The JSON of each event; the last one must be `[DONE]`.
pub(crate) fn events(text: &str) -> Vec<Value> {
    let mut frames: Vec<&str> = text.split("\n\n").collect();
    assert_eq!(frames.pop(), Some(""), "the stream ends with an empty line: {text:?}");
    assert_eq!(frames.pop(), Some("data: [DONE]"), "{text:?}");
    frames
        .into_iter()
        .map(|frame| {
            let data = frame
                .trim_start_matches(": keep-alive\n")
                .strip_prefix("data: ")
                .unwrap_or_else(|| panic!("{frame:?}"));
            serde_json::from_str(data).unwrap()
        })
        .collect()
}

/// A minimal chat request with further fields.
pub(crate) fn chat_with(fields: Value) -> Value {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}
