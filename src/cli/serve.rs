//! `millpond serve`: settings, log, metrics and the operators' port around the proxy.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use super::signals;
use crate::{
    config::Config,
    server::admin::{self, Admin, Readiness},
    telemetry::{Telemetry, TelemetryError},
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

/// What stops the proxy.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The log or the metrics cannot start.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// The runtime or its signal handlers cannot start.
    #[error("cannot start: {0}")]
    Runtime(#[from] io::Error),
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
}

/// Serves until a signal asks to stop, and then for at most the grace time.
pub fn run(config: Config) -> Result<(), ServeError> {
    let telemetry = Telemetry::start(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
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
    let listener = bind("admin-listen", config.admin_listen).await?;
    let (_readiness, receiver) = watch::channel(Readiness { reason: "starting".to_owned(), ..Readiness::default() });
    let admin = Admin { readiness: receiver, registry: telemetry.registry, check: None };
    admin::serve(listener, admin, shutdown).await;
    Ok(())
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
