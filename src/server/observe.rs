//! Passes the body of a forwarded answer on, unaltered and undelayed, and reads the header of a KV answer as it passes.

use std::{
    error::Error,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use prost::{
    Message,
    encoding::{WireType, decode_key, decode_varint},
};

use crate::{
    grpc::{self, BodyError, failure_trailers},
    proto::etcdserverpb::ResponseHeader,
    status::Status,
    upstream::{AuthHold, ConnectionNumber, ForwardedBody},
};

/// A response header is below 50 bytes of protobuf, and below 200 of JSON.
const PEEK_LIMIT: usize = 512;
/// How a message begins that begins with field 1, when that has a length.
const FIRST_FIELD: u8 = 0x0a;
/// The longest that the number and the length of such a field can be.
const LONGEST_KEY: usize = 11;

/// Is told the header of a KV answer before the client can read the answer.
pub trait AnswerObserver: Send + Sync {
    /// The answer came over `connection`, and is a success.
    fn answered(&self, connection: ConnectionNumber, header: ResponseHeader);
}

/// How an answer is written.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// gRPC messages, of which the first has the header.
    Grpc,
    /// gRPC messages, each with a header.
    GrpcStream,
    /// The messages of a RangeStream, of which the last has the header.
    GrpcChunks,
    /// JSON, as etcd's gateway writes it.
    Json,
}

/// The body of a forwarded answer on its way to the client.
pub struct ObservedBody {
    body: ForwardedBody,
    encoding: Encoding,
    peek: Option<Peek>,
    /// After which the answer has to end, though the upstream goes on.
    stop: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    ended: bool,
    /// What has been read ahead.
    first: Option<Option<Result<Frame<Bytes>, BodyError>>>,
    _hold: Option<AuthHold>,
}

impl ObservedBody {
    /// Passes on `body`. The hold is dropped when the client has been told everything or has gone away.
    pub fn new(body: ForwardedBody, encoding: Encoding, peek: Option<Peek>, hold: Option<AuthHold>) -> Self {
        Self { body, encoding, peek, stop: None, ended: false, first: None, _hold: hold }
    }

    /// The same, that ends with Unavailable after `end`.
    pub fn until(mut self, end: impl Future<Output = ()> + Send + 'static) -> Self {
        self.stop = Some(Box::pin(end));
        self
    }

    /// Reads the beginning ahead, so that the observer knows the header before anything is passed on. Nearly every header
    /// comes in the first piece; another is told later.
    pub async fn read_ahead(&mut self) {
        if self.first.is_none() && !self.is_end_stream() {
            self.first = Some(poll_fn(|cx| Pin::new(&mut *self).poll_frame(cx)).await);
        }
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

impl Body for ObservedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(first);
        }
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
        match &self.first {
            Some(first) => first.is_none(),
            None => self.ended || self.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        // Of what has been read ahead, the body does not know any more.
        if self.first.is_some() { SizeHint::default() } else { self.body.size_hint() }
    }
}

/// Looks for the response header at the beginning of an answer.
pub struct Peek {
    observer: Arc<dyn AnswerObserver>,
    connection: ConnectionNumber,
    encoding: Encoding,
    /// The beginning of the message that is looked at.
    seen: BytesMut,
    /// What is still to come of a message without a header.
    skip: usize,
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
    /// Tells `observer` about the answer that comes over `connection`.
    pub fn new(observer: Arc<dyn AnswerObserver>, connection: ConnectionNumber, encoding: Encoding) -> Self {
        Self { observer, connection, encoding, seen: BytesMut::new(), skip: 0 }
    }

    /// Looks at the next bytes; true when there is nothing more to look for.
    fn look(&mut self, mut data: &[u8]) -> bool {
        while !data.is_empty() {
            let skipped = self.skip.min(data.len());
            self.skip -= skipped;
            data = data.get(skipped..).unwrap_or_default();
            let before = self.seen.len();
            let room = PEEK_LIMIT.saturating_sub(before).min(data.len());
            let beginning = data.get(..room).unwrap_or_default();
            // Nearly every header comes in one piece, and then nothing is copied.
            if before > 0 {
                self.seen.extend_from_slice(beginning);
            }
            let looked_at = if before > 0 { &self.seen[..] } else { beginning };
            match find(self.encoding, looked_at) {
                Found::Header(header) => {
                    self.observer.answered(self.connection, header);
                    if self.encoding != Encoding::GrpcStream {
                        return true;
                    }
                    self.skip_rest(framed_len(looked_at), before);
                }
                Found::Part if looked_at.len() < PEEK_LIMIT => {
                    if before == 0 {
                        self.seen.extend_from_slice(beginning);
                    }
                    return false;
                }
                _ if matches!(self.encoding, Encoding::Grpc | Encoding::Json) => return true,
                _ => self.skip_rest(framed_len(looked_at), before),
            }
        }
        false
    }

    /// Passes over a message of `length`, of which `before` bytes have been looked at before.
    fn skip_rest(&mut self, length: usize, before: usize) {
        self.skip = length.saturating_sub(before);
        self.seen.clear();
    }
}

/// The length of a message with its prefix; there is a whole prefix.
fn framed_len(framed: &[u8]) -> usize {
    grpc::split(framed).map_or(framed.len(), |(length, _)| length.saturating_add(grpc::PREFIX))
}

