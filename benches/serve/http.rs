//! One HTTP/1.1 connection to the server under test: just enough of the protocol to see when which bytes arrive.
//!
//! Owner: one request at a time. A buffer per connection and nothing per read: the generator shares its cores with the
//! server.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use tokio::net::TcpStream;

const BUFFER_BYTES: usize = 16 << 10;

/// What the head of an answer says.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) framing: Framing,
    /// Retry-After.
    pub(crate) retry_after_s: Option<u64>,
    pub(crate) retry_after_ms: Option<u64>,
    /// The server will close the connection.
    pub(crate) closes: bool,
}

/// How the end of a body is found, and how much of it is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(usize),
    /// In the digits of a chunk's size.
    Size(usize),
    /// Bytes of a chunk to come.
    Chunk(usize),
    /// In the line end after a chunk.
    Gap,
    /// In the line end after the last chunk.
    Last,
}

impl Framing {
    pub(crate) const DONE: Framing = Framing::Length(0);
}

pub(crate) struct Connection {
    socket: TcpStream,
    buffer: Box<[u8]>,
    /// What arrived and was not yet looked at.
    unread: Range<usize>,
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Connection { socket, buffer: vec![0; BUFFER_BYTES].into(), unread: 0..0 })
    }

    /// Whether the server has neither closed it nor said anything unasked.
    pub(crate) fn is_idle(&self) -> bool {
        let nothing = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
        self.unread.is_empty() && self.socket.try_read(&mut [0]).is_err_and(nothing)
    }

    pub(crate) async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.socket.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits for more bytes. Cancel-safe.
    pub(crate) async fn fill(&mut self) -> io::Result<()> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.unread.end == self.buffer.len() {
            if self.unread.start == 0 {
                return Err(io::Error::other("the head of an answer is larger than the buffer"));
            }
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        loop {
            self.socket.readable().await?;
            match self.socket.try_read(&mut self.buffer[self.unread.end..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    self.unread.end += read;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The head, once all of it has arrived.
    pub(crate) fn head(&mut self) -> io::Result<Option<Head>> {
        let bytes = &self.buffer[self.unread.clone()];
        let Some(end) = bytes.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return Ok(None) };
        let head = parse_head(&bytes[..end])?;
        self.unread.start += end + 4;
        Ok(Some(head))
    }

    /// The next bytes of the body that have arrived, as a range of [`Connection::bytes`].
    pub(crate) fn part(&mut self, framing: &mut Framing) -> io::Result<Option<Range<usize>>> {
        while *framing != Framing::DONE && !self.unread.is_empty() {
            let first = self.buffer[self.unread.start];
            let (length, next) = match *framing {
                Framing::Length(left) => {
                    let length = left.min(self.unread.len());
                    (length, Framing::Length(left - length))
                }
                Framing::Chunk(left) => {
                    let length = left.min(self.unread.len());
                    (length, if length == left { Framing::Gap } else { Framing::Chunk(left - length) })
                }
                line => {
                    self.unread.start += 1;
                    *framing = in_line(line, first)?;
                    continue;
                }
            };
            *framing = next;
            let part = self.unread.start..self.unread.start + length;
            self.unread.start = part.end;
            return Ok(Some(part));
        }
        Ok(None)
    }

    pub(crate) fn bytes(&self, part: Range<usize>) -> &[u8] {
        &self.buffer[part]
    }
}

/// After one byte of what stands between chunks.
fn in_line(framing: Framing, byte: u8) -> io::Result<Framing> {
    Ok(match (framing, byte) {
        (line, b'\r') => line,
        (Framing::Size(0), b'\n') => Framing::Last,
        (Framing::Size(size), b'\n') => Framing::Chunk(size),
        (Framing::Size(size), digit) => {
            let digit = (digit as char).to_digit(16).ok_or_else(|| invalid("a chunk's size is not a number"))?;
            Framing::Size(size * 16 + digit as usize)
        }
        (Framing::Gap, b'\n') => Framing::Size(0),
        (Framing::Last, b'\n') => Framing::DONE,
        _ => return Err(invalid("a chunk is longer than its size")),
    })
}

fn parse_head(bytes: &[u8]) -> io::Result<Head> {
    let text = std::str::from_utf8(bytes).map_err(|_| invalid("the head of an answer is not text"))?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let status = status.ok_or_else(|| invalid("an answer starts without a status"))?;
    let mut head = Head { status, framing: Framing::DONE, retry_after_s: None, retry_after_ms: None, closes: false };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                head.framing = Framing::Length(value.parse().map_err(|_| invalid("content-length is not a number"))?);
            }
            "transfer-encoding" => head.framing = Framing::Size(0),
            "retry-after" => head.retry_after_s = value.parse().ok(),
            "retry-after-ms" => head.retry_after_ms = value.parse().ok(),
            "connection" => head.closes = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    Ok(head)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
