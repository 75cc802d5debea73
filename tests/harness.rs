//! The tests' own tools: what the other tests rely on must be so.

mod support;

use std::time::{Duration, Instant};

use support::{
    client::{Client, eventually, http_get},
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    toolchain::{Release, VERSIONS},
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
