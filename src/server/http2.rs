//! HTTP/2 on one client's connection, on h2 itself.
//!
//! hyper stands between h2 and a service as something general: each piece of an answer passes through its pipe, which reserves
//! room and so wakes the call that is sending, and asks about resets twice for each piece. For a stream that is sent one event
//! after the other, that costs more than HTTP/2 itself. So each call is a [`Call`] here: it answers, and then hands h2 what
//! the body gives, as long as h2 has room.
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
use h2::{
    Reason, SendStream,
    server::{Builder, SendResponse},
};
use http_body::Body;
use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::{body::BodyError, data::Data, keepalive::KeepAlive, listener::Settings};
use crate::{
    socket::{Gather, NewCalls},
    upstream::{Incoming, grpc},
};

const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 64 << 20;
const MAX_FRAME: u32 = 64 << 10;
const MAX_HEADERS: u32 = 64 << 10;
/// Bytes that a stream hands over before they are sent.
const SEND_BUFFER: usize = 128 << 10;
/// Streams that may be reset before they were looked at, and resets that we may have to send for protocol errors.
const RESETS: usize = 10_000;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error(transparent)]
    Http2(#[from] h2::Error),
    #[error("the client has not answered a ping")]
    Silent,
}

/// Serves a connection: each of its requests becomes a call among `calls`, answered by `answer`. When `leave` is cancelled the
/// client is told to go; calls under way go on.
///
/// # Errors
/// When the client breaks the rules of HTTP/2, when the socket fails, or when the client is silent for too long.
pub(super) async fn serve<S, A, F, B>(
    socket: Gather<S>,
    settings: Settings,
    calls: NewCalls,
    leave: CancellationToken,
    answer: A,
) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Data, Error = BodyError> + Unpin + Send + 'static,
{
    let ear = socket.ear();
    // In a box that goes: an idle connection keeps no room for how it began.
    let handshake = Box::pin(builder().handshake::<_, Data>(socket));
    let Some(opened) = leave.run_until_cancelled(handshake).await else { return Ok(()) };
    let mut connection = opened?;
    let mut keepalive = connection.ping_pong().map(|pings| KeepAlive::new(pings, ear, settings));
    let mut leave = Box::pin(leave.cancelled_owned());
    let mut leaves = false;
    poll_fn(|cx| {
        if !leaves && leave.as_mut().poll(cx).is_ready() {
            leaves = true;
            connection.graceful_shutdown();
        }
        while let Poll::Ready(accepted) = connection.poll_accept(cx) {
            let Some(accepted) = accepted else { return Poll::Ready(Ok(())) };
            let (request, respond) = accepted?;
            calls.execute(Call::Answering { answer: answer(request.map(Incoming::Http2)), respond });
        }
        // Only now: everything that the client has said was read.
        match &mut keepalive {
            Some(keepalive) => keepalive.poll_silent(cx).map(|()| Err(Ended::Silent)),
            None => Poll::Pending,
        }
    })
    .await
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
    /// A call, from its request to the end of its answer. Dropped with all that it waits for when the client resets it.
    #[project = CallProjection]
    enum Call<F, B> {
        Answering {
            #[pin]
            answer: F,
            respond: SendResponse<Data>,
        },
        Sending {
            pipe: Pipe<B>,
        },
    }
}

impl<F, B> Future for Call<F, B>
where
    F: Future<Output = Response<B>>,
    B: Body<Data = Data, Error = BodyError> + Unpin,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let CallProjection::Answering { answer, respond } = self.as_mut().project() {
            let Poll::Ready(response) = answer.poll(cx) else { return respond.poll_reset(cx).map(drop) };
            let (head, body) = response.into_parts();
            let is_over = body.is_end_stream();
            match respond.send_response(Response::from_parts(head, ()), is_over) {
                Ok(stream) if !is_over => self.set(Call::Sending { pipe: Pipe::new(stream, body) }),
                // What cannot be sent has been reset by the client.
                Ok(_) | Err(_) => return Poll::Ready(()),
            }
        }
        match self.project() {
            CallProjection::Sending { pipe } => pipe.poll(cx).map(drop),
            CallProjection::Answering { .. } => Poll::Ready(()),
        }
    }
}

