//! gRPC over HTTP/2 as far as a proxy needs it.
//!
//! - here: the five-byte prefix of messages, and how large they may be;
//! - [`Deframer`]: messages out of frames; [`Compression`]: those that a client has compressed;
//! - [`Incoming`]: what a client sends with a call; `deadline`: how long that may take;
//! - `outcome`: how a call ended, in headers and trailers; `transport`: one whose stream or connection broke.

mod compression;
mod deadline;
mod deframer;
mod incoming;
mod outcome;
mod transport;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

pub use self::{
    compression::{Compression, ENCODING},
    deadline::{TIMEOUT, checked_deadline, deadline, timeout_value},
    deframer::Deframer,
    incoming::{BodyError, Incoming},
    outcome::{failure_trailers, from_http, outcome, success_trailers, write_status},
    transport::{from_transport, http2_error, is_of_one_stream, remote_reset},
};

/// The content type of calls and answers.
pub const MEDIA_TYPE: &str = "application/grpc";
/// Bytes before each message: a compression flag and the length.
pub const PREFIX: usize = 5;
/// What etcd lets its gRPC layer take above `--max-request-bytes`: its `grpcOverheadBytes`.
const OVERHEAD: usize = 512 << 10;

/// The largest message, in bytes, that etcd's gRPC layer takes with this `--max-request-bytes`. A fragment of what a watch
/// tells is as large at most.
pub fn largest_message(max_request_bytes: usize) -> usize {
    max_request_bytes.saturating_add(OVERHEAD)
}

/// A message with its prefix.
pub fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX + length);
    framed.put_slice(&prefix(length));
    message.encode_raw(&mut framed);
    framed.freeze()
}

/// The same, where the message is encoded already.
pub fn frame_encoded(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(PREFIX + message.len());
    framed.put_slice(&prefix(message.len()));
    framed.put_slice(message);
    framed.freeze()
}

/// The prefix of an uncompressed message of `length` bytes. gRPC has no message above 4 GiB: longer answers have been
/// refused.
pub fn prefix(length: usize) -> [u8; PREFIX] {
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [0, a, b, c, d]
}

/// What the prefix of a message says of its length, and what is there of the message and of what follows it; nothing
/// while the prefix is not whole.
pub fn split(framed: &[u8]) -> Option<(usize, &[u8])> {
    let ([_, a, b, c, d], rest) = framed.split_first_chunk::<PREFIX>()?;
    Some((u32::from_be_bytes([*a, *b, *c, *d]) as usize, rest))
}
