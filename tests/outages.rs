//! Times when the upstream is away, what happens when it is back, and a wall clock that jumps meanwhile.
//!
//! `MILLPOND_OUTAGE_SECONDS` sets how long the upstream is away.

mod support;

use std::{
    env,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use millpond::proto::etcdserverpb as pb;
use prost::Message;
use support::{
    client::{Client, eventually, http_get},
    clock::ClockShift,
    etcd::Cluster,
    millpond::{Millpond, breathe},
    operation::range,
    raw::{RawConnection, framed},
    toolchain::Release,
    watching::{WatchStream, create, revision_of},
};
use tokio::{net::TcpStream, time::timeout};
use tonic::{Code, metadata::MetadataMap};

const DAY: i64 = 86_400;
/// What etcd's client takes for a proof that nothing was sent.
const NO_CONNECTION: &str = "there is no connection available";

/// A stream on a connection of its own, with a watcher of `k/` from `start` on.
async fn parked(millpond: &Millpond, start: i64) -> WatchStream {
    WatchStream::watching(&millpond.client(), create("k/", "k0", start)).await
}

async fn put(client: &Client, number: usize) -> i64 {
    client.put(format!("k/{number:04}"), vec![b'v'; 1000]).await.unwrap()
}

/// How old a serializable answer says it is, when that of a transaction says so as well.
async fn age(client: &Client) -> Option<Duration> {
    let read = pb::RangeRequest { serializable: true, count_only: true, ..range("k/", "k0") };
    let operation = pb::RequestOp { request: Some(pb::request_op::Request::RequestRange(read.clone())) };
    let txn = pb::TxnRequest { success: vec![operation], ..Default::default() };
    let of = |metadata: &MetadataMap| metadata.get("millpond-age-ms")?.to_str().unwrap().parse::<u64>().ok();
    let answer = client.kv.clone().range(read).await.expect("serializable reads go on");
    let also = client.kv.clone().txn(txn).await.expect("serializable transactions of reads go on");
    let (age, _) = of(answer.metadata()).zip(of(also.metadata()))?;
    Some(Duration::from_millis(age))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_parked_through_an_outage_go_on_without_a_gap() {
    let outage = env::var("MILLPOND_OUTAGE_SECONDS").map_or(4, |text| text.parse().expect("a number of seconds"));
    let mut cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--progress-interval=500ms"]).await;
    let client = millpond.client();
    let mut expected = vec![put(&client, 0).await];
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(parked(&millpond, expected[0]).await);
    }
    assert_eq!(age(&client).await, None, "nothing is old while the upstream is there");
    let gone = Instant::now();
    cluster.kill(0);
    eventually("an answer that says how old it is", async || age(&client).await).await;
    while gone.elapsed() < Duration::from_secs(outage) {
        let (before, age) = (gone.elapsed(), age(&client).await.expect("an age"));
        assert!(age <= gone.elapsed() && age + Duration::from_secs(2) > before, "{age:?} after {before:?}");
        assert!(millpond.metric("millpond_feed_lost_since_seconds").await > 0.0);
        streams.push(parked(&millpond, expected[0]).await);
        breathe(500).await;
    }
    cluster.restart(0).await;
    for number in 1..20 {
        expected.push(put(&cluster.client(0), number).await);
    }
    for stream in &streams {
        stream.until_revisions(&expected).await;
        assert!(stream.end().is_none(), "no stream was interrupted");
    }
    eventually("answers without an age", async || age(&client).await.is_none().then_some(())).await;
    assert_eq!(millpond.metric("millpond_feed_lost_since_seconds").await, 0.0);
    millpond.assert_well();
}

/// A member that has lost its majority says that there is no leader, and Kubernetes, which asks for one on every watch, tries again at
/// once and gives its own caches up after half a minute. Of a cluster that cannot be reached, etcd's client says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn that_there_is_no_leader_is_told_only_by_a_member() {
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    let client = millpond.client();
    let open = async || WatchStream::open_with(&client, &[("hasleader", "true")]).await;
    let stream = open().await;
    cluster.kill(0);
    cluster.kill(1);
    assert_eq!(stream.until_end().await.unwrap_err().message(), "etcdserver: no leader");
    cluster.kill(2);
    eventually("a word of those who cannot be reached", async || {
        let end = open().await.until_end().await.unwrap_err();
        assert_eq!(end.code(), Code::Unavailable);
        (end.message() == NO_CONNECTION).then_some(())
    })
    .await;
}

