//! Watches that begin while the cache warms up: the upstream serves them until the cache can, and they do not go on in a history
//! that nobody knows to be theirs.

mod support;

use millpond::proto::etcdserverpb as pb;
use support::{
    client::eventually,
    etcd::Cluster,
    fault::Faults,
    millpond::breathe,
    scene::Scene,
    toolchain::Release,
    watching::{WatchStream, create},
};
use tonic::Code;

/// Values of 100 KB that are to be loaded.
const BULK: usize = 40;
/// Watches that are begun meanwhile, more than may be relayed at once.
const WATCHES: usize = 40;

/// A Millpond that would need a minute to load everything.
async fn cold(flags: &[&str]) -> Scene {
    let cluster = Cluster::builder(Release::newest()).fixed_identity().start().await;
    let etcd = cluster.client(0);
    for number in 0..BULK {
        etcd.put(format!("bulk/{number}"), vec![b'v'; 100 << 10]).await.unwrap();
    }
    Scene::before(cluster, Faults { bytes_per_second: 64 << 10, ..Faults::default() }, flags).await
}

/// A stream with more watches than may be relayed at once.
async fn many(scene: &Scene) -> WatchStream {
    let stream = WatchStream::open(&scene.millpond.client()).await;
    for number in 0..WATCHES {
        stream.create(create(format!("k/{number:02}"), "", 0));
    }
    stream.until_count(WATCHES).await;
    stream
}

async fn is_warm(scene: &Scene) -> bool {
    scene.millpond.metric("millpond_feed_lists_total").await > 0.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_go_over_to_the_cache_once_it_is_warm() {
    let mut scene = cold(&["--catch-up-limit=4"]).await;
    let stream = many(&scene).await;
    assert!(!is_warm(&scene).await, "loading takes longer than this");
    scene.link.heal();
    // Nothing happens upstream that could wake a relay.
    eventually("no relays", async || {
        let relays = scene.millpond.metric("millpond_server_watch_relays").await;
        (is_warm(&scene).await && relays == 0.0).then_some(())
    })
    .await;
    let mut expected = Vec::new();
    for number in (0..WATCHES).rev() {
        expected.push(scene.etcd().put(format!("k/{number:02}"), "v").await.unwrap());
    }
    let all = |responses: &[pb::WatchResponse]| responses.iter().map(|one| one.events.len()).sum::<usize>() == WATCHES;
    stream.until("an event for each watch", all).await;
    let mut found = stream.revisions();
    found.sort_unstable();
    assert_eq!(found, expected);
    scene.millpond.assert_well();
}

/// Those that are too many wait for the load, which saves the upstream their watches, but not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_watch_stands_still_because_the_cache_does_not_become_warm() {
    let mut scene = cold(&["--catch-up-limit=4"]).await;
    let stream = many(&scene).await;
    for number in 0..WATCHES {
        scene.etcd().put(format!("k/{number:02}"), "v").await.unwrap();
    }
    let all = |responses: &[pb::WatchResponse]| responses.iter().map(|one| one.events.len()).sum::<usize>() == WATCHES;
    stream.until("an event for each watch", all).await;
    assert!(!is_warm(&scene).await, "loading takes longer than this");
    scene.millpond.assert_well();
}

/// Etcd does not answer it on a watch that begins in its future, and another could not be known to follow on this one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_progress_in_the_cold_ends_nothing() {
    for flags in [&[][..], &["--prefixes=bulk/"]] {
        let mut scene = cold(flags).await;
        let stream = WatchStream::watching(&scene.millpond.client(), create("k/", "k0", 0)).await;
        for _ in 0..3 {
            stream.ask_progress();
            breathe(100).await;
        }
        let mut expected = vec![scene.etcd().put("k/1", "v").await.unwrap()];
        stream.until_revisions(&expected).await;
        assert!(!is_warm(&scene).await, "loading takes longer than this");
        scene.link.heal();
        eventually("a warm cache", async || is_warm(&scene).await.then_some(())).await;
        stream.ask_progress();
        expected.push(scene.etcd().put("k/2", "v").await.unwrap());
        stream.until_revisions(&expected).await;
        stream.until("progress", |all| all.iter().any(|one| one.watch_id == -1)).await;
        scene.millpond.assert_well();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_begun_in_the_cold_does_not_go_on_in_another_history() {
    let mut scene = cold(&[]).await;
    let snapshot = scene.cluster.save_snapshot("backup").await;
    let stream = WatchStream::watching(&scene.millpond.client(), create("k/", "k0", 0)).await;
    let lost = scene.etcd().put("k/1", "only in the history that ends").await.unwrap();
    stream.until_count(2).await;
    assert!(!is_warm(&scene).await, "loading takes longer than this");
    scene.cluster.restore(&snapshot, &[]).await;
    while scene.etcd().put("k/2", "only in the other").await.unwrap() < lost + 10 {}
    scene.link.heal();
    let end = stream.until_end().await.unwrap_err();
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    assert_eq!(stream.revisions(), [lost]);
    eventually("a warm cache", async || is_warm(&scene).await.then_some(())).await;
    let again = WatchStream::open(&scene.millpond.client()).await;
    again.create(create("k/", "k0", lost + 1));
    again.until("what the other history has", |responses| responses.iter().any(|one| !one.events.is_empty())).await;
    scene.millpond.assert_well();
}
