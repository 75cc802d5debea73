//! Where a request is handed over: to an HTTP/2 connection, or to a server within the process.
//!
//! A server in the same process is called like a function. A pipe with HTTP/2 on it would cost each call its frames, and the
//! waking of the tasks at its ends, which is most of what a lone write waits for besides the disk.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http2},
};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::{body::RequestBody, endpoint::Serve};
use crate::{
    grpc::{BodyError, deadline},
    status::Status,
};

/// An answer, from its headers on.
pub(super) type Answered = Response<ResponseBody>;

/// What an answer carries.
pub(super) enum ResponseBody {
    /// It comes over a connection.
    Incoming(Incoming),
    /// It comes from within the process.
    InProcess(tonic::body::Body),
}

/// Takes requests. Clones share the connection.
#[derive(Clone)]
pub(super) enum Sender {
    /// A connection.
    Http2(http2::SendRequest<RequestBody>),
    /// A server within the process.
    InProcess(Arc<dyn Serve>),
}

impl Sender {
    /// Whether it takes nothing more.
    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Http2(sender) => sender.is_closed(),
            Self::InProcess(_) => false,
        }
    }

    /// Sends a request; the error gives it back if nothing of it was handed to a live connection.
    pub(super) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Answered, TrySendError<Request<RequestBody>>> {
        match self {
            Self::Http2(sender) => Ok(sender.try_send_request(request).await?.map(ResponseBody::Incoming)),
            Self::InProcess(server) => Ok(call(server, request).await),
        }
    }

    /// Starts a stream, whose messages go out whether or not anyone waits for the answer yet.
    pub(super) fn start(
        &mut self,
        request: Request<RequestBody>,
    ) -> Pin<Box<dyn Future<Output = Result<Answered, hyper::Error>> + Send>> {
        match self {
            Self::Http2(sender) => {
                let answered = sender.send_request(request);
                Box::pin(async move { Ok(answered.await?.map(ResponseBody::Incoming)) })
            }
            Self::InProcess(server) => {
                let server = server.clone();
                let calling = AbortOnDropHandle::new(tokio::spawn(async move { call(&server, request).await }));
                Box::pin(async move { Ok(calling.await.unwrap_or_else(|_| failed(&Status::STOPPED))) })
            }
        }
    }
}

/// Calls a server within the process, for no longer than the request allows.
async fn call(server: &Arc<dyn Serve>, request: Request<RequestBody>) -> Answered {
    match deadline(request.headers()) {
        None => server.serve(request).await.map(ResponseBody::InProcess),
        Some(limit) => match timeout(limit, server.serve(request)).await {
            Ok(answer) => answer.map(ResponseBody::InProcess),
            Err(_) => failed(&Status::DEADLINE),
        },
    }
}

fn failed(status: &Status) -> Answered {
    tonic::Status::from(status.clone()).into_http::<tonic::body::Body>().map(ResponseBody::InProcess)
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match self.get_mut() {
            Self::Incoming(body) => {
                ready!(Pin::new(body).poll_frame(cx)).map(|frame| frame.map_err(BodyError::because))
            }
            Self::InProcess(body) => {
                ready!(Pin::new(body).poll_frame(cx)).map(|frame| frame.map_err(BodyError::because))
            }
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Incoming(body) => body.is_end_stream(),
            Self::InProcess(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Incoming(body) => body.size_hint(),
            Self::InProcess(body) => body.size_hint(),
        }
    }
}
