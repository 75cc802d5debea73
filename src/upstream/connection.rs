//! HTTP connections to one endpoint: how each class of traffic is tuned, and the handshake.
//!
//! Windows are fixed. An adaptive window probes with pings, which etcd's gRPC library punishes. A connection's window is
//! the largest that there is, so whatever one stream leaves unread, the others can still fill their own windows: a stalled
//! stream never blocks another. What a stalled caller can make us hold is bound by its stream's window, and all of them by
//! the streams that the pool admits. A window of just that size would not do: h2 takes frames below 256 bytes that nobody
//! reads for an attack, and ends the connection once they make up too much of half its window.
//!
//! Keep-alive pings are sent only while a stream is open: etcd tolerates pings every 5 s on a connection with streams, and
//! takes offence at frequent ones on a connection without. The feed's stream is always open, so its connection is watched
//! even when nothing happens.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use hyper::{
    client::conn::{http1, http2},
    rt::Executor,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::io::InspectReader;
use tonic::Code;

use super::{body::RequestBody, endpoint::Dial, pings::PingPause, sender::Sender};
use crate::{
    signal::{Signal, SignalReader},
    socket::{Calls, Gather, NewCalls},
    status::Status,
};

/// A kind of traffic; each has connections of its own, so none waits behind another.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Health questions.
    Probe,
    /// Our own unary calls: questions for consistent reads, checks.
    Own,
    /// Clients' unary calls.
    Unary,
    /// Clients' streams, and calls that may block for long.
    Stream,
    /// A feed's list, its watch, and its questions beside them: a connection of its own for each feed.
    Feed,
    /// Short-lived watches that read history.
    CatchUp,
}

impl Class {
    pub(super) const ALL: [Class; 6] =
        [Class::Probe, Class::Own, Class::Unary, Class::Stream, Class::Feed, Class::CatchUp];

    /// The name in metrics.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Class::Probe => "probe",
            Class::Own => "own",
            Class::Unary => "unary",
            Class::Stream => "stream",
            Class::Feed => "feed",
            Class::CatchUp => "catch_up",
        }
    }

    /// Streams that one connection carries at a time.
    pub(super) const fn streams(self) -> usize {
        match self {
            Class::Probe => 16,
            Class::Own => 32,
            Class::Unary => 128,
            Class::Stream => 512,
            Class::Feed => 4,
            Class::CatchUp => 16,
        }
    }

    /// Bytes that etcd may send on a stream before we have read any.
    const fn stream_window(self) -> u32 {
        match self {
            Class::Probe => 64 << 10,
            Class::Stream => 256 << 10,
            Class::Unary => 1 << 20,
            Class::Own | Class::CatchUp => 4 << 20,
            Class::Feed => 16 << 20,
        }
    }
}

/// How connections are opened and watched.
#[derive(Clone)]
pub(super) struct Tuning {
    /// From the dial to the end of the handshake.
    pub connect_timeout: Duration,
    /// Silence on a connection with open streams after which a ping is sent.
    pub ping_pause: PingPause,
    /// How long its answer may take.
    pub keepalive_timeout: Duration,
}

/// As long as the server has told no settings.
const UNKNOWN_STREAMS: usize = 0;
const NO_PREFACE: Status =
    Status::fixed(Code::Unavailable, "connection error: desc = \"error reading server preface: EOF\"");
/// HTTP/2 has none above it.
const LARGEST_WINDOW: u32 = (1 << 31) - 1;
/// Frames of this size are accepted; etcd sends 16 KiB at most.
const MAX_FRAME: u32 = 64 << 10;
/// Response headers of this size are accepted.
const MAX_HEADERS: u32 = 1 << 20;
/// How long, and how many, cancelled streams are remembered, so that late frames for them are no surprise.
const REMEMBER_CANCELLED: Duration = Duration::from_secs(30);
const CANCELLED_STREAMS: usize = 16_384;

