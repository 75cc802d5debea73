//! What a client sends with a call, whatever protocol its connection speaks.

use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Body, Frame, SizeHint};

/// Why a body broke off. Wraps the cause, so that a stream reset is passed on with its reason.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BodyError(#[source] pub Box<dyn Error + Send + Sync>);

impl BodyError {
    /// It broke off for this reason.
    pub fn because(cause: impl Error + Send + Sync + 'static) -> Self {
        Self(Box::new(cause))
    }
}

/// The body of a client's request. Over HTTP/2, what was taken makes room for as much more.
#[derive(Debug)]
pub enum Incoming {
    /// Over HTTP/1.1.
    Http1(hyper::body::Incoming),
    /// Over HTTP/2.
    Http2(RecvStream),
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match self.get_mut() {
            Self::Http1(body) => ready!(Pin::new(body).poll_frame(cx)).map(|frame| frame.map_err(BodyError::because)),
            Self::Http2(stream) => ready!(poll_stream(stream, cx)).map(|frame| frame.map_err(BodyError::because)),
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(stream) => stream.is_end_stream(),
        }
    }

    /// Unknown over HTTP/2, whose length, if a client has told it, is among the headers.
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(_) => SizeHint::default(),
        }
    }
}

fn poll_stream(stream: &mut RecvStream, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
    match ready!(stream.poll_data(cx)) {
        Some(Ok(data)) => {
            // Of a stream that was reset meanwhile, all has been released.
            let _ = stream.flow_control().release_capacity(data.len());
            Poll::Ready(Some(Ok(Frame::data(data))))
        }
        Some(Err(error)) => Poll::Ready(Some(Err(error))),
        None => stream.poll_trailers(cx).map_ok(|trailers| trailers.map(Frame::trailers)).map(Result::transpose),
    }
}
