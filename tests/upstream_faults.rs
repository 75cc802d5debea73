//! Things break between Millpond and etcd, and in etcd, while clients write, read and watch: reads are right or refused,
//! watchers see every change once and in order or are told that they cannot, and all goes on by itself afterwards.

mod support;

use std::time::Duration;

use millpond::proto::etcdserverpb::{MemberRemoveRequest, MoveLeaderRequest};
use support::{
    client::{Client, eventually},
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    informer::Informer,
    millpond::{Millpond, breathe},
    random::seed,
    toolchain::Release,
    traffic::Traffic,
    watching::{WatchStream, create},
};
use tokio::time::timeout;
use tonic::Code;

/// A Millpond in front of a cluster, with a breakable connection to each member.
struct Stage {
    cluster: Cluster,
    proxies: Vec<FaultProxy>,
    millpond: Millpond,
    informers: Vec<Informer>,
    traffic: Traffic,
}

impl Stage {
    async fn start(members: usize) -> Self {
        let cluster = Cluster::builder(Release::newest()).members(members).start().await;
        let mut proxies = Vec::new();
        for member in 0..members {
            proxies.push(FaultProxy::start(&cluster.endpoint(member)).await);
        }
        let endpoints: Vec<String> = proxies.iter().map(|proxy| proxy.endpoint.clone()).collect();
        let millpond = Millpond::start(&endpoints, &[]).await;
        millpond.warm(1).await;
        let client = millpond.client();
        client.put("f/first", "1").await.unwrap();
        // Some share a connection, some have their own.
        let clients = [client.clone(), millpond.client(), millpond.client()];
        let scopes = [("f/", "f0"), ("\0", "\0"), ("f/churn/", "f/churn0"), ("f/counter", "f/counter\0")];
        let followed = scopes.iter().cycle().zip(clients.iter().cycle()).take(12);
        let informers: Vec<Informer> =
            followed.map(|(scope, client)| Informer::start(client.clone(), scope.0, scope.1)).collect();
        for informer in &informers {
            informer.listed().await;
        }
        let mut writers = vec![millpond.client()];
        writers.extend((0..members).map(|member| cluster.client(member)));
        let traffic = Traffic::start(writers, &client, seed());
        traffic.flows(20).await;
        Self { cluster, proxies, millpond, informers, traffic }
    }

    fn client(&self) -> Client {
        self.millpond.client()
    }

    /// Everything works again, without a restart: writes and reads go on, and every watcher knows what etcd knows.
    async fn recovers(mut self) {
        for proxy in &self.proxies {
            proxy.heal();
        }
        self.cluster.ready().await;
        self.traffic.flows(30).await;
        let (writes, reads) = self.traffic.stop().await;
        let direct = self.cluster.client(0);
        let revision = eventually("a revision", async || direct.revision().await.ok()).await;
        let mut moves = (0, 0);
        for informer in &self.informers {
            informer.until_equal(&direct).await;
            let (reconnects, relists) = informer.look(|state| (state.reconnects, state.relists));
            moves = (moves.0 + reconnects, moves.1 + relists);
        }
        self.millpond.assert_well();
        println!(
            "{writes} writes, {reads} linearizable reads, {} reconnects, {} relists, revision {revision}",
            moves.0, moves.1
        );
    }

    /// No watcher had to come back: their streams outlived it all.
    fn assert_streams_stayed(&self) {
        for informer in &self.informers {
            let moved = informer.look(|state| (state.reconnects, state.relists));
            assert_eq!(moved, (0, 0), "reconnects and relists of the watcher of {:?}", informer.key);
        }
    }

