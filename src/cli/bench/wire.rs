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

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD: usize = 9;
/// The largest frame that the protocol allows without negotiation, and so the largest that a peer may send us.
const MAX_FRAME: usize = 16 * 1024;
/// What a window may be at most.
const MAX_WINDOW: u32 = 0x7fff_ffff;
const DEFAULT_WINDOW: i64 = 65_535;
/// Bytes received after which the connection's window is filled up again.
const REFILL: u32 = 64 << 20;

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
    received: u32,
    ready: bool,
}

impl Wire {
    /// A connection on which every call goes to `path`.
    pub fn new(authority: &str, path: &str) -> Self {
        let mut wire = Self {
            out: PREFACE.to_vec(),
            next_stream: 1,
            headers: Headers::new(authority, path),
            connection_window: DEFAULT_WINDOW,
            initial_window: DEFAULT_WINDOW,
            windows: HashMap::new(),
            waiting: VecDeque::new(),
            received: 0,
            ready: false,
        };
        let initial_window = [&[0, 4][..], &MAX_WINDOW.to_be_bytes()].concat();
        wire.frame(kind::SETTINGS, 0, 0, &initial_window);
        wire.window_update(0, MAX_WINDOW - DEFAULT_WINDOW as u32);
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

    /// Lets the peer send `bytes` more on a call that lives long.
    pub fn refill(&mut self, stream: StreamId, bytes: u32) {
        self.window_update(stream, bytes);
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
        }
        match kind {
            kind::DATA => {
                self.count_received(payload.len() as u32);
                Ok(Some(Frame::Data { stream, bytes: unpadded(flags, payload)?, end }))
            }
            kind::HEADERS => Ok(Some(Frame::Headers { stream, end })),
            kind::RST_STREAM => Ok(Some(Frame::Reset { stream })),
            kind::SETTINGS if flags & flag::ACK == 0 => self.settings(payload),
            kind::PING if flags & flag::ACK == 0 => {
                self.frame(kind::PING, flag::ACK, 0, payload);
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

    fn count_received(&mut self, bytes: u32) {
        self.received = self.received.saturating_add(bytes);
        if self.received > REFILL {
            let bytes = std::mem::take(&mut self.received);
            self.window_update(0, bytes);
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

/// The header block of every request, as HPACK: spelled out and indexed the first time, four indices ever after.
struct Headers {
    spelled: Vec<u8>,
    indexed: Vec<u8>,
    first: bool,
}

/// Static HPACK entries: `:method: POST`, `:scheme: http`.
const POST_HTTP: [u8; 2] = [0x83, 0x86];
/// HPACK's default table size, which holds our five entries with room to spare.
const DEFAULT_TABLE: u32 = 4096;

impl Headers {
    fn new(authority: &str, path: &str) -> Self {
        let mut spelled = POST_HTTP.to_vec();
        let user_agent = concat!("millpond-bench/", env!("CARGO_PKG_VERSION"));
        // Each entry: the static table's index of its name (0: the name follows), the name, the value.
        let entries = [
            (4, "", path),
            (1, "", authority),
            (31, "", "application/grpc"),
            (58, "", user_agent),
            (0, "te", "trailers"),
        ];
        for (index, name, value) in entries {
            spelled.push(0x40 | index);
            if index == 0 {
                push_text(&mut spelled, name);
            }
            push_text(&mut spelled, value);
        }
        let newest_first = (62u8..).take(entries.len()).map(|index| 0x80 | index);
        let indexed = POST_HTTP.into_iter().chain(newest_first.collect::<Vec<_>>().into_iter().rev()).collect();
        Self { spelled, indexed, first: true }
    }

    fn next(&mut self) -> Vec<u8> {
        if std::mem::replace(&mut self.first, false) { self.spelled.clone() } else { self.indexed.clone() }
    }

    /// A peer with a smaller table gets an empty one and the block spelled out each time, which is valid everywhere.
    fn limit_table(&mut self, size: u32) {
        if size < DEFAULT_TABLE {
            const TABLE_OF_ZERO: u8 = 0x20;
            self.spelled.insert(0, TABLE_OF_ZERO);
            self.indexed = self.spelled.clone();
        }
    }
}

/// A text without Huffman coding; long ones take a second length byte or more.
fn push_text(out: &mut Vec<u8>, text: &str) {
    const FULL: usize = 0x7f;
    if text.len() < FULL {
        out.push(text.len() as u8);
    } else {
        out.push(FULL as u8);
        let mut rest = text.len() - FULL;
        while rest >= 0x80 {
            out.push((rest % 0x80) as u8 | 0x80);
            rest /= 0x80;
        }
        out.push(rest as u8);
    }
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut wire = Wire::new("a", "/p");
        wire.out.clear();
        wire.frame(kind, flags, stream, payload);
        wire.out
    }

    /// A wire after the peer's settings, with nothing left to write.
    fn ready(settings: &[u8]) -> Wire {
        let mut wire = Wire::new("a", "/p");
        let bytes = frame(kind::SETTINGS, 0, 0, settings);
        assert_eq!(wire.next(&mut &bytes[..]), Ok(Some(Frame::Ready)));
        wire.out.clear();
        wire
    }

    /// (kind, flags, stream, payload length) of each frame.
    fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, usize)> {
        let mut found = Vec::new();
        while let Some((head, rest)) = bytes.split_at_checked(FRAME_HEAD) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            found.push((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), length));
            bytes = &rest[length..];
        }
        found
    }

    #[test]
    fn a_second_request_is_a_few_bytes() {
        let mut wire = ready(&[]);
        wire.open(Bytes::from_static(b"12345"), true);
        wire.out.clear();
        assert_eq!(wire.open(Bytes::from_static(b"12345"), true), 3);
        assert_eq!(frames(&wire.out), [(kind::HEADERS, flag::END_HEADERS, 3, 7), (kind::DATA, flag::END_STREAM, 3, 5)]);
    }

    #[test]
    fn a_frame_cut_anywhere_waits_for_its_rest() {
        let mut wire = ready(&[]);
        let bytes = frame(kind::DATA, flag::END_STREAM, 1, b"abc");
        for cut in 0..bytes.len() {
            assert_eq!(wire.next(&mut &bytes[..cut]), Ok(None));
        }
        assert_eq!(wire.next(&mut &bytes[..]), Ok(Some(Frame::Data { stream: 1, bytes: b"abc", end: true })));
    }

    #[test]
    fn sending_stops_at_the_peers_windows_and_goes_on() {
        let mut wire = ready(&[0, 4, 0, 0, 0, 10]);
        let stream = wire.open(Bytes::from(vec![0; 25]), true);
        assert_eq!(frames(&wire.out)[1..], [(kind::DATA, 0, stream, 10)]);
        wire.out.clear();
        let update = frame(kind::WINDOW_UPDATE, 0, stream, &[0, 0, 0, 100]);
        assert_eq!(wire.next(&mut &update[..]), Ok(None));
        assert_eq!(frames(&wire.out), [(kind::DATA, flag::END_STREAM, stream, 15)]);
    }

    #[test]
    fn messages_of_one_call_keep_their_order_when_blocked() {
        let mut wire = ready(&[0, 4, 0, 0, 0, 3]);
        let stream = wire.open(Bytes::from_static(b"abcd"), false);
        wire.send(stream, Bytes::from_static(b"ef"), true);
        wire.out.clear();
        let update = frame(kind::WINDOW_UPDATE, 0, stream, &[0, 0, 0, 9]);
        assert_eq!(wire.next(&mut &update[..]), Ok(None));
        assert_eq!(wire.out, [frame(kind::DATA, 0, stream, b"d"), frame(kind::DATA, 1, stream, b"ef")].concat());
    }

    #[test]
    fn pings_are_answered_and_padding_taken_off() {
        let mut wire = ready(&[]);
        let ping = frame(kind::PING, 0, 0, b"12345678");
        assert_eq!(wire.next(&mut &ping[..]), Ok(None));
        assert_eq!(wire.out, frame(kind::PING, flag::ACK, 0, b"12345678"));
        let padded = frame(kind::DATA, flag::PADDED, 1, &[2, b'x', 0, 0]);
        assert_eq!(wire.next(&mut &padded[..]), Ok(Some(Frame::Data { stream: 1, bytes: b"x", end: false })));
        let broken = frame(kind::DATA, flag::PADDED, 1, &[9, b'x']);
        assert!(matches!(wire.next(&mut &broken[..]), Err(WireError::Protocol(_))));
    }

    #[test]
    fn what_is_no_http2_is_refused() {
        let mut wire = ready(&[]);
        assert!(matches!(wire.next(&mut &b"HTTP/1.1 400 Bad Request\r\n"[..]), Err(WireError::Protocol(_))));
        let goaway = frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]);
        assert_eq!(wire.next(&mut &goaway[..]), Err(WireError::GoAway(11)));
    }
}
