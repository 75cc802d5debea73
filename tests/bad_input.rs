//! What no proper client sends, and clients that behave badly: clear errors, the process stays up, memory stays bounded,
//! and proper clients notice nothing.

mod support;

use std::time::Duration;

use bytes::Bytes;
use millpond::proto::etcdserverpb::{self as pb, request_op::Request as Operation};
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use support::{
    client::{Client, eventually},
    etcd::Cluster,
    millpond::breathe,
    operation::range,
    random::seed,
    raw::{Ending, RawConnection, framed, framed_as},
    subject::{Subject, Twins},
    toolchain::Release,
    watching::{WatchStream, create, revision_of},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::Code;

const MIB: u64 = 1024 * 1024;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty SETTINGS frame.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Unary and streaming calls, some answered here and some forwarded.
const PATHS: [&str; 7] =
    ["KV/Range", "KV/Put", "KV/Txn", "KV/DeleteRange", "KV/RangeStream", "Lease/LeaseGrant", "Maintenance/Status"];

async fn subject_with(flags: &[&str]) -> Subject {
    Subject::before(Cluster::single(Release::newest()).await, flags).await
}

/// A proper client is served, and nothing has panicked.
async fn assert_serves(subject: &mut Subject) {
    let client = subject.client();
    client.put("well", "1").await.unwrap();
    assert_eq!(client.get("well").await.unwrap().count, 1);
    subject.assert_well();
}

fn resident(subject: &Subject) -> u64 {
    subject.millpond.as_ref().map_or(0, |millpond| millpond.process.resident_bytes())
}

/// Sends bytes and waits until the server closes or has been silent for a while; what it said.
async fn poke(endpoint: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(endpoint).await.unwrap();
    let mut answer = Vec::new();
    // The server may close while it is still being sent to.
    let _ = timeout(Duration::from_secs(2), stream.write_all(bytes)).await;
    let _ = timeout(Duration::from_millis(500), stream.read_to_end(&mut answer)).await;
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_the_wire_harms_nobody() {
    let mut subject = subject_with(&[]).await;
    let endpoint = subject.endpoint();
    let mut rng = StdRng::seed_from_u64(seed());
    for round in 0..60 {
        let mut garbage = vec![0; rng.random_range(1..5000)];
        rng.fill(&mut garbage[..]);
        let prefix: &[u8] = match round % 3 {
            0 => b"",
            1 => PREFACE,
            _ => &[PREFACE, SETTINGS].concat(),
        };
        let mut stream = TcpStream::connect(&endpoint).await.unwrap();
        let _ = stream.write_all(&[prefix, &garbage].concat()).await;
        if round % 10 == 0 {
            let _ = timeout(Duration::from_millis(200), stream.read_to_end(&mut Vec::new())).await;
        }
    }
    assert_serves(&mut subject).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_in_http_1_is_refused() {
    let mut subject = subject_with(&[]).await;
    let endpoint = subject.endpoint();
    let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(300_000));
    let many = format!("GET /health HTTP/1.1\r\n{}\r\n", "X-Header: value\r\n".repeat(5000));
    for request in [
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\0\0\0\0\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: -5\r\nHost: x\r\n\r\n",
        "POST /v3/kv/range HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nZZZ\r\n",
        &long,
        &many,
    ] {
        let answer = poke(&endpoint, request.as_bytes()).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.starts_with("HTTP/1.1 200") && !answer.starts_with("HTTP/1.0 200"), "{request:.60?}: {answer}");
    }
    assert_serves(&mut subject).await;
}

/// What a client compressed was refused as Internal, though etcd takes gzip: Go clients may switch it on with an option.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_requests_are_read_like_others() {
    let mut twins = Twins::start(&Release::newest()).await;
    let put = pb::PutRequest { key: "k".into(), value: "v".repeat(1000).into(), ..Default::default() };
    let get = pb::RangeRequest { key: "k".into(), count_only: true, serializable: true, ..Default::default() };
    let gzip = [("grpc-encoding", "gzip")];
    for subject in [twins.reference.endpoint(0), twins.subject.endpoint()] {
        let connection = RawConnection::open(&subject, 1 << 20).await;
        for (path, message) in [("Put", put.encode_to_vec()), ("Range", get.encode_to_vec())] {
            let packed = gzipped(&message);
            let body = framed_as(1, packed.len() as u32, &packed);
            let (ending, _) = connection.call(&format!("/etcdserverpb.KV/{path}"), body, &gzip).await;
            assert_eq!(ending, Ending::Status(0), "{path} at {subject}");
        }
    }
    assert_eq!(twins.subject.client().get("k").await.unwrap().kvs[0].value, put.value);
    twins.subject.assert_well();
}

