//! Accepts connections and serves HTTP/2 and HTTP/1.1 on them, as etcd's client port does.
//!
//! A stop goes in steps: no more connections; every connection is told to go (GOAWAY), and calls under way go on; after the
//! grace time the rest is closed.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use ::http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{IntCounter, IntGauge, Registry};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{body::Body, data::Data, http2};
use crate::{
    grpc::{BodyError, Incoming},
    socket::{Calls, Gather, Outlet, Protocol, detect_dead_peer},
    upstream::EndpointId,
};

/// For the head of an HTTP/1.1 request, once it has begun.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How connections are watched and let go.
#[derive(Copy, Clone, Debug)]
pub struct Settings {
    /// Silence after which a client is pinged; etcd's `--grpc-keepalive-interval`.
    pub keepalive_interval: Duration,
    /// How long an answer, or the acknowledgement of sent bytes, may take; etcd's `--grpc-keepalive-timeout`.
    pub keepalive_timeout: Duration,
    /// How long calls under way may go on after a stop.
    pub grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            keepalive_interval: Duration::from_secs(2 * 3600),
            keepalive_timeout: Duration::from_secs(20),
            grace: Duration::from_secs(10),
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    #[error(transparent)]
    Http2(#[from] h2::Error),
    #[error("the client is silent")]
    Silent,
}

/// A connection that is being served: over when its protocol is. That goes first then, and what is left of the calls after it.
struct Serving<'a> {
    /// In a box: an idle connection keeps no room for the protocol that it does not speak.
    protocol: Pin<Box<dyn Future<Output = Result<(), Ended>> + Send + 'a>>,
    outlet: Outlet<TcpStream>,
    calls: Calls,
}

impl Future for Serving<'_> {
    type Output = Result<(), Ended>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { protocol, outlet, calls } = self.get_mut();
        calls.poll(cx, outlet, protocol.as_mut())
    }
}

/// How a connection is sent away.
#[derive(Clone, Default)]
pub(super) struct Farewell {
    /// The client is told to go; calls under way go on.
    pub(super) leave: CancellationToken,
    /// Whatever is left is closed. Comes after the other, and is looked at only then: all connections share it.
    pub(super) close: CancellationToken,
}

/// What the listener counts. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    connections: IntGauge,
    accepted: IntCounter,
    accept_errors: IntCounter,
    streams: IntGauge,
}

impl Metrics {
    /// Registers the listener's metrics.
    ///
    /// # Errors
    /// When metrics of these names are registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            connections: IntGauge::new("millpond_server_connections", "Open client connections.")?,
            accepted: IntCounter::new("millpond_server_accepted_total", "Client connections accepted.")?,
            accept_errors: IntCounter::new("millpond_server_accept_errors_total", "Connections not accepted.")?,
            streams: IntGauge::new("millpond_server_streams", "Client calls and streams under way.")?,
        };
        registry.register(Box::new(metrics.connections.clone()))?;
        registry.register(Box::new(metrics.accepted.clone()))?;
        registry.register(Box::new(metrics.accept_errors.clone()))?;
        registry.register(Box::new(metrics.streams.clone()))?;
        Ok(metrics)
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    /// The client's address.
    pub peer: SocketAddr,
    /// The member that this client's member-bound calls go to, once there was one.
    pub member: OnceLock<EndpointId>,
    leave: CancellationToken,
    stop: CancellationToken,
}

impl Connection {
    /// A connection from `peer` to a server that leaves when `stop` is cancelled.
    pub fn new(peer: SocketAddr, stop: CancellationToken) -> Self {
        Self { peer, member: OnceLock::new(), leave: stop.child_token(), stop }
    }

    /// Cancelled when the server leaves: streams that do not end by themselves have to.
    pub fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// Asks the client to open another connection; calls under way go on.
    pub fn retire(&self) {
        self.leave.cancel();
    }
}

/// A client's call, boxed: each of the futures that it is handed through keeps room for it.
pub type BoxedRequest = Box<Request<Incoming>>;

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. Dropped when the client cancels before the answer begins.
    fn call(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        request: BoxedRequest,
    ) -> impl Future<Output = Response<Body>> + Send;
}

/// Raises the limit of open files to the highest allowed and logs it: each client connection is one. Returns the limit.
///
/// # Errors
/// When the system refuses.
pub fn raise_open_file_limit() -> io::Result<Option<u64>> {
    let mut limit = getrlimit(Resource::Nofile);
    let was = limit.current;
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)?;
    let current = getrlimit(Resource::Nofile).current;
    tracing::info!(was, is = current, "open file limit");
    Ok(current)
}

