//! A tree: a Millpond whose upstream is a Millpond. What holds in front of an etcd holds here too.

mod support;

use millpond::proto::etcdserverpb as pb;
use support::{
    client::eventually,
    etcd::Cluster,
    millpond::Millpond,
    operation::range,
    toolchain::Release,
    watching::{WatchStream, create},
};

/// An etcd, a Millpond in front of it, and one in front of that.
struct Tree {
    cluster: Cluster,
    trunk: Millpond,
    leaf: Millpond,
}

impl Tree {
    async fn grow() -> Self {
        let cluster = Cluster::single(Release::newest()).await;
        let trunk = Millpond::start(&cluster.endpoints(), &[]).await;
        trunk.warm(1).await;
        let leaf = Millpond::start(std::slice::from_ref(&trunk.endpoint), &[]).await;
        leaf.warm(1).await;
        Self { cluster, trunk, leaf }
    }

    async fn watch(&self, start: i64) -> WatchStream {
        WatchStream::watching(&self.leaf.client(), create("k", "l", start)).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leaf_reads_writes_and_watches_as_if_it_stood_at_the_etcd() {
    let mut tree = Tree::grow().await;
    let (etcd, leaf) = (tree.cluster.client(0), tree.leaf.client());
    let stream = tree.watch(1).await;
    let mut expected = Vec::new();
    for number in 0..100 {
        // Written at either end, and read at the leaf at once: a linearizable read has it.
        let writer = if number % 2 == 0 { &etcd } else { &leaf };
        let value = format!("value {number}");
        expected.push(writer.put("k", value.clone()).await.unwrap());
        assert_eq!(leaf.range(range("k", "")).await.unwrap().kvs[0].value, value);
    }
    stream.until_revisions(&expected).await;
    let last = etcd.put("elsewhere", "no event of the range").await.unwrap();
    assert!(leaf.revision().await.unwrap() >= last);
    stream.ask_progress();
    let told = |response: &pb::WatchResponse| response.header.as_ref().map_or(0, |header| header.revision);
    let told_of_last = |responses: &[pb::WatchResponse]| {
        responses.iter().any(|response| response.events.is_empty() && !response.created && told(response) >= last)
    };
    stream.until("progress at the last revision", told_of_last).await;
    let from_memory = tree.leaf.metric("millpond_server_reads_total{answered=\"memory\",method=\"Range\"}").await;
    assert!(from_memory >= 100.0, "the leaf answers from its own memory");
    tree.leaf.assert_well();
    tree.trunk.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trunk_that_is_killed_costs_a_leaf_nothing_but_time() {
    let mut tree = Tree::grow().await;
    let etcd = tree.cluster.client(0);
    let mut expected = vec![etcd.put("k", "before").await.unwrap()];
    let stream = tree.watch(expected[0]).await;
    stream.until_revisions(&expected).await;
    for round in 0..3 {
        tree.trunk.process.kill();
        expected.push(etcd.put("k", format!("meanwhile {round}")).await.unwrap());
        tree.trunk.restart().await;
        expected.push(etcd.put("k", format!("after {round}")).await.unwrap());
        stream.until_revisions(&expected).await;
    }
    let leaf = tree.leaf.client();
    eventually("a consistent read", async || leaf.range(range("k", "")).await.ok()).await;
    assert!(stream.end().is_none(), "the watch was never interrupted");
    tree.leaf.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_etcd_reaches_the_leaf() {
    let mut tree = Tree::grow().await;
    let etcd = tree.cluster.client(0);
    etcd.put("k", "in the backup").await.unwrap();
    let snapshot = tree.cluster.save_snapshot("backup").await;
    for number in 0..5 {
        etcd.put("k", format!("lost {number}")).await.unwrap();
    }
    let last = etcd.put("k", "lost").await.unwrap();
    let stream = tree.watch(last).await;
    stream.until_revisions(&[last]).await;
    tree.cluster.kill(0);
    tree.cluster.restore(&snapshot, &[]).await;
    let is_canceled = |responses: &[pb::WatchResponse]| responses.iter().any(|one| one.canceled);
    stream.until("a cancellation, since that history is over", is_canceled).await;
    let leaf = tree.leaf.client();
    eventually("what the backup had", async || {
        let answer = leaf.get("k").await.ok()?;
        (answer.kvs[0].value == "in the backup").then_some(())
    })
    .await;
    tree.leaf.assert_well();
    tree.trunk.assert_well();
}
