//! RangeStream: one Range in chunks, from memory whatever the upstream's version. Where only the upstream can answer, it is
//! relayed to etcd 3.7, and put together from Range pages at a pinned revision on older ones.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use ::http::{HeaderValue, Request, Response, header::CONTENT_TYPE};
use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use tokio::sync::mpsc;
use tonic::Code;

use super::{
    Call, Kv,
    answer::{Run, Values, wrapped_len},
    decode,
    reads::{check, range_of},
};
use crate::{
    proto::etcdserverpb::{RangeRequest, RangeResponse, RangeStreamResponse},
    server::{
        body::{Body, BodyError, failure_trailers, success_trailers},
        forward::forward,
        response,
    },
    status::Status,
    store::{
        Responder, Revision, View,
        range::{Records, Selection, has_custom_order, has_filters},
        wire::{int_field_len, put_bytes_head, put_int_field},
    },
    upstream::{ForwardClass, RequestBody, Route, Upstream, grpc},
};

/// Keys in the first chunk, as in etcd; each further one may have twice as many, up to a size.
const FIRST_CHUNK: usize = 10;
const CHUNK_BYTES: usize = 1 << 20;
/// Keys in the largest page that is asked of an upstream without RangeStream.
const LARGEST_PAGE: i64 = 10_000;

impl Kv {
    pub(super) async fn range_stream(&self, call: Call<'_>) -> Result<Response<Body>, Status> {
        let request: RangeRequest = decode(&call.message)?;
        check(&request)?;
        check_streamable(&request)?;
        let range = range_of(&request);
        let unserved = match self.view(&range, request.serializable).await {
            Ok(view) => match self.evaluate(&view, &request)? {
                Some(selection) => {
                    self.count_unserved("RangeStream", "memory");
                    // Only 3.7 has chunks, and it leaves out leases with values: so do we, whatever the upstream's version.
                    let values = if request.keys_only { Values::LeftOutWithLease } else { Values::Sent };
                    let mut response = response::streaming(Body::boxed(Chunks::new(&view, selection, values)));
                    self.tell_age(&range, &mut response);
                    return Ok(response);
                }
                None => "revision_not_in_memory",
            },
            Err(unserved) => unserved.label(),
        };
        self.count_unserved("RangeStream", unserved);
        Ok(self.relay_stream(call, request).await)
    }

    async fn relay_stream(&self, call: Call<'_>, request: RangeRequest) -> Response<Body> {
        let upstream = self.cache.upstream();
        if self.cache.gate().has_range_stream {
            let body = RequestBody::full(super::framed(&call.message));
            return forward(upstream, call.connection, Request::from_parts(call.head, body), None).await;
        }
        let (sender, mut chunks) = mpsc::channel(1);
        tokio::spawn(page_through(upstream.clone(), request, call.head.headers, sender));
        let frames = futures_util::stream::poll_fn(move |cx| chunks.poll_recv(cx));
        response::streaming(Body::boxed(StreamBody::new(frames)))
    }
}

/// Etcd's further checks for a stream.
fn check_streamable(request: &RangeRequest) -> Result<(), Status> {
    if has_custom_order(request) {
        return Err(Status::fixed(Code::Unimplemented, "RangeStream does not support custom sort orders"));
    }
    if has_filters(request) {
        return Err(Status::fixed(Code::Unimplemented, "RangeStream does not support revision filters"));
    }
    Ok(())
}

/// A selection in chunks. Header, `more` and `count` stand in the last one.
struct Chunks {
    responder: Responder,
    revision: Revision,
    run: Option<Run>,
    keys: usize,
    more: bool,
    count: u64,
    values: Values,
    done: bool,
}

impl Chunks {
    fn new(view: &View, selection: Selection, values: Values) -> Self {
        let run = match selection.records {
            Records::Run(tree, range, _) => Run { tree, range },
            // Only a count has a list here, and it is empty.
            Records::List(_) => Run { tree: Default::default(), range: crate::store::KeyRange::everything() },
        };
        Self {
            responder: view.responder,
            revision: view.revision(),
            run: Some(run),
            keys: FIRST_CHUNK,
            more: selection.more,
            count: selection.count,
            values,
            done: false,
        }
    }

