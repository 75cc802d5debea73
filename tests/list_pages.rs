//! Lists come in pages where etcd has no RangeStream: heavy values behind many light ones must not make a page that is too large to
//! be had, or not again and again.

mod proxy;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use millpond::{
    cache::{self, Cache},
    grpc::{self, BodyError, Incoming},
    proto::{
        etcdserverpb::{
            RangeRequest, RangeResponse, RangeStreamResponse, ResponseHeader, StatusResponse, WatchResponse,
        },
        mvccpb::KeyValue,
    },
    rules::KeyRange,
    server::{
        body::Body,
        kv::{self, Kv},
        leader::Leader,
        listener::{self, BoxedRequest, Connection, Handler},
        response,
    },
    status::Status,
    store::Limits,
    upstream::{Settings, Upstream},
};
use prometheus::Registry;
use prost::Message;
use proxy::{
    Answering, PATIENCE, Served,
    fake::{AT, WATCH},
    serve,
};
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tonic::Code;

const STATUS: &str = "/etcdserverpb.Maintenance/Status";
const RANGE: &str = "/etcdserverpb.KV/Range";
/// A prefix without keys.
const ELSEWHERE: &str = "elsewhere/";
/// Keys without a value, and behind them keys with values of 50 KiB.
const LIGHT: usize = 3000;
const HEAVY: usize = 600;
/// More than this is more than the etcd can send at once: a part of the heavy keys.
const MOST: usize = 20 << 20;

/// What the etcd does with an answer that is too large.
#[derive(Clone, Copy)]
enum Manner {
    /// It loses the call.
    Loses,
    /// It says so, as Go's gRPC library does.
    Refuses,
    /// It announces a message of so many bytes, and takes its time.
    Announces(usize),
}

/// How many keys were asked for, page by page, and how many bytes were answered; none when it was too large.
type Asked = Arc<Mutex<Vec<(i64, Option<usize>)>>>;

fn header() -> Option<ResponseHeader> {
    Some(ResponseHeader { cluster_id: 7, member_id: 8, revision: 5000, raft_term: 2 })
}

fn key(number: usize) -> Bytes {
    format!("k{number:05}").into()
}

fn key_value(number: usize) -> KeyValue {
    let value = if number < LIGHT { Bytes::new() } else { vec![b'v'; 50 << 10].into() };
    KeyValue { key: key(number), value, create_revision: 2, mod_revision: 2, version: 1, lease: 0 }
}

fn page(request: &RangeRequest) -> RangeResponse {
    let start = (0..LIGHT + HEAVY).take_while(|number| key(*number) < request.key).count();
    let count = LIGHT + HEAVY - start;
    let limit = if request.count_only { 0 } else { request.limit as usize };
    let kvs: Vec<_> = (start..LIGHT + HEAVY).take(limit).map(key_value).collect();
    RangeResponse { header: header(), more: kvs.len() < count, count: count as i64, kvs }
}

/// The beginning of an answer that does not go on.
fn beginning(bytes: Bytes) -> Response<Body> {
    let first = tokio_stream::once(Ok::<_, BodyError>(Frame::data(bytes.into())));
    response::streaming(Body::boxed(StreamBody::new(first.chain(tokio_stream::pending()))))
}

fn too_large(manner: Manner) -> Response<Body> {
    match manner {
        Manner::Loses => response::error(&Status::unavailable("the connection is lost")),
        Manner::Refuses => {
            let text = "grpc: trying to send message larger than max (3000000000 vs. 2147483647)";
            response::error(&Status::new(Code::ResourceExhausted, text))
        }
        Manner::Announces(bytes) => beginning(Bytes::copy_from_slice(&grpc::prefix(bytes))),
    }
}

async fn etcd(manner: Manner, asked: Asked) -> Served {
    let answer = move |request: Request<Incoming>| {
        let asked = asked.clone();
        async move {
            let path = request.uri().path().to_owned();
            if path == WATCH {
                let created = WatchResponse { header: header(), created: true, ..Default::default() };
                return beginning(grpc::frame(&created));
            }
            if path == STATUS {
                let status =
                    StatusResponse { header: header(), version: "3.6.5".into(), leader: 8, ..Default::default() };
                return response::framed(grpc::frame(&status));
            }
            if path != RANGE {
                return response::error(&Status::STOPPED);
            }
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let request = RangeRequest::decode(&body[grpc::PREFIX..]).unwrap();
            if request.key == ELSEWHERE {
                return response::framed(grpc::frame(&RangeResponse { header: header(), ..Default::default() }));
            }
            let framed = grpc::frame(&page(&request));
            let fits = framed.len() <= MOST;
            if request.limit > 0 {
                asked.lock().unwrap().push((request.limit, fits.then_some(framed.len())));
            }
            if fits { response::framed(framed) } else { too_large(manner) }
        }
    };
    serve(Arc::new(Answering(answer)), listener::Settings::default()).await
}

