//! A server within the process is handed requests as calls: no stream of bytes is opened for them, and they are answered,
//! streamed, cancelled and timed out as over a connection.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::Request;
use millpond::{
    grpc,
    proto::{
        etcdserverpb::{
            PutRequest, PutResponse, RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse,
            watch_request::RequestUnion,
        },
        v3lockpb::{LockRequest, LockResponse},
    },
    sql::{Engine, Options},
    upstream::{
        Dial, DialFuture, Endpoint, EndpointId, ForwardClass, RequestBody, Route, Serve, ServeFuture, Settings,
        Upstream,
    },
};
use prometheus::Registry;
use prost::Message;
use tempfile::TempDir;
use tonic::{Code, codegen::Service, service::Routes};

const AT: EndpointId = EndpointId(0);
const PATIENCE: Duration = Duration::from_secs(30);
const PUT: &str = "/etcdserverpb.KV/Put";
const LOCK: &str = "/v3lockpb.Lock/Lock";

/// An engine's gRPC face, and how often it was dialled all the same.
#[derive(Clone)]
struct Within {
    routes: Routes,
    dialled: Arc<AtomicUsize>,
}

impl Dial for Within {
    fn dial(&self) -> DialFuture<'_> {
        self.dialled.fetch_add(1, Ordering::Relaxed);
        Box::pin(std::future::ready(Err(io::ErrorKind::ConnectionRefused.into())))
    }

    fn in_process(&self) -> Option<Arc<dyn Serve>> {
        Some(Arc::new(self.clone()))
    }
}

impl Serve for Within {
    fn serve(&self, request: Request<RequestBody>) -> ServeFuture {
        let mut routes = self.routes.clone();
        Box::pin(async move { routes.call(request).await.unwrap_or_else(|never| match never {}) })
    }
}

async fn started(home: &TempDir) -> (Engine, Upstream, Arc<AtomicUsize>) {
    let engine = Engine::open(home.path(), Options::default()).unwrap();
    let within = Within { routes: engine.routes().prepare(), dialled: Arc::default() };
    let dialled = within.dialled.clone();
    let settings =
        Settings::new(vec![Endpoint::InProcess { name: "embedded".parse().unwrap(), dial: Arc::new(within) }]);
    let upstream = Upstream::start(settings, &Registry::new()).unwrap();
    assert_eq!(upstream.await_preferred(&[], PATIENCE).await, Some(AT));
    (engine, upstream, dialled)
}

fn put(key: &str) -> PutRequest {
    PutRequest { key: key.to_owned().into(), value: "v".into(), ..Default::default() }
}

#[tokio::test]
async fn calls_and_streams_need_no_connection() {
    let home = TempDir::new().unwrap();
    let (engine, upstream, dialled) = started(&home).await;
    let create = WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), ..Default::default() };
    let watch = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    let (sender, mut receiver) = upstream.open_catch_up::<WatchRequest>(AT, "/etcdserverpb.Watch/Watch").await.unwrap();
    // More than a stream's outbox holds, so they move before anyone looks for an answer.
    for _ in 0..40 {
        sender.send(&watch).await.unwrap();
    }
    for number in 0..40 {
        let created = WatchResponse::decode(receiver.next().await.unwrap().unwrap()).unwrap();
        assert!(created.created && created.watch_id == number);
    }
    let done: PutResponse = upstream.unary(AT, PUT, &put("a"), PATIENCE).await.unwrap();
    let request = RangeRequest { key: "a".into(), ..Default::default() };
    let found: RangeResponse = upstream.unary(AT, "/etcdserverpb.KV/Range", &request, PATIENCE).await.unwrap();
    assert_eq!((found.count, found.header.unwrap().revision), (1, done.header.unwrap().revision));
    let event = WatchResponse::decode(receiver.next().await.unwrap().unwrap()).unwrap();
    assert_eq!(event.events.len(), 1);
    let refused = upstream.unary::<_, PutResponse>(AT, PUT, &put(""), PATIENCE).await.unwrap_err();
    assert_eq!((refused.code, &refused.message[..]), (Code::InvalidArgument, "etcdserver: key is not provided"));
    engine.close().await;
    let ended = loop {
        match receiver.next().await {
            Some(Ok(_)) => {}
            ended => break ended,
        }
    };
    assert_eq!(ended.unwrap().unwrap_err().code, Code::Unavailable);
    assert_eq!(dialled.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_and_one_that_is_dropped_is_cancelled() {
    let home = TempDir::new().unwrap();
    let (engine, upstream, _) = started(&home).await;
    let lock = LockRequest { name: "l".into(), lease: 0 };
    let held: LockResponse = upstream.unary(AT, LOCK, &lock, PATIENCE).await.unwrap();
    let waiting = || {
        let body = RequestBody::full(grpc::frame(&lock));
        let request = Request::post(LOCK).header("content-type", "application/grpc").header("grpc-timeout", "100m");
        upstream.forward(Route::Preferred, ForwardClass::Stream, request.body(body).unwrap())
    };
    let answer = waiting().await.unwrap().response;
    let outcome = grpc::outcome(answer.headers()).unwrap().unwrap_err();
    assert_eq!(outcome.code, Code::DeadlineExceeded);
    let dropped = tokio::time::timeout(Duration::from_millis(50), waiting()).await;
    assert!(dropped.is_err(), "the lock is held");
    // Whoever waited has left the queue, so only the holder's key is there.
    let request = RangeRequest { key: "l/".into(), range_end: "l0".into(), ..Default::default() };
    let left = async {
        loop {
            let found: RangeResponse = upstream.unary(AT, "/etcdserverpb.KV/Range", &request, PATIENCE).await.unwrap();
            if found.kvs.len() == 1 {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, left).await.expect("waiters leave the queue");
    assert_eq!(found.kvs[0].key, held.key);
    engine.close().await;
}