/// Who is refused comes back at once, so a stream that asks for a leader waits for a member that can be reached before it is refused, and is
/// served if one comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_asks_for_a_leader_waits_a_moment_for_the_upstream() {
    let mut cluster = Cluster::single(Release::newest()).await;
    let millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    let client = millpond.client();
    let open = async || WatchStream::open_with(&client, &[("hasleader", "true")]).await;
    let stream = open().await;
    cluster.kill(0);
    assert_eq!(stream.until_end().await.unwrap_err().message(), NO_CONNECTION);
    let began = Instant::now();
    assert_eq!(open().await.until_end().await.unwrap_err().message(), NO_CONNECTION);
    assert!(began.elapsed() > Duration::from_millis(900), "refused after {:?}", began.elapsed());
    let waiting = async {
        loop {
            let stream = open().await;
            stream.create(create("k/", "k0", 0));
            let is_told = async || stream.end().is_some() || !stream.responses().is_empty();
            eventually("an answer", async || is_told().await.then_some(())).await;
            match stream.end() {
                Some(Err(status)) => {
                    assert_eq!(status.message(), NO_CONNECTION, "a member that has come back has a leader")
                }
                _ => return stream,
            }
        }
    };
    let (stream, _) = tokio::join!(waiting, cluster.restart(0));
    let revision = put(&client, 1).await;
    stream.until_revisions(&[revision]).await;
}

/// As at etcd, where each member tells what it has. Nothing has been loaded yet, and cannot be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_begins_without_a_quorum() {
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let before = cluster.client(2);
    let first = put(&before, 1).await;
    eventually("the third member to have it", async || {
        let read = pb::RangeRequest { serializable: true, ..range("k/", "k0") };
        let answer = before.kv.clone().range(read).await.ok()?.into_inner();
        (answer.count == 1).then_some(())
    })
    .await;
    cluster.kill(0);
    cluster.kill(1);
    let millpond = Millpond::launch(&cluster.endpoints()[2..], &["--read-timeout=1s", "--prefixes=k/"]);
    eventually("a Millpond that listens", async || TcpStream::connect(&millpond.endpoint).await.ok()).await;
    let client = millpond.client();
    let past = WatchStream::watching(&client, create("k/", "k0", first)).await;
    let now = WatchStream::watching(&client, create("k/", "k0", 0)).await;
    let uncached = WatchStream::watching(&client, create("u/", "u0", 0)).await;
    past.until_revisions(&[first]).await;
    let (_, metrics) = http_get(&cluster.endpoint(2), "/metrics").await.unwrap();
    let counted = "etcd_server_client_requests_total{client_api_version=\"3.7\",type=\"stream\"}";
    assert!(metrics.contains(counted), "etcd is not told which version its client speaks");
    assert_eq!(past.responses()[0].header.as_ref().unwrap().revision, first);
    cluster.restart(0).await;
    // Only then a put, and only one: one that fails may yet be done.
    eventually("a quorum", async || client.kv.clone().range(range("k/", "k0")).await.ok()).await;
    let second = put(&client, 2).await;
    past.until_revisions(&[first, second]).await;
    now.until_revisions(&[second]).await;
    let third = client.put("u/1", "v").await.unwrap();
    uncached.until_revisions(&[third]).await;
}

/// They waited one after the other, each as long as a consistent read does, and so did what followed them on the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_that_begin_without_a_quorum_wait_for_it_once() {
    const PATIENCE: Duration = Duration::from_secs(3);
    let mut cluster = Cluster::builder(Release::newest()).members(3).start().await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--read-timeout=3s", "--prefixes=k/"]).await;
    let client = millpond.client();
    put(&client, 1).await;
    cluster.kill(1);
    cluster.kill(2);
    eventually("the loss of the quorum", async || {
        let end = WatchStream::open_with(&client, &[("hasleader", "true")]).await;
        breathe(200).await;
        matches!(end.end(), Some(Err(status)) if status.message() == "etcdserver: no leader").then_some(())
    })
    .await;
    let stream = WatchStream::open(&client).await;
    for key in ["a", "b", "c", "d", "k/"] {
        stream.create(create(key, format!("{key}0"), 0));
    }
    stream.until_count(1).await;
    let began = Instant::now();
    let created = stream.until_count(5).await;
    assert!(began.elapsed() < PATIENCE, "{:?} after the first", began.elapsed());
    assert!(created.iter().zip(0..).all(|(response, id)| response.created && response.watch_id == id), "{created:?}");
    cluster.restart(1).await;
    // With the first consistent answer, it is the cluster again that says where watchers begin.
    eventually("a quorum", async || client.kv.clone().range(range("k/", "k0")).await.ok()).await;
    let before = cluster.client(1).put("a", "v").await.unwrap();
    let later = WatchStream::watching(&client, create("a", "", 0)).await;
    assert!(later.responses()[0].header.as_ref().unwrap().revision >= before);
    let after = client.put("a", "v").await.unwrap();
    stream.until_revisions(&[before, after]).await;
    later.until_revisions(&[after]).await;
    millpond.assert_well();
}

