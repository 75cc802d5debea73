//! What an answer carries, and how a unary request is read.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use ::http::Request;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use tonic::Code;

use super::{data::Data, observe::ObservedBody};
use crate::{
    grpc::{BodyError, Compression, Deframer, Incoming, success_trailers},
    status::Status,
};

/// The body of an answer.
pub enum Body {
    /// Nothing: the headers say everything.
    Empty,
    /// One framed message, then the trailers of a success.
    Unary(UnaryBody),
    /// Plain bytes, for HTTP/1.1.
    Plain(Option<Bytes>),
    /// What etcd answers.
    Forwarded(Box<ObservedBody>),
    /// Anything else.
    Boxed(Pin<Box<dyn HttpBody<Data = Data, Error = BodyError> + Send>>),
}

/// What is left to send of a unary answer.
pub enum UnaryBody {
    /// The message and the trailers.
    Message(Data),
    /// The trailers.
    Trailers,
    /// Nothing.
    Done,
}

impl Body {
    /// A body that is boxed.
    pub fn boxed(body: impl HttpBody<Data = Data, Error = BodyError> + Send + 'static) -> Self {
        Body::Boxed(Box::pin(body))
    }

    /// Where it is etcd's answer, reads the beginning ahead, so that its observer knows the header.
    pub(super) async fn read_ahead(&mut self) {
        if let Body::Forwarded(body) = self {
            body.read_ahead().await;
        }
    }

    /// The same, where it is etcd's answer, ending with Unavailable after `end`, if that comes first.
    pub(super) fn until(self, end: Option<impl Future<Output = ()> + Send + 'static>) -> Self {
        match (self, end) {
            (Body::Forwarded(body), Some(end)) => Body::Forwarded(Box::new(body.until(end))),
            (body, _) => body,
        }
    }
}

impl UnaryBody {
    fn next(&mut self) -> Option<Frame<Data>> {
        match std::mem::replace(self, UnaryBody::Done) {
            UnaryBody::Message(message) => {
                *self = UnaryBody::Trailers;
                Some(Frame::data(message))
            }
            UnaryBody::Trailers => Some(Frame::trailers(success_trailers())),
            UnaryBody::Done => None,
        }
    }
}

impl HttpBody for Body {
    type Data = Data;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, BodyError>>> {
        match self.get_mut() {
            Body::Empty => Poll::Ready(None),
            Body::Unary(unary) => Poll::Ready(unary.next().map(Ok)),
            Body::Plain(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes.into())))),
            Body::Forwarded(body) => {
                let polled = Pin::new(body.as_mut()).poll_frame(cx);
                polled.map(|frame| frame.map(|frame| frame.map(|frame| frame.map_data(Data::Bytes))))
            }
            Body::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Empty => true,
            Body::Unary(unary) => matches!(unary, UnaryBody::Done),
            Body::Plain(bytes) => bytes.is_none(),
            Body::Forwarded(body) => body.is_end_stream(),
            Body::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Empty => SizeHint::with_exact(0),
            Body::Plain(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Body::Forwarded(body) => body.size_hint(),
            // gRPC does not use content-length.
            Body::Unary(_) | Body::Boxed(_) => SizeHint::default(),
        }
    }
}

/// Reads the single message of a unary request, and unpacks it if it is compressed as its headers say.
///
/// # Errors
/// ResourceExhausted for a message above `limit` bytes, as Go's gRPC library says it; Unknown for a body that ends before its
/// message does; Cancelled when the client went away.
pub async fn read_message(request: &mut Request<Incoming>, limit: usize) -> Result<Bytes, Status> {
    let mut deframer = Deframer::compressed(Compression::named(request.headers(), limit)?);
    next_message(&mut deframer, request.body_mut(), limit).await
}

/// As [`read_message`], where the answer is a stream: there Go's gRPC library looks at the end of the request too.
///
/// # Errors
/// As [`read_message`], but Internal for a body that is not one message.
pub async fn read_only_message(request: &mut Request<Incoming>, limit: usize) -> Result<Bytes, Status> {
    let mut deframer = Deframer::compressed(Compression::named(request.headers(), limit)?);
    let body = request.body_mut();
    let message = next_message(&mut deframer, body, limit).await.map_err(|status| match status.code {
        Code::Unknown => Status { code: Code::Internal, ..status },
        _ => status,
    })?;
    match next_message(&mut deframer, body, limit).await {
        Err(Status { code: Code::Unknown, .. }) => Ok(message),
        Err(status) => Err(status),
        Ok(_) => Err(TWO_REQUESTS),
    }
}

const TWO_REQUESTS: Status = Status::fixed(
    Code::Internal,
    "cardinality violation: received multiple request messages for non-client-streaming RPC",
);

async fn next_message(deframer: &mut Deframer, body: &mut Incoming, limit: usize) -> Result<Bytes, Status> {
    loop {
        deframer.check_announced(limit)?;
        if let Some(message) = deframer.pop()? {
            return Ok(message);
        }
        let Some(frame) = body.frame().await else { break };
        let frame = frame.map_err(|_| Status::CANCELLED)?;
        if let Ok(data) = frame.into_data() {
            deframer.push(data);
        }
    }
    Err(Status::fixed(Code::Unknown, if deframer.announced().is_some() { "unexpected EOF" } else { "EOF" }))
}
