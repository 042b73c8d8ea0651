//! `kvern serve`: the port first, then the model, then requests until a signal, then the drain.

use crate::config::{Config, ServerConfig};
use crate::http::{self, ApiKeys, AppState, HttpLimits, ServedModel};
use crate::keys::{ClassNames, Keyring, KeyringError, KeyringOptions};
use crate::load::{self, Loaded};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, oneshot};

/// Front-end threads; the rest of the machine computes.
const HTTP_THREADS: usize = 2;

/// How often the keys file is looked at.
const KEYS_PERIOD: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ServeFailure {
    #[error(transparent)]
    Keys(#[from] KeyringError),
    #[error("cannot listen on {address}: {source}")]
    Bind { address: std::net::SocketAddr, source: io::Error },
    #[error("cannot start the front end: {0}")]
    FrontEnd(io::Error),
    #[error(transparent)]
    Load(#[from] load::LoadFailure),
    #[error("the engine stopped by itself; the log says why")]
    EngineStopped,
}

/// Serves until SIGTERM or SIGINT; returns once what ran has finished or the shutdown timeout is over.
pub fn run(config: &Config, server: &ServerConfig) -> Result<(), ServeFailure> {
    let threads = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .thread_name("kvern-http")
        .enable_all()
        .build()
        .map_err(ServeFailure::FrontEnd)?;
    let result = threads.block_on(serve(config, server));
    // A load that is still under way must not hold the exit up.
    threads.shutdown_background();
    result
}

async fn serve(config: &Config, server: &ServerConfig) -> Result<(), ServeFailure> {
    let started = Instant::now();
    let mut signals = Signals::new().map_err(ServeFailure::FrontEnd)?;
    let keys = keyring(server)?;
    let listener = TcpListener::bind(server.address)
        .await
        .map_err(|source| ServeFailure::Bind { address: server.address, source })?;
    let address = listener.local_addr().map_err(ServeFailure::FrontEnd)?;
    let limits = HttpLimits {
        body_bytes_max: server.max_body_bytes,
        drain_timeout: server.shutdown_timeout,
        ..HttpLimits::default()
    };
    let state = AppState::new(limits, keys);
    if server.keys_file.is_some() {
        let hangup = signal(SignalKind::hangup()).map_err(ServeFailure::FrontEnd)?;
        tokio::spawn(follow_keys(Arc::clone(&state.keys), hangup));
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(http::serve(listener, state.clone(), async move {
        // A dropped sender asks for the same.
        let _ = stopped.await;
    }));

    let names = server.served_model_names.clone();
    let settings = config.clone();
    let loading = tokio::task::spawn_blocking(move || load::load(&settings, &names));
    let loaded = tokio::select! {
        loaded = loading => loaded.expect("loading reports its panics as errors")?,
        () = signals.wait() => return Ok(()),
    };
    let Loaded { mut runtime, text, names, root, fingerprint } = loaded;
    let model = ServedModel {
        engine: Arc::new(runtime.handle.clone()),
        text,
        root,
        context_tokens_max: runtime.max_model_len,
        block_size: runtime.account.block_size,
        vocab_size: runtime.config.vocab_size as u32,
        defaults: load::generation_defaults(&runtime.config),
        created: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        fingerprint,
        log_prompts: config.log.prompts,
        names: names.clone(),
    };
    state.publish(model).await;
    tracing::info!(model = names[0], %address, seconds = started.elapsed().as_secs_f32(), "ready");

    let engine_ended = tokio::select! {
        () = signals.wait() => false,
        _ = &mut runtime.ended => true,
    };
    drop(stop);
    tokio::select! {
        _ = serving => {}
        () = signals.wait() => tracing::warn!("a second signal: requests in flight are cut off"),
    }
    runtime.handle.abort();
    tokio::task::spawn_blocking(move || runtime.join()).await.map_err(|_| ServeFailure::EngineStopped)?;
    if engine_ended { Err(ServeFailure::EngineStopped) } else { Ok(()) }
}

/// The keys that the operator gave, and what clients may do with them.
fn keyring(server: &ServerConfig) -> Result<Keyring, KeyringError> {
    let classes = server.scheduling.classes.iter().map(|class| class.name.clone());
    let keys = Keyring::open(KeyringOptions {
        api_keys: ApiKeys::new(server.api_keys.iter().map(|key| key.reveal().to_owned()).collect()),
        file: server.keys_file.clone(),
        classes: ClassNames::from_names(classes.collect()),
        guard_metrics: server.guard_metrics,
    })?;
    if keys.is_open() {
        tracing::warn!("the server is open to all who reach it: neither --api-key nor --keys is given");
    }
    Ok(keys)
}

/// Takes over changes of the keys file, at once on SIGHUP.
async fn follow_keys(keys: Arc<Keyring>, mut hangup: Signal) {
    let asked = Notify::new();
    let forward = async {
        while hangup.recv().await.is_some() {
            asked.notify_one();
        }
    };
    tokio::join!(keys.follow(KEYS_PERIOD, &asked), forward);
}

/// SIGTERM, as orchestrators send it, and SIGINT, as a terminal does.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
