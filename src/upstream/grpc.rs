//! gRPC over HTTP/2 as far as a proxy needs it: the five-byte message prefix, and outcomes in headers and trailers.

mod compression;

use std::{error::Error, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, StatusCode};
use prost::Message;
use tonic::Code;

use crate::status::Status;
pub use compression::{Compression, ENCODING};

/// The header with the time that a call may take.
pub(super) const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// Bytes before each message: a compression flag and the length.
pub const PREFIX: usize = 5;

/// A message with its prefix.
pub fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX + length);
    framed.put_slice(&prefix(length));
    message.encode_raw(&mut framed);
    framed.freeze()
}

/// The prefix of an uncompressed message of `length` bytes. gRPC has no message above 4 GiB: longer answers have been refused.
pub fn prefix(length: usize) -> [u8; PREFIX] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [0, a, b, c, d]
}

/// The time that the client gives the call: at most eight digits and a unit.
pub fn deadline(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(TIMEOUT)?.as_bytes();
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(number.saturating_mul(3600))),
        b'M' => Some(Duration::from_secs(number.saturating_mul(60))),
        b'S' => Some(Duration::from_secs(number)),
        b'm' => Some(Duration::from_millis(number)),
        b'u' => Some(Duration::from_micros(number)),
        b'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// What the prefix of a message says of its length, and what is there of the message and of what follows it; nothing while
/// the prefix is not whole.
pub fn split(framed: &[u8]) -> Option<(usize, &[u8])> {
    let ([_, a, b, c, d], rest) = framed.split_first_chunk::<PREFIX>()?;
    Some((u32::from_be_bytes([*a, *b, *c, *d]) as usize, rest))
}

/// The outcome that headers or trailers tell: `None` when they tell none, `Some(Ok(()))` for a success.
pub fn outcome(headers: &HeaderMap) -> Option<Result<(), Status>> {
    let code = headers.get("grpc-status")?;
    let code = Code::from_bytes(code.as_bytes());
    if code == Code::Ok {
        return Some(Ok(()));
    }
    let message = headers.get("grpc-message").map(|text| unescape(text.as_bytes())).unwrap_or_default();
    Some(Err(Status::new(code, message)))
}

/// The gRPC code for a response without a gRPC status, as gRPC's documentation maps HTTP codes.
pub fn from_http(status: StatusCode) -> Status {
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(code, format!("unexpected HTTP status code received from server: {status}"))
}

/// The status of a call that a transport error ended, with the words and codes of Go's gRPC library.
pub fn from_transport(error: &(dyn Error + 'static)) -> Status {
    match remote_reset(error) {
        Some(reason) => {
            let text = format!("stream terminated by RST_STREAM with error code: {}", reset_name(reason));
            Status::new(code_of_reset(reason), text)
        }
        None => Status::unavailable(format!("error reading from server: {}", root_cause(error))),
    }
}

/// The reason with which the peer reset this one stream; `None` when the whole connection failed.
pub fn remote_reset(error: &(dyn Error + 'static)) -> Option<h2::Reason> {
    let error = http2_error(error)?;
    error.reason().filter(|_| error.is_reset() && error.is_remote())
}

/// Whether `error` ended one stream and says nothing of its connection: the peer has reset it, or we have, because the request broke
/// off.
pub fn is_of_one_stream(error: &(dyn Error + 'static)) -> bool {
    http2_error(error).is_some_and(|error| error.is_reset() && !error.is_library())
}

/// What went wrong with HTTP/2, if that is behind `error`.
pub fn http2_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a h2::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return Some(error);
        }
        next = error.source();
    }
    None
}

fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

fn code_of_reset(reason: h2::Reason) -> Code {
    match reason {
        h2::Reason::REFUSED_STREAM => Code::Unavailable,
        h2::Reason::CANCEL => Code::Cancelled,
        h2::Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        h2::Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    }
}

fn reset_name(reason: h2::Reason) -> &'static str {
    match reason {
        h2::Reason::NO_ERROR => "NO_ERROR",
        h2::Reason::PROTOCOL_ERROR => "PROTOCOL_ERROR",
        h2::Reason::INTERNAL_ERROR => "INTERNAL_ERROR",
        h2::Reason::FLOW_CONTROL_ERROR => "FLOW_CONTROL_ERROR",
        h2::Reason::STREAM_CLOSED => "STREAM_CLOSED",
        h2::Reason::FRAME_SIZE_ERROR => "FRAME_SIZE_ERROR",
        h2::Reason::REFUSED_STREAM => "REFUSED_STREAM",
        h2::Reason::CANCEL => "CANCEL",
        h2::Reason::COMPRESSION_ERROR => "COMPRESSION_ERROR",
        h2::Reason::ENHANCE_YOUR_CALM => "ENHANCE_YOUR_CALM",
        _ => "unknown",
    }
}