/// Etcd's client repeats what was not sent, a hundred times within three seconds. Before an etcd that is away it would wait for longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_has_the_patience_with_an_outage_that_it_has_with_etcd() {
    let mut cluster = Cluster::single(Release::newest()).await;
    let millpond = Millpond::start(&cluster.endpoints(), &[]).await;
    let client = millpond.client();
    put(&client, 0).await;
    let refused = |answer: &Result<i64, tonic::Status>| {
        answer.as_ref().is_err_and(|status| status.message() == NO_CONNECTION && status.code() == Code::Unavailable)
    };
    cluster.kill(0);
    eventually("a write that was not sent", async || refused(&client.put("k/1", "v").await).then_some(())).await;
    let patient = async {
        for _ in 0..100 {
            let answer = client.put("k/1", "v").await;
            if !refused(&answer) {
                return answer;
            }
            breathe(25).await;
        }
        panic!("a hundred times in vain");
    };
    let back = async {
        breathe(4000).await;
        cluster.restart(0).await;
    };
    let (answer, ()) = tokio::join!(patient, back);
    answer.unwrap();
}

/// After an outage everybody asks for everything since long ago at once, which only the etcd has; who is up to date is
/// served meanwhile, and nobody loses anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_herd_from_the_far_past_is_served_and_stalls_nobody() {
    const HERD: usize = 40;
    const WATCHERS: i64 = 10;
    let cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--history-bytes=16KiB"]).await;
    let client = millpond.client();
    let mut expected = Vec::new();
    for number in 0..300 {
        expected.push(put(&cluster.client(0), number).await);
    }
    // A read that is consistent brings what was written at the etcd to memory.
    client.revision().await.unwrap();
    let window = millpond.metric("millpond_feed_window_start_revision").await;
    assert!(window > expected[0] as f64, "the window begins at {window}, after the first event");
    let current = parked(&millpond, 0).await;
    let mut herd = Vec::new();
    for _ in 0..HERD {
        herd.push(WatchStream::open(&millpond.client()).await);
    }
    for stream in &herd {
        (0..WATCHERS).for_each(|_| stream.create(create("k/", "k0", expected[0])));
    }
    let mut later = Vec::new();
    for number in 300..320 {
        later.push(put(&client, number).await);
    }
    current.until_revisions(&later).await;
    expected.extend(later);
    for stream in &herd {
        let all = expected.len() * WATCHERS as usize;
        stream
            .until("all events", |responses| responses.iter().map(|one| one.events.len()).sum::<usize>() >= all)
            .await;
        for watcher in 0..WATCHERS {
            let responses = stream.responses();
            let of_watcher = responses.iter().filter(|response| response.watch_id == watcher);
            let found: Vec<i64> = of_watcher.flat_map(|response| &response.events).map(revision_of).collect();
            assert_eq!(found, expected, "watcher {watcher}");
        }
    }
    millpond.assert_well();
}