    async fn relisted(&self) {
        for informer in &self.informers {
            eventually("a watcher that lists anew", async || informer.look(|s| s.relists > 0).then_some(())).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_killed_and_restarted_is_followed_again_and_watches_stay_open() {
    let mut stage = Stage::start(1).await;
    for _ in 0..4 {
        stage.cluster.kill(0);
        breathe(300).await;
        stage.cluster.restart(0).await;
        stage.traffic.flows(10).await;
    }
    stage.assert_streams_stayed();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_loses_members_one_by_one_and_gets_them_back() {
    let mut stage = Stage::start(3).await;
    let leader = stage.cluster.leader().await;
    stage.cluster.kill(leader);
    stage.traffic.flows(10).await;
    let second = (leader + 1) % 3;
    stage.cluster.kill(second);
    breathe(1500).await;
    stage.cluster.kill((leader + 2) % 3);
    breathe(1000).await;
    stage.traffic.assert_right();
    for member in 0..3 {
        stage.cluster.launch(member);
    }
    stage.cluster.ready().await;
    stage.assert_streams_stayed();
    stage.recovers().await;
}

/// Makes the member that comes `step` after the leader the leader. Raft gives a transfer up that takes longer than an election
/// timeout, and then etcd waits for it for as long as its client does.
async fn move_leader(cluster: &mut Cluster, step: usize) {
    eventually("another leader", async || {
        let leader = cluster.leader().await;
        let target_id = cluster.client((leader + step) % 3).status().await.ok()?.header?.member_id;
        let mut maintenance = cluster.client(leader).maintenance;
        timeout(Duration::from_secs(5), maintenance.move_leader(MoveLeaderRequest { target_id })).await.ok()?.ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_moves_and_nothing_is_lost() {
    let mut stage = Stage::start(3).await;
    for step in 1..3 {
        move_leader(&mut stage.cluster, step).await;
        stage.traffic.flows(20).await;
    }
    stage.assert_streams_stayed();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_swallow_everything_are_left_for_others() {
    let stage = Stage::start(3).await;
    stage.proxies[0].set(Faults::black_hole());
    stage.traffic.flows(20).await;
    stage.proxies[0].heal();
    stage.proxies[1].set(Faults { hold_answers: true, ..Faults::default() });
    stage.traffic.flows(20).await;
    stage.proxies[1].heal();
    stage.proxies[2].set(Faults { hold_requests: true, ..Faults::default() });
    stage.traffic.flows(20).await;
    stage.assert_streams_stayed();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_before_the_only_member_is_outlived() {
    let stage = Stage::start(1).await;
    for fault in [Faults::black_hole(), Faults { hold_answers: true, ..Faults::default() }] {
        stage.proxies[0].set(fault);
        breathe(2500).await;
        stage.traffic.assert_right();
        stage.proxies[0].heal();
        stage.traffic.flows(10).await;
    }
    stage.assert_streams_stayed();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_break_anywhere_are_made_anew() {
    let stage = Stage::start(1).await;
    for bytes in [0, 1, 8, 9, 10, 100, 1000, 5000, 20_000] {
        stage.proxies[0].cut_after(bytes);
        breathe(150).await;
    }
    for _ in 0..8 {
        stage.proxies[0].reset();
        breathe(100).await;
    }
    stage.proxies[0].set(Faults { refuse: true, ..Faults::default() });
    stage.proxies[0].reset();
    breathe(700).await;
    stage.proxies[0].heal();
    stage.traffic.flows(10).await;
    stage.assert_streams_stayed();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_and_late_connections_only_make_things_slow_and_late() {
    let stage = Stage::start(1).await;
    stage.proxies[0].set(Faults { delay: Duration::from_millis(1500), ..Faults::default() });
    breathe(4000).await;
    stage.traffic.assert_right();
    stage.proxies[0].set(Faults { bytes_per_second: 1000, ..Faults::default() });
    breathe(3000).await;
    stage.traffic.assert_right();
    stage.proxies[0].heal();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compaction_past_the_feed_cancels_watchers_and_invents_nothing() {
    let stage = Stage::start(1).await;
    stage.proxies[0].set(Faults { refuse: true, ..Faults::default() });
    stage.proxies[0].reset();
    let direct = stage.cluster.client(0);
    for number in 0..200 {
        direct.put(format!("f/churn/{:02}", number % 40), format!("missed {number}")).await.unwrap();
    }
    let revision = direct.revision().await.unwrap();
    direct.compact(revision).await.unwrap();
    // Past the compaction there is more to be caught up with.
    direct.put("f/churn/00", "after").await.unwrap();
    stage.proxies[0].heal();
    stage.relisted().await;
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_member_under_the_feed_is_left_for_one_that_goes_on() {
    let mut stage = Stage::start(3).await;
    for member in 0..3 {
        stage.cluster.freeze(member);
        stage.traffic.flows(8).await;
        stage.cluster.thaw(member);
        breathe(1500).await;
        stage.traffic.flows(8).await;
    }
    stage.assert_streams_stayed();
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn millpond_killed_under_load_comes_back_and_its_watchers_resume_without_a_gap() {
    let mut stage = Stage::start(1).await;
    for _ in 0..2 {
        stage.millpond.restart().await;
        stage.traffic.flows(10).await;
    }
    stage.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serializable_reads_and_open_watches_go_on_while_the_upstream_is_down() {
    let mut cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    millpond.warm(1).await;
    let client = millpond.client();
    client.put("k", "v").await.unwrap();
    let stream = WatchStream::open(&client).await;
    stream.create(create("k", "", 0));
    stream.until_count(1).await;
    millpond.has_in_memory(&client, "k").await;
    cluster.kill(0);
    for _ in 0..20 {
        assert_eq!(client.get("k").await.unwrap().kvs[0].value, "v");
        breathe(50).await;
    }
    // The history that is in memory can still be watched.
    stream.create(create("k", "", 2));
    stream.until("the event from memory", |all| all.iter().any(|response| !response.events.is_empty())).await;
    let refused = timeout(Duration::from_secs(20), client.revision()).await.expect("an answer, in etcd's own time");
    assert_eq!(refused.expect_err("a linearizable read needs the cluster").code(), Code::Unavailable);
    cluster.restart(0).await;
    eventually("a put", async || client.put("k", "w").await.ok()).await;
    stream.until("the next event", |all| all.iter().filter(|response| !response.events.is_empty()).count() == 3).await;
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_the_same_after_everything() {
    let stage = Stage::start(1).await;
    let client = stage.client();
    let written = client.put("f/mine", "v").await.unwrap();
    stage.proxies[0].reset();
    let found = eventually("the write, after a reset", async || client.get("f/mine").await.ok()).await;
    assert_eq!(found.kvs[0].mod_revision, written);
    assert!(found.header.expect("a range's answer has a header").revision >= written);
    stage.recovers().await;
}

/// The leader is removed, as when a cluster is renewed member by member: it ends by itself, and all goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_removed_ends_by_itself() {
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    let informer = Informer::start(millpond.client(), "k", "l");
    informer.listed().await;
    let leader = cluster.leader().await;
    let removed = cluster.client(leader).status().await.unwrap().header.expect("an answer has a header").member_id;
    let client = cluster.client((leader + 1) % 3);
    // While a cluster is young, etcd takes its members for unhealthy.
    eventually("a removal", async || {
        match client.cluster.clone().member_remove(MemberRemoveRequest { id: removed }).await {
            Err(status) if status.code() != Code::NotFound => None,
            _ => Some(()),
        }
    })
    .await;
    assert_eq!(cluster.process(leader).wait(Duration::from_secs(20)).await, Some(0));
    eventually("a put", async || millpond.client().put("k", "v").await.ok()).await;
    informer.until_equal(&client).await;
    millpond.assert_well();
}