/// How many streams a server takes on a connection at a time; it may change its mind.
pub(super) type Streams = SignalReader<usize>;

/// Opens an HTTP/2 connection; to a server within the process, which needs none, gives the server. As with Go's gRPC library, it is
/// open when the server has told its settings: what is sent before may be more than it takes.
///
/// # Errors
/// Unavailable, in the words of Go's gRPC library.
pub(super) async fn http2(
    dial: &Arc<dyn Dial>,
    name: &str,
    class: Class,
    tuning: &Tuning,
) -> Result<(Sender, Streams), Status> {
    if let Some(server) = dial.in_process() {
        return Ok((Sender::InProcess(server), Signal::new(usize::MAX).reader()));
    }
    timeout(tuning.connect_timeout, open_http2(dial, name, class, tuning))
        .await
        .unwrap_or_else(|_| Err(cannot_dial(name, "i/o timeout")))
}

async fn open_http2(
    dial: &Arc<dyn Dial>,
    name: &str,
    class: Class,
    tuning: &Tuning,
) -> Result<(Sender, Streams), Status> {
    let calls = Calls::default();
    let executor = calls.executor();
    let gather = Gather::new(dial.dial().await.map_err(|error| cannot_dial(name, &error.to_string()))?);
    let outlet = gather.outlet();
    let hears = Arc::<AtomicWaker>::default();
    let heard = hears.clone();
    let socket = TokioIo::new(InspectReader::new(gather, move |_: &[u8]| heard.wake()));
    let ping_pause = tuning.ping_pause.clone();
    let paused = ping_pause.now();
    let handshake = builder(class, paused, tuning.keepalive_timeout, executor.clone()).handshake(socket);
    let (sender, connection) = handshake.await.map_err(|error| cannot_dial(name, &error.to_string()))?;
    let taken = Signal::new(UNKNOWN_STREAMS);
    let streams = taken.reader();
    let name = name.to_owned();
    executor.execute(async move {
        if let Err(error) = telling_streams(connection, taken, hears).await {
            tracing::debug!(endpoint = name, class = class.name(), %error, "upstream connection ended");
            ping_pause.ended(&name, paused, &error);
        }
    });
    tokio::spawn(calls.run(outlet));
    match streams.changes().wait_for(|streams| *streams != UNKNOWN_STREAMS).await {
        Ok(_) => Ok((Sender::Http2(sender), streams)),
        Err(_) => Err(NO_PREFACE),
    }
}

/// Runs `connection` to its end, and tells in `streams` how many the server takes. Requests are an occasion to look. Before the
/// first one there is none, and hyper wakes nobody when the server tells its settings, so what `hears` wakes looks then.
async fn telling_streams<S>(
    connection: http2::Connection<TokioIo<S>, RequestBody, NewCalls>,
    streams: Signal<usize>,
    hears: Arc<AtomicWaker>,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = pin!(connection);
    poll_fn(|cx| {
        if streams.now() == UNKNOWN_STREAMS {
            hears.register(cx.waker());
        }
        let polled = connection.as_mut().poll(cx);
        let now = connection.current_max_send_streams();
        if streams.now() != now {
            streams.set(now);
        }
        polled
    })
    .await
}

/// Opens an HTTP/1.1 connection, for what etcd serves beside gRPC.
///
/// # Errors
/// As [`http2()`].
pub(super) async fn http1(
    dial: &Arc<dyn Dial>,
    name: &str,
    tuning: &Tuning,
) -> Result<http1::SendRequest<RequestBody>, Status> {
    let opened = timeout(tuning.connect_timeout, async {
        let io = dial.dial().await.map_err(|error| error.to_string())?;
        http1::handshake(TokioIo::new(io)).await.map_err(|error| error.to_string())
    });
    let (sender, connection) = flatten(opened.await).map_err(|reason| cannot_dial(name, &reason))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "upstream HTTP/1.1 connection ended");
        }
    });
    Ok(sender)
}

