//! RangeStream: one Range in chunks, from memory whatever the upstream's version. Where only the upstream can answer, it is
//! forwarded to etcd 3.7, and put together from Range pages at a pinned revision on older ones.

use std::sync::Arc;

use ::http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use tokio::sync::mpsc;
use tonic::Code;

use super::{
    Answered, Call, Kv,
    answer::{Values, put_record, record_len},
    forwarded_observer,
    held::{Held, Holder},
    unless_memory_can, unserved,
};
use crate::{
    aside,
    grpc::{self, BodyError, failure_trailers, success_trailers},
    proto::{
        etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse},
        paths,
    },
    rules::{range::range_of, successor, validate},
    server::{
        body::Body,
        data::Data,
        forward::forward,
        observe::AnswerObserver,
        response::{self, check_length},
    },
    status::Status,
    store::{
        Responder, Revision, View,
        range::{Records, Selection},
        wire::{bytes_field_len, put_bytes_head, put_int_field},
    },
    upstream::{
        ForwardClass, ForwardedBody, PageSize, RequestBody, Route, Sizing, TooLarge, Upstream, is_refusal_of_size,
    },
};

/// Keys in the first chunk, as in etcd; each further one may have twice as many, up to a size.
const FIRST_CHUNK: usize = 10;
const CHUNK_BYTES: usize = 1 << 20;
/// Pages that are asked of an upstream without RangeStream; each becomes a chunk. They weigh more than chunks from memory, because
/// etcd walks the whole range for each.
const PAGES: Sizing = Sizing { first: FIRST_CHUNK as i64, largest: 10_000, bytes: 4 << 20 };
/// What is read at a time at most, unless a single key has more.
const HEAVIEST_PAGE: usize = 64 << 20;

const CUT_SHORT: Status = Status::fixed(Code::Internal, "server closed the stream without sending a message");

impl Kv {
    pub(super) async fn range_stream(&self, call: Call<'_>) -> Result<Response<Body>, Status> {
        let Ok(request) = RangeRequest::decode(call.message.clone()) else {
            return Ok(self.forward_unread(call).await);
        };
        validate::range_stream(&request)?;
        match self.answer_range_stream(&request).await {
            Ok(answer) => {
                let answer = answer?;
                self.metrics.count("RangeStream", "memory");
                Ok(answer)
            }
            Err(why) => {
                self.metrics.count("RangeStream", why);
                let read = || self.answer_range_stream(&request).boxed();
                unless_memory_can(self.forward_stream(call, request.clone()), read).await
            }
        }
    }

    async fn answer_range_stream(&self, request: &RangeRequest) -> Answered {
        let range = range_of(request);
        let view = match self.view(&range, request.revision, request.serializable).await {
            Ok(view) => view,
            Err(why) => return unserved(why),
        };
        let selection = match self.evaluate(&view, &range, request) {
            Ok(selection) => selection.ok_or("revision_not_in_memory")?,
            Err(refusal) => return Ok(Err(refusal)),
        };
        // Only 3.7 has chunks, and it leaves out leases with values: so do we, whatever the upstream's version.
        let values = if request.keys_only { Values::LeftOutWithLease } else { Values::Sent };
        Ok(self.check_all(&selection.records, values).map(|()| {
            let answer = response::pieces(Chunks::new(&self.holder, &view, selection, values));
            self.with_age(&range, answer)
        }))
    }

    /// Refuses chunks that are more than the largest answer together. Only what an operator has set counts: each is a message.
    fn check_all(&self, records: &Records, values: Values) -> Result<(), Status> {
        let limit = self.settings.max_response_bytes;
        // Without values they are less than the sums say.
        if limit == u64::MAX || records.sums().wire <= limit {
            return Ok(());
        }
        let mut length = 0;
        aside::walk(records.len(), || records.for_each(|record| length += record_len(record, values) as u64));
        check_length(length, limit)
    }

    async fn forward_stream(&self, call: Call<'_>, request: RangeRequest) -> Response<Body> {
        let upstream = self.cache.upstream();
        let observer = forwarded_observer(&self.cache);
        if self.cache.gate().has_range_stream {
            let body = RequestBody::full(grpc::frame_encoded(&call.message));
            return forward(upstream, call.connection, call.request.map(|_| body), Some(observer)).await;
        }
        let (sender, mut chunks) = mpsc::channel(1);
        let pages = Pages { upstream: upstream.clone(), metadata: call.request.into_parts().0.headers, observer };
        tokio::spawn(pages.through(request, sender));
        let frames = futures_util::stream::poll_fn(move |cx| chunks.poll_recv(cx));
        response::streaming(Body::boxed(StreamBody::new(frames)))
    }
}

