//! Reads that an etcd takes and never answers: memory answers them as soon as it can.

#![allow(clippy::disallowed_methods, reason = "what a test sends to itself is few")]

mod proxy;
mod support;

use std::sync::Arc;

use http::{Request, Response};
use http_body_util::BodyExt;
use millpond::{
    grpc,
    proto::etcdserverpb::{self as pb, request_op::Request as Operation},
    server::{
        body::Body,
        forward::forward,
        listener::{self, BoxedRequest, Connection, Handler},
    },
    upstream::{RequestBody, Settings, Upstream},
};
use prometheus::Registry;
use prost::Message;
use proxy::{PATIENCE, serve};
use support::{client::eventually, etcd::Cluster, millpond::Millpond, operation::range, toolchain::Release};
use tokio::{sync::watch, time::timeout};

const KEY: &str = "silent";
const RANGE: &str = "/etcdserverpb.KV/Range";
const RANGE_STREAM: &str = "/etcdserverpb.KV/RangeStream";
const TXN: &str = "/etcdserverpb.KV/Txn";

/// Stands before an etcd, leaves every read of [`KEY`] unanswered, and holds lists back until they are released.
struct Silencer {
    etcd: Upstream,
    released: watch::Receiver<bool>,
    /// How many reads have been left unanswered.
    unanswered: watch::Sender<usize>,
}

impl Handler for Silencer {
    async fn call(self: &Arc<Self>, connection: &Arc<Connection>, request: BoxedRequest) -> Response<Body> {
        let path = request.uri().path().to_owned();
        if ![RANGE, RANGE_STREAM, TXN].contains(&&path[..]) {
            return forward(&self.etcd, connection, *request, None).await;
        }
        let (head, body) = request.into_parts();
        let framed = body.collect().await.unwrap().to_bytes();
        if is_silenced(&path, &framed[grpc::PREFIX..]) {
            self.unanswered.send_modify(|unanswered| *unanswered += 1);
            std::future::pending().await
        }
        if path == RANGE_STREAM {
            self.released.clone().wait_for(|released| *released).await.unwrap();
        }
        forward(&self.etcd, connection, Request::from_parts(head, RequestBody::full(framed)), None).await
    }
}

fn is_silenced(path: &str, message: &[u8]) -> bool {
    match path {
        TXN => !pb::TxnRequest::decode(message).unwrap().success.is_empty(),
        _ => pb::RangeRequest::decode(message).unwrap().key == KEY,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_etcd_leaves_unanswered_is_answered_from_memory_once_that_is_there() {
    let cluster = Cluster::single(Release::newest()).await;
    let revision = cluster.client(0).put(KEY, "value").await.unwrap();
    let etcd = Upstream::start(Settings::new(vec![cluster.endpoint(0).parse().unwrap()]), &Registry::new()).unwrap();
    let ((release, released), (unanswered, mut count)) = (watch::channel(false), watch::channel(0));
    let silencer = serve(Arc::new(Silencer { etcd, released, unanswered }), listener::Settings::default()).await;
    let mut millpond = Millpond::launch(std::slice::from_ref(&silencer.address), &[]);

    eventually("other reads are forwarded", async || millpond.client().get("other").await.ok()).await;

    let mut reads = Vec::new();
    for serializable in [true, false] {
        let (one, two, three) = (millpond.client(), millpond.client(), millpond.client());
        let read = pb::RangeRequest { serializable, ..range(KEY, "") };
        let (streamed, within) = (read.clone(), read.clone());
        let operation = pb::RequestOp { request: Some(Operation::RequestRange(within)) };
        let txn = pb::TxnRequest { success: vec![operation], ..Default::default() };
        reads.push(tokio::spawn(async move { one.range(read).await.unwrap() }));
        reads.push(tokio::spawn(async move {
            let answer = two.kv.clone().txn(txn).await.unwrap().into_inner();
            match answer.responses.into_iter().next().unwrap().response.unwrap() {
                pb::response_op::Response::ResponseRange(read) => pb::RangeResponse { header: answer.header, ..read },
                other => panic!("{other:?}"),
            }
        }));
        reads.push(tokio::spawn(async move {
            let mut chunks = three.kv.clone().range_stream(streamed).await.unwrap().into_inner();
            chunks.message().await.unwrap().unwrap().range_response.unwrap()
        }));
    }
    timeout(PATIENCE, count.wait_for(|count| *count == reads.len())).await.expect("all reach the etcd").unwrap();
    release.send_replace(true);
    for read in reads {
        let answer = timeout(PATIENCE, read).await.expect("memory answers").unwrap();
        assert_eq!(answer.header.unwrap().revision, revision);
        assert_eq!((&answer.kvs[0].key[..], &answer.kvs[0].value[..]), (KEY.as_bytes(), &b"value"[..]));
    }
    millpond.assert_well();
}
