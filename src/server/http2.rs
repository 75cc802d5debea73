//! HTTP/2 on one client's connection, on h2 itself.
//!
//! hyper stands between h2 and a service as something general: each piece of an answer passes through its pipe, which reserves
//! room and so wakes the call that is sending, and asks about resets twice for each piece. For a stream that is sent one event
//! after the other, that costs more than HTTP/2 itself. So each call is an [`Exchange`] here, which answers, and then a [`Pipe`],
//! which hands h2 what the body gives, as long as h2 has room.
//!
//! Streams are not limited in number, as in etcd. A connection's receive window is many stream windows, so that a few
//! requests that nobody reads do not block the others. h2's guards against reset floods stay on, at numbers that a client
//! which cancels thousands of calls at once does not reach.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use ::http::{Request, Response};
use bytes::Buf;
use futures_util::FutureExt;
use h2::{
    Reason, SendStream,
    server::{Builder, SendResponse},
};
use http_body::Body;
use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{
    data::Data,
    keepalive::KeepAlive,
    listener::{Ended, Farewell, Settings},
};
use crate::{
    grpc::{self, BodyError, Incoming},
    socket::{Call, GREETING, Gather, NewCalls},
};

const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 64 << 20;
const MAX_FRAME: u32 = 64 << 10;
const MAX_HEADERS: u32 = 64 << 10;
/// Bytes that a stream hands over before they are sent.
const SEND_BUFFER: usize = 128 << 10;
/// Bytes that a stream hands over without asking for room: to ask costs half as much again as to send. Less than a new stream may send.
const UNASKED: usize = 16 << 10;
/// Streams that may be reset before they were looked at, and resets that we may have to send for protocol errors.
const RESETS: usize = 10_000;

/// Serves a connection: each of its requests becomes a call among `calls`, answered by `answer`. No `async fn`: that would keep its
/// arguments twice for as long as the connection lasts.
///
/// # Errors
/// When the client breaks the rules of HTTP/2, when the socket fails, or when the client is silent for too long, or from the start.
pub(super) fn serve<S, A, F, B>(
    socket: Gather<S>,
    settings: &Settings,
    calls: NewCalls,
    farewell: Farewell,
    answer: A,
) -> impl Future<Output = Result<(), Ended>>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Data, Error = BodyError> + Unpin + Send + 'static,
{
    let ear = socket.ear();
    // In a box that goes: an idle connection keeps no room for how it began.
    let handshake = Box::pin(timeout(GREETING, builder().handshake::<_, Data>(socket)));
    async move {
        let Some(opened) = farewell.leave.run_until_cancelled(handshake).await else { return Ok(()) };
        let mut connection = opened.map_err(|_| Ended::Silent)??;
        let mut keepalive = connection.ping_pong().map(|pings| KeepAlive::new(pings, ear, settings));
        let mut word = Box::pin(farewell.leave.cancelled_owned());
        let mut leaves = false;
        poll_fn(|cx| {
            while word.as_mut().poll(cx).is_ready() {
                if leaves {
                    return Poll::Ready(Ok(()));
                }
                leaves = true;
                word.set(farewell.close.clone().cancelled_owned());
                connection.graceful_shutdown();
            }
            while let Poll::Ready(accepted) = connection.poll_accept(cx) {
                let Some(accepted) = accepted else { return Poll::Ready(Ok(())) };
                let (request, respond) = accepted?;
                let answer = answer(request.map(Incoming::Http2));
                calls.add(Call::new(Exchange { answer, respond, is_watched: false }));
            }
            // Only now: everything that the client has said was read.
            match &mut keepalive {
                Some(keepalive) => keepalive.poll_silent(cx).map(|()| Err(Ended::Silent)),
                None => Poll::Pending,
            }
        })
        .await
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(Some(RESETS));
    builder
}

pin_project! {
    /// A call, from its request to the first wait within its answer. Dropped with all that it waits for when the client resets it.
    struct Exchange<F> {
        #[pin]
        answer: F,
        respond: SendResponse<Data>,
        // Whether h2 wakes the call when anything changes.
        is_watched: bool,
    }
}

impl<F, B> Future for Exchange<F>
where
    F: Future<Output = Response<B>>,
    B: Body<Data = Data, Error = BodyError> + Unpin + Send + 'static,
{
    type Output = Option<Call>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let exchange = self.project();
        let Poll::Ready(response) = exchange.answer.poll(cx) else {
            *exchange.is_watched = true;
            return exchange.respond.poll_reset(cx).map(|_| None);
        };
        let (head, body) = response.into_parts();
        let is_over = body.is_end_stream();
        let Ok(stream) = exchange.respond.send_response(Response::from_parts(head, ()), is_over) else {
            // The client has reset what cannot be sent.
            return Poll::Ready(None);
        };
        if is_over {
            return Poll::Ready(None);
        }
        let mut pipe = Pipe { stream, body, waiting: None, unasked: 0, is_watched: *exchange.is_watched };
        let is_sent = pipe.poll_unpin(cx).is_ready();
        // What is left may last, and the future of the answer is several times as large.
        Poll::Ready((!is_sent).then(|| Call::new(pipe.map(|()| None))))
    }
}