/// They stop reading what only the etcd has, and kept the few relays that there are for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_stop_reading_do_not_keep_the_far_past_from_others() {
    // The etcd sends a thousand at a time, and some such responses have room in Millpond.
    const EVENTS: usize = 12_000;
    const VALUE: usize = 200;
    let cluster = Cluster::single(Release::newest()).await;
    let direct = cluster.client(0);
    let mut expected = Vec::new();
    for hundred in 0..EVENTS / 100 {
        let puts = (0..100).map(|number| direct.put(format!("k/{hundred}/{number}"), vec![b'v'; VALUE]));
        expected.extend(join_all(puts).await.into_iter().map(Result::unwrap));
    }
    expected.sort_unstable();
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--catch-up-limit=2"]).await;
    let connection = RawConnection::open(&millpond.endpoint, 16 << 10).await;
    let create_request = pb::watch_request::RequestUnion::CreateRequest(create("k/", "k0", expected[0]));
    let request = framed(&pb::WatchRequest { request_union: Some(create_request) }.encode_to_vec());
    let mut unread = Vec::new();
    for _ in 0..4 {
        let (answer, mut outgoing) = connection.open_call("/etcdserverpb.Watch/Watch", &[]).await.unwrap();
        outgoing.send_data(request.clone(), false).unwrap();
        unread.push((answer.await.unwrap(), outgoing));
    }
    // Until they have all that there is room for.
    breathe(1500).await;
    let read = WatchStream::watching(&millpond.client(), create("k/", "k0", expected[0])).await;
    read.until_revisions(&expected).await;
    // One that reads again has lost nothing.
    let (answer, _outgoing) = unread.swap_remove(0);
    let mut body = answer.into_body();
    let mut bytes = 0;
    while bytes < EVENTS * VALUE {
        let part = timeout(Duration::from_secs(30), body.data()).await.unwrap().unwrap().unwrap();
        bytes += part.len();
        body.flow_control().release_capacity(part.len()).unwrap();
    }
    millpond.assert_well();
}

/// Whether a read through consensus, a write and a watch work, and nothing is lost on the way.
async fn works(client: &Client, stream: &WatchStream, expected: &mut Vec<i64>) {
    expected.push(put(client, expected.len()).await);
    stream.until_revisions(expected).await;
    let current = client.range(pb::RangeRequest { count_only: true, ..range("k/", "k0") }).await.unwrap();
    assert_eq!(current.count, expected.len() as i64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wall_clock_that_jumps_changes_nothing() {
    let clock = ClockShift::new();
    let mut cluster = Cluster::single(Release::newest()).await;
    let flags = ["--progress-interval=500ms", "--history-age=1m"];
    let mut millpond = Millpond::start_in(clock.environment(), &cluster.endpoints(), &flags).await;
    let (client, stream) = (millpond.client(), parked(&millpond, 0).await);
    let mut expected = Vec::new();
    works(&client, &stream, &mut expected).await;
    for days in [400, -400, 0, 1] {
        clock.set(days * DAY);
        works(&client, &stream, &mut expected).await;
        cluster.kill(0);
        eventually("an answer that says how old it is", async || age(&client).await).await;
        assert!(age(&client).await.expect("an age") < Duration::from_secs(60));
        cluster.restart(0).await;
        eventually("a write", async || client.put("other", "v").await.ok()).await;
        works(&client, &stream, &mut expected).await;
        // A window that went by the wall clock would have lost its beginning.
        parked(&millpond, expected[0]).await.until_revisions(&expected).await;
    }
    let dates: std::collections::BTreeSet<String> =
        millpond.process.log().lines().filter_map(|line| line.get(..10)).map(str::to_owned).collect();
    assert!(dates.len() >= 4, "the clock has jumped, says the log: {dates:?}");
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wall_clock_that_jumps_shortens_no_lease_of_the_embedded_store() {
    let clock = ClockShift::new();
    let mut millpond = Millpond::start_in(clock.environment(), &[], &[]).await;
    let client = millpond.client();
    let granted = client.lease.clone().lease_grant(pb::LeaseGrantRequest { id: 7, ttl: 300 }).await.unwrap();
    assert_eq!(granted.into_inner().ttl, 300);
    client.kv.clone().put(pb::PutRequest { key: "k".into(), lease: 7, ..Default::default() }).await.unwrap();
    let remains = async || {
        let request = pb::LeaseTimeToLiveRequest { id: 7, keys: true };
        let answer = client.lease.clone().lease_time_to_live(request).await.ok()?.into_inner();
        assert_eq!(answer.keys, [Bytes::from_static(b"k")]);
        Some(answer.ttl)
    };
    for days in [2, -2, 0] {
        clock.set(days * DAY);
        breathe(600).await;
        let left = remains().await.expect("the store");
        assert!((240..=300).contains(&left), "{left} s remain of 300 with the clock {days} days away");
        millpond.restart().await;
        let left = eventually("the store", remains).await;
        assert!((240..=300).contains(&left), "{left} s remain of 300 after a restart, with the clock {days} days away");
    }
    millpond.assert_well();
}
