//! Just enough HTTP/2 for a load generator: gRPC calls out, message bytes in, all frames of a burst in one buffer.
//!
//! A general client decodes headers, keeps a state machine for every stream and wakes a task for each; that costs about as much
//! as the server's work that is to be measured. Here a request is a header block that was indexed once per connection, an
//! answer's headers are passed over, and only message bytes, ends and resets are told. Without headers an error shows as a call
//! that ended without a message: gRPC errors of unary calls carry none.
//!
//! This file does no input or output, see [`super::link`].

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;

pub use self::receiving::Manners;
use self::{headers::Headers, receiving::Receiving};

mod headers;
mod receiving;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD: usize = 9;
/// The largest frame that the protocol allows without negotiation, and so the largest that a peer may send us.
const MAX_FRAME: usize = 16 * 1024;
/// What a window may be at most.
const MAX_WINDOW: u32 = 0x7fff_ffff;
const DEFAULT_WINDOW: i64 = 65_535;

mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
}

mod flag {
    pub const END_STREAM: u8 = 1;
    pub const ACK: u8 = 1;
    pub const END_HEADERS: u8 = 4;
    pub const PADDED: u8 = 8;
}

/// A call on a connection.
pub type StreamId = u32;

/// What the peer sent, as far as it matters to a load generator.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The peer's first settings: calls may be opened.
    Ready,
    /// A piece of a call's answer.
    Data {
        /// The call.
        stream: StreamId,
        /// gRPC-framed messages, cut anywhere.
        bytes: &'a [u8],
        /// Nothing follows.
        end: bool,
    },
    /// Headers or trailers.
    Headers {
        /// The call.
        stream: StreamId,
        /// Nothing follows.
        end: bool,
    },
    /// The peer gave a call up.
    Reset {
        /// The call.
        stream: StreamId,
    },
}

/// The peer broke the protocol or ended the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The peer asked us to leave.
    #[error("the server ended the connection (HTTP/2 error {0})")]
    GoAway(u32),
    /// Bytes that are no HTTP/2.
    #[error("the server does not speak HTTP/2: {0}")]
    Protocol(&'static str),
}

/// A request that waits for room in the peer's windows.
struct Waiting {
    stream: StreamId,
    bytes: Bytes,
    end: bool,
}

/// One connection's framing.
pub struct Wire {
    out: Vec<u8>,
    next_stream: StreamId,
    headers: Headers,
    /// How much the peer takes on the connection, and on each call at first.
    connection_window: i64,
    initial_window: i64,
    /// What the peer still takes on calls whose sending half is open.
    windows: HashMap<StreamId, i64>,
    waiting: VecDeque<Waiting>,
    receiving: Receiving,
    ready: bool,
}

impl Wire {
    /// A connection on which every call goes to `path`.
    pub fn new(authority: &str, path: &str, manners: Manners) -> Self {
        let mut wire = Self {
            out: PREFACE.to_vec(),
            next_stream: 1,
            headers: Headers::new(authority, path),
            connection_window: DEFAULT_WINDOW,
            initial_window: DEFAULT_WINDOW,
            windows: HashMap::new(),
            waiting: VecDeque::new(),
            receiving: Receiving::new(manners),
            ready: false,
        };
        let initial_window = [&[0, 4][..], &manners.window().to_be_bytes()].concat();
        wire.frame(kind::SETTINGS, 0, 0, &initial_window);
        wire.window_update(0, manners.window() - DEFAULT_WINDOW as u32);
        wire
    }

    /// Bytes to write, to be drained from the front.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Starts a call with its first gRPC-framed message; `end` closes our half.
    pub fn open(&mut self, message: Bytes, end: bool) -> StreamId {
        let stream = self.next_stream;
        self.next_stream += 2;
        let block = self.headers.next();
        self.frame(kind::HEADERS, flag::END_HEADERS, stream, &block);
        self.windows.insert(stream, self.initial_window);
        self.send(stream, message, end);
        stream
    }

    /// Sends a further gRPC-framed message on a call.
    pub fn send(&mut self, stream: StreamId, bytes: Bytes, end: bool) {
        self.waiting.push_back(Waiting { stream, bytes, end });
        self.send_waiting();
    }

