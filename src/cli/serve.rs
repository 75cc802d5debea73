//! `millpond serve`: settings, log, metrics and the operators' port around the proxy.

mod embedded;
mod vigil;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use http::uri::Authority;
use prometheus::Registry;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use self::embedded::Embedded;
use super::signals;
use crate::{
    cache::{self, Cache},
    config::{Config, DEFAULT_DATA_DIR},
    rules::KeyRange,
    server::{
        self,
        admin::{self, Admin, ConsistencyCheck},
        health::{HealthService, Readiness},
        kv::{self, Kv},
        leader::Leader,
        listener,
        members::Members,
        router::{Router, mind_readiness},
        watch::Watch,
    },
    sql::{self, Engine, SqlError},
    store::Limits,
    telemetry::{Telemetry, TelemetryError},
    upstream::{self, Endpoint, Upstream, UpstreamError},
};

/// Shown below the help of `serve`.
pub const EXAMPLES: &str = "\
Sizes are written like 64MiB, 1.5GB or 1048576; durations like 500ms or 1h30m.
A setting can also come from the environment (MILLPOND_HISTORY_BYTES=1GiB) or
from the settings file (history-bytes = \"1GiB\").

Examples:
  millpond serve --endpoints 127.0.0.1:2379
  millpond serve --endpoints etcd-0:2379,etcd-1:2379,etcd-2:2379 \\
      --listen :2379 --advertise-client-url http://millpond:2379
  millpond serve --endpoints 127.0.0.1:2379 --prefixes /registry/ \\
      --cache-bytes 16GiB --history-age 30m
  millpond serve --data-dir /var/lib/millpond --auto-compaction-retention 1h";

/// See [`cache::Settings::floor_patience`]. Events follow what was relayed within milliseconds. Where they do not, to ask a
/// member is quicker.
const FLOOR_PATIENCE: Duration = Duration::from_millis(100);
/// See [`cache::Settings::view_patience`]. A feed may lag for as long as a burst of events takes: to move it to another
/// member costs a proof of continuity.
const VIEW_PATIENCE: Duration = Duration::from_secs(3);

/// What stops the proxy.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The log or the metrics cannot start.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The runtime or its signal handlers cannot start.
    #[error("cannot start: {0}")]
    Runtime(#[from] io::Error),
    /// The upstream cannot be set up.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    /// The embedded store cannot be opened.
    #[error("data-dir: {0}")]
    Store(#[from] SqlError),
    /// Two parts want metrics of the same name.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// An address cannot be bound. Worth a retry once it is free.
    #[error("{setting}: cannot listen on {address}: {source}")]
    Bind {
        /// The setting with the address.
        setting: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// What would be served after that might not be true. To be started anew.
    #[error("a task that everything depends on has panicked; the log says which")]
    Panicked,
}

/// Serves until a signal asks to stop, and then for at most the grace time.
pub fn run(config: Config) -> Result<(), ServeError> {
    let telemetry = Telemetry::start(&config)?;
    let workers = config.worker_threads();
    tracing::info!(workers, busy_poll = ?vigil::patience(&config), "threads that serve");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    let grace = config.shutdown_grace;
    let outcome = runtime.block_on(async {
        let shutdown = signals::listen()?;
        within_grace(serve(config, telemetry, shutdown.clone()), shutdown, grace).await
    });
    // Whatever still runs is past its grace time.
    runtime.shutdown_background();
    outcome
}

/// Runs `serving` to its end, but no longer than `grace` after `shutdown`.
async fn within_grace(
    serving: impl Future<Output = Result<(), ServeError>>,
    shutdown: CancellationToken,
    grace: Duration,
) -> Result<(), ServeError> {
    let too_late = async {
        shutdown.cancelled().await;
        tokio::time::sleep(grace).await;
    };
    tokio::select! {
        outcome = serving => outcome,
        () = too_late => {
            tracing::warn!(?grace, "the grace time is over; what is still under way is cut off");
            Ok(())
        }
    }
}

/// Binds the listeners and serves until `shutdown`.
pub async fn serve(config: Config, telemetry: Telemetry, shutdown: CancellationToken) -> Result<(), ServeError> {
    let admin_listener = bind("admin-listen", config.admin_listen).await?;
    let listener = bind("listen", config.listen).await?;
    if let Err(error) = listener::raise_open_file_limit() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let (readiness, ready) = watch::channel(Readiness { reason: "starting".to_owned(), ..Readiness::default() });
    let registry = telemetry.registry.clone();
    let embedded = embedded_store(&config, listener.local_addr().ok(), &registry)?;
    let upstream = Upstream::start(upstream_settings(&config, embedded.as_ref()), &registry)?;
    let awake = vigil::metric(&registry)?;
    let _vigil = vigil::patience(&config)
        .map(|patience| AbortOnDropHandle::new(tokio::spawn(vigil::keep(upstream.unary_under_way(), patience, awake))));
    let cache = Cache::start(upstream.clone(), cache_settings(&config), &registry)?;
    let check = Some(Arc::new(cache.clone()) as Arc<dyn ConsistencyCheck>);
    let admin = Admin { readiness: ready.clone(), registry: registry.clone(), check };
    let admin = tokio::spawn(admin::serve(admin_listener, admin, shutdown.clone()));
    let minding = tokio::spawn(mind_readiness(cache.clone(), readiness, shutdown.clone()));
    let router = Arc::new(router(&config, cache.clone(), ready, &registry, &shutdown)?);
    let metrics = listener::Metrics::register(&registry)?;
    tokio::select! {
        () = listener::serve(listener, router, listener_settings(&config), metrics, shutdown) => {}
        () = cache.failed() => return Err(ServeError::Panicked),
    }
    // Both end with the same token.
    let _ = tokio::join!(admin, minding);
    if let Some(embedded) = embedded {
        embedded.close().await;
    }
    Ok(())
}

/// The store within the process, when no endpoints are given.
fn embedded_store(
    config: &Config,
    listening: Option<SocketAddr>,
    registry: &Registry,
) -> Result<Option<Engine>, ServeError> {
    if !config.is_embedded() {
        return Ok(None);
    }
    let dir = config.data_dir.clone().unwrap_or_else(|| DEFAULT_DATA_DIR.into());
    let listening = listening.map(|address| format!("http://{address}"));
    let options = sql::Options {
        quota_bytes: i64::try_from(config.quota_bytes()).unwrap_or(i64::MAX),
        max_request_bytes: config.max_request_bytes as usize,
        progress_interval: config.progress_interval,
        auto_compaction: config.auto_compaction(),
        client_urls: config.advertise_client_url.clone().or(listening).into_iter().collect(),
        metrics: sql::Metrics::register(registry)?,
        ..sql::Options::default()
    };
    Ok(Some(Engine::open(&dir, options)?))
}

fn router(
    config: &Config,
    cache: Cache,
    ready: watch::Receiver<Readiness>,
    registry: &Registry,
    shutdown: &CancellationToken,
) -> Result<Router, ServeError> {
    let max_request_bytes = config.max_request_bytes as usize;
    let watch_settings = server::watch::Settings {
        max_request_bytes,
        progress_interval: config.progress_interval,
        catch_up_limit: config.catch_up_limit,
        stream_limit: config.forward_stream_limit,
    };
    let kv_settings =
        kv::Settings { max_request_bytes, max_response_bytes: config.max_response_bytes.unwrap_or(u64::MAX) };
    let leader = Leader::start(cache.upstream(), shutdown.clone());
    let watch_metrics = server::watch::Metrics::register(registry)?;
    Ok(Router {
        kv: Kv::new(cache.clone(), kv_settings, kv::Metrics::register(registry)?, leader.clone()),
        watch: Watch::new(cache.clone(), watch_settings, watch_metrics, leader, shutdown.clone()),
        members: match config.is_embedded() {
            true => Members::embedded(),
            false => Members::new(config.advertise_client_url.clone()),
        },
        health: HealthService::new(ready, shutdown.clone()),
        cache,
    })
}

fn upstream_settings(config: &Config, embedded: Option<&Engine>) -> upstream::Settings {
    let endpoints = match embedded.cloned() {
        Some(engine) => {
            let dial = Arc::new(Embedded::new(engine));
            vec![Endpoint::InProcess { name: Authority::from_static("embedded"), dial }]
        }
        None => config.endpoints.iter().cloned().map(|authority| Endpoint::Tcp { authority }).collect(),
    };
    upstream::Settings {
        connect_timeout: config.connect_timeout,
        keepalive_interval: config.upstream_keepalive_interval,
        keepalive_timeout: config.upstream_keepalive_timeout,
        forward_limit: config.forward_limit,
        stream_limit: config.forward_stream_limit,
        ..upstream::Settings::new(endpoints)
    }
}

fn cache_settings(config: &Config) -> cache::Settings {
    let prefix = |prefix: &String| KeyRange::prefix(prefix.clone().into());
    let prefixes: Vec<_> = config.prefixes.iter().map(prefix).collect();
    cache::Settings {
        prefixes: if prefixes.is_empty() { vec![KeyRange::everything()] } else { prefixes },
        cache_bytes: config.cache_bytes as usize,
        history: Limits {
            bytes: config.history_bytes as usize,
            age: config.history_age.as_millis().try_into().unwrap_or(u64::MAX),
        },
        floor_patience: FLOOR_PATIENCE,
        view_patience: VIEW_PATIENCE,
        consensus_patience: config.read_timeout,
        check_interval: config.check_interval,
    }
}

fn listener_settings(config: &Config) -> listener::Settings {
    listener::Settings {
        keepalive_interval: config.grpc_keepalive_interval,
        keepalive_timeout: config.grpc_keepalive_timeout,
        grace: config.shutdown_grace,
    }
}

/// Binds an address and logs where that turned out to be, since port 0 means any free one.
async fn bind(setting: &'static str, address: SocketAddr) -> Result<TcpListener, ServeError> {
    let failed = |source| ServeError::Bind { setting, address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    tracing::info!(setting, address = %bound, "listening");
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn serving_is_cut_off_after_the_grace_time() {
        let shutdown = CancellationToken::new();
        let serving = within_grace(std::future::pending(), shutdown.clone(), Duration::from_millis(1));
        let (outcome, ()) = tokio::join!(serving, async { shutdown.cancel() });
        assert!(outcome.is_ok());
    }
}
