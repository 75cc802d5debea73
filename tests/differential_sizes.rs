//! Requests around etcd's size limits, and answers far above the defaults of gRPC libraries: as etcd, byte for byte.

mod support;

use millpond::proto::etcdserverpb as pb;
use support::{
    client::eventually,
    compare::outcomes,
    operation::{Operation, execute, range},
    subject::Twins,
    toolchain::{Release, VERSIONS},
    watching::{WatchStream, create},
};
use tonic::Code;

const KIB: usize = 1024;
/// etcd's limit on a request.
const REQUEST: usize = 1536 * KIB;
/// What gRPC lets in beyond it.
const OVERHEAD: usize = 512 * KIB;

/// Sends one request to both servers; the code on which they agree.
async fn code_of(twins: &Twins, operation: &Operation) -> Code {
    let (reference, subject) = (twins.reference.client(0), twins.subject.client());
    let (expected, found) = tokio::join!(execute(&reference, operation), execute(&subject, operation));
    outcomes(operation, &expected, &found).unwrap_or_else(|difference| panic!("{difference:.2000}"));
    expected.map_or_else(|failure| failure.code, |_| Code::Ok)
}

fn put_of(size: usize) -> Operation {
    Operation::Put(pb::PutRequest { key: "k".into(), value: vec![b'v'; size].into(), ..Default::default() })
}

fn read(request: &pb::RangeRequest) -> pb::RequestOp {
    pb::RequestOp { request: Some(pb::request_op::Request::RequestRange(request.clone())) }
}

fn range_with_key_of(size: usize) -> Operation {
    Operation::Range(pb::RangeRequest { serializable: true, ..range(vec![b'k'; size], "") })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_around_the_limits_are_taken_or_refused_as_by_etcd() {
    for version in VERSIONS {
        let Some(release) = Release::pinned(version) else { continue };
        let mut twins = Twins::start(&release).await;
        for (size, code) in [
            (REQUEST - KIB, Code::Ok),
            (REQUEST, Code::InvalidArgument),
            (REQUEST + OVERHEAD - KIB, Code::InvalidArgument),
            (REQUEST + OVERHEAD, Code::ResourceExhausted),
            (8 * REQUEST, Code::ResourceExhausted),
        ] {
            assert_eq!(code_of(&twins, &put_of(size)).await, code, "a value of {size} bytes");
        }
        for (size, code) in [
            (REQUEST + KIB, Code::Ok),
            (REQUEST + OVERHEAD - KIB, Code::Ok),
            (REQUEST + OVERHEAD, Code::ResourceExhausted),
        ] {
            assert_eq!(code_of(&twins, &range_with_key_of(size)).await, code, "a read with a key of {size} bytes");
        }
        twins.subject.assert_well();
    }
}

/// The text used to be one that no etcd has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_request_above_the_limit_ends_its_stream_in_etcds_words() {
    let mut twins = Twins::start(&Release::newest()).await;
    let mut ends = Vec::new();
    for client in [twins.reference.client(0), twins.subject.client()] {
        let stream = WatchStream::open(&client).await;
        stream.create(create("k".repeat(REQUEST + OVERHEAD), "", 0));
        let end = eventually("the end of the stream", async || stream.end()).await.unwrap_err();
        ends.push((end.code(), end.message().to_owned()));
    }
    assert_eq!(ends[0].0, Code::ResourceExhausted);
    assert_eq!(ends[0], ends[1]);
    twins.subject.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_any_size_pass() {
    const KEYS: usize = 24;
    let mut twins = Twins::start(&Release::newest()).await;
    for number in 0..KEYS {
        let value = vec![number as u8; 1024 * KIB];
        let put = pb::PutRequest { key: format!("k{number:02}").into(), value: value.into(), ..Default::default() };
        assert_eq!(code_of(&twins, &Operation::Put(put)).await, Code::Ok);
    }
    for serializable in [false, true] {
        let request = pb::RangeRequest { serializable, ..range("k", "l") };
        assert_eq!(code_of(&twins, &Operation::Range(request.clone())).await, Code::Ok);
        let keys = pb::RangeRequest { keys_only: true, ..request.clone() };
        let one = pb::RangeRequest { limit: 1, ..request.clone() };
        let reads = [&one, &request, &keys, &range("x", ""), &request].map(read).to_vec();
        let txn = pb::TxnRequest { success: reads, ..Default::default() };
        assert_eq!(code_of(&twins, &Operation::Txn(txn)).await, Code::Ok);
        if twins.reference.release().is_3_7() {
            assert_eq!(code_of(&twins, &Operation::RangeStream(request)).await, Code::Ok);
        }
    }
    let mut histories = Vec::new();
    for client in [twins.reference.client(0), twins.subject.client()] {
        let stream = WatchStream::open(&client).await;
        stream.create(create("k", "l", 2));
        stream.until("the whole history", |all| all.iter().flat_map(|r| &r.events).count() >= KEYS).await;
        histories.push(stream.events());
    }
    assert_eq!(histories[0].len(), KEYS);
    assert!(histories[0] == histories[1], "the histories differ");
    twins.subject.assert_well();
}
