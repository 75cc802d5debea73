//! Which room answers a request.

use std::{sync::Arc, time::Duration};

use ::http::{Request, Response, Version};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    body::Body,
    forward::{forward, whole},
    health::{self, HealthService, Readiness},
    http,
    kv::{self, Kv, forwarded_observer},
    listener::{BoxedRequest, Connection, Handler},
    members::Members,
    precheck, response,
    watch::Watch,
};
use crate::{cache::Cache, feed::Phase, grpc::Incoming, proto::paths};

/// Answers every request of the client port.
pub struct Router {
    /// The cache, and the upstream behind it.
    pub cache: Cache,
    /// The KV service.
    pub kv: Kv,
    /// The Watch service.
    pub watch: Watch,
    /// MemberList.
    pub members: Members,
    /// The health service.
    pub health: HealthService,
}

impl Handler for Router {
    async fn call(self: &Arc<Self>, connection: &Arc<Connection>, request: BoxedRequest) -> Response<Body> {
        // A stream keeps the room that its call's future takes for as long as it lives, so only reads have theirs in place.
        if request.version() < Version::HTTP_2 {
            let observer = Some(forwarded_observer(&self.cache));
            let readiness = self.health.readiness();
            return Box::pin(http::call(self.cache.upstream(), connection, &readiness, *request, observer)).await;
        }
        if let Some(refusal) = precheck::refusal(&request) {
            return refusal;
        }
        match request.uri().path() {
            path if path.starts_with(kv::SERVICE) => self.kv.call(connection, request).await,
            paths::WATCH => Box::pin(self.watch.call(connection, *request)).await,
            path if path.starts_with(health::SERVICE) => Box::pin(self.health.call(*request)).await,
            _ => Box::pin(self.forward(connection, *request)).await,
        }
    }
}

impl Router {
    /// Has etcd answer.
    async fn forward(&self, connection: &Connection, request: Request<Incoming>) -> Response<Body> {
        let request = match whole(request, self.kv.longest_request()).await {
            Ok(request) => request,
            Err(status) => return response::error(&status),
        };
        let upstream = self.cache.upstream();
        match request.uri().path() {
            paths::MEMBER_LIST => self.members.list(upstream, connection, request).await,
            path => {
                let observer = tells_revisions(path).then(|| forwarded_observer(&self.cache));
                forward(upstream, connection, request, observer).await
            }
        }
    }
}

/// Whether answers of a service outside KV tell revisions: then their clients must find what these have.
fn tells_revisions(path: &str) -> bool {
    const SERVICES: [&str; 5] = [
        "/etcdserverpb.Lease/",
        "/v3lockpb.Lock/",
        "/v3electionpb.Election/",
        "/etcdserverpb.Maintenance/",
        "/etcdserverpb.Auth/",
    ];
    SERVICES.iter().any(|service| path.starts_with(service))
}

/// How often readiness is looked at while nothing signals a change.
const LOOK: Duration = Duration::from_millis(500);

/// Keeps `readiness` true until `stop` is cancelled.
pub async fn mind_readiness(cache: Cache, readiness: watch::Sender<Readiness>, stop: CancellationToken) {
    let mut health = cache.upstream().health();
    let mut phases: Vec<_> = cache.prefixes().iter().map(|prefix| prefix.phases()).collect();
    loop {
        let now = readiness_of(&cache);
        readiness.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
        let phase_changed = futures_util::future::select_all(phases.iter_mut().map(|phase| Box::pin(phase.changed())));
        tokio::select! {
            () = stop.cancelled() => return,
            Ok(()) = health.changed() => {}
            (Ok(()), ..) = phase_changed => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn readiness_of(cache: &Cache) -> Readiness {
    let upstream_reachable = cache.upstream().health().borrow().reachable;
    let cache_warm = cache.is_open() && cache.is_warm();
    let phases: Vec<_> = cache.prefixes().iter().map(|prefix| name(prefix.phase())).collect();
    let reason = if cache_warm { String::new() } else { format!("the cache is {}", phases.join(", ")) };
    Readiness { cache_warm, upstream_reachable, reason }
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Cold => "warming up",
        Phase::Live => "live",
        Phase::Lost(_) => "without its upstream",
        Phase::Proving => "proving that its state is the upstream's",
        Phase::Barred => "off while authentication is on",
    }
}
