//! One Watch stream as a test sees it, and its responses as comparable items.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use millpond::proto::{
    etcdserverpb::{self as pb, watch_request::RequestUnion},
    mvccpb::Event,
};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;

use super::client::{Client, eventually};

/// What has come back on a stream so far.
#[derive(Debug, Default)]
struct Received {
    responses: Vec<pb::WatchResponse>,
    /// How the stream ended, once it has.
    end: Option<Result<(), tonic::Status>>,
}

/// An open Watch stream whose responses are collected.
pub struct WatchStream {
    requests: Option<mpsc::Sender<pb::WatchRequest>>,
    received: Arc<Mutex<Received>>,
    reading: JoinHandle<()>,
}

impl WatchStream {
    pub async fn open(client: &Client) -> Self {
        Self::open_with(client, &[]).await
    }

    /// Opens a stream with request metadata, such as `hasleader` or `token`.
    pub async fn open_with(client: &Client, metadata: &[(&'static str, &str)]) -> Self {
        let (requests, outgoing) = mpsc::channel(4096);
        let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
        for (name, value) in metadata {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let received = Arc::new(Mutex::new(Received::default()));
        // etcd answers with headers at once only for some streams, so the call itself belongs to the reader.
        let reading = tokio::spawn(read(client.clone(), request, Arc::clone(&received)));
        Self { requests: Some(requests), received, reading }
    }

    /// Opens a stream of a client's with one watcher, which has been created.
    pub async fn watching(client: &Client, request: pb::WatchCreateRequest) -> Self {
        let stream = Self::open(client).await;
        stream.create(request);
        stream.until_count(1).await;
        stream
    }

    pub fn send(&self, request: RequestUnion) {
        self.send_raw(pb::WatchRequest { request_union: Some(request) });
    }

    /// Sends a request as it is, an empty one too.
    pub fn send_raw(&self, request: pb::WatchRequest) {
        let sent = self.requests.as_ref().expect("requests are not finished").try_send(request);
        // A stream that the server has ended shows it in `end`.
        assert!(!matches!(sent, Err(TrySendError::Full(_))), "the server takes no more requests");
    }

    pub fn create(&self, request: pb::WatchCreateRequest) {
        self.send(RequestUnion::CreateRequest(request));
    }

    pub fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id }));
    }

    pub fn ask_progress(&self) {
        self.send(RequestUnion::ProgressRequest(pb::WatchProgressRequest {}));
    }

    /// Half-closes the stream.
    pub fn finish(&mut self) {
        self.requests = None;
    }

    /// Every response so far.
    pub fn responses(&self) -> Vec<pb::WatchResponse> {
        self.received.lock().unwrap().responses.clone()
    }

    /// How the stream ended, once it has.
    pub fn end(&self) -> Option<Result<(), tonic::Status>> {
        self.received.lock().unwrap().end.clone()
    }

    /// Every event so far, over all watchers.
    pub fn events(&self) -> Vec<Event> {
        self.received.lock().unwrap().responses.iter().flat_map(|response| response.events.clone()).collect()
    }

    /// Waits until the responses satisfy `enough`.
    pub async fn until(&self, what: &str, enough: impl Fn(&[pb::WatchResponse]) -> bool) {
        eventually(what, async || {
            let received = self.received.lock().unwrap();
            if enough(&received.responses) {
                return Some(());
            }
            assert!(received.end.is_none(), "{what}: the stream ended with {:?}", received.end);
            None
        })
        .await;
    }

    /// Waits for at least this many responses.
    pub async fn until_count(&self, count: usize) -> Vec<pb::WatchResponse> {
        self.until(&format!("{count} watch responses"), |responses| responses.len() >= count).await;
        self.responses()
    }

    /// Waits for as many events as are expected: those of these revisions, in this order, and no others.
    pub async fn until_revisions(&self, expected: &[i64]) {
        let count = |responses: &[pb::WatchResponse]| responses.iter().map(|one| one.events.len()).sum::<usize>();
        self.until("all events", |responses| count(responses) >= expected.len()).await;
        assert_eq!(self.revisions(), expected);
    }

    /// The revision of every event so far.
    pub fn revisions(&self) -> Vec<i64> {
        self.events().iter().map(revision_of).collect()
    }

    /// Waits for the end of the stream.
    pub async fn until_end(&self) -> Result<(), tonic::Status> {
        eventually("the end of the watch stream", async || self.end()).await
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

async fn read(
    mut client: Client,
    request: tonic::Request<ReceiverStream<pb::WatchRequest>>,
    received: Arc<Mutex<Received>>,
) {
    let end = async {
        let mut answers = client.watch.watch(request).await?.into_inner();
        while let Some(response) = answers.message().await? {
            received.lock().unwrap().responses.push(response);
        }
        Ok(())
    };
    let end = end.await;
    received.lock().unwrap().end = Some(end);
}

/// A part of what a watcher was told, independent of how events were batched into responses.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// A response without events: created, canceled or progress.
    Control(Box<pb::WatchResponse>),
    /// One event, and the header under which it came.
    Event { header: pb::ResponseHeader, event: Box<Event> },
}

