//! The upstream becomes another history: restored from a backup, or replaced by another cluster. Everything derived from
//! the old one is dropped, every watcher is told, and nothing of the old is served any more.

mod support;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use millpond::{
    grpc::Deframer,
    proto::{
        etcdserverpb::{self as pb, RangeRequest},
        mvccpb::Event,
    },
};
use prost::Message;
use support::{
    client::{Client, eventually},
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    informer::{Informer, list},
    millpond::{Millpond, breathe},
    operation::range,
    raw::{RawConnection, framed},
    scene::Scene,
    toolchain::Release,
    watching::{WatchStream, create, revision_of},
};
use tokio::time::timeout;

/// A Millpond that knows a history which the cluster is about to lose.
struct Stage {
    cluster: Cluster,
    proxy: FaultProxy,
    millpond: Millpond,
    client: Client,
    informers: Vec<Informer>,
    /// Up to date, and quiet until the end.
    open: WatchStream,
    backup: PathBuf,
}

/// Nobody reaches the cluster through the link, and whoever has is cut off.
fn cut(link: &FaultProxy) {
    link.set(Faults { refuse: true, ..Faults::default() });
    link.reset();
}

/// A Millpond in front of `cluster` that caches `k/` alone.
async fn caching_one_prefix(cluster: Cluster) -> Scene {
    let scene = Scene::before(cluster, Faults::default(), &["--prefixes=k/"]).await;
    scene.millpond.warm(1).await;
    scene
}

/// Restores what was in `backup` while nobody can reach the cluster.
async fn restore(scene: &mut Scene, backup: &Path) {
    cut(&scene.link);
    scene.cluster.restore(backup, &[]).await;
}

impl Stage {
    /// Keys 0 to 49 are in the backup; 50 to 99 and the second value of `k/00` are not. Then the connection is cut.
    async fn start() -> Self {
        let cluster = Cluster::single(Release::newest()).await;
        let proxy = FaultProxy::start(&cluster.endpoint(0)).await;
        let millpond = Millpond::start(std::slice::from_ref(&proxy.endpoint), &[]).await;
        millpond.warm(1).await;
        let client = millpond.client();
        for number in 0..50 {
            client.put(format!("k/{number:02}"), "backed up").await.unwrap();
        }
        let backup = cluster.save_snapshot("backup.db").await;
        for number in 50..100 {
            client.put(format!("k/{number:02}"), "lost").await.unwrap();
        }
        client.put("k/00", "lost").await.unwrap();
        let informers =
            vec![Informer::start(client.clone(), "k/", "k0"), Informer::start(millpond.client(), "\0", "\0")];
        for informer in &informers {
            informer.listed().await;
        }
        let open = WatchStream::open(&client).await;
        open.create(create("other/", "other0", 0));
        open.until_count(1).await;
        cut(&proxy);
        Self { cluster, proxy, millpond, client, informers, open, backup }
    }

