//! What clients say in the metadata of a call counts for what is answered from memory as it does at etcd.

mod support;

use millpond::proto::etcdserverpb as pb;
use prost::Message;
use support::{
    client::eventually, etcd::Cluster, millpond::Millpond, operation::range, raw::RawConnection, subject::Twins,
    toolchain::Release,
};
use tonic::Code;

const CONTENT_TYPE: (&str, &[u8]) = ("content-type", b"application/grpc");

/// Calls that are answered from memory.
fn reads() -> Vec<(&'static str, Vec<u8>)> {
    let read = pb::RangeRequest { serializable: true, ..range("k", "") };
    let operation = pb::RequestOp { request: Some(pb::request_op::Request::RequestRange(read.clone())) };
    let txn = pb::TxnRequest { success: vec![operation], ..Default::default() };
    vec![
        ("/etcdserverpb.KV/Range", read.encode_to_vec()),
        ("/etcdserverpb.KV/RangeStream", read.encode_to_vec()),
        ("/etcdserverpb.KV/Txn", txn.encode_to_vec()),
        ("/etcdserverpb.Watch/Watch", Vec::new()),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_cannot_be_read_is_refused_as_by_etcd() {
    let mut twins = Twins::start(&Release::newest()).await;
    let reference = RawConnection::open(&twins.reference.endpoint(0), 1 << 20).await;
    let subject = RawConnection::open(&twins.subject.endpoint(), 1 << 20).await;
    let sound: [&[(&str, &[u8])]; 4] = [
        &[CONTENT_TYPE],
        &[CONTENT_TYPE, ("client-api-version", b"3.7"), ("client-api-version", b"\xff")],
        &[CONTENT_TYPE, ("client-api-version", "\u{e9}".as_bytes())],
        &[CONTENT_TYPE, ("x-bin", b"AAE="), ("y-bin", b"AAE"), ("z-bin", b"")],
    ];
    let wrong: [&[(&str, &[u8])]; 11] = [
        &[CONTENT_TYPE, ("client-api-version", b"\xff\xfe")],
        &[CONTENT_TYPE, ("client-api-version", b"\xff"), ("hasleader", b"true")],
        &[CONTENT_TYPE, ("x-bin", b"!!!")],
        &[CONTENT_TYPE, ("x-bin", b"AAEC"), ("x-bin", b"AA=A")],
        &[CONTENT_TYPE, ("x-bin", b"AAE,AAE")],
        &[CONTENT_TYPE, ("x-bin", b"A")],
        &[CONTENT_TYPE, ("x-bin", b"AAE=AAEC")],
        &[CONTENT_TYPE, ("grpc-status-details-bin", b"!")],
        &[CONTENT_TYPE, ("x-bin", b"a \"quoted\" 'word'")],
        &[("content-type", b"text/plain"), ("x-bin", b"!!!")],
        &[("content-type", b"text/plain"), ("grpc-timeout", b"1")],
    ];
    for (path, message) in reads() {
        // A watch that is well has no end.
        let sound = sound.iter().filter(|_| !message.is_empty());
        for metadata in wrong.iter().chain(sound) {
            let expected = reference.refusal(path, &message, metadata).await;
            let found = subject.refusal(path, &message, metadata).await;
            assert_eq!(found, expected, "{path} with {metadata:?}");
        }
    }
    twins.subject.assert_well();
}

/// As etcd has it, a client that asks for a leader is not to be told what a member without one has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_asks_for_a_leader_is_refused_while_there_is_none() {
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    let client = millpond.client();
    client.put("k", "v").await.unwrap();
    // A view without the put would have nothing to serve once nobody can be asked.
    millpond.has_in_memory(&client, "k").await;
    cluster.kill(0);
    cluster.kill(1);
    let connection = RawConnection::open(&millpond.endpoint, 1 << 20).await;
    let call = async |path: &str, message: &[u8], value: &str| {
        let metadata = [CONTENT_TYPE, ("hasleader", value.as_bytes())];
        let (_, status, text) = connection.refusal(path, message, &metadata).await;
        (status, text)
    };
    let served = ("0".to_owned(), String::new());
    let refused = ((Code::Unavailable as i32).to_string(), "etcdserver: no leader".to_owned());
    for (path, message) in &reads()[..3] {
        eventually(path, async || (call(path, message, "true").await == refused).then_some(())).await;
        assert_eq!(call(path, message, "false").await, served, "{path}");
    }
    // What the member answered itself came over a connection that may be new, which has to be known for the history's.
    millpond.has_in_memory(&client, "k").await;
    // Of members that cannot be reached, nobody knows that.
    cluster.kill(2);
    for (path, message) in &reads()[..3] {
        eventually(path, async || (call(path, message, "true").await == served).then_some(())).await;
    }
    millpond.assert_well();
}
