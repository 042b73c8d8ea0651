//! `kvern serve --record FILE`: everything that goes into the core, so that the run can be repeated by `kvern replay`.
//!
//! Owner: the engine thread, which encodes into a buffer and hands full ones to a thread that writes them:
//!
//! ```text
//!   engine thread  --full buffers-->  writer.rs  -->  FILE (the one before it is FILE.1, up to FILE.3)
//!                  <--empty buffers--
//! ```
//!
//! The engine never waits: there are `BUFFERS_MAX` buffers, and when all are on their way, or the file would outgrow its
//! limit, or cannot be written, the recording ends with a line on the log and the server goes on. A recording that ends is
//! whole up to there. Without `--record-prompts` no token and no salt is written, see `kvern_core::record::Pseudonyms`.
//! Cost on the engine thread: some 50 ns a token of a prompt, 100 ns a sequence of a step.

mod writer;

use crate::config::RecordConfig;
use kvern_core::record::{Encoder, Prf, Pseudonyms, write_header};
use kvern_core::{CoreConfig, Effect, Input, Micros, StepPlan, Timed, WorkerId};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

/// A buffer is sent off when it holds this much, or when its first entry is [`FLUSH_US`] old at the next one.
const BUFFER_BYTES: usize = 256 << 10;
const FLUSH_US: u64 = 1_000_000;

/// Buffers in all: what the disk may lag behind by.
const BUFFERS_MAX: usize = 64;

/// Records one core. Its calls stand beside those of the core, as `kvern_core::record::Encoder` shows.
pub struct Recorder {
    encoder: Encoder,
    /// Entries that were not sent yet.
    buffer: Vec<u8>,
    /// Where in the buffer the present call's entries begin.
    start: usize,
    sent_bytes: u64,
    bytes_max: u64,
    path: PathBuf,
    now: Micros,
    flushed_at: Micros,
    buffers_left: usize,
    /// To the other thread; `None` once the recording has ended.
    full: Option<SyncSender<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    writer: Option<JoinHandle<()>>,
}

impl Recorder {
    /// Moves an earlier recording at the path aside and begins a new one, of a core that is made with this configuration.
    ///
    /// # Errors
    /// When the files cannot be renamed or made, or no thread be started.
    pub fn start(options: &RecordConfig, config: &CoreConfig) -> io::Result<Self> {
        let mut file = writer::create(&options.path)?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        write_header(config, &mut buffer);
        // At once, so that the file is a recording from its first moment.
        file.write_all(&buffer)?;
        let sent_bytes = buffer.len() as u64;
        buffer.clear();
        let (full, buffers) = sync_channel(BUFFERS_MAX);
        let (emptied, empty) = sync_channel(BUFFERS_MAX);
        let path = options.path.clone();
        let writer = std::thread::Builder::new()
            .name("kvern-record".to_owned())
            .spawn(move || writer::write(file, &path, &buffers, &emptied))?;
        let pseudonyms = (!options.prompts).then(|| Pseudonyms::new(prf(), config.block_size));
        tracing::info!(path = %options.path.display(), prompts = options.prompts, "recording");
        Ok(Recorder {
            encoder: Encoder::new(pseudonyms),
            start: 0,
            buffer,
            sent_bytes,
            bytes_max: options.bytes_max,
            path: options.path.clone(),
            now: Micros(0),
            flushed_at: Micros(0),
            buffers_left: BUFFERS_MAX - 1,
            full: Some(full),
            empty,
            writer: Some(writer),
        })
    }

    /// An input that is about to be applied.
    pub fn input(&mut self, input: &Timed<Input>) {
        if self.full.is_some() {
            self.now = self.now.max(input.at);
            self.encoder.input(input, &mut self.buffer);
        }
    }

    /// A call of `plan`, whatever it gave.
    pub fn planned(&mut self, worker: WorkerId, plan: &StepPlan, is_planned: bool) {
        if self.full.is_some() {
            self.encoder.planned(worker, plan, is_planned, &mut self.buffer);
        }
    }

    /// A call of `plan_ahead`, whatever it gave.
    pub fn planned_ahead(&mut self, worker: WorkerId, plan: &StepPlan, is_planned: bool) {
        if self.full.is_some() {
            self.encoder.planned_ahead(worker, plan, is_planned, &mut self.buffer);
        }
    }

    /// All effects of the input or the call of `plan` or `plan_ahead` before.
    pub fn effects(&mut self, effects: &[Effect]) {
        if self.full.is_none() {
            return;
        }
        self.encoder.effects(effects, &mut self.buffer);
        if self.sent_bytes + self.buffer.len() as u64 > self.bytes_max {
            self.buffer.truncate(self.start);
            self.end("it has reached --record-max-bytes");
            return;
        }
        self.start = self.buffer.len();
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush();
        }
        self.turn(self.now);
    }

    /// The time of a turn of the engine: what was taken a second ago is written, although nothing follows.
    pub fn turn(&mut self, now: Micros) {
        self.now = self.now.max(now);
        if self.full.is_some() && !self.buffer.is_empty() && self.now.0 - self.flushed_at.0 >= FLUSH_US {
            self.flush();
        }
    }

    /// Whether what happens is still recorded.
    #[must_use]
    pub fn is_recording(&self) -> bool {
        self.full.is_some()
    }

    /// Sends the buffer off and takes an empty one.
    fn flush(&mut self) {
        let Some(writer) = &self.full else { return };
        let next = match self.empty.try_recv() {
            Ok(buffer) => buffer,
            Err(_) if self.buffers_left > 0 => {
                self.buffers_left -= 1;
                Vec::with_capacity(BUFFER_BYTES)
            }
            Err(_) => return self.end("the disk is too slow for it"),
        };
        let full = std::mem::replace(&mut self.buffer, next);
        self.sent_bytes += full.len() as u64;
        self.start = 0;
        self.flushed_at = self.now;
        match writer.try_send(full) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.end("the disk is too slow for it"),
            Err(TrySendError::Disconnected(_)) => self.end("its file cannot be written"),
        }
    }

    /// Gives the writer the rest, after which it ends by itself.
    fn end(&mut self, why: &str) {
        let Some(full) = self.full.take() else { return };
        let rest = std::mem::take(&mut self.buffer);
        let bytes = self.sent_bytes + rest.len() as u64;
        // Where there is no room for the rest, the recording ends a little earlier.
        let _ = full.try_send(rest);
        tracing::warn!(path = %self.path.display(), bytes, "the recording ends: {why}; the server goes on");
    }
}

/// The rest is written before the process may end.
impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(full) = self.full.take() {
            // It fails only when the file cannot be written, which the writer has said.
            let _ = full.send(std::mem::take(&mut self.buffer));
        }
        if let Some(writer) = self.writer.take() {
            // A panic was reported where it happened.
            let _ = writer.join();
        }
    }
}

/// SipHash under a key of the system's random numbers, which lives as long as the recorder.
fn prf() -> Prf {
    let key = RandomState::new();
    Box::new(move |a, b| {
        let mut hasher = key.build_hasher();
        hasher.write_u64(a);
        hasher.write_u64(b);
        hasher.finish()
    })
}

#[cfg(test)]
mod tests;