/// Hands a body over to h2.
struct Pipe<B> {
    stream: SendStream<Data>,
    body: B,
    /// What waits for room.
    waiting: Option<Data>,
    /// Whether h2 wakes the call when anything changes.
    is_watched: bool,
}

impl<B: Body<Data = Data, Error = BodyError> + Unpin> Pipe<B> {
    fn new(stream: SendStream<Data>, body: B) -> Self {
        Self { stream, body, waiting: None, is_watched: false }
    }

    /// Ready when everything was handed over, or the client wants no more.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
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
    /// there is something to send, since what is reserved is taken from the connection's other streams.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Data>, h2::Error>> {
        if self.waiting.is_none() {
            return Poll::Ready(Ok(None));
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
        Poll::Ready(Ok(self.waiting.take()))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        future::{pending, ready},
        pin::pin,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use ::http::{HeaderMap, HeaderValue, StatusCode};
    use bytes::{Bytes, BytesMut};
    use h2::{RecvStream, client};
    use http_body::Frame;
    use tokio::{
        io::{AsyncWriteExt, DuplexStream},
        sync::{mpsc, oneshot},
        task::JoinHandle,
        time::{Instant, sleep, timeout},
    };

    use super::*;
    use crate::socket::Calls;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A body of frames that are at hand or to come. Counts how often it was asked; tells when it is dropped.
    struct Script {
        frames: VecDeque<Result<Frame<Data>, BodyError>>,
        coming: Option<mpsc::Receiver<Bytes>>,
        asked: Arc<AtomicUsize>,
        _dropped: Option<oneshot::Sender<()>>,
    }

    impl Script {
        fn of(frames: impl IntoIterator<Item = Result<Frame<Data>, BodyError>>) -> Self {
            Self { frames: frames.into_iter().collect(), coming: None, asked: Arc::default(), _dropped: None }
        }
    }

    impl Body for Script {
        type Data = Data;
        type Error = BodyError;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, BodyError>>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            match (self.frames.pop_front(), &mut self.coming) {
                (Some(frame), _) => Poll::Ready(Some(frame)),
                (None, Some(coming)) => coming.poll_recv(cx).map(|data| data.map(|data| Ok(Frame::data(data.into())))),
                (None, None) => Poll::Ready(None),
            }
        }
    }

    fn data(bytes: impl Into<Bytes>) -> Result<Frame<Data>, BodyError> {
        Ok(Frame::data(bytes.into().into()))
    }

    const SETTINGS: Settings = Settings {
        keepalive_interval: Duration::from_secs(60),
        keepalive_timeout: Duration::from_secs(20),
        grace: Duration::ZERO,
    };

    /// Serves one connection, whose client's end it gives.
    fn serving<A, F>(leave: CancellationToken, answer: A) -> (DuplexStream, JoinHandle<Result<(), Ended>>)
    where
        A: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
        F: Future<Output = Response<Script>> + Send + 'static,
    {
        let (near, far) = tokio::io::duplex(1 << 16);
        let served = tokio::spawn(async move {
            let (gather, mut calls) = (Gather::new(far), Calls::default());
            let mut outlet = gather.outlet();
            let mut serving = pin!(serve(gather, SETTINGS, calls.executor(), leave, answer));
            poll_fn(|cx| calls.poll(cx, &mut outlet, serving.as_mut())).await
        });
        (near, served)
    }

    /// A client whose streams may be sent `window` bytes before it has read any.
    async fn client(near: DuplexStream, window: u32) -> client::SendRequest<Bytes> {
        let mut builder = client::Builder::new();
        let (sender, connection) = builder.initial_window_size(window).handshake(near).await.unwrap();
        tokio::spawn(connection);
        sender.ready().await.unwrap()
    }

    fn call(client: &mut client::SendRequest<Bytes>) -> (client::ResponseFuture, SendStream<Bytes>) {
        client.send_request(Request::post("http://a/b").body(()).unwrap(), false).unwrap()
    }