/// The rest of a call: hands the body of its answer over to h2.
struct Pipe<B> {
    stream: SendStream<Data>,
    body: B,
    /// What waits for room.
    waiting: Option<Data>,
    /// Bytes that were handed over since there was room last.
    unasked: usize,
    /// Whether h2 wakes the call when anything changes.
    is_watched: bool,
}

impl<B: Body<Data = Data, Error = BodyError> + Unpin> Future for Pipe<B> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().poll_sent(cx).map(drop)
    }
}

impl<B: Body<Data = Data, Error = BodyError> + Unpin> Pipe<B> {
    /// Ready when everything was handed over, or the client wants no more.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            if let Some(data) = ready!(self.poll_waiting(cx))? {
                let is_over = self.body.is_end_stream();
                self.stream.send_data(data, is_over)?;
                if is_over {
                    return Poll::Ready(Ok(()));
                }
            }
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                self.is_watched = true;
                return self.stream.poll_reset(cx).map_ok(drop);
            };
            match frame.map(|frame| frame.map(|frame| frame.into_data())) {
                // Nothing needs no room.
                Some(Ok(Ok(data))) if !data.has_remaining() => self.stream.send_data(data, false)?,
                Some(Ok(Ok(data))) => self.waiting = Some(data),
                Some(Ok(Err(frame))) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        return Poll::Ready(self.stream.send_trailers(trailers));
                    }
                }
                Some(Err(error)) => {
                    let reason = grpc::http2_error(&error).and_then(h2::Error::reason);
                    self.stream.send_reset(reason.unwrap_or(Reason::INTERNAL_ERROR));
                    return Poll::Ready(Ok(()));
                }
                None => return Poll::Ready(self.stream.send_data(Data::default(), true)),
            }
        }
    }

    /// What waits, if anything does, once h2 takes it. It takes all of it when it has room for one byte; nothing is reserved before
    /// there is something to send, since what is reserved is taken from the connection's other streams. A little is handed over
    /// unasked: should the client make no room, h2 keeps it, and this asks before it has more.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Data>, h2::Error>> {
        let Some(waiting) = &self.waiting else { return Poll::Ready(Ok(None)) };
        let unasked = self.unasked.saturating_add(waiting.remaining());
        if unasked <= UNASKED {
            self.unasked = unasked;
            return Poll::Ready(Ok(self.waiting.take()));
        }
        if std::mem::take(&mut self.is_watched) {
            // To reserve room wakes whoever watches the stream, and that is this call.
            let _ = self.stream.poll_reset(&mut Context::from_waker(Waker::noop()));
        }
        self.stream.reserve_capacity(1);
        while self.stream.capacity() == 0 {
            self.is_watched = true;
            match ready!(self.stream.poll_capacity(cx)) {
                Some(room) => room?,
                None => return Poll::Ready(Err(Reason::CANCEL.into())),
            };
        }
        self.unasked = 0;
        Poll::Ready(Ok(self.waiting.take()))
    }
}

#[cfg(test)]
mod tests;
