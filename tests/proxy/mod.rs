//! A proxy in the test's own process that forwards everything, and upstreams that misbehave on purpose.

#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod fake;

use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response, Version};
use millpond::{
    grpc::Incoming,
    proto::{etcdserverpb::ResponseHeader, paths::MEMBER_LIST},
    server::{
        body::Body,
        forward::forward,
        health::{HealthService, Readiness, SERVICE},
        http as http1,
        listener::{self, BoxedRequest, Connection, Handler},
        members::Members,
        observe::AnswerObserver,
    },
    upstream::{ConnectionNumber, Endpoint, EndpointId, Health, Settings, Upstream},
};
use prometheus::Registry;
use tokio::{net::TcpListener, sync::watch, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// The headers of the answers that passed.
#[derive(Default)]
pub struct Noted(pub Mutex<Vec<ResponseHeader>>);

impl AnswerObserver for Noted {
    fn answered(&self, connection: ConnectionNumber, header: ResponseHeader) {
        assert_ne!(connection, ConnectionNumber::default());
        self.0.lock().unwrap().push(header);
    }
}

/// Forwards everything but health and the member list.
pub struct Forwarding {
    pub upstream: Upstream,
    pub noted: Arc<Noted>,
    members: Members,
    health: HealthService,
}

impl Handler for Forwarding {
    async fn call(self: &Arc<Self>, connection: &Arc<Connection>, request: BoxedRequest) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let observer: Arc<dyn AnswerObserver> = self.noted.clone();
        if request.version() < Version::HTTP_2 {
            let readiness = self.health.readiness();
            return http1::call(&self.upstream, connection, &readiness, *request, Some(observer)).await;
        }
        match path.as_str() {
            MEMBER_LIST => self.members.list(&self.upstream, connection, *request).await,
            path if path.starts_with(SERVICE) => self.health.call(*request).await,
            path => {
                let observer = path.starts_with("/etcdserverpb.KV/").then_some(observer);
                forward(&self.upstream, connection, *request, observer).await
            }
        }
    }
}

/// A server on a free port; it stops with this.
pub struct Served {
    pub address: String,
    pub stop: CancellationToken,
    pub done: tokio::task::JoinHandle<()>,
    _stop: DropGuard,
}

pub async fn serve<H: Handler>(handler: Arc<H>, settings: listener::Settings) -> Served {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let stop = CancellationToken::new();
    let metrics = listener::Metrics::register(&Registry::new()).unwrap();
    let done = tokio::spawn(listener::serve(listener, handler, settings, metrics, stop.clone()));
    Served { address, stop: stop.clone(), done, _stop: stop.drop_guard() }
}

pub struct Proxy {
    pub served: Served,
    pub upstream: Upstream,
    pub noted: Arc<Noted>,
    pub readiness: watch::Sender<Readiness>,
}

pub struct Options {
    pub settings: Settings,
    pub listener: listener::Settings,
    pub advertised: Option<String>,
}

impl Options {
    pub fn new(endpoints: &[&str]) -> Self {
        let endpoints = endpoints.iter().map(|endpoint| endpoint.parse::<Endpoint>().unwrap()).collect();
        let mut settings = Settings::new(endpoints);
        settings.probe_interval = Duration::from_millis(200);
        Self { settings, listener: listener::Settings::default(), advertised: None }
    }

    pub async fn start(self) -> Proxy {
        let upstream = Upstream::start(self.settings, &Registry::new()).unwrap();
        let ready = Readiness { upstream_reachable: true, ..Readiness::default() };
        let (readiness, seen) = watch::channel(ready);
        let noted = Arc::new(Noted::default());
        let handler = Forwarding {
            upstream: upstream.clone(),
            noted: noted.clone(),
            members: Members::new(self.advertised),
            health: HealthService::new(seen, CancellationToken::new()),
        };
        let served = serve(Arc::new(handler), self.listener).await;
        Proxy { served, upstream, noted, readiness }
    }
}

impl Proxy {
    pub async fn before(endpoints: &[&str]) -> Self {
        Options::new(endpoints).start().await
    }

    pub fn address(&self) -> &str {
        &self.served.address
    }

    /// Waits until the upstream's health satisfies `wanted`.
    pub async fn until(&self, what: &str, wanted: impl FnMut(&Health) -> bool) -> Health {
        let mut health = self.upstream.health();
        let found = timeout(PATIENCE, health.wait_for(wanted)).await;
        found.unwrap_or_else(|_| panic!("{what}: {:?}", self.upstream.health().borrow())).unwrap().clone()
    }

    pub async fn until_preferred(&self, wanted: usize) {
        self.until("preference", |health| health.preferred(&[]) == Some(EndpointId(wanted))).await;
    }
}

/// A handler made of a closure.
pub struct Answering<F>(pub F);

impl<F, Fut> Handler for Answering<F>
where
    F: Fn(Request<Incoming>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Response<Body>> + Send + 'static,
{
    fn call(
        self: &Arc<Self>,
        _: &Arc<Connection>,
        request: BoxedRequest,
    ) -> impl Future<Output = Response<Body>> + Send {
        (self.0)(*request)
    }
}

/// What answers a fake upstream's probes; `None` for every other call.
pub fn probe_answer(path: &str) -> Option<Response<Body>> {
    use millpond::{
        grpc,
        proto::etcdserverpb::{Member, MemberListResponse, RangeResponse, StatusResponse},
        server::response,
    };
    let header = Some(ResponseHeader { cluster_id: 7, member_id: 8, revision: 9, raft_term: 2 });
    match path {
        "/etcdserverpb.Cluster/MemberList" => {
            let list = MemberListResponse { header, members: vec![Member { id: 8, ..Default::default() }] };
            Some(response::framed(grpc::frame(&list)))
        }
        "/etcdserverpb.Maintenance/Status" => {
            let status = StatusResponse { header, version: "3.7.1".into(), leader: 8, ..Default::default() };
            Some(response::framed(grpc::frame(&status)))
        }
        "/etcdserverpb.KV/Range" => {
            let range = RangeResponse { header, ..Default::default() };
            Some(response::framed(grpc::frame(&range)))
        }
        _ => None,
    }
}