fn gzipped(message: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut packer, message).unwrap();
    packer.finish().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_none_get_etcds_codes() {
    let mut twins = Twins::start(&Release::newest()).await;
    let range = framed(&pb::RangeRequest { key: "k".into(), ..Default::default() }.encode_to_vec());
    let bodies = [
        ("garbage", framed(&[0xff; 40])),
        ("a key that ends too early", framed(&[0x0a, 0x20, b'k'])),
        ("an unknown compression", framed_as(1, 3, b"abc")),
        ("an unknown flag", framed_as(7, 3, b"abc")),
        ("a length of 4 GiB", framed_as(0, u32::MAX, b"abc")),
        ("an empty message", framed(b"")),
        ("unknown fields", framed(&[0x0a, 1, b'k', 0xf8, 0x7f, 5])),
        ("a field of another type, which Go takes for unknown", framed(&[0x0a, 1, b'k', 0x1a, 0])),
    ];
    let reference = RawConnection::open(&twins.reference.endpoint(0), 1 << 20).await;
    let subject = RawConnection::open(&twins.subject.endpoint(), 1 << 20).await;
    for path in PATHS {
        let path = format!("/etcdserverpb.{path}");
        for (what, body) in &bodies {
            let (expected, _) = reference.call(&path, body.clone(), &[]).await;
            let (found, _) = subject.call(&path, body.clone(), &[]).await;
            assert_eq!(found, expected, "{path} with {what}");
        }
    }
    for path in ["/no.such.Service/Call", "/etcdserverpb.KV/NoSuchCall", "/"] {
        let (expected, _) = reference.call(path, range.clone(), &[]).await;
        let (found, _) = subject.call(path, range.clone(), &[]).await;
        assert_eq!(found, expected, "{path}");
    }
    twins.subject.assert_well();
}

/// They are more than Millpond decodes by itself, and were refused for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_are_nested_as_deeply_as_in_etcd() {
    let mut twins = Twins::start(&Release::newest()).await;
    let reference = RawConnection::open(&twins.reference.endpoint(0), 1 << 20).await;
    let subject = RawConnection::open(&twins.subject.endpoint(), 1 << 20).await;
    for levels in [40, 60, 95, 200] {
        let put = pb::PutRequest { key: "nested".into(), value: "value".into(), ..Default::default() };
        let mut operation = Operation::RequestPut(put);
        for _ in 1..levels {
            let success = vec![pb::RequestOp { request: Some(operation) }];
            operation = Operation::RequestTxn(pb::TxnRequest { success, ..Default::default() });
        }
        let Operation::RequestTxn(txn) = operation else { unreachable!("there are two levels and more") };
        let body = framed(&txn.encode_to_vec());
        let (expected, _) = reference.call("/etcdserverpb.KV/Txn", body.clone(), &[]).await;
        let (found, _) = subject.call("/etcdserverpb.KV/Txn", body, &[]).await;
        assert_eq!(found, expected, "{levels} levels");
        assert_eq!(found == Ending::Status(0), levels < 200);
    }
    twins.subject.assert_well();
}

