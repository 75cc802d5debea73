//! Passes the body of a forwarded answer on, unaltered and undelayed, and reads the header of a KV answer as it passes.

use std::{
    error::Error,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use prost::{
    Message,
    encoding::{WireType, decode_key, decode_varint},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::body::failure_trailers;
use crate::{
    proto::etcdserverpb::ResponseHeader,
    status::Status,
    upstream::{AuthHold, BodyError, ForwardedBody, grpc},
};

/// A response header is below 50 bytes of protobuf, and below 200 of JSON.
const PEEK_LIMIT: usize = 512;

/// Is told the header of a KV answer before the client can read the answer.
pub trait AnswerObserver: Send + Sync {
    /// `sent` is a moment just before the request was handed to the upstream connection. The answer is a success.
    fn answered(&self, sent: Instant, header: ResponseHeader);
}

/// How an answer is written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// gRPC messages.
    Grpc,
    /// JSON, as etcd's gateway writes it.
    Json,
}

/// The body of a forwarded answer on its way to the client.
pub struct Relay {
    body: ForwardedBody,
    encoding: Encoding,
    peek: Option<Peek>,
    /// Cancelled when the answer has to end, though the upstream goes on.
    stop: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    ended: bool,
    _hold: Option<AuthHold>,
}

impl Relay {
    /// Passes on `body`. The hold is dropped when the client has been told everything or has gone away.
    pub fn new(body: ForwardedBody, encoding: Encoding, peek: Option<Peek>, hold: Option<AuthHold>) -> Self {
        Self { body, encoding, peek, stop: None, ended: false, _hold: hold }
    }

    /// The same, that ends with Unavailable when `stop` is cancelled.
    pub fn until(mut self, stop: CancellationToken) -> Self {
        self.stop = Some(Box::pin(stop.cancelled_owned()));
        self
    }

    fn is_stopped(&mut self, cx: &mut Context<'_>) -> bool {
        self.stop.as_mut().is_some_and(|stop| stop.as_mut().poll(cx).is_ready())
    }

    /// What the client is told when the answer breaks off: a reset of the stream is passed on as it is; the loss of the
    /// connection becomes the status that the client would have given it.
    fn broken(&mut self, error: BodyError) -> Result<Frame<Bytes>, BodyError> {
        let cause: &(dyn Error + 'static) = error.0.as_ref();
        if self.encoding == Encoding::Json || grpc::remote_reset(cause).is_some() {
            return Err(error);
        }
        self.ended = true;
        Ok(Frame::trailers(failure_trailers(&grpc::from_transport(cause))))
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.is_stopped(cx) {
            self.ended = true;
            return Poll::Ready(Some(Ok(Frame::trailers(failure_trailers(&Status::STOPPED)))));
        }
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                if let (Some(peek), Some(data)) = (&mut self.peek, frame.data_ref())
                    && peek.look(data)
                {
                    self.peek = None;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => Poll::Ready(Some(self.broken(error))),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Looks for the response header at the beginning of an answer.
pub struct Peek {
    observer: Arc<dyn AnswerObserver>,
    sent: Instant,
    encoding: Encoding,
    seen: BytesMut,
}

/// What the beginning of an answer shows.
#[derive(Debug, PartialEq)]
enum Found {
    Header(ResponseHeader),
    /// The header goes on.
    Part,
    Nothing,
}

impl Peek {
    /// Tells `observer` about the answer to a request that was sent at `sent`.
    pub fn new(observer: Arc<dyn AnswerObserver>, sent: Instant, encoding: Encoding) -> Self {
        Self { observer, sent, encoding, seen: BytesMut::new() }
    }

    /// Looks at the next bytes; true when there is nothing more to look for.
    fn look(&mut self, data: &[u8]) -> bool {
        let found = if self.seen.is_empty() {
            find(self.encoding, data)
        } else {
            let room = PEEK_LIMIT.saturating_sub(self.seen.len()).min(data.len());
            self.seen.extend_from_slice(data.get(..room).unwrap_or_default());
            find(self.encoding, &self.seen)
        };
        match found {
            Found::Header(header) => {
                self.observer.answered(self.sent, header);
                true
            }
            Found::Nothing => true,
            Found::Part => {
                if self.seen.is_empty() {
                    self.seen.extend_from_slice(data.get(..PEEK_LIMIT).unwrap_or(data));
                }
                self.seen.len() >= PEEK_LIMIT
            }
        }
    }
}

fn find(encoding: Encoding, beginning: &[u8]) -> Found {
    match encoding {
        Encoding::Grpc => find_in_message(beginning),
        Encoding::Json => find_in_json(beginning),
    }
}

/// The header is field 1 of every KV answer, and written first.
fn find_in_message(framed: &[u8]) -> Found {
    let Some((prefix, mut message)) = framed.split_first_chunk::<{ grpc::PREFIX }>() else { return Found::Part };
    let [_, a, b, c, d] = *prefix;
    let whole = message.len() >= u32::from_be_bytes([a, b, c, d]) as usize;
    let parsed = (|| {
        let (field, wire) = decode_key(&mut message).ok()?;
        let length = decode_varint(&mut message).ok()?;
        Some((field == 1 && wire == WireType::LengthDelimited, usize::try_from(length).ok()?))
    })();
    match parsed {
        Some((true, length)) if message.remaining() >= length => message
            .get(..length)
            .and_then(|header| ResponseHeader::decode(header).ok())
            .map_or(Found::Nothing, Found::Header),
        Some((false, _)) => Found::Nothing,
        _ if whole => Found::Nothing,
        _ => Found::Part,
    }
}

/// The gateway writes `{"header":{"cluster_id":"…","member_id":"…","revision":"…","raft_term":"…"},…`.
fn find_in_json(text: &[u8]) -> Found {
    let start = b"{\"header\":";
    if text.len() < start.len() && start.starts_with(text) {
        return Found::Part;
    }
    let Some(object) = text.strip_prefix(start) else { return Found::Nothing };
    let Some(end) = object.iter().position(|byte| *byte == b'}') else { return Found::Part };
    let Ok(fields) = serde_json::from_slice::<serde_json::Value>(object.get(..=end).unwrap_or_default()) else {
        return Found::Nothing;
    };
    let text = |name: &str| fields.get(name).and_then(serde_json::Value::as_str);
    let Some(revision) = text("revision").and_then(|number| number.parse().ok()) else { return Found::Nothing };
    let number = |name: &str| text(name).and_then(|number| number.parse().ok()).unwrap_or_default();
    Found::Header(ResponseHeader {
        cluster_id: number("cluster_id"),
        member_id: number("member_id"),
        revision,
        raft_term: number("raft_term"),
    })
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::proto::etcdserverpb::RangeResponse;

    #[derive(Default)]
    struct Noted(Mutex<Vec<ResponseHeader>>);

    impl AnswerObserver for Noted {
        fn answered(&self, _: Instant, header: ResponseHeader) {
            self.0.lock().push(header);
        }
    }

    fn look(encoding: Encoding, chunks: &[&[u8]]) -> Vec<ResponseHeader> {
        let noted = Arc::new(Noted::default());
        let mut peek = Peek::new(noted.clone(), Instant::now(), encoding);
        for chunk in chunks {
            if peek.look(chunk) {
                break;
            }
        }
        noted.0.lock().clone()
    }

    const HEADER: ResponseHeader = ResponseHeader { cluster_id: u64::MAX, member_id: 2, revision: 77, raft_term: 3 };

    #[test]
    fn the_header_is_found_however_the_answer_is_cut() {
        let answer = RangeResponse { header: Some(HEADER), count: 1, ..Default::default() };
        let grpc = grpc::frame(&answer).to_vec();
        let json = br#"{"header":{"cluster_id":"18446744073709551615","member_id":"2","revision":"77","raft_term":"3"},"count":"1"}"#;
        for (encoding, bytes) in [(Encoding::Grpc, grpc), (Encoding::Json, json.to_vec())] {
            for size in 1..bytes.len() {
                let chunks: Vec<&[u8]> = bytes.chunks(size).collect();
                assert_eq!(look(encoding, &chunks), [HEADER], "{encoding:?} cut at {size}");
            }
        }
    }

    #[test]
    fn an_answer_without_a_header_is_left_alone() {
        let none = RangeResponse { count: 1, ..Default::default() };
        for bytes in [grpc::frame(&none).to_vec(), vec![0, 0, 0, 0, 0], vec![0, 0, 0, 0, 3, 0xff, 0xff, 0xff]] {
            assert_eq!(look(Encoding::Grpc, &[&bytes]), []);
        }
        for text in [&b"{\"error\":\"x\"}"[..], b"", b"[]", b"{\"header\":{}}", b"{\"header\":{\"revision\":7}}"] {
            assert_eq!(look(Encoding::Json, &[text]), []);
        }
    }

    #[test]
    fn a_header_that_never_ends_is_given_up() {
        let noted = Arc::new(Noted::default());
        let mut peek = Peek::new(noted, Instant::now(), Encoding::Grpc);
        assert!(!peek.look(&[0, 255, 255, 255, 255, 0x0a, 0xff, 0xff, 0x01]));
        let given_up = (0..100).any(|_| peek.look(&[0; 64]));
        assert!(given_up && peek.seen.len() <= PEEK_LIMIT);
    }
}