    fn next(&mut self) -> Option<Frame<Bytes>> {
        let Some(run) = &mut self.run else {
            return (!std::mem::replace(&mut self.done, true)).then(|| Frame::trailers(success_trailers()));
        };
        let mut records = BytesMut::new();
        let last = run.write(&mut records, CHUNK_BYTES, self.keys, self.values);
        self.keys = self.keys.saturating_mul(2);
        let mut head = BytesMut::new();
        if last {
            self.run = None;
            self.responder.put(&mut head, self.revision);
        }
        let tail = if last { int_field_len(self.more.into()) + int_field_len(self.count as i64) } else { 0 };
        let length = head.len() + records.len() + tail;
        let mut out = BytesMut::with_capacity(grpc::PREFIX + wrapped_len(length));
        out.put_slice(&grpc::prefix(wrapped_len(length)));
        put_bytes_head(&mut out, 1, length);
        out.put_slice(&head);
        out.put_slice(&records);
        if last {
            put_int_field(&mut out, 3, self.more.into());
            put_int_field(&mut out, 4, self.count as i64);
        }
        Some(Frame::data(out.freeze()))
    }
}

impl HttpBody for Chunks {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Poll::Ready(self.get_mut().next().map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }
}

type Chunk = Result<Frame<Bytes>, BodyError>;

/// Puts a stream together from Range pages at one revision.
async fn page_through(
    upstream: Upstream,
    request: RangeRequest,
    metadata: ::http::HeaderMap,
    chunks: mpsc::Sender<Chunk>,
) {
    let trailers = match pages(&upstream, request, &metadata, &chunks).await {
        Ok(()) => success_trailers(),
        Err(status) => failure_trailers(&status),
    };
    // A client that has gone needs no trailers.
    let _ = chunks.send(Ok(Frame::trailers(trailers))).await;
}

async fn pages(
    upstream: &Upstream,
    mut request: RangeRequest,
    metadata: &::http::HeaderMap,
    chunks: &mpsc::Sender<Chunk>,
) -> Result<(), Status> {
    let mut left = if request.limit > 0 { request.limit } else { i64::MAX };
    let mut size = FIRST_CHUNK as i64;
    let mut header = None;
    let mut sent = 0;
    loop {
        request.limit = size.min(left);
        let mut page = ask(upstream, &request, metadata).await?;
        if request.keys_only {
            page.kvs.iter_mut().for_each(|kv| kv.lease = 0);
        }
        let first = header.get_or_insert(page.header.take().unwrap_or_default());
        if request.revision == 0 {
            request.revision = first.revision;
        }
        left -= page.kvs.len() as i64;
        let next = page.kvs.last().map(|kv| Bytes::from([&kv.key[..], &[0]].concat()));
        let last = !page.more || left <= 0 || next.is_none() || request.count_only;
        if last {
            page.header = header.take();
            page.count += sent;
        } else {
            sent += page.kvs.len() as i64;
            (page.count, page.more) = (0, false);
        }
        let chunk = RangeStreamResponse { range_response: Some(page) };
        let gone = chunks.send(Ok(Frame::data(grpc::frame(&chunk)))).await.is_err();
        let Some(next) = next.filter(|_| !last && !gone) else { return Ok(()) };
        request.key = next;
        size = (size * 2).min(LARGEST_PAGE);
    }
}

async fn ask(
    upstream: &Upstream,
    request: &RangeRequest,
    metadata: &::http::HeaderMap,
) -> Result<RangeResponse, Status> {
    let mut call = Request::post("/etcdserverpb.KV/Range").body(RequestBody::full(grpc::frame(request)));
    if let Ok(call) = &mut call {
        call.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        for name in ["te", "token", "authorization"] {
            metadata.get(name).map(|value| call.headers_mut().insert(name, value.clone()));
        }
    }
    let call = call.map_err(|error| Status::new(Code::Internal, error.to_string()))?;
    let forwarded = upstream.forward(Route::Preferred, ForwardClass::Unary, call).await?;
    let (head, body) = forwarded.response.into_parts();
    if let Some(Err(status)) = grpc::outcome(&head.headers) {
        return Err(status);
    }
    let collected = body.collect().await.map_err(|error| Status::unavailable(error.to_string()))?;
    if let Some(Err(status)) = collected.trailers().and_then(grpc::outcome) {
        return Err(status);
    }
    let message = collected.to_bytes();
    let message = message.get(grpc::PREFIX..).unwrap_or_default();
    RangeResponse::decode(message).map_err(|error| Status::new(Code::Internal, error.to_string()))
}