/// A selection in chunks. Header, `more` and `count` stand in the last one.
struct Chunks {
    responder: Responder,
    revision: Revision,
    rest: Option<Held>,
    keys: usize,
    more: bool,
    count: u64,
    values: Values,
}

impl Chunks {
    fn new(holder: &Holder, view: &View, selection: Selection, values: Values) -> Self {
        Self {
            responder: view.responder,
            revision: view.revision(),
            rest: Some(holder.hold([selection.records.into()])),
            keys: FIRST_CHUNK,
            more: selection.more,
            count: selection.count,
            values,
        }
    }

    fn chunk(&mut self, records: &[u8], last: bool) -> Bytes {
        let mut head = BytesMut::new();
        let mut tail = Vec::new();
        if last {
            self.responder.put(&mut head, self.revision);
            put_int_field(&mut tail, 3, self.more.into());
            put_int_field(&mut tail, 4, self.count as i64);
        }
        let length = head.len() + records.len() + tail.len();
        let mut out = BytesMut::with_capacity(grpc::PREFIX + bytes_field_len(length));
        out.put_slice(&grpc::prefix(bytes_field_len(length)));
        put_bytes_head(&mut out, 1, length);
        [&head, records, &tail].into_iter().for_each(|part| out.put_slice(part));
        out.freeze()
    }
}

impl Iterator for Chunks {
    type Item = Result<Data, BodyError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest.as_mut()?;
        let mut records = BytesMut::new();
        let (mut left, values) = (self.keys, self.values);
        let handed_out = rest.hand_out(|record| {
            put_record(&mut records, record, values);
            left -= 1;
            left > 0 && records.len() < CHUNK_BYTES
        });
        self.keys = self.keys.saturating_mul(2);
        if !matches!(handed_out, Ok(false)) {
            self.rest = None;
        }
        Some(handed_out.map(|last| self.chunk(&records, last).into()))
    }
}

type Chunk = Result<Frame<Data>, BodyError>;

/// A stream that is put together from Range pages at one revision.
struct Pages {
    upstream: Upstream,
    metadata: HeaderMap,
    observer: Arc<dyn AnswerObserver>,
}

impl Pages {
    async fn through(self, request: RangeRequest, chunks: mpsc::Sender<Chunk>) {
        let trailers = match self.send(request, &chunks).await {
            Ok(()) => success_trailers(),
            Err(status) => failure_trailers(&status),
        };
        // A client that has gone needs no trailers.
        let _ = chunks.send(Ok(Frame::trailers(trailers))).await;
    }

    async fn send(&self, mut request: RangeRequest, chunks: &mpsc::Sender<Chunk>) -> Result<(), Status> {
        let mut left = if request.limit > 0 { request.limit } else { i64::MAX };
        let mut size = PageSize::new(PAGES);
        let mut header = None;
        let mut sent = 0;
        loop {
            request.limit = size.keys().min(left);
            let Some(mut page) = self.next_page(&request, &mut size).await? else { continue };
            if request.keys_only {
                page.kvs.iter_mut().for_each(|kv| kv.lease = 0);
            }
            let first = header.get_or_insert(page.header.take().unwrap_or_default());
            if request.revision <= 0 {
                request.revision = first.revision;
            }
            left -= page.kvs.len() as i64;
            let next = page.kvs.last().map(|kv| successor(&kv.key));
            let last = !page.more || left <= 0 || next.is_none() || request.count_only;
            if last {
                page.header = header.take();
                page.count += sent;
            } else {
                sent += page.kvs.len() as i64;
                (page.count, page.more) = (0, false);
            }
            let chunk = RangeStreamResponse { range_response: Some(page) };
            let gone = chunks.send(Ok(Frame::data(grpc::frame(&chunk).into()))).await.is_err();
            let Some(next) = next.filter(|_| !last && !gone) else { return Ok(()) };
            request.key = next;
        }
    }