    /// Reads what is there of a body until it ends.
    async fn read(body: &mut RecvStream) -> Result<BytesMut, h2::Error> {
        let mut all = BytesMut::new();
        while let Some(data) = body.data().await.transpose()? {
            body.flow_control().release_capacity(data.len())?;
            all.extend_from_slice(&data);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn an_answer_has_its_head_its_data_and_its_trailers() {
        let (near, _) = serving(CancellationToken::new(), |_| {
            let trailers = HeaderMap::from_iter([("a".parse().unwrap(), HeaderValue::from_static("b"))]);
            let frames = [data("one"), data(""), data("two"), Ok(Frame::trailers(trailers))];
            let mut response = Response::new(Script::of(frames));
            *response.status_mut() = StatusCode::ACCEPTED;
            ready(response)
        });
        let mut client = client(near, 1 << 16).await;
        let response = call(&mut client).0.await.unwrap();
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        let mut body = response.into_body();
        assert_eq!(read(&mut body).await.unwrap(), "onetwo");
        assert_eq!(body.trailers().await.unwrap().unwrap()["a"], "b");
    }

    #[tokio::test]
    async fn what_is_empty_needs_no_room() {
        let (near, _) = serving(CancellationToken::new(), |_| {
            ready(Response::new(Script::of([data(""), Ok(Frame::trailers(HeaderMap::new()))])))
        });
        let mut client = client(near, 0).await;
        let mut body = call(&mut client).0.await.unwrap().into_body();
        assert!(timeout(PATIENCE, body.trailers()).await.unwrap().unwrap().is_some());
    }

    #[tokio::test]
    async fn what_was_read_of_a_request_makes_room_for_more() {
        let (near, _) = serving(CancellationToken::new(), |request| async {
            let mut body = request.into_body();
            let (mut read, mut told) = (0, HeaderMap::new());
            while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                match frame.into_data() {
                    Ok(data) => read += data.len(),
                    Err(frame) => told = frame.into_trailers().unwrap(),
                }
            }
            Response::new(Script::of([data(format!("{read} {told:?}"))]))
        });
        let mut client = client(near, 1 << 16).await;
        let (response, mut request) = call(&mut client);
        for _ in 0..20 {
            let mut rest = Bytes::from(vec![0; STREAM_WINDOW as usize / 4]);
            while !rest.is_empty() {
                request.reserve_capacity(rest.len());
                let room = poll_fn(|cx| request.poll_capacity(cx)).await.unwrap().unwrap();
                request.send_data(rest.split_to(room), false).unwrap();
            }
        }
        request.send_trailers(HeaderMap::from_iter([("a".parse().unwrap(), HeaderValue::from_static("b"))])).unwrap();
        let answer = read(response.await.unwrap().body_mut()).await.unwrap();
        assert_eq!(answer, format!("{} {{\"a\": \"b\"}}", 5 * STREAM_WINDOW));
    }

    /// Of an endless answer only as much is made as the client takes, and what h2 holds for it.
    #[tokio::test]
    async fn an_answer_waits_for_room() {
        const PIECE: usize = 64 << 10;
        const PIECES: usize = 64;
        let asked = Arc::<AtomicUsize>::default();
        let counted = asked.clone();
        let (near, _) = serving(CancellationToken::new(), move |_| {
            let pieces = (0..PIECES).map(|piece| data(vec![piece as u8; PIECE]));
            ready(Response::new(Script { asked: counted.clone(), ..Script::of(pieces) }))
        });
        let mut client = client(near, 1 << 10).await;
        let mut body = call(&mut client).0.await.unwrap().into_body();
        sleep(Duration::from_millis(100)).await;
        let made = asked.load(Ordering::Relaxed);
        assert!(made <= 1 + SEND_BUFFER / PIECE, "{made} pieces were made that nobody takes");
        let all = read(&mut body).await.unwrap();
        assert!(all.chunks(PIECE).enumerate().all(|(piece, bytes)| bytes.iter().all(|byte| *byte == piece as u8)));
        assert_eq!(all.len(), PIECES * PIECE);
    }

    /// A body is asked once for what has come and once more to hear that there is nothing else.
    #[tokio::test]
    async fn what_is_sent_wakes_nobody_in_vain() {
        const EVENTS: usize = 50;
        let asked = Arc::<AtomicUsize>::default();
        let (send, coming) = mpsc::channel(1);
        let script = Script { coming: Some(coming), asked: asked.clone(), ..Script::of([]) };
        let script = parking_lot::Mutex::new(Some(script));
        let (near, _) = serving(CancellationToken::new(), move |_| ready(Response::new(script.lock().take().unwrap())));
        let mut client = client(near, 1 << 20).await;
        let (response, _request) = call(&mut client);
        let mut body = response.await.unwrap().into_body();
        for _ in 0..EVENTS {
            send.send(Bytes::from(vec![7; 600])).await.unwrap();
            assert_eq!(timeout(PATIENCE, body.data()).await.unwrap().unwrap().unwrap().len(), 600);
        }
        let asked = asked.load(Ordering::Relaxed);
        assert!(asked <= 2 * EVENTS + 2, "{EVENTS} events, and {asked} times asked for them");
    }

    #[tokio::test]
    async fn a_call_that_its_client_resets_is_dropped_whatever_it_waits_for() {
        for is_answered in [false, true] {
            let (tell, dropped) = oneshot::channel();
            let (_send, coming) = mpsc::channel(1);
            let script = Script { coming: Some(coming), _dropped: Some(tell), ..Script::of([]) };
            let script = parking_lot::Mutex::new(Some(script));
            let (near, _) = serving(CancellationToken::new(), move |_| {
                let script = script.lock().take().unwrap();
                async move {
                    if !is_answered {
                        pending::<()>().await;
                    }
                    Response::new(script)
                }
            });
            let mut client = client(near, 1 << 16).await;
            let (response, mut request) = call(&mut client);
            if is_answered {
                response.await.unwrap();
            } else {
                sleep(Duration::from_millis(20)).await;
            }
            request.send_reset(Reason::CANCEL);
            assert!(timeout(PATIENCE, dropped).await.unwrap().is_err());
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_resets_its_stream_and_passes_a_reset_on() {
        let cases: [(fn() -> BodyError, _); 2] = [
            (|| BodyError("why".into()), Reason::INTERNAL_ERROR),
            (|| BodyError(h2::Error::from(Reason::CANCEL).into()), Reason::CANCEL),
        ];
        for (breaks, reason) in cases {
            let body = move || Script::of([data("half"), Err(breaks())]);
            let (near, _) = serving(CancellationToken::new(), move |_| ready(Response::new(body())));
            let mut client = client(near, 1 << 16).await;
            let error = async { read(call(&mut client).0.await?.body_mut()).await }.await.unwrap_err();
            assert_eq!((error.is_remote(), error.reason()), (true, Some(reason)));
        }
    }

    #[tokio::test]
    async fn a_client_that_is_told_to_go_is_still_answered() {
        let leave = CancellationToken::new();
        let (go, gone) = oneshot::channel::<()>();
        let gone = parking_lot::Mutex::new(Some(gone));
        let (near, served) = serving(leave.clone(), move |_| {
            let gone = gone.lock().take().unwrap();
            async move {
                gone.await.unwrap();
                Response::new(Script::of([data("late")]))
            }
        });
        let mut client = client(near, 1 << 16).await;
        let (response, _) = call(&mut client);
        sleep(Duration::from_millis(20)).await;
        leave.cancel();
        let refused = async {
            while poll_fn(|cx| client.poll_ready(cx)).await.is_ok()
                && client.send_request(Request::post("http://a/b").body(()).unwrap(), true).is_ok()
            {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, refused).await.unwrap();
        go.send(()).unwrap();
        assert_eq!(read(response.await.unwrap().body_mut()).await.unwrap(), "late");
        timeout(PATIENCE, served).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_has_not_finished_its_greeting_holds_no_stop_up() {
        let leave = CancellationToken::new();
        let (mut near, served) = serving(leave.clone(), |_| pending::<Response<Script>>());
        near.write_all(b"PRI * HTTP").await.unwrap();
        sleep(Duration::from_millis(20)).await;
        leave.cancel();
        timeout(PATIENCE, served).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_let_go_and_one_that_answers_pings_is_not() {
        let long = SETTINGS.keepalive_interval * 10;
        let never = |_| pending::<Response<Script>>();
        let (near, served) = serving(CancellationToken::new(), never);
        let mut client = client(near, 1 << 16).await;
        let _call = call(&mut client);
        assert!(timeout(long, served).await.is_err());

        let (mut near, served) = serving(CancellationToken::new(), never);
        near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let begun = Instant::now();
        let ended = timeout(long, served).await.unwrap().unwrap();
        assert!(matches!(ended, Err(Ended::Silent)), "{ended:?}");
        assert_eq!(begun.elapsed().as_secs(), (SETTINGS.keepalive_interval + SETTINGS.keepalive_timeout).as_secs());
    }
}
