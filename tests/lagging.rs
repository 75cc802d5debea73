//! A member that lags: what one member may answer as it stands is forwarded, but clients were told more already.

#![allow(clippy::disallowed_methods, reason = "what a test sends to itself is few")]

mod proxy;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use millpond::{
    cache::{self, Cache},
    grpc::{self, BodyError, Deframer, Incoming},
    proto::etcdserverpb::{
        LeaseGrantRequest, RangeRequest, RangeResponse, RequestOp, ResponseHeader, TxnRequest, TxnResponse,
        WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, request_op::Request as Operation,
        watch_request::RequestUnion,
    },
    rules::KeyRange,
    server::{
        body::Body,
        kv::{self, Kv},
        leader::Leader,
        listener::{self, BoxedRequest, Connection, Handler},
        response,
        watch::{self, Watch},
    },
    status::Status,
    store::Limits,
    upstream::{Settings, StreamReceiver, Upstream},
};
use prometheus::Registry;
use prost::Message;
use proxy::{
    Answering, PATIENCE, Served,
    fake::{AT, WATCH},
    probe_answer, serve,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::Code;

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
const LAGGING: i64 = 120;
const PRESENT: i64 = 122;

/// Progress requests of a watch to which the member that lags tells of its own revision.
const STALE_ANSWERS: usize = 3;

/// The KV and Watch services alone.
struct Reads(Kv, Watch);

impl Handler for Reads {
    async fn call(self: &Arc<Self>, connection: &Arc<Connection>, request: BoxedRequest) -> Response<Body> {
        match request.uri().path() {
            WATCH => self.1.call(connection, *request).await,
            _ => self.0.call(connection, request).await,
        }
    }
}

/// Whether each call about `k`, and each transaction, that reached the upstream left the answer to one member.
type Seen = Arc<Mutex<Vec<bool>>>;

fn header_at(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { cluster_id: 7, member_id: 8, revision, raft_term: 2 })
}

/// A watch on a member that lags for some progress requests, and then has caught up.
fn lagging_watch(requests: Incoming) -> Response<Body> {
    let (answers, answered) = mpsc::channel(16);
    tokio::spawn(async move {
        let (mut requests, mut deframer, mut asked) = (requests, Deframer::default(), 0);
        while let Some(Ok(frame)) = requests.frame().await {
            deframer.push(frame.into_data().unwrap());
            while let Some(message) = deframer.pop().unwrap() {
                let request = WatchRequest::decode(message).unwrap().request_union.unwrap();
                let created = matches!(request, RequestUnion::CreateRequest(_));
                asked += usize::from(!created);
                let revision = if asked <= STALE_ANSWERS { LAGGING } else { PRESENT };
                let watch_id = if created { 0 } else { -1 };
                let answer = WatchResponse { header: header_at(revision), watch_id, created, ..Default::default() };
                if answers.send(grpc::frame(&answer)).await.is_err() {
                    return;
                }
            }
        }
    });
    let frames = ReceiverStream::new(answered).map(|answer| Ok::<_, BodyError>(Frame::data(answer.into())));
    response::streaming(Body::boxed(StreamBody::new(frames)))
}

/// An etcd that answers reads of `k` at the present when it has to ask the cluster, and at an older revision when not.
async fn lagging_etcd(seen: Seen) -> Served {
    let answer = move |request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            let path = request.uri().path().to_owned();
            if path == WATCH {
                return lagging_watch(request.into_body());
            }
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let message = body.slice(grpc::PREFIX.min(body.len())..);
            let header = |by_one_member: bool| {
                seen.lock().unwrap().push(by_one_member);
                header_at(if by_one_member { LAGGING } else { PRESENT })
            };
            if path == TXN {
                let txn = TxnRequest::decode(message).unwrap();
                let header = header(txn.success.iter().filter_map(read_of).all(|read| read.serializable));
                return response::framed(grpc::frame(&TxnResponse { header, ..Default::default() }));
            }
            match RangeRequest::decode(message) {
                Ok(read) if path == RANGE && read.key == "k" => {
                    let header = header(read.serializable);
                    response::framed(grpc::frame(&RangeResponse { header, ..Default::default() }))
                }
                _ => probe_answer(&path).unwrap_or_else(|| response::error(&Status::STOPPED)),
            }
        }
    };
    serve(Arc::new(Answering(answer)), listener::Settings::default()).await
}

fn read_of(operation: &RequestOp) -> Option<&RangeRequest> {
    match &operation.request {
        Some(Operation::RequestRange(read)) => Some(read),
        _ => None,
    }
}

/// KV and Watch services whose cache does not cover `k`.
async fn reads_before(etcd: &Served) -> Served {
    let registry = Registry::new();
    let upstream = Upstream::start(Settings::new(vec![etcd.address.parse().unwrap()]), &registry).unwrap();
    let settings = cache::Settings {
        prefixes: vec![KeyRange::prefix("elsewhere/".into())],
        cache_bytes: 1 << 20,
        history: Limits { bytes: 1 << 20, age: 1000 },
        floor_patience: Duration::from_millis(100),
        view_patience: Duration::from_millis(100),
        consensus_patience: PATIENCE,
        check_interval: Duration::ZERO,
    };
    let cache = Cache::start(upstream.clone(), settings, &registry).unwrap();
    let stop = CancellationToken::new();
    let settings = watch::Settings {
        max_request_bytes: 1 << 20,
        progress_interval: Duration::from_secs(600),
        catch_up_limit: 8,
        stream_limit: 8,
    };
    let metrics = watch::Metrics::register(&registry).unwrap();
    let leader = Leader::start(&upstream, stop.clone());
    let watches = Watch::new(cache.clone(), settings, metrics, leader.clone(), stop);
    let settings = kv::Settings { max_request_bytes: 1 << 20, max_response_bytes: u64::MAX };
    let metrics = kv::Metrics::register(&registry).unwrap();
    serve(Arc::new(Reads(Kv::new(cache, settings, metrics, leader), watches)), listener::Settings::default()).await
}

