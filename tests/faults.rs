//! One fault at a time, each as a scenario: what open watches, reads and the cache do when something breaks.
//!
//! The checker lets everything break at once and at random; these show the rules one by one.

mod support;

use std::time::Duration;

use bytes::Bytes;
use millpond::proto::{
    etcdserverpb::{self as pb, request_op::Request},
    mvccpb::event::EventType,
};
use support::{
    client::eventually,
    etcd::Cluster,
    fault::Faults,
    millpond::{Millpond, breathe},
    operation::range,
    scene::Scene,
    toolchain::Release,
    watching::{WatchStream, create, revision_of},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet, time::timeout};
use tonic::Code;

async fn start(flags: &[&str]) -> Scene {
    let cluster = Cluster::builder(Release::newest()).fixed_identity().flag("--max-txn-ops=128").start().await;
    Scene::before(cluster, Faults::default(), flags).await
}

/// A watch of everything under `k` from `start` on, created.
async fn watch(scene: &Scene, start: i64) -> WatchStream {
    WatchStream::watching(&scene.millpond.client(), create("k", "l", start)).await
}

/// Waits until a read through consensus is answered.
async fn recovered(scene: &Scene) {
    let client = scene.millpond.client();
    eventually("a linearizable answer", async || {
        timeout(Duration::from_secs(2), client.range(range("k", "l"))).await.ok()?.ok()
    })
    .await;
}