    /// Takes the next frame that matters off `input`; None when the rest is not a whole frame.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Frame<'a>>, WireError> {
        while let Some((head, rest)) = input.split_at_checked(FRAME_HEAD) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            if length > MAX_FRAME {
                return Err(WireError::Protocol("a frame is too large"));
            }
            let Some((payload, rest)) = rest.split_at_checked(length) else { return Ok(None) };
            *input = rest;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & MAX_WINDOW;
            if let Some(frame) = self.receive(head[3], head[4], stream, payload)? {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    fn receive<'a>(
        &mut self,
        kind: u8,
        flags: u8,
        stream: StreamId,
        payload: &'a [u8],
    ) -> Result<Option<Frame<'a>>, WireError> {
        let end = flags & flag::END_STREAM != 0;
        if end && matches!(kind, kind::DATA | kind::HEADERS) || kind == kind::RST_STREAM {
            self.windows.remove(&stream);
            self.receiving.end(stream);
        }
        match kind {
            kind::DATA => {
                self.acknowledge(stream, payload.len());
                if end {
                    self.receiving.end(stream);
                }
                Ok(Some(Frame::Data { stream, bytes: unpadded(flags, payload)?, end }))
            }
            kind::HEADERS => Ok(Some(Frame::Headers { stream, end })),
            kind::RST_STREAM => Ok(Some(Frame::Reset { stream })),
            kind::SETTINGS if flags & flag::ACK == 0 => self.settings(payload),
            kind::PING if flags & flag::ACK == 0 => {
                self.frame(kind::PING, flag::ACK, 0, payload);
                Ok(None)
            }
            kind::PING => {
                self.receiving.ping_answered();
                Ok(None)
            }
            kind::GOAWAY => Err(WireError::GoAway(number(payload.get(4..8))?)),
            kind::WINDOW_UPDATE => {
                self.widen(stream, number(payload.get(..4))? & MAX_WINDOW);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn settings<'a>(&mut self, payload: &[u8]) -> Result<Option<Frame<'a>>, WireError> {
        for setting in payload.chunks_exact(6) {
            let value = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
            match u16::from_be_bytes([setting[0], setting[1]]) {
                1 => self.headers.limit_table(value),
                4 => {
                    let change = i64::from(value & MAX_WINDOW) - self.initial_window;
                    self.initial_window += change;
                    self.windows.values_mut().for_each(|window| *window += change);
                }
                _ => {}
            }
        }
        self.frame(kind::SETTINGS, flag::ACK, 0, &[]);
        self.send_waiting();
        let first = !std::mem::replace(&mut self.ready, true);
        Ok(first.then_some(Frame::Ready))
    }

    fn widen(&mut self, stream: StreamId, by: u32) {
        if stream == 0 {
            self.connection_window += i64::from(by);
        } else if let Some(window) = self.windows.get_mut(&stream) {
            *window += i64::from(by);
        }
        self.send_waiting();
    }

    fn acknowledge(&mut self, stream: StreamId, bytes: usize) {
        let owed = self.receiving.data(stream, bytes as u32);
        if owed.connection > 0 {
            self.window_update(0, owed.connection);
        }
        if owed.stream > 0 {
            self.window_update(stream, owed.stream);
        }
        if owed.ping {
            self.frame(kind::PING, 0, 0, b"millpond");
        }
    }

    /// Sends what the windows have room for, keeping the order within each call.
    fn send_waiting(&mut self) {
        let mut blocked: Vec<StreamId> = Vec::new();
        for _ in 0..self.waiting.len() {
            let Some(mut message) = self.waiting.pop_front() else { break };
            if blocked.contains(&message.stream) || !self.send_some(&mut message) {
                blocked.push(message.stream);
                self.waiting.push_back(message);
            }
        }
    }

    /// Whether all of the message was sent. A message of a call that is over counts as sent.
    fn send_some(&mut self, message: &mut Waiting) -> bool {
        loop {
            let Some(window) = self.windows.get_mut(&message.stream) else { return true };
            let room = self.connection_window.min(*window).clamp(0, MAX_FRAME as i64) as usize;
            let length = message.bytes.len().min(room);
            if length == 0 && !message.bytes.is_empty() {
                return false;
            }
            *window -= length as i64;
            self.connection_window -= length as i64;
            let part = message.bytes.split_to(length);
            let last = message.bytes.is_empty();
            let flags = if last && message.end { flag::END_STREAM } else { 0 };
            self.frame(kind::DATA, flags, message.stream, &part);
            if last {
                if message.end {
                    self.windows.remove(&message.stream);
                }
                return true;
            }
        }
    }

    fn window_update(&mut self, stream: StreamId, bytes: u32) {
        self.frame(kind::WINDOW_UPDATE, 0, stream, &bytes.to_be_bytes());
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: StreamId, payload: &[u8]) {
        let length = (payload.len() as u32).to_be_bytes();
        self.out.extend_from_slice(&[length[1], length[2], length[3], kind, flags]);
        self.out.extend_from_slice(&stream.to_be_bytes());
        self.out.extend_from_slice(payload);
    }
}

fn unpadded(flags: u8, payload: &[u8]) -> Result<&[u8], WireError> {
    if flags & flag::PADDED == 0 {
        return Ok(payload);
    }
    let bytes = payload.split_first().and_then(|(&pad, rest)| rest.get(..rest.len().checked_sub(pad.into())?));
    bytes.ok_or(WireError::Protocol("a frame's padding is longer than the frame"))
}

fn number(bytes: Option<&[u8]>) -> Result<u32, WireError> {
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or(WireError::Protocol("a frame is cut short"))?;
    Ok(u32::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests;
