//! Upstreams that are well, but far away, or take little at a time.

mod support;

use std::time::Duration;

use futures_util::future::join_all;
use millpond::{
    proto::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse},
    upstream::{EndpointId, Settings, Upstream},
};
use prometheus::Registry;
use support::{
    client::Client,
    etcd::Cluster,
    fault::{FaultProxy, Faults},
    millpond::Millpond,
    operation::range,
    toolchain::Release,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

/// Long for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A Millpond before `cluster`, to which every byte takes `delay`.
async fn afar(cluster: &Cluster, delay: Duration) -> (FaultProxy, Millpond) {
    let link = FaultProxy::start(&cluster.endpoint(0)).await;
    let millpond = Millpond::start(std::slice::from_ref(&link.endpoint), &[]).await;
    link.set(Faults { delay, ..Faults::default() });
    (link, millpond)
}

/// Keeps a lease of its own alive, over a stream that stays open.
struct Keeper {
    _requests: mpsc::Sender<LeaseKeepAliveRequest>,
    answers: Streaming<LeaseKeepAliveResponse>,
}

impl Keeper {
    async fn of(client: &Client) -> Self {
        let grant = LeaseGrantRequest { ttl: 60, id: 0 };
        let id = client.lease.clone().lease_grant(grant).await.unwrap().into_inner().id;
        let (requests, outgoing) = mpsc::channel(1);
        requests.try_send(LeaseKeepAliveRequest { id }).unwrap();
        let answers = client.lease.clone().lease_keep_alive(ReceiverStream::new(outgoing)).await.unwrap();
        Self { _requests: requests, answers: answers.into_inner() }
    }
}

/// Etcd refuses streams above its limit on a connection, and those that wait for others to end may wait for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_streams_above_etcds_limit_go_over_further_connections() {
    const LIMIT: usize = 8;
    let flag = format!("--max-concurrent-streams={LIMIT}");
    let cluster = Cluster::builder(Release::newest()).flag(flag).start().await;
    let (_link, mut millpond) = afar(&cluster, Duration::from_millis(100)).await;
    // The connection for calls is new: how many it takes is not known when the first of these come.
    let client = millpond.client();
    let puts = join_all((0..10 * LIMIT).map(|number| client.put(format!("k/{number}"), "v"))).await;
    assert!(puts.iter().all(Result::is_ok), "{puts:?}");
    let mut keepers = timeout(PATIENCE, join_all((0..5 * LIMIT).map(|_| Keeper::of(&client)))).await.unwrap();
    let answered = join_all(keepers.iter_mut().map(|keeper| timeout(PATIENCE, keeper.answers.message()))).await;
    for answer in answered {
        assert!(matches!(&answer, Ok(Ok(Some(kept))) if kept.ttl > 0), "{answer:?}");
    }
    millpond.assert_well();
}

/// A question that is not answered soon is put to another endpoint. Where there is none, asking again and again as
/// impatiently would never be answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consistent_read_is_answered_however_far_the_upstream_is() {
    let cluster = Cluster::single(Release::newest()).await;
    let (_link, mut millpond) = afar(&cluster, Duration::from_millis(350)).await;
    let client = millpond.client();
    for round in 0..3 {
        let revision = cluster.client(0).put("k", format!("{round}")).await.unwrap();
        let read = client.range(range("k", "")).await.unwrap();
        assert!(read.header.is_some_and(|header| header.revision >= revision));
        assert_eq!(read.kvs[0].value, format!("{round}"));
    }
    millpond.assert_well();
}

/// An upstream that takes pings for too frequent ends the connection, and with it every stream. That must not go on for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_is_pinged_as_seldom_as_it_wants() {
    const FIRST_PAUSE: Duration = Duration::from_secs(1);
    /// Etcd takes offence at the fourth ping that comes too soon.
    const OFFENCE: Duration = Duration::from_secs(6);
    let cluster = Cluster::builder(Release::newest()).flag("--grpc-keepalive-min-time=1500ms").start().await;
    let endpoint = cluster.endpoint(0).parse().unwrap();
    let settings = Settings { keepalive_interval: FIRST_PAUSE, ..Settings::new(vec![endpoint]) };
    let upstream = Upstream::start(settings, &Registry::new()).unwrap();
    assert!(upstream.await_preferred(&[], PATIENCE).await.is_some());
    let mut ended = 0;
    for _ in 0..8 {
        let opened = upstream.open_catch_up(EndpointId(0), "/etcdserverpb.Lease/LeaseKeepAlive").await;
        let (sender, mut answers) = opened.unwrap();
        if sender.send(&LeaseKeepAliveRequest { id: 1 }).await.is_err() || answers.next().await.unwrap().is_err() {
            // It came onto the connection that was ending.
            continue;
        }
        // A ping that comes late is none that comes too soon.
        let patience = if ended == 0 { PATIENCE } else { OFFENCE };
        let Ok(end) = timeout(patience, answers.next()).await else { break };
        assert_eq!(end.unwrap().unwrap_err().code, Code::Unavailable);
        ended += 1;
    }
    assert_eq!(ended, 1);
}

/// Time that Millpond was kept awake in for a lone call, in seconds.
const AWAKE: &str = "millpond_busy_poll_seconds_total";

/// One write after the other; how long it was kept awake for them.
async fn kept_awake(millpond: &Millpond, writes: usize) -> f64 {
    let (client, before) = (millpond.client(), millpond.metric(AWAKE).await);
    for number in 0..writes {
        client.put("k", number.to_string()).await.unwrap();
    }
    millpond.metric(AWAKE).await - before
}

/// Where there are cores enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lone_writes_keep_it_awake_but_not_for_an_upstream_that_is_far() {
    let cluster = Cluster::single(Release::newest()).await;
    let link = FaultProxy::start(&cluster.endpoint(0)).await;
    let before_link = |busy_poll| {
        let flags = ["--worker-threads=1", busy_poll];
        let endpoint = std::slice::from_ref(&link.endpoint);
        async move { Millpond::start(endpoint, &flags).await }
    };
    let mut drowsy = before_link("--busy-poll=0").await;
    let mut awake = before_link("--busy-poll=10ms").await;
    let has_another_core = std::thread::available_parallelism().unwrap().get() > 1;
    assert_eq!(kept_awake(&drowsy, 3).await, 0.0);
    assert_eq!(kept_awake(&awake, 3).await > 0.0, has_another_core);
    link.set(Faults { delay: Duration::from_millis(50), ..Faults::default() });
    // They take 3.4 s, and none keeps it awake for more than 10 ms, unless others have the core just then.
    let far = kept_awake(&awake, 34).await;
    assert!(far < 1.0, "kept awake for {far} s");
    drowsy.assert_well();
    awake.assert_well();
}