async fn until_compacted(stream: &WatchStream) -> i64 {
    stream.until("a cancellation", |responses| responses.iter().any(|one| one.canceled)).await;
    stream.responses().iter().find(|one| one.canceled).map_or(0, |one| one.compact_revision)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_go_on_without_a_gap_when_the_etcd_is_killed_and_restarted() {
    let mut scene = start(&[]).await;
    let first = scene.etcd().put("k1", "before").await.unwrap();
    let stream = watch(&scene, first).await;
    let client = scene.millpond.client();
    let lease = pb::LeaseGrantRequest { id: 0, ttl: 600 };
    let lease = client.lease.clone().lease_grant(lease).await.unwrap().into_inner().id;
    let request = pb::PutRequest { key: "leased".into(), lease, ..Default::default() };
    client.kv.clone().put(request).await.unwrap();
    let without_values = pb::RangeRequest { keys_only: true, serializable: true, ..range("leased", "") };
    let before = client.range(without_values.clone()).await.unwrap();
    scene.cluster.kill(0);
    let aged = eventually("an answer that says how old it is", async || {
        let request = pb::RangeRequest { serializable: true, ..range("k", "l") };
        let answer = client.kv.clone().range(request).await.ok()?;
        answer.metadata().contains_key("millpond-age-ms").then(|| answer.into_inner())
    })
    .await;
    assert_eq!(aged.kvs[0].value, "before");
    assert_eq!(client.range(without_values).await.unwrap().kvs, before.kvs, "in the form of the version that is away");
    scene.cluster.restart(0).await;
    let second = scene.etcd().put("k2", "after").await.unwrap();
    stream.until_revisions(&[first, second]).await;
    recovered(&scene).await;
    assert!(stream.end().is_none(), "the watch was never interrupted");
    scene.millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_stale_is_called_current_behind_a_black_hole() {
    let mut scene = start(&["--read-timeout=2s"]).await;
    let first = scene.etcd().put("k1", "old").await.unwrap();
    let stream = watch(&scene, first).await;
    stream.until_revisions(&[first]).await;
    scene.link.set(Faults::black_hole());
    let second = scene.etcd().put("k1", "new").await.unwrap();
    let client = scene.millpond.client();
    let old =
        timeout(Duration::from_secs(5), client.get("k1")).await.expect("a serializable read needs nobody").unwrap();
    assert_eq!(old.kvs[0].value, "old");
    let current = timeout(Duration::from_secs(20), client.range(range("k1", ""))).await;
    let refused = current.expect("a read is refused in time").expect_err("nobody can know what is current");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let read = pb::RequestOp { request: Some(Request::RequestRange(range("k1", ""))) };
    let reads = pb::TxnRequest { success: vec![read], ..Default::default() };
    let current = timeout(Duration::from_secs(20), client.kv.clone().txn(reads)).await;
    let refused = current.expect("a transaction is refused in time").expect_err("nobody can know what is current");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    let relayed = scene.millpond.metric("millpond_server_reads_total{answered=\"no_consensus\"").await;
    assert_eq!(relayed, 0.0, "to wait once more would not help");
    scene.link.heal();
    stream.until_revisions(&[first, second]).await;
    eventually("the new value", async || {
        let answer = timeout(Duration::from_secs(3), client.range(range("k1", ""))).await.ok()?.ok()?;
        (answer.kvs[0].value == "new").then_some(())
    })
    .await;
    scene.millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compaction_past_the_feed_cancels_only_who_is_below_it() {
    let mut scene = start(&[]).await;
    let first = scene.etcd().put("k1", "1").await.unwrap();
    let below = watch(&scene, first).await;
    below.until_revisions(&[first]).await;
    let future = watch(&scene, first + 50).await;
    scene.link.set(Faults { refuse: true, ..Faults::black_hole() });
    for number in 0..20 {
        scene.etcd().put("k2", format!("{number}")).await.unwrap();
    }
    scene.etcd().compact(first + 20).await.unwrap();
    scene.link.reset();
    // What the link still holds must be gone before it is whole again.
    breathe(100).await;
    scene.link.heal();
    assert_eq!(until_compacted(&below).await, first + 20);
    assert_eq!(below.revisions(), [first], "what happened in between cannot be known, so nothing is made up");
    recovered(&scene).await;
    while scene.etcd().put("k3", "later").await.unwrap() < first + 52 {}
    future.until_revisions(&[first + 50, first + 51, first + 52]).await;
    let refused = scene.millpond.client().range(pb::RangeRequest { revision: first, ..range("k1", "") }).await;
    assert_eq!(refused.unwrap_err().message(), "etcdserver: mvcc: required revision has been compacted");
    scene.millpond.assert_well();
}

/// After a restore with these flags, whatever was cached of the old history is gone, and its watchers know.
async fn another_history(extra: &[&str]) {
    let mut scene = start(&[]).await;
    scene.etcd().put("k1", "kept").await.unwrap();
    let snapshot = scene.cluster.save_snapshot("backup.db").await;
    for number in 0..10 {
        scene.etcd().put("k2", format!("lost {number}")).await.unwrap();
    }
    let last = scene.etcd().put("k1", "lost").await.unwrap();
    let stream = watch(&scene, last).await;
    stream.until_revisions(&[last]).await;
    scene.cluster.restore(&snapshot, extra).await;
    // The restored etcd may already be past what was cached when it is found again.
    for number in 0..15 {
        scene.etcd().put("k3", format!("new {number}")).await.unwrap();
    }
    assert!(until_compacted(&stream).await > 0);
    assert_eq!(stream.revisions(), [last], "nothing of the new history follows on the old one");
    let client = scene.millpond.client();
    let answer = eventually("a current answer", async || client.range(range("k", "l")).await.ok()).await;
    let found: Vec<(&[u8], &[u8])> = answer.kvs.iter().map(|kv| (&kv.key[..], &kv.value[..])).collect();
    assert_eq!(found, [(&b"k1"[..], &b"kept"[..]), (b"k3", b"new 14")]);
    let own = client.get("k2").await.unwrap();
    assert_eq!(own.count, 0, "the cache does not serve what the restore took away");
    scene.millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_with_the_same_flags_is_another_history() {
    another_history(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_raises_the_revision_is_another_history() {
    another_history(&["--bump-revision=1000", "--mark-compacted"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_three_may_lose_one_then_two_then_all() {
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--read-timeout=2s"]).await;
    let client = millpond.client();
    let first = client.put("k", "0").await.unwrap();
    let stream = WatchStream::open(&client).await;
    stream.create(create("k", "l", first));
    stream.until_revisions(&[first]).await;
    cluster.kill(0);
    let second = eventually("a put without one member", async || {
        timeout(Duration::from_secs(3), client.put("k", "1")).await.ok()?.ok()
    })
    .await;
    stream
        .until("the event", |responses| {
            responses.iter().any(|one| one.events.iter().any(|event| revision_of(event) == second))
        })
        .await;
    cluster.kill(1);
    let refused = timeout(Duration::from_secs(20), client.range(range("k", ""))).await.expect("refused in time");
    assert_eq!(refused.expect_err("one of three decides nothing").code(), Code::Unavailable);
    assert_eq!(client.get("k").await.unwrap().kvs[0].value, "1", "serializable reads go on");
    // The last member may have answered that; memory does once it knows that it has its view from where that is current.
    millpond.has_in_memory(&client, "k").await;
    cluster.kill(2);
    assert_eq!(client.get("k").await.unwrap().kvs[0].value, "1", "serializable reads go on without anybody");
    (0..3).for_each(|member| cluster.launch(member));
    cluster.ready().await;
    let third = eventually("a put when all are back", async || {
        timeout(Duration::from_secs(3), client.put("k", "2")).await.ok()?.ok()
    })
    .await;
    stream
        .until("the last event", |responses| {
            responses.iter().any(|one| one.events.iter().any(|event| revision_of(event) == third))
        })
        .await;
    assert!(stream.revisions().is_sorted_by(|one, next| one < next), "no event came twice: {:?}", stream.revisions());
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_from_one_prefix_is_never_followed_by_an_older_one_from_another() {
    let mut scene = start(&["--prefixes=a/,b/"]).await;
    let client = scene.millpond.client();
    for number in 0..20 {
        let written = scene.etcd().put("a/1", format!("{number}")).await.unwrap();
        let first = eventually("the write to be seen", async || {
            let seen = client.get("a/1").await.ok()?.header?.revision;
            (seen >= written).then_some(seen)
        })
        .await;
        let second = client.get("b/1").await.unwrap().header.unwrap().revision;
        assert!(second >= first, "revision {second} after {first}");
    }
    scene.millpond.assert_well();
}

fn put(key: String, value: impl Into<Bytes>) -> pb::RequestOp {
    let request = pb::PutRequest { key: key.into(), value: value.into(), ..Default::default() };
    pb::RequestOp { request: Some(Request::RequestPut(request)) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_revisions_stay_whole() {
    let mut scene = start(&[]).await;
    let client = scene.millpond.client();
    let stream = watch(&scene, 2).await;
    for part in 0..79 {
        let success = (0..128).map(|number| put(format!("k{part:03}/{number:03}"), "v")).collect();
        client.kv.clone().txn(pb::TxnRequest { success, ..Default::default() }).await.unwrap();
    }
    let all = 79 * 128;
    assert_eq!(client.range(pb::RangeRequest { count_only: true, ..range("k", "l") }).await.unwrap().count, all);
    let request = pb::DeleteRangeRequest { key: "k".into(), range_end: "l".into(), prev_kv: false };
    let deleted = client.kv.clone().delete_range(request).await.unwrap().into_inner();
    assert_eq!(deleted.deleted, all);
    let revision = deleted.header.unwrap().revision;
    let of_deletes = |one: &pb::WatchResponse| one.events.iter().filter(|event| revision_of(event) == revision).count();
    stream.until("the deletes", |responses| responses.iter().any(|one| of_deletes(one) > 0)).await;
    let whole: Vec<usize> = stream.responses().iter().map(of_deletes).filter(|count| *count > 0).collect();
    assert_eq!(whole, [all as usize], "one revision comes in one response");
    let is_delete = |one: &i32| *one == EventType::Delete as i32;
    assert_eq!(stream.events().iter().map(|event| event.r#type).filter(is_delete).count(), all as usize);
    let large = vec![b'x'; 1_500_000];
    client.put("k/large", large.clone()).await.unwrap();
    assert_eq!(client.range(range("k/large", "")).await.unwrap().kvs[0].value, large);
    scene.millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_vanish_or_never_read_stall_nobody() {
    let mut scene = start(&[]).await;
    let mut clients = JoinSet::new();
    for number in 0..1000 {
        let endpoint = scene.millpond.endpoint.clone();
        clients.spawn(async move {
            let mut stream = TcpStream::connect(endpoint).await.unwrap();
            // Some say nothing, some begin HTTP/2 and stop in the middle of it.
            let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
            let _ = stream.write_all(&preface[..number % preface.len()]).await;
        });
        if number % 50 == 0 {
            while clients.join_next().await.is_some() {}
        }
    }
    while clients.join_next().await.is_some() {}
    let mut silent = Vec::new();
    for _ in 0..20 {
        let request = pb::watch_request::RequestUnion::CreateRequest(create("k", "l", 2));
        let first = tokio_stream::once(pb::WatchRequest { request_union: Some(request) });
        let requests = tokio_stream::StreamExt::chain(first, tokio_stream::pending());
        // Each on a connection of its own, whose answers nobody ever asks for.
        silent.push(scene.millpond.client().watch.watch(requests).await.unwrap());
    }
    let stream = watch(&scene, 2).await;
    let mut expected = Vec::new();
    for _ in 0..40 {
        expected.push(scene.etcd().put("k", vec![b'v'; 200_000]).await.unwrap());
    }
    stream.until_revisions(&expected).await;
    // Nothing was lost for who was slow.
    let mut slow = silent.pop().unwrap().into_inner();
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        let response =
            timeout(Duration::from_secs(20), slow.message()).await.expect("the rest comes").unwrap().unwrap();
        seen.extend(response.events.iter().map(revision_of));
    }
    assert_eq!(seen, expected);
    scene.millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyspace_over_the_limit_is_forwarded_and_its_watches_go_on() {
    let mut scene = start(&["--cache-bytes=1MiB"]).await;
    let first = scene.etcd().put("k/first", "small").await.unwrap();
    let stream = watch(&scene, first).await;
    stream.until_revisions(&[first]).await;
    let mut expected = vec![first];
    for number in 0..30 {
        expected.push(scene.etcd().put(format!("k/{number}"), vec![b'v'; 100_000]).await.unwrap());
    }
    stream.until_revisions(&expected).await;
    eventually("the limit to show", async || {
        (scene.millpond.metric("millpond_feed_over_limit").await > 0.0).then_some(())
    })
    .await;
    let client = scene.millpond.client();
    let answer = client.range(pb::RangeRequest { keys_only: true, ..range("k", "l") }).await.unwrap();
    assert_eq!(answer.count, 31, "reads are forwarded");
    expected.push(scene.etcd().put("k/after", "small").await.unwrap());
    stream.until_revisions(&expected).await;
    breathe(50).await;
    assert_eq!(stream.revisions(), expected, "and nothing comes twice");
    scene.millpond.assert_well();
}