/// The KV service alone.
struct Reads(Kv);

impl Handler for Reads {
    async fn call(self: &Arc<Self>, connection: &Arc<Connection>, request: BoxedRequest) -> Response<Body> {
        self.0.call(connection, request).await
    }
}

/// The chunks of a RangeStream of everything, with this limit, that such an etcd is asked for in pages.
async fn streamed(manner: Manner, limit: i64) -> Vec<RangeResponse> {
    let etcd = etcd(manner, Asked::default()).await;
    let registry = Registry::new();
    let cache = cache_of(KeyRange::prefix(ELSEWHERE.into()), &etcd, &registry);
    let settings = kv::Settings { max_request_bytes: 1 << 20, max_response_bytes: u64::MAX };
    let metrics = kv::Metrics::register(&registry).unwrap();
    let leader = Leader::start(cache.upstream(), CancellationToken::new());
    let served = serve(Arc::new(Reads(Kv::new(cache, settings, metrics, leader))), listener::Settings::default()).await;
    let client = Upstream::start(Settings::new(vec![served.address.parse().unwrap()]), &Registry::new()).unwrap();
    let link = client.connect(AT).await.unwrap();
    let (sender, mut chunks) = link.open_stream("/etcdserverpb.KV/RangeStream", &[]).unwrap();
    let request = RangeRequest { key: "k".into(), range_end: "l".into(), limit, ..Default::default() };
    sender.send(&request).await.unwrap();
    sender.finish();
    let mut received = Vec::new();
    while let Some(chunk) = timeout(PATIENCE, chunks.next()).await.unwrap() {
        received.push(RangeStreamResponse::decode(chunk.unwrap()).unwrap().range_response.unwrap());
    }
    received
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_pages_takes_those_that_can_be_had() {
    for manner in [Manner::Refuses, Manner::Announces(1 << 30)] {
        for limit in [0, LIGHT as i64 + 500] {
            let mut chunks = streamed(manner, limit).await;
            let keys: Vec<_> = chunks.iter().flat_map(|chunk| &chunk.kvs).map(|kv| kv.key.clone()).collect();
            let all = LIGHT + HEAVY;
            let expected: Vec<_> = (0..all).map(key).take(if limit > 0 { limit as usize } else { all }).collect();
            assert!(keys == expected, "{} keys came", keys.len());
            let last = chunks.pop().unwrap();
            assert_eq!((last.header, last.more, last.count), (header(), limit > 0, all as i64));
            assert!(chunks.iter().all(|chunk| chunk.header.is_none() && !chunk.more && chunk.count == 0));
        }
    }
}

/// A cache before such an etcd, once it is warm, what it asked for, and how often it had to begin anew.
async fn warmed(manner: Manner) -> (Vec<(i64, Option<usize>)>, u64) {
    let asked = Asked::default();
    let etcd = etcd(manner, asked.clone()).await;
    let registry = Registry::new();
    let cache = cache_of(KeyRange::everything(), &etcd, &registry);
    let warm = async {
        while !cache.is_warm() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let is_warm = timeout(PATIENCE, warm).await.is_ok();
    let asked = asked.lock().unwrap().clone();
    assert!(is_warm, "asked for pages of {asked:?}");
    let view = cache.prefixes()[0].store().view_owned();
    assert_eq!(view.tree.as_ref().map(|tree| tree.len()), Some((LIGHT + HEAVY) as u64));
    let families = registry.gather();
    let attempts = families.iter().find(|family| family.name() == "millpond_feed_ended_attempts_total").unwrap();
    (asked, attempts.get_metric()[0].get_counter().get_value() as u64)
}

fn cache_of(range: KeyRange, etcd: &Served, registry: &Registry) -> Cache {
    let upstream = Upstream::start(Settings::new(vec![etcd.address.parse().unwrap()]), registry).unwrap();
    let settings = cache::Settings {
        prefixes: vec![range],
        cache_bytes: 1 << 30,
        history: Limits { bytes: 1 << 20, age: 1000 },
        floor_patience: Duration::from_millis(100),
        view_patience: Duration::from_millis(100),
        consensus_patience: PATIENCE,
        check_interval: Duration::ZERO,
    };
    Cache::start(upstream, settings, registry).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_fails_with_a_page_is_tried_again_with_smaller_ones() {
    let (asked, failed) = warmed(Manner::Loses).await;
    assert!((1..=3).contains(&failed), "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_is_refused_is_asked_for_in_smaller_ones() {
    let (asked, failed) = warmed(Manner::Refuses).await;
    assert_eq!(failed, 0, "{asked:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_announces_too_much_is_not_waited_for() {
    let (asked, failed) = warmed(Manner::Announces(1 << 30)).await;
    assert_eq!(failed, 0, "{asked:?}");
    let after = asked.iter().skip_while(|(_, answered)| answered.is_some()).nth(1).unwrap();
    assert!(after.0 < 100, "the next follows what was announced: {asked:?}");
}
