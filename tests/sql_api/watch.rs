//! Watch streams.

use std::time::Duration;

use millpond::{
    proto::{
        etcdserverpb::{
            DeleteRangeRequest, RequestOp, TxnRequest, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest,
            WatchRequest, WatchResponse, request_op::Request, watch_request::RequestUnion,
        },
        mvccpb::Event,
    },
    sql::Options,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::store::{Result, Store, bytes, put, soon};

/// An open watch stream.
pub struct Stream {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Stream {
    pub async fn open(store: &Store) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(16);
        let responses = store.watch().watch(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests, responses })
    }

    async fn ask(&self, request: RequestUnion) -> Result {
        Ok(self.requests.send(WatchRequest { request_union: Some(request) }).await?)
    }

    pub async fn next(&mut self) -> Result<WatchResponse> {
        Ok(soon(self.responses.message()).await??.ok_or("the stream ended")?)
    }

    /// Creates a watch and returns the response to that.
    pub async fn create(&mut self, request: WatchCreateRequest) -> Result<WatchResponse> {
        self.ask(RequestUnion::CreateRequest(request)).await?;
        self.next().await
    }

    async fn cancel(&self, watch_id: i64) -> Result {
        self.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id })).await
    }

    async fn progress(&self) -> Result {
        self.ask(RequestUnion::ProgressRequest(WatchProgressRequest {})).await
    }

    async fn is_silent(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.responses.message()).await.is_err()
    }

    /// The events up to `count`, over as many responses as it takes.
    async fn events(&mut self, count: usize) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        while events.len() < count {
            events.extend(self.next().await?.events);
        }
        Ok(events)
    }
}

fn all() -> WatchCreateRequest {
    WatchCreateRequest { key: bytes("\0"), range_end: bytes("\0"), ..Default::default() }
}

fn from(start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { start_revision, ..all() }
}

fn header(response: &WatchResponse) -> i64 {
    response.header.as_ref().map_or(-1, |header| header.revision)
}

fn brief(events: &[Event]) -> Vec<(i32, String, i64)> {
    let kv = |event: &Event| event.kv.clone().unwrap_or_default();
    let brief =
        |event: &Event| (event.r#type, String::from_utf8_lossy(&kv(event).key).into_owned(), kv(event).mod_revision);
    events.iter().map(brief).collect()
}

#[tokio::test]
async fn live_events_come_one_revision_at_a_time() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    let created = stream.create(all()).await?;
    assert!(created.created && !created.canceled && created.watch_id == 0 && header(&created) == 1);
    store.put("a", "1").await?;
    store.put("b", "2").await?;
    store.delete("\0", "\0").await?;
    for (revision, expected) in [
        (2, vec![(0, "a".to_owned(), 2)]),
        (3, vec![(0, "b".to_owned(), 3)]),
        (4, vec![(1, "a".to_owned(), 4), (1, "b".to_owned(), 4)]),
    ] {
        let response = stream.next().await?;
        assert_eq!((header(&response), brief(&response.events)), (revision, expected));
    }
    Ok(())
}

#[tokio::test]
async fn a_watch_from_the_past_gets_everything_since() -> Result {
    let store = Store::with(Options { history_bytes: 1, ..Options::default() }).await?;
    for round in 0..50 {
        store.put(&format!("k{round}"), "v").await?;
    }
    let mut stream = Stream::open(&store).await?;
    stream.create(from(2)).await?;
    let events = stream.events(50).await?;
    assert_eq!(brief(&events), (0..50).map(|n| (0, format!("k{n}"), n + 2)).collect::<Vec<_>>());
    store.put("live", "v").await?;
    let live = stream.next().await?;
    assert_eq!((header(&live), brief(&live.events)), (52, vec![(0, "live".to_owned(), 52)]));
    let mut late = Stream::open(&store).await?;
    late.create(WatchCreateRequest { key: bytes("k40"), range_end: bytes("k42"), ..from(10) }).await?;
    assert_eq!(brief(&late.events(2).await?), [(0, "k40".to_owned(), 42), (0, "k41".to_owned(), 43)]);
    Ok(())
}

#[tokio::test]
async fn a_watch_from_the_future_stays_quiet_until_then() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    stream.create(from(4)).await?;
    stream.progress().await?;
    for key in ["a", "b", "c"] {
        store.put(key, "v").await?;
    }
    let first = stream.next().await?;
    assert_eq!((header(&first), brief(&first.events)), (4, vec![(0, "c".to_owned(), 4)]));
    stream.progress().await?;
    let progress = stream.next().await?;
    assert_eq!((progress.watch_id, header(&progress), progress.events.len()), (-1, 4, 0));
    Ok(())
}

