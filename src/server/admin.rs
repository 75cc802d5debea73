//! The operators' port: health, readiness, metrics, and a consistency check on demand. Plain HTTP/1.1 on a listener of its own,
//! so that it answers when the clients' port is busy.
//!
//! `/health`, `/livez` and `/readyz` answer in etcd's forms. `?verbose` lists each part on a line of its own.

use std::{io, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::future::BoxFuture;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use prometheus::{Registry, TextEncoder};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tokio_util::sync::CancellationToken;

pub use super::health::Readiness;
use crate::cache::{Cache, CheckReport};

/// Connections at a time: far more than probes and scrapers need, few enough to cost nothing.
const MAX_CONNECTIONS: usize = 256;

/// How long a client may take to send a request's head, also on an idle kept-alive connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);

/// How long answers under way may take once the process stops.
const DRAIN: Duration = Duration::from_secs(2);

/// Pause after a failed accept, so that running out of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Compares the cache with the upstream when an operator asks.
pub trait ConsistencyCheck: Send + Sync {
    /// Runs one check to its end. The error says why it could not be run, in a sentence for the operator.
    fn check(&self) -> BoxFuture<'_, Result<CheckReport, String>>;
}

impl ConsistencyCheck for Cache {
    fn check(&self) -> BoxFuture<'_, Result<CheckReport, String>> {
        Box::pin(async { Cache::check(self).await.map_err(|error| error.to_string()) })
    }
}

/// What the port shows.
#[derive(Clone)]
pub struct Admin {
    /// Changes as the cache and the upstream come and go.
    pub readiness: watch::Receiver<Readiness>,
    /// What `/metrics` shows.
    pub registry: Registry,
    /// What `POST /check` runs. None: there is no cache to check.
    pub check: Option<Arc<dyn ConsistencyCheck>>,
}

struct Shared {
    admin: Admin,
    /// One check at a time: each reads the whole keyspace upstream.
    checking: Semaphore,
}

/// Serves until `shutdown`, then lets answers under way finish.
pub async fn serve(listener: TcpListener, admin: Admin, shutdown: CancellationToken) {
    let router = router(admin);
    let graceful = GracefulShutdown::new();
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Some((socket, permit)) = accept(&listener, &connections, &shutdown).await {
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(socket), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "admin connection failed");
            }
            drop(permit);
        });
    }
    let _ = tokio::time::timeout(DRAIN, graceful.shutdown()).await;
}

/// The next connection, once there is room for it; None at shutdown.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
    shutdown: &CancellationToken,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let accepted = async {
        let permit = Arc::clone(connections).acquire_owned().await.ok()?;
        loop {
            match listener.accept().await {
                Ok((socket, _)) => return Some((socket, permit)),
                Err(error) => log_accept_error(&error).await,
            }
        }
    };
    shutdown.run_until_cancelled(accepted).await.flatten()
}

async fn log_accept_error(error: &io::Error) {
    tracing::warn!(%error, "admin port cannot accept a connection");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .route("/check", post(check))
        .with_state(Arc::new(Shared { admin, checking: Semaphore::new(1) }))
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let readiness = shared.admin.readiness.borrow().clone();
    let code = status(readiness.is_ready());
    let body = json!({
        "health": readiness.is_ready().to_string(),
        "reason": readiness.reason,
        "cache_warm": readiness.cache_warm,
        "upstream_reachable": readiness.upstream_reachable,
    });
    json_response(code, &body)
}

async fn livez(RawQuery(query): RawQuery) -> String {
    if is_verbose(query.as_deref()) { "[+]process ok\nok\n".to_owned() } else { "ok\n".to_owned() }
}

async fn readyz(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> (StatusCode, String) {
    let readiness = shared.admin.readiness.borrow().clone();
    let ready = readiness.is_ready();
    let mut text = String::new();
    if !ready || is_verbose(query.as_deref()) {
        text += &part("cache", readiness.cache_warm, &readiness.reason);
        text += &part("upstream", readiness.upstream_reachable, &readiness.reason);
    }
    text += if ready { "ok\n" } else { "not ready\n" };
    (status(ready), text)
}

fn part(name: &str, ok: bool, reason: &str) -> String {
    if ok { format!("[+]{name} ok\n") } else { format!("[-]{name} failed: {reason}\n") }
}

fn status(ready: bool) -> StatusCode {
    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn is_verbose(query: Option<&str>) -> bool {
    query.is_some_and(|query| query.split('&').any(|pair| pair.split('=').next() == Some("verbose")))
}

async fn version() -> Response {
    json_response(StatusCode::OK, &json!({ "millpond": env!("CARGO_PKG_VERSION") }))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    match TextEncoder::new().encode_to_string(&shared.admin.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics cannot be encoded: {error}\n")).into_response()
        }
    }
}

async fn check(State(shared): State<Arc<Shared>>) -> Response {
    let Some(check) = &shared.admin.check else {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "there is no cache to check");
    };
    let Ok(_permit) = shared.checking.try_acquire() else {
        return problem(StatusCode::CONFLICT, "a check is running already");
    };
    match check.check().await {
        Ok(report) => json_response(StatusCode::OK, &json!(report)),
        Err(reason) => problem(StatusCode::SERVICE_UNAVAILABLE, &reason),
    }
}

fn problem(code: StatusCode, reason: &str) -> Response {
    json_response(code, &json!({ "error": reason }))
}

fn json_response(code: StatusCode, body: &serde_json::Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

#[cfg(test)]
mod tests;
