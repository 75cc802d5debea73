//! The Watch service. A stream is one body without a task of its own: the connection asks it for bytes when it has room,
//! and it reads requests, takes events from its session and starts relays while it is asked.

mod lineage;
mod relay;
mod stream;

use std::sync::Arc;

use ::http::{Request, Response};
use prometheus::{IntCounter, IntGauge, Registry};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{body::Body, forward::forward, leader::Leader, listener::Connection, response};
use crate::{
    cache::Cache,
    fanout::{Hub, SessionSettings},
    status::Status,
    upstream::{AuthState, Incoming, grpc::Compression},
};
use stream::Stream;

/// The path of the only method.
pub const PATH: &str = "/etcdserverpb.Watch/Watch";
/// How long a stream waits at its opening for the first probes to say whether authentication is on.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

/// What the service is told.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The largest request, in bytes; a fragment is at most as large, and what etcd's gRPC layer allows on top.
    pub max_request_bytes: usize,
    /// Between two progress notifications to a quiet watcher.
    pub progress_interval: std::time::Duration,
    /// Upstream watches under way at once for watchers that begin before the history window.
    pub catch_up_limit: usize,
    /// Upstream watches under way at once for ranges that are not cached.
    pub stream_limit: usize,
}

/// What the service counts.
#[derive(Clone)]
pub struct Metrics {
    streams: IntGauge,
    watchers: IntGauge,
    relays: IntGauge,
    bytes: IntCounter,
}

impl Metrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            streams: IntGauge::new("millpond_server_watch_streams", "Open Watch streams answered from the cache.")?,
            watchers: IntGauge::new("millpond_server_watchers", "Watchers on them.")?,
            relays: IntGauge::new("millpond_server_watch_relays", "Watchers relayed from the upstream for now.")?,
            bytes: IntCounter::new("millpond_server_watch_bytes_total", "Bytes sent on Watch streams.")?,
        };
        registry.register(Box::new(metrics.streams.clone()))?;
        registry.register(Box::new(metrics.watchers.clone()))?;
        registry.register(Box::new(metrics.relays.clone()))?;
        registry.register(Box::new(metrics.bytes.clone()))?;
        Ok(metrics)
    }
}

/// The Watch service.
pub struct Watch {
    shared: Arc<Shared>,
}

/// What all streams have in common.
struct Shared {
    cache: Cache,
    hubs: Arc<[Arc<Hub>]>,
    settings: Settings,
    metrics: Metrics,
    leader: Leader,
    stop: CancellationToken,
    catch_up: Arc<Semaphore>,
    uncached: Arc<Semaphore>,
}

impl Shared {
    fn session_settings(&self) -> SessionSettings {
        SessionSettings { fragment_bytes: self.settings.max_request_bytes + (512 << 10) }
    }
}

impl Watch {
    /// The service on `cache`. Streams end with Unavailable when `stop` is cancelled, so that clients resume elsewhere.
    pub fn new(cache: Cache, settings: Settings, metrics: Metrics, leader: Leader, stop: CancellationToken) -> Self {
        let hubs = cache.prefixes().iter().map(|prefix| prefix.hub().clone()).collect();
        let catch_up = Arc::new(Semaphore::new(settings.catch_up_limit));
        let uncached = Arc::new(Semaphore::new(settings.stream_limit));
        Self { shared: Arc::new(Shared { cache, hubs, settings, metrics, leader, stop, catch_up, uncached }) }
    }

    /// Answers a Watch call. While authentication is on, all of it is the upstream's.
    pub async fn call(&self, connection: &Connection, request: Request<Incoming>) -> Response<Body> {
        let mut auth = self.shared.cache.upstream().auth().changes();
        let known = timeout(PATIENCE, auth.wait_for(|auth| *auth != AuthState::Unknown)).await;
        match known.map(|known| known.map(|auth| *auth)) {
            Ok(Ok(AuthState::Off)) => self.open(request).await,
            Ok(Ok(_)) => forward(self.shared.cache.upstream(), connection, request, None).await,
            _ => response::error(&Status::unavailable("the upstream has not answered yet")),
        }
    }

    async fn open(&self, request: Request<Incoming>) -> Response<Body> {
        let asks_for_leader = request.headers().get("hasleader").is_some_and(|value| value == "true");
        let end = if asks_for_leader { self.shared.leader.reign().await } else { Ok(self.shared.stop.clone()) };
        let compression = Compression::named(request.headers(), self.shared.settings.max_request_bytes + (512 << 10));
        match compression.and_then(|compression| Ok((compression, end?))) {
            Ok((compression, end)) => {
                let stream = Stream::new(self.shared.clone(), request.into_body(), compression, end);
                response::streaming(Body::boxed(stream))
            }
            Err(status) => response::error(&status),
        }
    }
}