#[tokio::test]
async fn ids_are_picked_or_taken_as_given() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    let mut create = async |watch_id| stream.create(WatchCreateRequest { watch_id, ..all() }).await;
    assert_eq!(create(1).await?.watch_id, 1);
    assert_eq!(create(0).await?.watch_id, 0);
    assert_eq!(create(0).await?.watch_id, 2);
    assert_eq!(create(-5).await?.watch_id, -5);
    let refused = create(2).await?;
    assert_eq!((refused.watch_id, refused.created, refused.canceled), (-1, true, true));
    assert_eq!(refused.cancel_reason, "mvcc: duplicate watch ID provided on the WatchStream");
    Ok(())
}

#[tokio::test]
async fn refused_watches_leave_the_stream_open() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    let negative = stream.create(from(-1)).await?;
    assert_eq!(negative.cancel_reason, "etcdserver: mvcc: required revision has been compacted");
    assert_eq!((negative.watch_id, negative.created, negative.canceled), (-1, true, true));
    assert_eq!((header(&negative), negative.compact_revision), (1, 0));
    let empty = WatchCreateRequest { key: bytes("b"), range_end: bytes("a"), ..Default::default() };
    assert_eq!(stream.create(empty).await?.cancel_reason, "mvcc: watcher range is empty");
    stream.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 77 })).await?;
    stream.requests.send(WatchRequest::default()).await?;
    assert_eq!(stream.create(all()).await?.watch_id, 0);
    Ok(())
}

#[tokio::test]
async fn a_cancelled_watch_says_so_and_nothing_after() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    stream.create(all()).await?;
    stream.cancel(0).await?;
    let canceled = stream.next().await?;
    assert!(canceled.canceled && !canceled.created && canceled.cancel_reason.is_empty());
    store.put("a", "1").await?;
    assert!(stream.is_silent().await);
    assert_eq!(stream.create(WatchCreateRequest { watch_id: 0, ..all() }).await?.watch_id, 1);
    Ok(())
}

#[tokio::test]
async fn a_compacted_start_is_cancelled_after_its_creation() -> Result {
    let store = Store::open().await?;
    for _ in 0..4 {
        store.put("a", "v").await?;
    }
    store.compact(4).await?;
    let mut stream = Stream::open(&store).await?;
    let created = stream.create(from(3)).await?;
    assert!(created.created && !created.canceled);
    let canceled = stream.next().await?;
    assert_eq!((canceled.canceled, canceled.compact_revision, header(&canceled)), (true, 4, 0));
    assert_eq!((canceled.watch_id, canceled.cancel_reason.as_str()), (0, ""));
    let duplicate = stream.create(WatchCreateRequest { watch_id: 0, ..all() }).await?;
    assert_eq!(duplicate.watch_id, 1, "the id of a compacted watch stays taken");
    stream.progress().await?;
    stream.cancel(0).await?;
    assert!(stream.next().await?.canceled, "no progress while a compacted watch is on the stream");
    let at_compaction = stream.create(from(4)).await?;
    assert!(at_compaction.created && !at_compaction.canceled);
    assert_eq!(brief(&stream.events(2).await?), [(0, "a".to_owned(), 4), (0, "a".to_owned(), 5)]);
    Ok(())
}

#[tokio::test]
async fn a_deletion_at_the_compacted_revision_is_still_seen() -> Result {
    let store = Store::with(Options { history_bytes: 1, ..Options::default() }).await?;
    store.put("a", "v").await?;
    store.delete("a", "").await?;
    store.put("b", "v").await?;
    store.compact(3).await?;
    let mut stream = Stream::open(&store).await?;
    stream.create(from(3)).await?;
    assert_eq!(brief(&stream.events(2).await?), [(1, "a".to_owned(), 3), (0, "b".to_owned(), 4)]);
    store.compact(4).await?;
    assert_eq!(store.range(crate::store::everything()).await?.count, 1);
    Ok(())
}

#[tokio::test]
async fn previous_pairs_come_where_there_is_one() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    store.put("a", "2").await?;
    store.delete("a", "").await?;
    for start in [2, 0] {
        let mut stream = Stream::open(&store).await?;
        stream.create(WatchCreateRequest { prev_kv: true, ..from(start) }).await?;
        if start == 0 {
            store.put("a", "1").await?;
            store.put("a", "2").await?;
            store.delete("a", "").await?;
        }
        let events = stream.events(3).await?;
        let previous: Vec<_> = events.iter().map(|event| event.prev_kv.as_ref().map(|kv| kv.value.clone())).collect();
        assert_eq!(previous, [None, Some(bytes("1")), Some(bytes("2"))], "start {start}");
        let deletion = events.last().and_then(|event| event.kv.clone()).ok_or("no event")?;
        assert_eq!((deletion.create_revision, deletion.version, deletion.value.len()), (0, 0, 0));
    }
    Ok(())
}