impl Item {
    /// The revision of a progress notification, or of the answer to a request for one.
    pub fn progress(&self) -> Option<i64> {
        match self {
            Self::Control(response) if !response.created && !response.canceled => Some(response.header?.revision),
            _ => None,
        }
    }

    /// Whether they are the same, but for a previous record that was compacted away while the watcher was behind: etcd
    /// leaves it out then.
    pub fn agrees_with(&self, found: &Self) -> bool {
        match (self, found) {
            (Self::Event { header, event }, Self::Event { header: other_header, event: other }) => {
                let mut event = event.clone();
                if event.prev_kv.is_none() && !is_create(&event) {
                    event.prev_kv.clone_from(&other.prev_kv);
                }
                header == other_header && event == *other
            }
            _ => self == found,
        }
    }
}

fn is_create(event: &Event) -> bool {
    event.kv.as_ref().is_some_and(|record| record.version == 1)
}

/// What each watcher was told, in order, by watch id. Fails on what no server may do: a revision split over responses
/// that are no fragments, events out of order, a header older than an event under it.
pub fn by_watcher(responses: &[pb::WatchResponse]) -> BTreeMap<i64, Vec<Item>> {
    let mut watchers: BTreeMap<i64, Vec<Item>> = BTreeMap::new();
    let mut last_whole: BTreeMap<i64, i64> = BTreeMap::new();
    for response in responses {
        check_order(response, last_whole.entry(response.watch_id).or_default());
        let items = watchers.entry(response.watch_id).or_default();
        if response.events.is_empty() {
            items.push(Item::Control(Box::new(response.clone())));
            if response.canceled {
                last_whole.remove(&response.watch_id);
            }
        }
        let header = response.header.expect("every watch response has a header");
        items.extend(response.events.iter().map(|event| Item::Event { header, event: Box::new(event.clone()) }));
    }
    watchers
}

/// Checks a response's events against the highest revision that the watcher has been sent whole.
fn check_order(response: &pb::WatchResponse, last_whole: &mut i64) {
    let revisions: Vec<i64> = response.events.iter().map(revision_of).collect();
    assert!(revisions.is_sorted(), "events out of order: {response:?}");
    let (Some(first), Some(last)) = (revisions.first(), revisions.last()) else { return };
    assert!(first > last_whole, "revision {first} comes after {last_whole} was complete: {response:?}");
    let header = response.header.expect("every watch response has a header").revision;
    assert!(header >= *last, "the header says {header}, an event {last}");
    if !response.fragment {
        *last_whole = *last;
    }
}

/// The revision of an event.
pub fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().expect("every event has a record").mod_revision
}

/// A watch of `key` to `range_end` from `start_revision`.
pub fn create(key: impl Into<Bytes>, range_end: impl Into<Bytes>, start_revision: i64) -> pb::WatchCreateRequest {
    pb::WatchCreateRequest { key: key.into(), range_end: range_end.into(), start_revision, ..Default::default() }
}