/// Percent-encodes a status text for the `grpc-message` header: printable ASCII but `%` stays.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

fn unescape(mut text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    while let Some((&first, rest)) = text.split_first() {
        let pair = rest.get(..2).filter(|pair| first == b'%' && pair.iter().all(u8::is_ascii_hexdigit));
        let escaped = pair.and_then(|pair| std::str::from_utf8(pair).ok());
        match escaped.and_then(|pair| u8::from_str_radix(pair, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                text = rest.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                text = rest;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Puts messages together from the DATA frames of one direction of a call.
#[derive(Default)]
pub struct Deframer {
    received: BytesMut,
    /// A frame that was taken as it came, before anything is copied.
    whole: Bytes,
    compression: Compression,
}

impl Deframer {
    /// For messages that may be compressed so.
    pub fn compressed(compression: Compression) -> Self {
        Self { compression, ..Self::default() }
    }

    /// Takes the next bytes of the body.
    pub fn push(&mut self, data: Bytes) {
        if self.received.is_empty() && self.whole.is_empty() {
            self.whole = data;
        } else {
            self.received.extend_from_slice(&std::mem::take(&mut self.whole));
            self.received.extend_from_slice(&data);
        }
    }

    /// The next whole message; `None` when bytes are missing.
    ///
    /// # Errors
    /// For a compressed message that cannot be unpacked, or that is too large then: see [`Compression`].
    pub fn pop(&mut self) -> Result<Option<Bytes>, Status> {
        let at_hand = self.at_hand();
        let Some(prefix) = at_hand.first_chunk::<PREFIX>() else { return Ok(None) };
        let [flag, a, b, c, d] = *prefix;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if at_hand.len() - PREFIX < length {
            return Ok(None);
        }
        let message = self.take(length);
        self.compression.unpack(flag, message).map(Some)
    }

    /// The length that the next message's prefix announces.
    pub fn announced(&self) -> Option<usize> {
        let [_, a, b, c, d] = *self.at_hand().first_chunk::<PREFIX>()?;
        Some(u32::from_be_bytes([a, b, c, d]) as usize)
    }

    fn at_hand(&self) -> &[u8] {
        if self.received.is_empty() { &self.whole } else { &self.received }
    }

    fn take(&mut self, length: usize) -> Bytes {
        if self.received.is_empty() {
            self.whole.advance(PREFIX);
            return self.whole.split_to(length);
        }
        self.received.advance(PREFIX);
        self.received.split_to(length).freeze()
    }

    /// Whether the bytes so far end between two messages.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that have not been taken as messages.
    pub fn len(&self) -> usize {
        self.at_hand().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::RangeRequest;

    #[test]
    fn status_texts_survive_the_header() {
        for text in ["etcdserver: no leader", "100% größe\n", "%zz%4", ""] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", "14".parse().unwrap());
            headers.insert("grpc-message", escape(text).parse().unwrap());
            assert_eq!(outcome(&headers), Some(Err(Status::unavailable(text))));
        }
        assert_eq!(unescape(b"%zz%4"), "%zz%4");
        assert_eq!(outcome(&HeaderMap::new()), None);
    }

    #[test]
    fn messages_come_out_whole_however_the_frames_are_cut() {
        let messages: Vec<Bytes> = [0usize, 1, 300, 70_000]
            .iter()
            .map(|size| frame(&RangeRequest { key: vec![b'k'; *size].into(), ..Default::default() }))
            .collect();
        let stream: Vec<u8> = messages.iter().flatten().copied().collect();
        for size in [1, 4, 5, 6, 1000, 16_384, stream.len()] {
            let mut deframer = Deframer::default();
            let mut seen = Vec::new();
            for cut in stream.chunks(size) {
                deframer.push(Bytes::copy_from_slice(cut));
                while let Some(message) = deframer.pop().unwrap() {
                    seen.push(message);
                }
            }
            let expected: Vec<Bytes> = messages.iter().map(|message| message.slice(PREFIX..)).collect();
            assert_eq!(seen, expected, "cut at {size}");
            assert!(deframer.is_empty());
        }
    }

    #[test]
    fn a_compressed_message_is_refused() {
        let mut deframer = Deframer::default();
        deframer.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert!(deframer.pop().is_err());
    }

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        let read =
            |text: &str| deadline(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]));
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("5m"), Some(Duration::from_millis(5)));
        assert_eq!(read("2S"), Some(Duration::from_millis(2000)));
        assert_eq!(read("1M"), Some(Duration::from_millis(60_000)));
        assert_eq!(read("3000u"), Some(Duration::from_millis(3)));
        assert_eq!(read("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "S", "5", "-5S", "5 S", "999999999S", "5X", "+5S"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(deadline(&HeaderMap::new()), None);
    }
}
