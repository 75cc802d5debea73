//! What a request to etcd carries: bytes at hand, messages to come, or a client's own body passed on.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;

use crate::grpc::{BodyError, Incoming};

/// The body of a request to etcd.
pub enum RequestBody {
    /// Everything is at hand; `None` once it was taken.
    Full(Option<Bytes>),
    /// What a client is sending.
    Incoming(Incoming),
    /// Framed messages as they are handed in; ends when the sender is gone.
    Messages(mpsc::Receiver<Bytes>),
}

impl RequestBody {
    /// A body of these bytes.
    pub fn full(bytes: Bytes) -> Self {
        RequestBody::Full(Some(bytes))
    }
}

impl From<Incoming> for RequestBody {
    fn from(body: Incoming) -> Self {
        RequestBody::Incoming(body)
    }
}

impl From<Bytes> for RequestBody {
    fn from(bytes: Bytes) -> Self {
        RequestBody::full(bytes)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            RequestBody::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            RequestBody::Incoming(body) => Pin::new(body).poll_frame(cx),
            RequestBody::Messages(messages) => {
                let message = ready!(messages.poll_recv(cx));
                Poll::Ready(message.map(|message| Ok(Frame::data(message))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            RequestBody::Full(bytes) => bytes.is_none(),
            RequestBody::Incoming(body) => body.is_end_stream(),
            RequestBody::Messages(_) => false,
        }
    }

    /// Unknown on purpose where hyper would turn it into a content-length header that gRPC does not use.
    fn size_hint(&self) -> SizeHint {
        match self {
            RequestBody::Incoming(body) => body.size_hint(),
            RequestBody::Full(_) | RequestBody::Messages(_) => SizeHint::default(),
        }
    }
}
