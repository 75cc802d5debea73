//! The tests' own tools: what the other tests rely on must be so.

mod support;

use std::{
    panic::catch_unwind,
    time::{Duration, Instant},
};

use millpond::proto::{
    etcdserverpb as pb,
    mvccpb::{Event, KeyValue, event::EventType},
};
use support::{
    client::{Client, eventually, http_get},
    compare::outcomes,
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    informer::State,
    operation::{Answer, Operation, range},
    toolchain::{Release, VERSIONS},
    traffic::Traffic,
    watching::by_watcher,
};
use tokio::time::timeout;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_pinned_etcd_runs_and_says_its_version() {
    for version in VERSIONS {
        let Some(release) = Release::pinned(version) else { continue };
        let cluster = Cluster::single(release).await;
        assert_eq!(cluster.client(0).status().await.unwrap().version, version);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clusters_of_one_with_a_fixed_identity_have_equal_headers() {
    let start = || Cluster::builder(Release::newest()).fixed_identity().start();
    let (left, right) = tokio::join!(start(), start());
    let header = async |cluster: &Cluster| cluster.client(0).status().await.unwrap().header.unwrap();
    assert_eq!(header(&left).await, header(&right).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_member_keeps_its_data_and_a_restore_brings_back_the_snapshot() {
    let mut cluster = Cluster::builder(Release::newest()).fixed_identity().start().await;
    let client = cluster.client(0);
    client.put("a", "1").await.unwrap();
    let snapshot = cluster.save_snapshot("backup.db").await;
    let id = client.status().await.unwrap().header.unwrap().cluster_id;
    client.put("a", "2").await.unwrap();

    cluster.kill(0);
    cluster.restart(0).await;
    assert_eq!(cluster.client(0).get("a").await.unwrap().kvs[0].value, "2");

    cluster.restore(&snapshot, &["--bump-revision=1000", "--mark-compacted"]).await;
    let restored = cluster.client(0);
    let answer = restored.get("a").await.unwrap();
    assert_eq!(answer.kvs[0].value, "1");
    let header = answer.header.unwrap();
    assert_eq!(header.cluster_id, id, "a restore with the same flags keeps the ids");
    assert!(header.revision > 1000, "the revision was raised: {}", header.revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_three_outlives_its_leader() {
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let leader = cluster.leader().await;
    cluster.kill(leader);
    let other = cluster.client((leader + 1) % 3);
    eventually("a put after the election", async || {
        timeout(Duration::from_secs(2), other.put("k", "v")).await.ok()?.ok()
    })
    .await;
    cluster.restart(leader).await;
    assert_eq!(cluster.client(leader).get("k").await.unwrap().count, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_strike_and_heal() {
    let cluster = Cluster::single(Release::newest()).await;
    let proxy = FaultProxy::start(&cluster.endpoint(0)).await;
    let client = Client::new(&proxy.endpoint);
    client.put("k", vec![b'v'; 4000]).await.unwrap();

    proxy.set(Faults::black_hole());
    assert!(timeout(Duration::from_millis(300), client.get("k")).await.is_err(), "nothing passes a black hole");
    proxy.heal();
    client.get("k").await.unwrap();

    proxy.set(Faults { delay: Duration::from_millis(200), ..Faults::default() });
    let start = Instant::now();
    client.get("k").await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(400), "each direction waits");

    proxy.set(Faults { bytes_per_second: 10_000, ..Faults::default() });
    let start = Instant::now();
    client.get("k").await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(350), "4 KB take 0.4 s at 10 KB/s");

    proxy.heal();
    proxy.cut_after(100);
    client.get("k").await.expect_err("the answer is cut after 100 bytes");
    let before = proxy.accepted();
    eventually("an answer over a new connection", async || client.get("k").await.ok()).await;
    assert!(proxy.accepted() > before, "a new connection was needed");

    proxy.set(Faults { refuse: true, ..Faults::default() });
    proxy.reset();
    eventually("a refusal", async || client.get("k").await.err()).await;
    proxy.heal();
    eventually("an answer again", async || client.get("k").await.ok()).await;
}

#[tokio::test]
async fn http_get_reads_status_and_body() {
    let cluster = Cluster::single(Release::newest()).await;
    let (status, body) = http_get(&cluster.endpoint(0), "/health").await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&body).unwrap()["health"], "true");
}

/// A record of `key` last changed at `revision`, at this version.
fn record(key: &str, revision: i64, version: i64) -> KeyValue {
    let create_revision = revision - version + 1;
    KeyValue { key: key.to_owned().into(), create_revision, mod_revision: revision, version, ..Default::default() }
}

fn event(kind: EventType, key: &str, revision: i64, version: i64) -> Event {
    Event { r#type: kind as i32, kv: Some(record(key, revision, version)), prev_kv: None }
}

fn answer(kvs: Vec<KeyValue>) -> Result<Answer, support::operation::Failure> {
    let header = Some(pb::ResponseHeader { revision: 9, ..Default::default() });
    Ok(Answer::Range(pb::RangeResponse { header, count: kvs.len() as i64, more: false, kvs }))
}

#[test]
fn the_comparison_finds_what_differs_and_only_that() {
    let by_key = Operation::Range(range("a", "z"));
    let by_version = Operation::Range(pb::RangeRequest { sort_target: 1, ..range("a", "z") });
    let (a, b, c) = (record("a", 2, 1), record("b", 3, 1), record("c", 5, 2));
    let ordered = answer(vec![a.clone(), b.clone(), c.clone()]);
    let swapped = answer(vec![b.clone(), a.clone(), c.clone()]);
    let unsorted = answer(vec![c, a.clone(), b.clone()]);
    assert!(outcomes(&by_key, &ordered, &ordered).is_ok());
    assert!(outcomes(&by_key, &ordered, &swapped).is_err(), "order by key is not free");
    assert!(outcomes(&by_version, &ordered, &swapped).is_ok(), "records that tie come in any order");
    assert!(outcomes(&by_version, &ordered, &unsorted).is_err());
    assert!(outcomes(&by_key, &answer(vec![a.clone()]), &answer(vec![b])).is_err());
    assert!(outcomes(&by_key, &answer(vec![a]), &answer(vec![KeyValue { lease: 1, ..record("a", 2, 1) }])).is_err());
    let refused = Err(millpond::status::Status::EMPTY_KEY.into());
    assert!(outcomes(&by_key, &ordered, &refused).is_err());
    assert!(outcomes(&by_key, &refused, &Err(millpond::status::Status::COMPACTED.into())).is_err());
}

#[test]
fn the_informer_finds_gaps_repeats_and_inventions() {
    use EventType::{Delete, Put};
    let told = |events: &[&[Event]]| {
        let mut state = State { revision: 1, ..State::default() };
        events.iter().try_for_each(|events| state.apply_all(events))
    };
    let first = event(Put, "k", 5, 1);
    assert!(told(&[std::slice::from_ref(&first), &[event(Put, "k", 6, 2)], &[event(Delete, "k", 8, 0)]]).is_ok());
    let wrong: [&[&[Event]]; 6] = [
        &[&[event(Put, "k", 5, 2)]],
        &[std::slice::from_ref(&first), std::slice::from_ref(&first)],
        &[std::slice::from_ref(&first), &[event(Put, "k", 7, 3)]],
        &[std::slice::from_ref(&first), &[event(Put, "other", 4, 1)]],
        &[&[event(Delete, "k", 5, 0)]],
        &[std::slice::from_ref(&first), &[event(Put, "k", 7, 1)]],
    ];
    for events in wrong {
        assert!(told(events).is_err(), "{events:?}");
    }
}

#[test]
fn a_revision_that_comes_in_two_responses_is_found() {
    let response = |revision, event, fragment| pb::WatchResponse {
        header: Some(pb::ResponseHeader { revision, ..Default::default() }),
        events: vec![event],
        fragment,
        ..Default::default()
    };
    let (a, b) = (event(EventType::Put, "a", 5, 1), event(EventType::Put, "b", 5, 1));
    by_watcher(&[response(5, a.clone(), true), response(5, b.clone(), false)]);
    for split in
        [[response(5, a.clone(), false), response(5, b.clone(), false)], [response(4, a, true), response(5, b, false)]]
    {
        assert!(catch_unwind(|| by_watcher(&split)).is_err(), "{split:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn traffic_finds_a_stale_linearizable_read() {
    let (written, stale) = tokio::join!(Cluster::single(Release::newest()), Cluster::single(Release::newest()));
    let traffic = Traffic::start(vec![written.client(0)], &stale.client(0), 1);
    eventually("the stale read to be found", async || {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| traffic.assert_right())).err()
    })
    .await;
    let right = Traffic::start(vec![written.client(0)], &written.client(0), 1);
    right.flows(50).await;
    right.assert_right();
}