    /// The connection is back: what is served now is the new history, and soon all know it.
    async fn everyone_learns_of_it(mut self) {
        self.proxy.heal();
        self.open.until("a cancelled watch", |all| all.iter().any(|response| response.canceled)).await;
        let canceled = self.open.responses().pop().expect("a response");
        assert!(canceled.compact_revision > 0, "cancelled with a compaction, so that clients list anew: {canceled:?}");
        // Whoever was told of the change finds nothing of the old.
        let direct = self.cluster.client(0);
        let everything = (Bytes::from_static(b"\0"), Bytes::from_static(b"\0"));
        for _ in 0..20 {
            let (_, found) = list(&self.client, &everything.0, &everything.1, 500).await.unwrap();
            let (_, expected) = list(&direct, &everything.0, &everything.1, 500).await.unwrap();
            assert_eq!(found, expected, "what is served and what is there");
        }
        let written = eventually("a put", async || self.client.put("k/new", "v").await.ok()).await;
        let found = self.client.get("k/new").await.unwrap();
        assert_eq!((found.kvs[0].mod_revision, found.header), (written, direct.get("k/new").await.unwrap().header));
        for informer in &self.informers {
            informer.until_equal(&direct).await;
            assert!(
                informer.look(|state| state.relists) > 0,
                "the watcher of {:?} was told to list anew",
                informer.key
            );
        }
        self.millpond.assert_well();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_goes_back() {
    let mut stage = Stage::start().await;
    stage.cluster.restore(&stage.backup, &[]).await;
    stage.everyone_learns_of_it().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_has_come_to_our_revision_by_other_writes() {
    let mut stage = Stage::start().await;
    stage.cluster.restore(&stage.backup, &[]).await;
    // One write for each that was lost: the same revision, another history.
    let direct = stage.cluster.client(0);
    for number in 50..101 {
        direct.put(format!("k/{number:02}"), "another").await.unwrap();
    }
    stage.everyone_learns_of_it().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_is_far_past_our_revision() {
    let mut stage = Stage::start().await;
    stage.cluster.restore(&stage.backup, &[]).await;
    let direct = stage.cluster.client(0);
    for number in 0..300 {
        direct.put(format!("k/{:02}", number % 60), format!("another {number}")).await.unwrap();
    }
    stage.everyone_learns_of_it().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_raises_the_revision_and_compacts() {
    let mut stage = Stage::start().await;
    stage.cluster.restore(&stage.backup, &["--bump-revision=1000", "--mark-compacted"]).await;
    stage.everyone_learns_of_it().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_in_its_place() {
    let mut stage = Stage::start().await;
    stage.cluster.replace().await;
    let direct = stage.cluster.client(0);
    for number in 0..150 {
        direct.put(format!("k/{number:03}"), "another").await.unwrap();
    }
    stage.everyone_learns_of_it().await;
}

/// The state was known to be another cluster's, and served again when that could not be listed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_known_to_be_of_another_history_is_not_served_when_the_upstream_is_lost_again() {
    let mut stage = Stage::start().await;
    stage.cluster.replace().await;
    for number in 0..8 {
        stage.cluster.client(0).put(format!("big/{number}"), vec![b'v'; 1 << 20]).await.unwrap();
    }
    let old = RangeRequest { serializable: true, ..range("k/50", "") };
    assert_eq!(
        stage.client.range(old.clone()).await.unwrap().count,
        1,
        "what is known is served while nobody is there"
    );
    // Enough for questions, not for the list.
    stage.proxy.set(Faults { bytes_per_second: 200 << 10, ..Faults::default() });
    let proving = "millpond_feed_phase{phase=\"proving\"";
    eventually("the state is looked at", async || (stage.millpond.metric(proving).await == 1.0).then_some(())).await;
    breathe(1500).await;
    assert_eq!(stage.millpond.metric(proving).await, 1.0, "the list is under way");
    stage.proxy.set(Faults { refuse: true, ..Faults::default() });
    stage.proxy.reset();
    for _ in 0..20 {
        breathe(100).await;
        assert!(stage.client.range(old.clone()).await.is_err());
    }
    stage.everyone_learns_of_it().await;
}

/// The last event of the prefix is in both histories; what came after it, in other prefixes, is not. The view has got past
/// that, and the new history has events of the prefix there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_shares_the_last_event_of_a_quiet_prefix() {
    let mut scene = caching_one_prefix(Cluster::single(Release::newest()).await).await;
    let client = scene.millpond.client();
    client.put("k/00", "backed up").await.unwrap();
    let backup = scene.cluster.save_snapshot("backup.db").await;
    for number in 0..10 {
        client.put(format!("other/{number}"), "lost").await.unwrap();
    }
    // A consistent read brings the view of the prefix to the last revision, which has no event of the prefix.
    assert_eq!(client.range(range("k/", "k0")).await.unwrap().count, 1);
    let open = WatchStream::open(&client).await;
    open.create(create("k/", "k0", 0));
    open.until_count(1).await;
    restore(&mut scene, &backup).await;
    let direct = scene.etcd();
    for number in 1..=20 {
        direct.put(format!("k/{number:02}"), "another").await.unwrap();
    }
    scene.link.heal();
    open.until("a cancelled watch", |all| all.iter().any(|response| response.canceled)).await;
    let found = client.range(range("k/", "k0")).await.unwrap();
    assert_eq!(found.kvs, direct.range(range("k/", "k0")).await.unwrap().kvs);
    scene.millpond.assert_well();
}

/// A watcher of what is not cached has been told of a deletion that the view does not know of. In the new history the key is
/// absent at that revision as well, but went before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_deletes_the_same_key_at_another_revision() {
    let cluster = Cluster::single(Release::newest()).await;
    cluster.client(0).put("k/00", "backed up").await.unwrap();
    cluster.client(0).put("other/x", "backed up").await.unwrap();
    let mut scene = caching_one_prefix(cluster).await;
    let backup = scene.cluster.save_snapshot("backup.db").await;
    let open = WatchStream::watching(&scene.millpond.client(), create("other/", "other0", 0)).await;
    scene.etcd().put("other/a", "lost").await.unwrap();
    scene.etcd().delete("other/x").await.unwrap();
    open.until("both events", |all| all.iter().map(|one| one.events.len()).sum::<usize>() == 2).await;
    restore(&mut scene, &backup).await;
    scene.etcd().delete("other/x").await.unwrap();
    scene.etcd().put("other/a", "another").await.unwrap();
    scene.link.heal();
    open.until("a cancelled watch", |all| all.iter().any(|response| response.canceled)).await;
    assert_eq!(open.events().len(), 2, "nothing of the new history follows on the old one");
    scene.millpond.assert_well();
}

/// Whoever wrote before the restore goes on after it: the same keys are put and deleted at the same revisions, with the same versions.
/// The view of what is cached may have got past that. A watcher that comes late is sent both events in one response, of which the
/// last alone, a deletion, would prove nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_after_which_the_same_keys_are_written_at_the_same_revisions() {
    for (deletes, reads, is_late) in
        [(false, false, false), (true, false, false), (true, true, false), (true, true, true)]
    {
        let cluster = Cluster::single(Release::newest()).await;
        for key in ["k/00", "other/a", "other/x"] {
            cluster.client(0).put(key, "backed up").await.unwrap();
        }
        let mut scene = caching_one_prefix(cluster).await;
        let client = scene.millpond.client();
        let read = async || client.range(range("k/", "k0")).await.unwrap().count;
        assert_eq!(read().await, 1);
        let backup = scene.cluster.save_snapshot("backup.db").await;
        let watch = async |from| WatchStream::watching(&client, create("other/", "other0", from)).await;
        let early = if is_late { None } else { Some(watch(0).await) };
        let write = async |client: Client, value: &'static str| {
            client.put("other/a", value).await.unwrap();
            match deletes {
                false => client.put("other/x", value).await.unwrap(),
                true => client.delete("other/x").await.unwrap(),
            }
        };
        let lost = write(scene.etcd(), "lost").await;
        let open = match early {
            Some(early) => early,
            None => watch(lost - 1).await,
        };
        open.until("both events", |all| all.iter().map(|one| one.events.len()).sum::<usize>() == 2).await;
        if is_late {
            assert!(open.responses().iter().any(|one| one.events.len() == 2), "in one response");
        }
        if reads {
            assert_eq!(read().await, 1);
        }
        restore(&mut scene, &backup).await;
        assert_eq!(write(scene.etcd(), "other").await, lost);
        scene.link.heal();
        open.until("a cancelled watch", |all| all.iter().any(|response| response.canceled)).await;
        assert_eq!(open.events().len(), 2, "nothing of the new history follows on the old one");
        scene.millpond.assert_well();
    }
}

/// A client that reads slowly is still to be sent what was lost when the cache has long gone on in the new history, which it shares.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_while_a_client_does_not_read() {
    let cluster = Cluster::single(Release::newest()).await;
    cluster.client(0).put("k/00", "backed up").await.unwrap();
    let mut scene = caching_one_prefix(cluster).await;
    let connection = RawConnection::open(&scene.millpond.endpoint, 16 << 10).await;
    let (answer, mut outgoing) = connection.open_call("/etcdserverpb.Watch/Watch", &[]).await.unwrap();
    let create_request = pb::watch_request::RequestUnion::CreateRequest(create("other/", "other0", 2));
    let request = pb::WatchRequest { request_union: Some(create_request) };
    outgoing.send_data(framed(&request.encode_to_vec()), false).unwrap();
    let body = answer.await.unwrap().into_body();
    // More than has room on the way to the client, and less than has room on the way to Millpond.
    for number in 0..20 {
        scene.etcd().put(format!("other/{number:02}"), vec![b'v'; 64 << 10]).await.unwrap();
    }
    let backup = scene.cluster.save_snapshot("backup.db").await;
    scene.etcd().put("other/lost", "lost").await.unwrap();
    breathe(1000).await;
    restore(&mut scene, &backup).await;
    let direct = scene.etcd();
    for number in 0..5 {
        direct.put(format!("other/{number:02}"), "another").await.unwrap();
    }
    let last = direct.put("other/last", "another").await.unwrap();
    scene.link.heal();
    let cached =
        async || scene.millpond.client().range(range("k/", "k0")).await.ok().filter(|answer| answer.count == 1);
    eventually("the cache goes on", cached).await;
    let expected = WatchStream::watching(&direct, create("other/", "other0", 2)).await;
    let has_last =
        |all: &[pb::WatchResponse]| all.iter().flat_map(|one| &one.events).any(|event| revision_of(event) == last);
    expected.until("the last event", has_last).await;
    let found = timeout(Duration::from_secs(60), events_until(body, last)).await.expect("the events, or an end");
    if let Some(found) = found {
        assert_eq!(brief(&found), brief(&expected.events()), "one history and no other");
    }
    scene.millpond.assert_well();
}

/// What tells events apart here.
fn brief(events: &[Event]) -> Vec<(i64, Bytes, usize)> {
    let record = |event: &Event| event.kv.clone().unwrap_or_default();
    events.iter().map(record).map(|kv| (kv.mod_revision, kv.key, kv.value.len())).collect()
}

/// Reads a watch up to the event of revision `last`. None: it was cancelled, or ended.
async fn events_until(mut body: h2::RecvStream, last: i64) -> Option<Vec<Event>> {
    let (mut deframer, mut events) = (Deframer::default(), Vec::new());
    loop {
        let data = body.data().await?.ok()?;
        body.flow_control().release_capacity(data.len()).unwrap();
        deframer.push(data);
        while let Some(message) = deframer.pop().unwrap() {
            let response = pb::WatchResponse::decode(message).unwrap();
            if response.canceled {
                return None;
            }
            events.extend(response.events);
        }
        if events.last().is_some_and(|event| revision_of(event) >= last) {
            return Some(events);
        }
    }
}