fn find(encoding: Encoding, beginning: &[u8]) -> Found {
    match encoding {
        Encoding::Grpc | Encoding::GrpcStream => find_in_message(beginning, find_header),
        Encoding::GrpcChunks => find_in_message(beginning, find_in_chunk),
        Encoding::Json => find_in_json(beginning),
    }
}

fn find_in_message(framed: &[u8], find: fn(&[u8], bool) -> Found) -> Found {
    let Some((length, rest)) = grpc::split(framed) else { return Found::Part };
    find(rest.get(..length).unwrap_or(rest), rest.len() >= length)
}

/// The header is field 1 of every KV answer, and written first. `whole` says that nothing follows `answer`.
fn find_header(answer: &[u8], whole: bool) -> Found {
    match first_field(answer) {
        Some((length, header)) if header.len() >= length => header
            .get(..length)
            .and_then(|header| ResponseHeader::decode(header).ok())
            .map_or(Found::Nothing, Found::Header),
        Some(_) if !whole => Found::Part,
        None if !whole && may_begin(answer) => Found::Part,
        _ => Found::Nothing,
    }
}

/// A chunk of a RangeStream has an answer to a Range as its field 1.
fn find_in_chunk(chunk: &[u8], whole: bool) -> Found {
    match first_field(chunk) {
        Some((length, answer)) => find_header(answer.get(..length).unwrap_or(answer), whole || answer.len() >= length),
        None if !whole && may_begin(chunk) => Found::Part,
        None => Found::Nothing,
    }
}

/// Whether field 1 may turn out to stand at the beginning, once there is more of the message.
fn may_begin(message: &[u8]) -> bool {
    message.len() < LONGEST_KEY && message.first().is_none_or(|key| *key == FIRST_FIELD)
}

/// The length of field 1, where the message begins with that, and what is there of it and of what follows.
fn first_field(mut message: &[u8]) -> Option<(usize, &[u8])> {
    let (field, wire) = decode_key(&mut message).ok()?;
    let length = decode_varint(&mut message).ok()?;
    let is_first = field == 1 && wire == WireType::LengthDelimited;
    Some((usize::try_from(length).ok().filter(|_| is_first)?, message))
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
    use crate::proto::{
        etcdserverpb::{RangeResponse, RangeStreamResponse},
        mvccpb::KeyValue,
    };

    #[derive(Default)]
    struct Noted(Mutex<Vec<ResponseHeader>>);

    impl AnswerObserver for Noted {
        fn answered(&self, _: ConnectionNumber, header: ResponseHeader) {
            self.0.lock().push(header);
        }
    }

    fn look(encoding: Encoding, chunks: &[&[u8]]) -> Vec<ResponseHeader> {
        let noted = Arc::new(Noted::default());
        let mut peek = Peek::new(noted.clone(), ConnectionNumber(1), encoding);
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

    /// The last message of a RangeStream has the header, after any number of messages without.
    #[test]
    fn the_header_of_a_stream_is_found_however_it_is_cut() {
        let chunk = |header, bytes| {
            let value = vec![b'v'; bytes].into();
            let kvs = vec![KeyValue { key: "k".into(), value, ..Default::default() }];
            let answer = RangeResponse { header, kvs, ..Default::default() };
            grpc::frame(&RangeStreamResponse { range_response: Some(answer) }).to_vec()
        };
        let empty = grpc::frame(&RangeStreamResponse::default()).to_vec();
        let stream = [chunk(None, 1), empty, chunk(None, 700), chunk(None, 300), chunk(Some(HEADER), 900)].concat();
        for size in 1..stream.len() {
            let chunks: Vec<&[u8]> = stream.chunks(size).collect();
            assert_eq!(look(Encoding::GrpcChunks, &chunks), [HEADER], "cut at {size}");
        }
    }

    /// Each answer on a stream has one, and may be of any length.
    #[test]
    fn every_header_of_a_stream_is_found_however_it_is_cut() {
        let answer = |revision, bytes| {
            let header = Some(ResponseHeader { revision, ..HEADER });
            let kvs = vec![KeyValue { key: vec![b'k'; bytes].into(), ..Default::default() }];
            grpc::frame(&RangeResponse { header, kvs, ..Default::default() }).to_vec()
        };
        let none = grpc::frame(&RangeResponse { count: 1, ..Default::default() }).to_vec();
        let stream = [answer(1, 1), none, answer(2, 900), answer(3, 0)].concat();
        for size in 1..stream.len() {
            let chunks: Vec<&[u8]> = stream.chunks(size).collect();
            let found = look(Encoding::GrpcStream, &chunks).into_iter().map(|header| header.revision);
            assert_eq!(found.collect::<Vec<_>>(), [1, 2, 3], "cut at {size}");
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
        let mut peek = Peek::new(noted, ConnectionNumber(1), Encoding::Grpc);
        assert!(!peek.look(&[0, 255, 255, 255, 255, 0x0a, 0xff, 0xff, 0x01]));
        let given_up = (0..100).any(|_| peek.look(&[0; 64]));
        assert!(given_up && peek.seen.len() <= PEEK_LIMIT);
    }
}