/// Serves until `stop` is cancelled, and then until every connection is gone or the grace time is over.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    handler: Arc<H>,
    settings: Settings,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let server = Arc::new(Server { handler, settings, metrics, close: CancellationToken::new() });
    let connections = TaskTracker::new();
    let accepting = accept_all(&server, &listener, &connections, &stop);
    stop.run_until_cancelled(accepting).await;
    drop(listener);
    connections.close();
    if timeout(settings.grace, connections.wait()).await.is_err() {
        tracing::info!(connections = connections.len(), "grace time is over, closing what is left");
        server.close.cancel();
        connections.wait().await;
    }
}

struct Server<H> {
    handler: Arc<H>,
    settings: Settings,
    metrics: Metrics,
    /// The end of the grace time.
    close: CancellationToken,
}

async fn accept_all<H: Handler>(
    server: &Arc<Server<H>>,
    listener: &TcpListener,
    connections: &TaskTracker,
    stop: &CancellationToken,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                connections.spawn(server.clone().serve_connection(stream, peer, stop.clone()));
            }
            Err(error) if concerns_one_connection(&error) => server.metrics.accept_errors.inc(),
            Err(error) => {
                server.metrics.accept_errors.inc();
                tracing::warn!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Whether an error of accept(2) tells about the connection that was to be accepted, not about the listener.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkDown, NetworkUnreachable,
    };
    let kinds =
        [ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkDown, NetworkUnreachable];
    kinds.contains(&error.kind())
}

impl<H: Handler> Server<H> {
    /// Serves an accepted connection until it ends. What comes before the future is not kept in it.
    fn serve_connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "cannot send small answers at once: the connection is gone already");
        }
        detect_dead_peer(&stream, self.settings.keepalive_timeout);
        self.metrics.accepted.inc();
        let open = Counted::new(&self.metrics.connections);
        let connection = Arc::new(Connection::new(peer, stop));
        let greeting = Gather::accept(stream);
        async move {
            let _open = open;
            let (gather, protocol) = match connection.leave.run_until_cancelled(greeting).await {
                Some(Ok(Some(opened))) => opened,
                Some(Ok(None)) | None => return,
                Some(Err(error)) => {
                    tracing::debug!(peer = %connection.peer, %error, "connection ended before it began");
                    return;
                }
            };
            if let Err(error) = self.serving(&connection, gather, protocol).await {
                tracing::debug!(peer = %connection.peer, %error, "connection ended");
            }
        }
    }

    /// What serves a connection whose protocol is known.
    fn serving<'a>(
        self: &'a Arc<Self>,
        connection: &'a Arc<Connection>,
        gather: Gather<TcpStream>,
        protocol: Protocol,
    ) -> Serving<'a> {
        let calls = Calls::default();
        let (outlet, executor) = (gather.outlet(), calls.executor());
        let farewell = Farewell { leave: connection.leave.clone(), close: self.close.clone() };
        let answer = |request| self.clone().answer(connection.clone(), Box::new(request));
        let protocol: Pin<Box<dyn Future<Output = _> + Send>> = match protocol {
            Protocol::Http1 => Box::pin(serve_http1(gather, farewell, answer)),
            Protocol::Http2 => Box::pin(http2::serve(gather, &self.settings, executor, farewell, answer)),
        };
        Serving { protocol, outlet, calls }
    }

    async fn answer(self: Arc<Self>, connection: Arc<Connection>, request: BoxedRequest) -> Response<CountedBody> {
        let open = Counted::new(&self.metrics.streams);
        let response = self.handler.call(&connection, request).await;
        response.map(|body| CountedBody { body, _open: open })
    }
}

async fn serve_http1<A, F>(socket: Gather<TcpStream>, farewell: Farewell, answer: A) -> Result<(), Ended>
where
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<CountedBody>>,
{
    let service = service_fn(|request: Request<_>| {
        let answered = answer(request.map(Incoming::Http1));
        async move { Ok::<_, Infallible>(answered.await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).half_close(true);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let mut served = farewell.leave.run_until_cancelled(serving.as_mut()).await;
    if served.is_none() {
        serving.as_mut().graceful_shutdown();
        served = farewell.close.run_until_cancelled(serving).await;
    }
    Ok(served.unwrap_or(Ok(()))?)
}

/// Counts as long as it lives.
pub(super) struct Counted(IntGauge);

impl Counted {
    pub(super) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A body whose call counts as under way until it is dropped.
struct CountedBody {
    body: Body,
    _open: Counted,
}

impl HttpBody for CountedBody {
    type Data = Data;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Data>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