/// What the etcd is asked, a client of the service before it, and both servers.
async fn scene() -> (Seen, Upstream, [Served; 2]) {
    let seen = Seen::default();
    let etcd = lagging_etcd(seen.clone()).await;
    let served = reads_before(&etcd).await;
    let client = Upstream::start(Settings::new(vec![served.address.parse().unwrap()]), &Registry::new()).unwrap();
    (seen, client, [etcd, served])
}

#[tokio::test]
async fn revisions_do_not_go_back_though_a_member_lags() {
    let (seen, client, _servers) = scene().await;
    let read = async |serializable: bool| {
        let request = RangeRequest { key: "k".into(), serializable, ..Default::default() };
        let answer: RangeResponse = client.unary(AT, RANGE, &request, PATIENCE).await.unwrap();
        answer.header.unwrap().revision
    };
    assert_eq!(read(true).await, LAGGING, "nobody knows more");
    assert_eq!(read(false).await, PRESENT);
    assert_eq!(read(true).await, PRESENT, "the member is behind what a client was told, so the cluster is asked");
    assert_eq!(*seen.lock().unwrap(), [true, false, true, false]);
}

/// Etcd says what it makes of a request that we cannot decode, but not with a revision from before what a client was told.
#[tokio::test]
async fn what_cannot_be_decoded_takes_no_revision_back_either() {
    let (_seen, client, _servers) = scene().await;
    // The first field of a Range is a key, not a number.
    let odd = LeaseGrantRequest { ttl: 1, id: 0 };
    let ask = async || client.unary::<_, RangeResponse>(AT, RANGE, &odd, PATIENCE).await;
    let early = ask().await.expect("nobody knows more").header.unwrap().revision;
    let request = RangeRequest { key: "k".into(), ..Default::default() };
    let read: RangeResponse = client.unary(AT, RANGE, &request, PATIENCE).await.unwrap();
    assert!(early < read.header.unwrap().revision);
    assert_eq!(ask().await.unwrap_err().code, Code::Unavailable);
}

#[tokio::test]
async fn transactions_of_reads_do_not_go_back_either_and_one_without_reads_proves_nothing() {
    let (seen, client, _servers) = scene().await;
    let txn = async |reads: &[bool]| {
        let read =
            |serializable: &bool| RangeRequest { key: "k".into(), serializable: *serializable, ..Default::default() };
        let operation = |serializable| RequestOp { request: Some(Operation::RequestRange(read(serializable))) };
        let request = TxnRequest { success: reads.iter().map(operation).collect(), ..Default::default() };
        let answer: TxnResponse = client.unary(AT, TXN, &request, PATIENCE).await.unwrap();
        answer.header.unwrap().revision
    };
    assert_eq!(txn(&[true, true]).await, LAGGING, "nobody knows more");
    assert_eq!(txn(&[true, false]).await, PRESENT);
    assert_eq!(txn(&[true, true]).await, PRESENT);
    assert_eq!(
        txn(&[]).await,
        LAGGING,
        "etcd has no consensus on a transaction without reads, so it is passed on as it is"
    );
    assert_eq!(*seen.lock().unwrap(), [true, false, true, false, true]);
}

#[tokio::test]
async fn progress_of_a_relayed_watcher_does_not_go_back_either() {
    let (_seen, client, _servers) = scene().await;
    let request = RangeRequest { key: "k".into(), ..Default::default() };
    let read: RangeResponse = client.unary(AT, RANGE, &request, PATIENCE).await.unwrap();
    assert_eq!(read.header.unwrap().revision, PRESENT);
    let (requests, mut answers) = client.open_catch_up(AT, WATCH).await.unwrap();
    let send = async |union| requests.send(&WatchRequest { request_union: Some(union) }).await.unwrap();
    send(RequestUnion::CreateRequest(WatchCreateRequest { key: "k".into(), ..Default::default() })).await;
    assert!(next(&mut answers).await.created);
    send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    let told = next(&mut answers).await;
    assert_eq!((told.watch_id, told.header.unwrap().revision), (-1, PRESENT));
}

/// Nobody asked the relay that began after the request, and it was never answered.
#[tokio::test]
async fn a_relayed_watcher_that_comes_while_progress_is_awaited_does_not_hold_it_up() {
    let (_seen, client, _servers) = scene().await;
    let request = RangeRequest { key: "k".into(), ..Default::default() };
    let _: RangeResponse = client.unary(AT, RANGE, &request, PATIENCE).await.unwrap();
    let (requests, mut answers) = client.open_catch_up(AT, WATCH).await.unwrap();
    let send = async |union| requests.send(&WatchRequest { request_union: Some(union) }).await.unwrap();
    let create = || RequestUnion::CreateRequest(WatchCreateRequest { key: "k".into(), ..Default::default() });
    send(create()).await;
    assert!(next(&mut answers).await.created);
    send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    send(create()).await;
    assert!(next(&mut answers).await.created);
    let told = next(&mut answers).await;
    assert_eq!((told.watch_id, told.header.unwrap().revision), (-1, PRESENT));
}

async fn next(answers: &mut StreamReceiver) -> WatchResponse {
    let answer = timeout(PATIENCE, answers.next()).await.expect("there is an answer").unwrap().unwrap();
    WatchResponse::decode(answer).unwrap()
}