#[tokio::test]
async fn filters_leave_events_out_and_empty_responses_unsent() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    stream.create(WatchCreateRequest { filters: vec![0], ..all() }).await?;
    stream.create(WatchCreateRequest { filters: vec![1], ..all() }).await?;
    store.put("a", "1").await?;
    store.delete("a", "").await?;
    let (put, deleted) = (stream.next().await?, stream.next().await?);
    assert_eq!((put.watch_id, brief(&put.events)), (1, vec![(0, "a".to_owned(), 2)]));
    assert_eq!((deleted.watch_id, brief(&deleted.events)), (0, vec![(1, "a".to_owned(), 3)]));
    Ok(())
}

#[tokio::test]
async fn progress_is_told_after_all_events_before_it() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    stream.progress().await?;
    let created = stream.create(all()).await?;
    assert!(created.created, "a stream without watchers says nothing about progress");
    for round in 1..=50 {
        store.put("a", &round.to_string()).await?;
        stream.progress().await?;
        let (mut seen, mut told) = (false, false);
        while !told {
            let response = stream.next().await?;
            seen |=
                response.events.iter().any(|event| event.kv.as_ref().is_some_and(|kv| kv.mod_revision == round + 1));
            told = response.watch_id == -1;
            assert!(!told || (seen && header(&response) == round + 1));
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_quiet_watch_is_notified_in_its_interval() -> Result {
    let options = Options { progress_interval: Duration::from_millis(100), ..Options::default() };
    let store = Store::with(options).await?;
    let mut stream = Stream::open(&store).await?;
    stream.create(WatchCreateRequest { progress_notify: true, watch_id: 5, ..all() }).await?;
    let notified = stream.next().await?;
    assert_eq!((notified.watch_id, notified.events.len(), header(&notified)), (5, 0, 1));
    Ok(())
}

#[tokio::test]
async fn a_large_revision_is_cut_only_on_request() -> Result {
    let store = Store::open().await?;
    for round in 0..4 {
        store.put(&format!("k{round}"), &"v".repeat(1 << 20)).await?;
    }
    store.delete("\0", "\0").await?;
    for (fragment, expected) in [(false, vec![(4, false)]), (true, vec![(1, true), (1, true), (1, true), (1, false)])] {
        let mut stream = Stream::open(&store).await?;
        stream.create(WatchCreateRequest { fragment, prev_kv: true, ..from(6) }).await?;
        let mut seen = Vec::new();
        while seen.iter().map(|(count, _)| count).sum::<usize>() < 4 {
            let response = stream.next().await?;
            seen.push((response.events.len(), response.fragment));
        }
        assert_eq!(seen, expected);
    }
    Ok(())
}

#[tokio::test]
async fn the_events_of_a_transaction_arrive_whole() -> Result {
    let store = Store::open().await?;
    let mut stream = Stream::open(&store).await?;
    stream.create(all()).await?;
    store.put("gone", "v").await?;
    let op = |request| RequestOp { request: Some(request) };
    let success = vec![
        op(Request::RequestPut(put("b", "1"))),
        op(Request::RequestDeleteRange(DeleteRangeRequest { key: bytes("gone"), ..Default::default() })),
        op(Request::RequestPut(put("a", "1"))),
    ];
    store.kv().txn(TxnRequest { success, ..Default::default() }).await?;
    stream.next().await?;
    let response = stream.next().await?;
    let expected = [(0, "b".to_owned(), 3), (1, "gone".to_owned(), 3), (0, "a".to_owned(), 3)];
    assert_eq!(brief(&response.events), expected);
    Ok(())
}

#[tokio::test]
async fn a_half_closed_stream_goes_on_and_closing_the_store_ends_it() -> Result {
    let store = Store::open().await?;
    let Stream { requests, mut responses } = Stream::open(&store).await?;
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(all())) }).await?;
    drop(requests);
    assert!(soon(responses.message()).await??.is_some_and(|response| response.created));
    store.put("a", "1").await?;
    assert_eq!(soon(responses.message()).await??.map(|response| response.events.len()), Some(1));
    store.engine.close().await;
    let status = soon(responses.message()).await?.err().ok_or("the stream went on")?;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: server stopped"));
    Ok(())
}