    /// None when the page is too large, and a smaller one is to be asked for.
    async fn next_page(&self, request: &RangeRequest, size: &mut PageSize) -> Result<Option<RangeResponse>, Status> {
        let can_shrink = request.limit > 1;
        match self.ask(request, if can_shrink { HEAVIEST_PAGE } else { usize::MAX }).await {
            Ok(Ok((page, bytes))) => {
                size.weighed(page.kvs.len() as i64, bytes);
                return Ok(Some(page));
            }
            Ok(Err(TooLarge { announced })) => size.weighed(request.limit, announced),
            Err(status) if can_shrink && is_refusal_of_size(&status) => size.refused(request.limit),
            Err(status) => return Err(status),
        }
        Ok(None)
    }

    /// A page and how many bytes it came in, unless it announces more than `most`.
    async fn ask(
        &self,
        request: &RangeRequest,
        most: usize,
    ) -> Result<Result<(RangeResponse, usize), TooLarge>, Status> {
        let mut call = Request::post(paths::RANGE).body(RequestBody::full(grpc::frame(request)));
        if let Ok(call) = &mut call {
            call.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(grpc::MEDIA_TYPE));
            for name in ["te", "token", "authorization"] {
                self.metadata.get(name).map(|value| call.headers_mut().insert(name, value.clone()));
            }
        }
        let call = call.map_err(|error| Status::new(Code::Internal, error.to_string()))?;
        let forwarded = self.upstream.forward(Route::Preferred, ForwardClass::Unary, call).await?;
        let connection = forwarded.connection;
        let message = match read_page(forwarded.response, most).await? {
            Ok(message) => message,
            Err(too_large) => return Ok(Err(too_large)),
        };
        let bytes = message.len();
        let page = RangeResponse::decode(message).map_err(|error| Status::new(Code::Internal, error.to_string()))?;
        if let Some(header) = &page.header {
            self.observer.answered(connection, *header);
        }
        Ok(Ok((page, bytes)))
    }
}

async fn read_page(response: Response<ForwardedBody>, most: usize) -> Result<Result<Bytes, TooLarge>, Status> {
    let (head, mut body) = response.into_parts();
    if let Some(Err(status)) = grpc::outcome(&head.headers) {
        return Err(status);
    }
    let mut deframer = grpc::Deframer::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Status::unavailable(error.to_string()))?;
        if let Some(Err(status)) = frame.trailers_ref().and_then(grpc::outcome) {
            return Err(status);
        }
        deframer.push(frame.into_data().unwrap_or_default());
        if let Some(announced) = deframer.announced().filter(|announced| *announced > most) {
            return Ok(Err(TooLarge { announced }));
        }
    }
    deframer.pop()?.map(Ok).ok_or(CUT_SHORT)
}

#[cfg(test)]
mod tests {
    use bytes::Buf;

    use super::*;
    use crate::{
        proto::mvccpb::KeyValue,
        store::{Limits, Record, Store},
    };

    fn record(number: usize) -> Record {
        let key = format!("k{number}").into();
        let record = KeyValue { key, mod_revision: 2, create_revision: 2, version: 1, ..Default::default() };
        Record::from_wire(&record.encode_to_vec()).unwrap()
    }

    /// Only the count used to be sent of keys that are sorted by something else than the key.
    #[test]
    fn a_list_is_sent_whole_and_in_its_order() {
        let (store, _writer) = Store::new(Limits { bytes: 0, age: 0 });
        for count in [0, 1, 10, 11, 100] {
            let records: Vec<_> = (0..count).rev().map(record).collect();
            let keys: Vec<_> = records.iter().map(|record| record.key().to_vec()).collect();
            let selection = Selection { count: count as u64, more: false, records: Records::list(records) };
            let holder = Holder::new(prometheus::IntCounter::new("given_up", "for the test").unwrap());
            let mut sent = Vec::new();
            for data in Chunks::new(&holder, &store.view(), selection, Values::Sent) {
                let mut data = data.unwrap();
                data.advance(grpc::PREFIX);
                let chunk = RangeStreamResponse::decode(data).unwrap().range_response.unwrap();
                assert!(!chunk.kvs.is_empty() || count == 0, "no chunk is empty");
                sent.extend(chunk.kvs.iter().map(|record| record.key.to_vec()));
            }
            assert_eq!(sent, keys);
        }
    }
}