/// Go's gRPC library gives one of two codes here, by the kind of call; what matters is that the call ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_calls_end_with_an_error() {
    let mut subject = subject_with(&[]).await;
    let connection = RawConnection::open(&subject.endpoint(), 1 << 20).await;
    let refused = [Ending::Status(Code::Unknown as u32), Ending::Status(Code::Internal as u32)];
    for path in PATHS {
        for body in [Bytes::from_static(&[0, 0]), framed_as(0, 100, b"abc"), Bytes::new()] {
            let (ending, _) = connection.call(&format!("/etcdserverpb.{path}"), body.clone(), &[]).await;
            assert!(refused.contains(&ending), "{path} with {body:?}: {ending:?}");
        }
    }
    let range = framed(&pb::RangeRequest { key: "k".into(), ..Default::default() }.encode_to_vec());
    for limit in ["zz", "", "-1S", "123456789S", "1"] {
        let (ending, _) = connection.call("/etcdserverpb.KV/Range", range.clone(), &[("grpc-timeout", limit)]).await;
        // Go refuses such a call, others go without a limit.
        assert!(ending == Ending::Status(0) || refused.contains(&ending), "a grpc-timeout of {limit:?}: {ending:?}");
    }
    assert_serves(&mut subject).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_a_watch_stream_ends_that_stream_alone() {
    let mut subject = subject_with(&[]).await;
    let connection = RawConnection::open(&subject.endpoint(), 1 << 20).await;
    for body in [framed(&[0xff; 40]), framed_as(0, u32::MAX, b"abc"), framed_as(9, 0, b"")] {
        let (ending, _) = connection.call("/etcdserverpb.Watch/Watch", body, &[]).await;
        assert!(matches!(ending, Ending::Status(code) if code != 0), "{ending:?}");
    }
    let create = pb::watch_request::RequestUnion::CreateRequest(create("k", "", 0));
    let good = framed(&pb::WatchRequest { request_union: Some(create) }.encode_to_vec());
    let (answer, mut outgoing) = connection.open_call("/etcdserverpb.Watch/Watch", &[]).await.unwrap();
    outgoing.send_data(good, false).unwrap();
    let mut answer = timeout(Duration::from_secs(20), answer).await.unwrap().unwrap().into_body();
    let created = timeout(Duration::from_secs(20), answer.data()).await.unwrap().expect("a created response").unwrap();
    assert!(created.len() > 5);
    assert_serves(&mut subject).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_filters_are_ignored_as_etcd_ignores_them() {
    let twins = Twins::start(&Release::newest()).await;
    let mut histories = Vec::new();
    for client in [twins.reference.client(0), twins.subject.client()] {
        let stream = WatchStream::open(&client).await;
        stream.create(pb::WatchCreateRequest { filters: vec![7, -1], ..create("k", "", 0) });
        stream.until_count(1).await;
        client.put("k", "v").await.unwrap();
        client.delete("k").await.unwrap();
        histories.push(stream.until_count(3).await);
    }
    assert_eq!(histories[0], histories[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_vanish_leave_nothing_behind() {
    let mut subject = subject_with(&[]).await;
    let endpoint = subject.endpoint();
    assert_serves(&mut subject).await;
    let vanish = async |rounds: usize| {
        for round in 0..rounds {
            let connection = RawConnection::open(&endpoint, 65_535).await;
            let mut calls = Vec::new();
            for path in ["KV/Range", "Watch/Watch", "Lease/LeaseKeepAlive", "KV/Put"].iter().cycle().take(40) {
                calls.push(connection.open_call(&format!("/etcdserverpb.{path}"), &[]).await.unwrap());
            }
            if round % 2 == 0 {
                breathe(2).await;
            }
        }
    };
    vanish(50).await;
    let before = resident(&subject);
    vanish(200).await;
    breathe(500).await;
    let grown = resident(&subject).saturating_sub(before);
    assert!(grown < 48 * MIB, "grown by {grown} bytes over 200 connections of 40 half-open streams");
    assert_serves(&mut subject).await;
}

/// Writes values of 64 KiB to ten keys: this many bytes in all.
async fn write_bytes(client: &Client, total: u64) -> i64 {
    const VALUE: usize = 64 * 1024;
    let mut revision = 0;
    for number in 0..total / VALUE as u64 {
        revision = client.put(format!("k{}", number % 10), vec![number as u8; VALUE]).await.unwrap();
    }
    revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_never_reads_stalls_nobody_and_loses_nothing() {
    let mut subject = subject_with(&["--history-bytes=16MiB"]).await;
    let client = subject.client();
    let first = write_bytes(&client, 4 * MIB).await;
    let connections: Vec<RawConnection> = {
        let mut open = Vec::new();
        for _ in 0..20 {
            open.push(RawConnection::open(&subject.endpoint(), 65_535).await);
        }
        open
    };
    let mut stuck = Vec::new();
    for connection in &connections {
        let request = pb::watch_request::RequestUnion::CreateRequest(create("k", "l", 0));
        let message = framed(&pb::WatchRequest { request_union: Some(request) }.encode_to_vec());
        let (answer, mut outgoing) = connection.open_call("/etcdserverpb.Watch/Watch", &[]).await.unwrap();
        outgoing.send_data(message, false).unwrap();
        stuck.push((timeout(Duration::from_secs(20), answer).await.unwrap().unwrap().into_body(), outgoing));
    }
    let reading = WatchStream::open(&client).await;
    reading.create(create("k", "l", 0));
    reading.until_count(1).await;
    breathe(200).await;
    let before = resident(&subject);
    let last = write_bytes(&client, 64 * MIB).await;
    reading
        .until("the last event", |all| all.last().and_then(|r| r.events.last()).is_some_and(|e| revision_of(e) == last))
        .await;
    let grown = resident(&subject).saturating_sub(before);
    assert!(grown < 160 * MIB, "grown by {grown} bytes while 20 watchers read nothing of 64 MiB each");

    // One of them begins to read, and is told everything.
    let (body, _outgoing) = &mut stuck[0];
    let told = drain(body, last).await;
    assert_eq!(told, (first + 1..=last).collect::<Vec<_>>());
    assert_serves(&mut subject).await;
}

/// Reads watch responses up to the event of revision `last`: the revisions of all events.
async fn drain(body: &mut h2::RecvStream, last: i64) -> Vec<i64> {
    let mut buffer: Vec<u8> = Vec::new();
    let mut revisions = Vec::new();
    while revisions.last() != Some(&last) {
        let part = timeout(Duration::from_secs(30), body.data()).await.expect("the watch goes on").unwrap().unwrap();
        body.flow_control().release_capacity(part.len()).unwrap();
        buffer.extend_from_slice(&part);
        while let Some(prefix) = buffer.first_chunk::<5>() {
            let end = 5 + u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            if buffer.len() < end {
                break;
            }
            let response = pb::WatchResponse::decode(&buffer[5..end]).unwrap();
            assert!(!response.canceled, "a slow watcher is not dropped: {response:?}");
            revisions.extend(response.events.iter().map(revision_of));
            buffer.drain(..end);
        }
    }
    revisions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_never_take_their_answer_cost_little() {
    let mut subject = subject_with(&[]).await;
    let client = subject.client();
    for number in 0..20 {
        client.put(format!("k{number}"), vec![b'v'; MIB as usize]).await.unwrap();
    }
    let request = pb::RangeRequest { serializable: true, ..range("k", "l") };
    assert_eq!(client.range(request.clone()).await.unwrap().count, 20);
    let reads = reads_of(&request, 20);
    for (method, message) in [("Range", request.encode_to_vec()), ("Txn", reads.encode_to_vec())] {
        let before = resident(&subject);
        let mut held = Vec::new();
        for _ in 0..50 {
            let connection = RawConnection::open(&subject.endpoint(), 65_535).await;
            let path = format!("/etcdserverpb.KV/{method}");
            let (answer, mut outgoing) = connection.open_call(&path, &[]).await.unwrap();
            outgoing.send_data(framed(&message), true).unwrap();
            held.push((timeout(Duration::from_secs(20), answer).await.unwrap().unwrap(), connection));
        }
        breathe(300).await;
        let grown = resident(&subject).saturating_sub(before);
        assert!(
            grown < 200 * MIB,
            "{method}: grown by {grown} bytes for 50 answers of 20 MiB and more that nobody takes"
        );
        assert_eq!(client.range(request.clone()).await.unwrap().count, 20);
    }
    assert_serves(&mut subject).await;
}

fn reads_of(request: &pb::RangeRequest, times: usize) -> pb::TxnRequest {
    let read = pb::RequestOp { request: Some(pb::request_op::Request::RequestRange(request.clone())) };
    pb::TxnRequest { success: vec![read; times], ..Default::default() }
}

/// All of it used to be copied together, twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_asks_for_more_than_a_message_can_say_is_refused() {
    let mut subject = subject_with(&["--max-response-bytes=30MiB"]).await;
    let mut unlimited = Subject::before(Cluster::single(Release::newest()).await, &[]).await;
    for (subject, limit, times) in [(&mut subject, 30 * MIB, 2), (&mut unlimited, i32::MAX as u64, 128)] {
        let client = subject.client();
        for number in 0..20 {
            client.put(format!("k{number}"), vec![b'v'; MIB as usize]).await.unwrap();
        }
        let request = pb::RangeRequest { serializable: true, ..range("k", "l") };
        assert_eq!(client.range(request.clone()).await.unwrap().count, 20);
        let before = resident(subject);
        let refused = client.kv.clone().txn(reads_of(&request, times)).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().starts_with("grpc: trying to send message larger than max ("), "{refused:?}");
        assert!(refused.message().ends_with(&format!(" vs. {limit})")), "{refused:?}");
        let grown = resident(subject).saturating_sub(before);
        assert!(grown < 50 * MIB, "grown by {grown} bytes");
        assert_serves(subject).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_without_end_is_cut_off() {
    let mut subject = subject_with(&[]).await;
    let before = resident(&subject);
    let connection = RawConnection::open(&subject.endpoint(), 1 << 20).await;
    for path in ["/etcdserverpb.KV/Range", "/etcdserverpb.KV/Put", "/etcdserverpb.Lease/LeaseGrant"] {
        let body = framed_as(0, u32::MAX, &vec![b'x'; 64 * MIB as usize]);
        let (ending, _) = connection.call(path, body, &[]).await;
        let refused = Ending::Status(Code::ResourceExhausted as u32);
        assert!(ending == refused || ending == Ending::Reset, "{path}: {ending:?}");
    }
    let grown = resident(&subject).saturating_sub(before);
    assert!(grown < 64 * MIB, "grown by {grown} bytes");
    assert_serves(&mut subject).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_requests_do_not_hold_others_up() {
    let mut subject = subject_with(&[]).await;
    let connection = RawConnection::open(&subject.endpoint(), 65_535).await;
    let mut half = Vec::new();
    for number in 0..500 {
        let path = if number % 2 == 0 { "/etcdserverpb.KV/Range" } else { "/etcdserverpb.KV/Txn" };
        let (answer, mut outgoing) = connection.open_call(path, &[]).await.unwrap();
        outgoing.send_data(framed_as(0, 100, b"half"), false).unwrap();
        half.push((answer, outgoing));
    }
    let good = framed(&pb::RangeRequest { key: "k".into(), serializable: true, ..Default::default() }.encode_to_vec());
    let (ending, _) = connection.call("/etcdserverpb.KV/Range", good, &[]).await;
    assert_eq!(ending, Ending::Status(0), "on the same connection");
    assert_serves(&mut subject).await;
    drop((half, connection));
    eventually("service afterwards", async || subject.client().get("well").await.ok()).await;
}

/// A call that is open and asks nothing took the place of one that asks: a thousand of them, and nobody wrote any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_without_a_message_keep_nobody_from_writing() {
    let mut subject = subject_with(&["--forward-limit=4"]).await;
    let connection = RawConnection::open(&subject.endpoint(), 65_535).await;
    let mut idle = Vec::new();
    for path in ["Lease/LeaseGrant", "Cluster/MemberList", "Maintenance/Status", "Auth/AuthStatus"] {
        for begin in [&b""[..], &[0, 0, 0, 0, 2]] {
            let (answer, mut outgoing) = connection.open_call(&format!("/etcdserverpb.{path}"), &[]).await.unwrap();
            outgoing.send_data(Bytes::from_static(begin), false).unwrap();
            idle.push((answer, outgoing));
        }
    }
    breathe(300).await;
    assert_serves(&mut subject).await;
    // The call is answered once it does ask.
    let (answer, mut outgoing) = idle.swap_remove(0);
    outgoing.send_data(framed(&pb::LeaseGrantRequest { ttl: 60, id: 7 }.encode_to_vec()), true).unwrap();
    assert!(!answer.await.unwrap().headers().contains_key("grpc-status"));
    let leases = subject.client().lease.clone().lease_leases(pb::LeaseLeasesRequest {}).await.unwrap().into_inner();
    assert_eq!(leases.leases[0].id, 7);
}
