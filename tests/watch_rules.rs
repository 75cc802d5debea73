//! The rules of Watch one by one, with the exact fields that clients rely on: etcd and the server under test must agree
//! with each other and with the rule.

mod support;

use std::time::Duration;

use millpond::proto::{
    etcdserverpb::{self as pb, RequestOp, TxnRequest, WatchCreateRequest, WatchResponse, request_op::Request},
    mvccpb::{Event, event::EventType},
};
use support::{
    client::{Client, eventually, http_get},
    etcd::Cluster,
    millpond::{Millpond, breathe},
    subject::{Kind, Twins},
    toolchain::Release,
    watching::{WatchStream, by_watcher, create, revision_of},
};

/// Plays the same on both servers and returns what they agree on.
async fn on_both<T: PartialEq + std::fmt::Debug>(twins: &Twins, play: impl AsyncFn(Client) -> T) -> T {
    let expected = play(twins.reference.client(0)).await;
    let found = play(twins.subject.client()).await;
    assert_eq!(found, expected, "the server under test differs from etcd");
    expected
}

async fn twins() -> Twins {
    Twins::start(&Release::newest()).await
}

fn revision(response: &WatchResponse) -> i64 {
    response.header.expect("every watch response has a header").revision
}

/// Puts on several keys in one revision.
async fn put_together(client: &Client, keys: &[&str], value: &[u8]) -> i64 {
    let put = |key: &&str| pb::PutRequest {
        key: key.as_bytes().to_vec().into(),
        value: value.to_vec().into(),
        ..Default::default()
    };
    let success = keys.iter().map(|key| RequestOp { request: Some(Request::RequestPut(put(key))) }).collect();
    let answer = client.kv.clone().txn(TxnRequest { success, ..Default::default() }).await.unwrap().into_inner();
    answer.header.expect("a txn's answer has a header").revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_that_fails_is_a_response_and_the_stream_stays_open() {
    let responses = on_both(&twins().await, async |client| {
        client.put("k", "v").await.unwrap();
        let stream = WatchStream::open(&client).await;
        stream.create(create("k", "", -1));
        stream.create(create("k", "k", 0));
        stream.create(create("k", "a", 0));
        stream.create(WatchCreateRequest { watch_id: 5, ..create("k", "", 0) });
        stream.until_count(4).await;
        stream.create(WatchCreateRequest { watch_id: 5, ..create("k", "", 0) });
        stream.until_count(5).await
    })
    .await;
    let empty = "mvcc: watcher range is empty";
    let reasons: Vec<&str> = responses.iter().map(|response| response.cancel_reason.as_str()).collect();
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    assert_eq!(reasons, [compacted, empty, empty, "", "mvcc: duplicate watch ID provided on the WatchStream"]);
    for failed in responses.iter().filter(|response| !response.cancel_reason.is_empty()) {
        assert!(
            failed.created && failed.canceled && failed.watch_id == -1 && failed.compact_revision == 0,
            "{failed:?}"
        );
        assert_eq!(revision(failed), 2, "the header tells the current revision");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_are_picked_in_order_taken_as_given_and_free_after_a_cancel() {
    let ids = on_both(&twins().await, async |client| {
        let stream = WatchStream::open(&client).await;
        let mut count = 0;
        for watch_id in [0, 2, 0, 0, -1, i64::MIN, 0] {
            stream.create(WatchCreateRequest { watch_id, ..create("k", "", 0) });
            count += 1;
            stream.until_count(count).await;
        }
        stream.cancel(99);
        stream.cancel(2);
        stream.until_count(count + 1).await;
        stream.create(WatchCreateRequest { watch_id: 2, ..create("k", "", 0) });
        let responses = stream.until_count(count + 2).await;
        responses.iter().map(|response| (response.watch_id, response.created, response.canceled)).collect::<Vec<_>>()
    })
    .await;
    let created = |id| (id, true, false);
    let expected = [0, 2, 1, 3, -1, i64::MIN, 4].map(created);
    assert_eq!(ids[..7], expected);
    assert_eq!(ids[7..], [(2, false, true), created(2)], "cancelling an unknown id is met with silence");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_below_the_compaction_is_created_and_then_canceled() {
    let responses = on_both(&twins().await, async |client| {
        for number in 0..10 {
            client.put("k", number.to_string()).await.unwrap();
        }
        client.compact(8).await.unwrap();
        let stream = WatchStream::open(&client).await;
        stream.create(WatchCreateRequest { watch_id: 7, ..create("k", "", 3) });
        stream.until_count(2).await;
        stream.create(WatchCreateRequest { watch_id: 7, ..create("k", "", 0) });
        stream.until_count(3).await;
        stream.cancel(7);
        stream.until_count(4).await
    })
    .await;
    let [created, canceled, duplicate, again] = &responses[..] else { panic!("four responses: {responses:?}") };
    assert!(created.created && !created.canceled && revision(created) == 11, "{created:?}");
    assert!(canceled.canceled && canceled.compact_revision == 8 && revision(canceled) == 0, "{canceled:?}");
    assert_eq!(canceled.cancel_reason, "", "etcd gives no reason here");
    assert_eq!(duplicate.watch_id, -1, "the id stays taken until the client cancels it");
    assert!(again.canceled && again.watch_id == 7 && again.compact_revision == 0, "{again:?}");
}

/// A quiet prefix was as old as its last event, and so was what its watchers were told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notifications_of_a_quiet_prefix_keep_up_with_the_cluster() {
    let cluster = Cluster::single(Release::newest()).await;
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--prefixes=k/", "--progress-interval=1s"]).await;
    let stream = WatchStream::open(&millpond.client()).await;
    stream.create(WatchCreateRequest { progress_notify: true, ..create("k/", "k0", 0) });
    stream.until_count(1).await;
    for _ in 0..2 {
        let present = cluster.client(0).put("other", "v").await.unwrap();
        let keeps_up = |all: &[WatchResponse]| all.iter().any(|one| !one.created && revision(one) >= present);
        stream.until("a notification of the present", keeps_up).await;
    }
    assert_eq!(stream.events().len(), 0);
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_at_the_compaction_is_valid() {
    let revisions = on_both(&twins().await, async |client| {
        for number in 0..10 {
            client.put("k", number.to_string()).await.unwrap();
        }
        client.delete("k").await.unwrap();
        client.compact(8).await.unwrap();
        let stream = WatchStream::open(&client).await;
        stream.create(create("k", "", 8));
        stream.until("events up to the delete", |all| all.iter().flat_map(|r| &r.events).count() >= 5).await;
        stream.events().iter().map(revision_of).collect::<Vec<_>>()
    })
    .await;
    assert_eq!(revisions, [8, 9, 10, 11, 12]);
}

/// A put that its own transaction deletes again is gone with the compaction of their revision; the deletion is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_at_the_compaction_shows_what_was_left_of_its_revision() {
    let events = on_both(&twins().await, async |client| {
        client.put("old", "1").await.unwrap();
        client.put("k", "0").await.unwrap();
        let put = |key: &'static str| {
            Request::RequestPut(pb::PutRequest { key: key.into(), value: "2".into(), ..Default::default() })
        };
        let delete =
            pb::DeleteRangeRequest { key: "k".into(), range_end: b"\0".as_slice().into(), ..Default::default() };
        let requests = [put("a"), put("k"), put("new"), Request::RequestDeleteRange(delete)];
        let success = requests.map(|request| RequestOp { request: Some(request) }).to_vec();
        let twice = client.kv.clone().txn(TxnRequest { success, ..Default::default() }).await.unwrap().into_inner();
        let revision = twice.header.unwrap().revision;
        client.put("z", "3").await.unwrap();
        let mut told = Vec::new();
        for compacted in [false, true] {
            if compacted {
                client.compact(revision).await.unwrap();
            }
            let stream = WatchStream::open(&client).await;
            stream.create(WatchCreateRequest { prev_kv: true, ..create("\0", "\0", revision) });
            stream
                .until("the last put", |all| all.iter().flat_map(|r| &r.events).any(|e| revision_of(e) > revision))
                .await;
            told.push(stream.events());
        }
        told
    })
    .await;
    let puts = |events: &[Event]| events.iter().filter(|event| event.r#type() == EventType::Put).count();
    assert_eq!((puts(&events[0]), events[0].len()), (4, 7), "before the compaction: a, k, new and z; three deletions");
    assert_eq!((puts(&events[1]), events[1].len()), (2, 5), "after it: a and z; the deletions");
    assert!(events[1].iter().all(|event| event.prev_kv.is_none()), "nothing is left from before it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_comes_whole_with_previous_records_and_what_filters_empty_is_not_sent() {
    let responses = on_both(&twins().await, async |client| {
        put_together(&client, &["a", "b", "c"], b"old").await;
        let stream = WatchStream::open(&client).await;
        stream.create(WatchCreateRequest { prev_kv: true, ..create("a", "c", 0) });
        stream.create(WatchCreateRequest { filters: vec![0], ..create("a", "z", 0) });
        stream.create(WatchCreateRequest { filters: vec![1], ..create("a", "z", 0) });
        stream.until_count(3).await;
        put_together(&client, &["a", "b", "c"], b"new").await;
        stream.until_count(5).await;
        client.delete("b").await.unwrap();
        stream.until_count(7).await;
        breathe(50).await;
        by_watcher(&stream.responses())
    })
    .await;
    let events = |id: i64| responses[&id].len() - 1;
    assert_eq!((events(0), events(1), events(2)), (3, 1, 3), "two puts and a delete; the delete; three puts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_events_come_under_their_own_revision_in_one_response_each() {
    let responses = on_both(&twins().await, async |client| {
        let stream = WatchStream::open(&client).await;
        stream.create(create("", "\0", 0));
        stream.until_count(1).await;
        for number in 0..20 {
            client.put(format!("k{}", number % 3), "v").await.unwrap();
            stream.until_count(2 + number).await;
        }
        stream.responses()
    })
    .await;
    for response in &responses[1..] {
        let [event] = &response.events[..] else { panic!("one event each: {response:?}") };
        assert_eq!(revision(response), revision_of(event));
    }
}

/// etcd takes minutes to cut such a response into fragments, so whoever is to relay it must not ask for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_deleted_at_once_are_one_response() {
    const KEYS: usize = 70_000;
    let deleted = on_both(&twins().await, async |client| {
        let keys: Vec<String> = (0..KEYS).map(|number| format!("m{number:024}")).collect();
        for some in keys.chunks(125) {
            put_together(&client, &some.iter().map(String::as_str).collect::<Vec<_>>(), b"").await;
        }
        let stream = WatchStream::watching(&client, create("m", "n", 0)).await;
        let range = pb::DeleteRangeRequest { key: "m".into(), range_end: "n".into(), ..Default::default() };
        let answer = client.kv.clone().delete_range(range).await.unwrap().into_inner();
        let responses = stream.until_count(2).await;
        let left =
            client.range(pb::RangeRequest { key: "m".into(), range_end: "n".into(), ..Default::default() }).await;
        (answer.deleted, responses[1].events.len(), left.unwrap().count)
    })
    .await;
    assert_eq!(deleted, (KEYS as i64, KEYS, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fragments_split_what_is_too_large_and_only_when_asked() {
    let twins = twins().await;
    let value = vec![b'x'; 700 * 1024];
    let events = on_both(&twins, async |client| {
        put_together(&client, &["a", "b"], &value).await;
        let stream = WatchStream::open(&client).await;
        stream.create(WatchCreateRequest { fragment: true, prev_kv: true, ..create("a", "c", 0) });
        stream.create(WatchCreateRequest { prev_kv: true, ..create("a", "c", 0) });
        stream.until_count(2).await;
        put_together(&client, &["a", "b"], &value).await;
        // From the past, over several revisions.
        let past = WatchStream::open(&client).await;
        past.create(WatchCreateRequest { fragment: true, ..create("a", "c", 2) });
        for stream in [&stream, &past] {
            stream.until("four events", |all| all.iter().flat_map(|r| &r.events).count() >= 4).await;
            check_fragments(&stream.responses());
        }
        let fragments = stream.responses().iter().filter(|response| response.fragment).count();
        let unasked = stream.responses().iter().any(|response| response.watch_id == 1 && response.fragment);
        assert!(fragments == 1 && !unasked, "one of two fragments says that more follows");
        (by_watcher(&stream.responses()), past.events())
    })
    .await;
    assert_eq!((events.0.len(), events.1.len()), (2, 4));
}

/// A fragment is no larger than the limit unless it holds a single event, and a last one follows.
fn check_fragments(responses: &[WatchResponse]) {
    const LIMIT: usize = 2 * 1024 * 1024;
    let mut of_fragmenting = responses.iter().filter(|response| response.watch_id == 0);
    for response in of_fragmenting.clone() {
        let size = prost::Message::encoded_len(response);
        assert!(size <= LIMIT || response.events.len() == 1, "{size} bytes with {} events", response.events.len());
    }
    assert!(of_fragmenting.next_back().is_some_and(|last| !last.fragment), "the last part says so");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_requests_are_answered_only_when_every_watcher_is_up_to_date() {
    let twins = twins().await;
    on_both(&twins, async |client| {
        let current = client.put("k", "v").await.unwrap();
        let stream = WatchStream::open(&client).await;
        stream.ask_progress();
        breathe(200).await;
        assert_eq!(stream.responses().len(), 0, "a stream without watchers stays silent");

        stream.create(create("k", "", 0));
        stream.until_count(1).await;
        stream.ask_progress();
        let answer = stream.until_count(2).await.pop().unwrap();
        assert!(answer.watch_id == -1 && revision(&answer) == current && !answer.created && !answer.canceled);

        stream.create(create("k", "", current + 100));
        stream.until_count(3).await;
        stream.ask_progress();
        breathe(300).await;
        assert_eq!(stream.responses().len(), 3, "a watcher that starts in the future keeps the stream silent");
        stream.responses()
    })
    .await;
}

/// The answer tells of everything that the client knew when it asked, though it saw nothing of it on the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_not_behind_what_the_client_was_told_before() {
    const ROUNDS: usize = 200;
    let twins = twins().await;
    on_both(&twins, async |client| {
        let stream = WatchStream::open(&client).await;
        stream.create(create("k", "", 0));
        stream.until_count(1).await;
        for round in 0..ROUNDS {
            let known = client.put("other", "v").await.unwrap();
            stream.ask_progress();
            let told = stream.until_count(2 + round).await.pop().map(|answer| revision(&answer));
            assert_eq!(told, Some(known));
        }
    })
    .await;
}

/// Etcd tells no progress to a watcher that begins in its future, which is where the watchers of clients who name no start begin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_of_what_is_not_cached_is_told_though_nothing_happens() {
    let cluster = Cluster::single(Release::newest()).await;
    let etcd = cluster.client(0);
    let mut millpond = Millpond::start(&cluster.endpoints(), &["--prefixes=k/"]).await;
    let stream = WatchStream::open(&millpond.client()).await;
    let mut expected = vec![etcd.put("other/last", "seen by nobody").await.unwrap()];
    stream.create(create("other/", "other0", 0));
    stream.until_count(1).await;
    for round in 1..4 {
        stream.ask_progress();
        let told = |all: &[pb::WatchResponse]| all.iter().filter(|one| one.watch_id == -1).count() >= round;
        stream.until("progress", told).await;
        let now = *expected.last().unwrap();
        assert_eq!(stream.responses().last().unwrap().header.as_ref().unwrap().revision, now);
        expected.push(etcd.put("other/next", "v").await.unwrap());
        stream.until("the event", |all| all.iter().map(|one| one.events.len()).sum::<usize>() == round).await;
    }
    assert_eq!(stream.revisions(), expected[1..], "nothing is sent twice");
    etcd.compact(*expected.last().unwrap()).await.unwrap();
    expected.push(etcd.put("other/next", "v").await.unwrap());
    stream.until_revisions(&expected[1..]).await;
    millpond.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_never_overtakes_an_event() {
    let twins = twins().await;
    let client = twins.subject.client();
    let stream = WatchStream::open(&client).await;
    stream.create(create("k", "", 0));
    stream.until_count(1).await;
    for number in 0..300 {
        // Written elsewhere, so that only the feed can tell the proxy of it.
        let writer = twins.subject.etcd.client(0);
        writer.put(if number % 2 == 0 { "k" } else { "other" }, "v").await.unwrap();
        stream.ask_progress();
    }
    stream.until("all events", |all| all.iter().flat_map(|r| &r.events).count() >= 150).await;
    let mut proven = 0;
    let mut answers = 0;
    for response in stream.responses() {
        for event in &response.events {
            assert!(revision_of(event) > proven, "revision {} comes after progress {proven}", revision_of(event));
        }
        if response.watch_id == -1 {
            proven = revision(&response);
            answers += 1;
        }
    }
    assert!(answers > 0, "some requests were answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quiet_watchers_that_ask_for_it_hear_of_progress() {
    let twins = Twins::with_progress_interval(&Release::newest(), Duration::from_millis(500)).await;
    let ids = on_both(&twins, async |client| {
        let current = client.put("k", "v").await.unwrap();
        let stream = WatchStream::open(&client).await;
        for progress_notify in [true, false, true] {
            stream.create(WatchCreateRequest { progress_notify, ..create("k", "", 0) });
        }
        stream.until("three notifications", |all| all.len() >= 3 + 3).await;
        let mut notified: Vec<i64> = Vec::new();
        for response in stream.responses().iter().skip(3) {
            assert!(response.events.is_empty() && revision(response) == current, "{response:?}");
            notified.push(response.watch_id);
        }
        notified.sort_unstable();
        notified.dedup();
        notified
    })
    .await;
    assert_eq!(ids, [0, 2]);
}

/// A quiet watcher was told the revision of the tick before, so it always stood one interval back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notification_tells_of_writes_that_the_watcher_does_not_see() {
    let twins = Twins::with_progress_interval(&Release::newest(), Duration::from_secs(2)).await;
    on_both(&twins, async |client| {
        client.put("k", "v").await.unwrap();
        let stream = WatchStream::open(&client).await;
        stream.create(WatchCreateRequest { progress_notify: true, ..create("k", "", 0) });
        stream.until_count(2).await;
        // The next tick is far away.
        let written = client.put("other", "v").await.unwrap();
        stream.until_count(3).await;
        assert_eq!(stream.responses().last().map(revision), Some(written));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_close_ends_nothing_and_hasleader_is_served() {
    let twins = twins().await;
    on_both(&twins, async |client| {
        let mut stream = WatchStream::open_with(&client, &[("hasleader", "true")]).await;
        stream.create(create("k", "", 0));
        stream.until_count(1).await;
        stream.finish();
        breathe(100).await;
        client.put("k", "v").await.unwrap();
        stream.until_count(2).await;
        assert!(stream.end().is_none());
        stream.responses()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_is_seen_by_a_watch_from_its_revision_and_not_by_one_opened_after_it() {
    let twins = twins().await;
    on_both(&twins, async |client| {
        for number in 0..50 {
            let written = client.put("k", number.to_string()).await.unwrap();
            let stream = WatchStream::open(&client).await;
            stream.create(create("k", "", 0));
            stream.create(create("k", "", written));
            stream.until("the event", |all| all.iter().any(|response| !response.events.is_empty())).await;
            let after = client.put("k", "after").await.unwrap();
            stream.until("both", |all| all.iter().flat_map(|r| &r.events).count() >= 3).await;
            let told = by_watcher(&stream.responses());
            let seen: Vec<usize> = told.values().map(Vec::len).collect();
            assert_eq!(seen, [2, 3], "watcher 0: created, {after}; watcher 1: created, {written}, {after}: {told:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_watchers_see_everything_and_cost_the_upstream_one_watch() {
    const STREAMS: usize = 50;
    const WATCHERS: usize = 40;
    const WRITES: usize = 25;
    let mut twins = twins().await;
    let client = twins.subject.client();
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let stream = WatchStream::open(&client).await;
        for number in 0..WATCHERS {
            let request = if number % 2 == 0 { create("k/", "k0", 0) } else { create(format!("k/{number}"), "", 0) };
            stream.create(request);
        }
        streams.push(stream);
    }
    for stream in &streams {
        stream.until_count(WATCHERS).await;
    }
    let writer = twins.subject.etcd.client(0);
    for number in 0..WRITES {
        writer.put(format!("k/{number}"), "v").await.unwrap();
    }
    let single = (0..WRITES).filter(|number| number % 2 == 1).count();
    let due = WRITES * WATCHERS / 2 + single;
    for stream in &streams {
        stream.until("every event", |all| all.iter().flat_map(|r| &r.events).count() >= due).await;
        let told = by_watcher(&stream.responses());
        assert_eq!(told.len(), WATCHERS);
        assert_eq!(stream.events().len(), due, "nothing comes twice");
        assert!(stream.events().iter().all(|event| event.r#type == EventType::Put as i32));
    }
    if Kind::chosen() == Kind::Proxy {
        let (_, metrics) = http_get(&twins.subject.etcd.endpoint(0), "/metrics").await.unwrap();
        let watchers = metrics.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "));
        let watchers: f64 = watchers.expect("etcd counts its watchers").parse().unwrap();
        assert!(watchers <= 2.0, "{watchers} watches upstream for {} of clients", STREAMS * WATCHERS);
    }
    twins.subject.assert_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_gone_by_cancel_or_disconnect_hear_nothing_and_others_go_on() {
    let twins = twins().await;
    let client = twins.subject.client();
    let staying = WatchStream::open(&client).await;
    staying.create(create("k", "", 0));
    staying.create(create("k", "", 0));
    staying.until_count(2).await;
    for _ in 0..50 {
        let leaving = WatchStream::open(&client).await;
        leaving.create(create("k", "", 0));
        leaving.until_count(1).await;
    }
    staying.cancel(0);
    staying.until_count(3).await;
    client.put("k", "v").await.unwrap();
    let last = eventually("the event", async || staying.responses().get(3).cloned()).await;
    assert_eq!((last.watch_id, last.events.len()), (1, 1));
    breathe(50).await;
    assert_eq!(staying.responses().len(), 4, "the cancelled watcher hears nothing more");
}
