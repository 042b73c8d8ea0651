//! Asks the server and times what it says, over connections that are kept.
//!
//! Owner: the tasks of one scenario, all on one thread. The cost per token is one read and one search in its event.

use crate::answer::{Answer, End, Micros};
use crate::http::{Connection, Framing, Head};
use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// A silent server is given up after this long: every run ends.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// One request to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) tag: u32,
    /// Head and body.
    pub(crate) bytes: Vec<u8>,
    /// Time from when it could be sent to when it is due.
    pub(crate) pause: Duration,
    /// The client closes the connection after this many tokens.
    pub(crate) leave_after: Option<usize>,
    pub(crate) keep_text: bool,
}

/// Callers that share connections and may be told to leave together.
pub(crate) struct Client {
    address: SocketAddr,
    epoch: Instant,
    idle: RefCell<Vec<Connection>>,
    leaving: Cell<bool>,
    leave: Notify,
}

impl Client {
    pub(crate) fn new(address: SocketAddr, epoch: Instant) -> Self {
        Client { address, epoch, idle: RefCell::default(), leaving: Cell::new(false), leave: Notify::new() }
    }

    pub(crate) fn now(&self) -> Micros {
        self.epoch.elapsed().as_micros() as Micros
    }

    /// Ends all that is in flight and all that would follow: connections close, and the server has to notice.
    pub(crate) fn leave_all(&self) {
        self.leaving.set(true);
        self.leave.notify_waiters();
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get()
    }

    /// Sends the request after its pause and reads the answer to its end.
    pub(crate) async fn ask(&self, asked: &Asked) -> Answer {
        if !asked.pause.is_zero() {
            tokio::time::sleep(asked.pause).await;
        }
        self.ask_due(asked, self.now()).await
    }

    /// Sends the request now, although it was due at `due`.
    pub(crate) async fn ask_due(&self, asked: &Asked, due: Micros) -> Answer {
        let mut answer = Answer {
            tag: asked.tag,
            due,
            sent: due,
            head: 0,
            ended: 0,
            tokens: Vec::with_capacity(64),
            completion_tokens: 0,
            cached_tokens: 0,
            body_bytes: 0,
            finished: false,
            end: End::Lost("not sent".into()),
            text: asked.keep_text.then(Vec::new),
        };
        let work = async {
            // A server may close an idle connection at any time: then the request goes out once more on a new one.
            let again = self.exchange(asked, &mut answer, true).await?;
            if again { self.exchange(asked, &mut answer, false).await.map(|_| ()) } else { Ok(()) }
        };
        let outcome: io::Result<()> = work.await;
        if let Err(error) = outcome {
            answer.end = End::Lost(error.to_string());
        }
        answer.ended = self.now();
        answer
    }

    /// Whether the request must be sent again, as a kept connection turned out to be closed.
    async fn exchange(&self, asked: &Asked, answer: &mut Answer, kept: bool) -> io::Result<bool> {
        let kept = if kept { self.idle.borrow_mut().pop().filter(Connection::is_idle) } else { None };
        let was_kept = kept.is_some();
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(self.address).await?,
        };
        let written = connection.write(&asked.bytes).await;
        answer.sent = self.now();
        let head = match written {
            Ok(()) => self.head(&mut connection).await,
            Err(error) => Err(error),
        };
        let head = match head {
            Ok(Some(head)) => head,
            Ok(None) => {
                answer.end = End::Left;
                return Ok(false);
            }
            Err(_) if was_kept => return Ok(true),
            Err(error) => return Err(error),
        };
        answer.head = self.now();
        answer.end = End::Lost("the stream ended early".into());
        if head.status != 200 {
            let body = self.rest(&mut connection, &head).await?;
            answer.body_bytes = body.len() as u64;
            answer.take_refusal(&head, &body);
        } else if !self.stream(&mut connection, &head, asked, answer).await? {
            answer.end = End::Left;
            return Ok(false);
        }
        if !head.closes {
            self.idle.borrow_mut().push(connection);
        }
        Ok(false)
    }

    /// Waits for bytes; false when it is time to leave.
    async fn fill(&self, connection: &mut Connection) -> io::Result<bool> {
        if self.is_leaving() {
            return Ok(false);
        }
        tokio::select! {
            biased;
            filled = tokio::time::timeout(SILENCE_MAX, connection.fill()) => match filled {
                Ok(filled) => filled.map(|()| true),
                Err(_) => Err(io::Error::other("the server was silent for too long")),
            },
            () = self.leave.notified() => Ok(false),
        }
    }

    async fn head(&self, connection: &mut Connection) -> io::Result<Option<Head>> {
        loop {
            if !self.fill(connection).await? {
                return Ok(None);
            }
            if let Some(head) = connection.head()? {
                return Ok(Some(head));
            }
        }
    }

    async fn rest(&self, connection: &mut Connection, head: &Head) -> io::Result<Vec<u8>> {
        let mut framing = head.framing;
        let mut body = Vec::new();
        loop {
            while let Some(part) = connection.part(&mut framing)? {
                body.extend_from_slice(connection.bytes(part));
            }
            if framing == Framing::DONE {
                return Ok(body);
            }
            connection.fill().await?;
        }
    }

    /// Reads events to the end; false when the client left.
    async fn stream(
        &self,
        connection: &mut Connection,
        head: &Head,
        asked: &Asked,
        answer: &mut Answer,
    ) -> io::Result<bool> {
        let mut framing = head.framing;
        let mut begun = Vec::new();
        loop {
            let now = self.now();
            while let Some(part) = connection.part(&mut framing)? {
                answer.body_bytes += part.len() as u64;
                for piece in connection.bytes(part).split_inclusive(|&byte| byte == b'\n') {
                    match (piece.strip_suffix(b"\n"), begun.is_empty()) {
                        (Some(line), true) => answer.take_line(line, now),
                        (Some(line), false) => {
                            begun.extend_from_slice(line);
                            answer.take_line(&begun, now);
                            begun.clear();
                        }
                        (None, _) => begun.extend_from_slice(piece),
                    }
                }
            }
            if framing == Framing::DONE {
                return Ok(true);
            }
            if asked.leave_after.is_some_and(|tokens| answer.tokens.len() >= tokens) {
                return Ok(false);
            }
            if !self.fill(connection).await? {
                return Ok(false);
            }
        }
    }

    /// The whole answer to a GET, and the milliseconds from the request's last byte to its head.
    pub(crate) async fn get(&self, path: &str, key: Option<&str>) -> io::Result<(u16, String, f64)> {
        let kept = self.idle.borrow_mut().pop().filter(Connection::is_idle);
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(self.address).await?,
        };
        let bearer = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        connection.write(format!("GET {path} HTTP/1.1\r\nhost: bench\r\n{bearer}\r\n").as_bytes()).await?;
        let sent = self.now();
        let head = loop {
            connection.fill().await?;
            if let Some(head) = connection.head()? {
                break head;
            }
        };
        let took = (self.now() - sent) as f64 / 1e3;
        let body = self.rest(&mut connection, &head).await?;
        if !head.closes {
            self.idle.borrow_mut().push(connection);
        }
        Ok((head.status, String::from_utf8_lossy(&body).into_owned(), took))
    }
}