fn builder(class: Class, ping_pause: Duration, ping_timeout: Duration, executor: NewCalls) -> http2::Builder<NewCalls> {
    let mut builder = http2::Builder::new(executor);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(class.stream_window())
        .initial_connection_window_size(LARGEST_WINDOW)
        .initial_max_send_streams(UNKNOWN_STREAMS)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(ping_pause)
        .keep_alive_timeout(ping_timeout)
        .keep_alive_while_idle(false)
        .max_concurrent_reset_streams(CANCELLED_STREAMS)
        .reset_stream_duration(REMEMBER_CANCELLED)
        .max_local_error_reset_streams(None);
    builder
}

fn flatten<T>(opened: Result<Result<T, String>, tokio::time::error::Elapsed>) -> Result<T, String> {
    opened.unwrap_or_else(|_| Err("i/o timeout".to_owned()))
}

fn cannot_dial(name: &str, reason: &str) -> Status {
    Status::unavailable(format!(
        "connection error: desc = \"transport: Error while dialing: dial tcp {name}: {reason}\""
    ))
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use ::http::{Request, Response};
    use bytes::Bytes;
    use h2::server::SendResponse;
    use http_body_util::BodyExt;

    use super::*;

    #[test]
    fn a_connection_window_holds_every_stream_window() {
        for class in Class::ALL {
            let whole = u64::from(class.stream_window()) * class.streams() as u64;
            assert!(whole <= u64::from(LARGEST_WINDOW), "{class:?}");
        }
    }

    /// About the size of an event of a small key.
    const MESSAGE: Bytes = Bytes::from_static(&[7; 90]);

    /// Answers with one small frame after the other for as long as there is room; the other stream, with one each time the
    /// room of all others is used up.
    async fn answer(path: String, mut respond: SendResponse<Bytes>) {
        let mut stream = respond.send_response(Response::new(()), false).unwrap();
        loop {
            stream.reserve_capacity(MESSAGE.len());
            while stream.capacity() < MESSAGE.len() {
                let Some(Ok(_)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
            }
            if stream.send_data(MESSAGE, false).is_err() {
                return;
            }
            if path == "/read" {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    async fn serve(socket: tokio::io::DuplexStream) {
        let mut connection = h2::server::handshake(socket).await.unwrap();
        while let Some(Ok((request, respond))) = connection.accept().await {
            tokio::spawn(answer(request.uri().path().to_owned(), respond));
        }
    }

    /// Of relays, a few whose clients do not read used to end all on the connection.
    #[tokio::test(start_paused = true)]
    async fn streams_of_small_messages_that_nobody_reads_end_no_other() {
        const CLASS: Class = Class::CatchUp;
        let (near, far) = tokio::io::duplex(1 << 20);
        tokio::spawn(serve(far));
        let second = Duration::from_secs(1);
        let (calls, gather) = (Calls::default(), Gather::new(near));
        let (executor, outlet) = (calls.executor(), gather.outlet());
        let handshake = builder(CLASS, 100 * second, second, executor.clone()).handshake(TokioIo::new(gather));
        let (mut sender, connection) = handshake.await.unwrap();
        executor.execute(async move { drop(connection.await) });
        tokio::spawn(calls.run(outlet));
        let mut bodies = Vec::new();
        for stream in 0..CLASS.streams() {
            let path = if stream == 0 { "http://a/read" } else { "http://a/left" };
            let request = Request::post(path).body(RequestBody::full(Bytes::new())).unwrap();
            bodies.push(sender.send_request(request).await.unwrap().into_body());
        }
        // The clock moves when all others have filled their windows.
        for _ in 0..10 {
            let frame = bodies[0].frame().await.unwrap();
            assert_eq!(frame.unwrap().into_data().unwrap(), MESSAGE);
        }
    }
}
