//! The Watch service. A stream is one body without a task of its own: the connection asks it for bytes when it has room,
//! and it reads requests, takes events from its session and starts relays while it is asked.

mod lineage;
mod relay;
mod stream;

use std::{sync::Arc, time::Duration};

use ::http::{Request, Response};
use prometheus::{IntCounter, IntGauge, Registry};
use tokio::{
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    body::Body, forward::forward, kv::forwarded_observer, leader::Leader, listener::Connection, metadata, response,
};
use crate::{
    cache::Cache,
    fanout::{Hub, SessionSettings},
    grpc::{Compression, Incoming, largest_message},
    status::Status,
    upstream::AuthState,
};
use stream::Stream;

/// How long a stream waits at its opening for the first probes to say whether authentication is on.
const PATIENCE: Duration = Duration::from_secs(5);
/// When authentication is off, forwarded streams end within this time: not all at once, or all would come back at once.
const LONGEST_FAREWELL: Duration = Duration::from_secs(5);

/// What the service is told.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The largest request, in bytes; a fragment is at most as large, and what etcd's gRPC layer allows on top.
    pub max_request_bytes: usize,
    /// Between two progress notifications to a quiet watcher.
    pub progress_interval: Duration,
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
        SessionSettings { fragment_bytes: largest_message(self.settings.max_request_bytes) }
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
        let is_settled = |auth: &AuthState| matches!(auth, AuthState::Off | AuthState::On);
        let _ = timeout(PATIENCE, auth.wait_for(is_settled)).await;
        let auth_now = *auth.borrow_and_update();
        match auth_now {
            AuthState::Off => self.open(request).await,
            AuthState::Changing | AuthState::On => Box::pin(self.forward(connection, request, auth)).await,
            AuthState::Unknown => response::error(&Status::unavailable("the upstream has not answered yet")),
        }
    }

    /// Forwards the call, for as long as authentication is not off: then the client is to come back, and be served from the cache.
    async fn forward(
        &self,
        connection: &Connection,
        request: Request<Incoming>,
        mut auth: watch::Receiver<AuthState>,
    ) -> Response<Body> {
        let observer = Some(forwarded_observer(&self.shared.cache));
        let answer = forward(self.shared.cache.upstream(), connection, request, observer).await;
        let stop = connection.stop().clone();
        let off = async move {
            // An error is the end of the upstream.
            drop(auth.wait_for(|auth| *auth == AuthState::Off).await);
            sleep(rand::random_range(Duration::ZERO..LONGEST_FAREWELL)).await;
        };
        let end = async move {
            let _ = stop.run_until_cancelled_owned(off).await;
        };
        answer.map(|body| body.until(Some(end)))
    }

    async fn open(&self, request: Request<Incoming>) -> Response<Body> {
        if let Err(status) = metadata::check_version(request.headers()) {
            return response::error(&status);
        }
        let end = if metadata::asks_for_leader(request.headers()) {
            self.shared.leader.reign().await
        } else {
            Ok(self.shared.stop.clone())
        };
        let compression =
            Compression::named(request.headers(), largest_message(self.shared.settings.max_request_bytes));
        match compression.and_then(|compression| Ok((compression, end?))) {
            Ok((compression, end)) => {
                let stream = Stream::new(self.shared.clone(), request.into_body(), compression, end);
                response::streaming(Body::boxed(stream))
            }
            Err(status) => response::error(&status),
        }
    }
}
