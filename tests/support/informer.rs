//! A client that lists a range page by page and then follows it with a watch, as Kubernetes' informers do, and checks on
//! the way that it is told every change once and in order.
//!
//! A gap shows at once: an update's version must be one above the version that is known, a create's key must be unknown,
//! a delete's known.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use millpond::proto::{
    etcdserverpb as pb,
    mvccpb::{Event, KeyValue, event::EventType},
};
use tokio::{
    task::JoinHandle,
    time::{Duration, sleep, timeout},
};
use tonic::{Code, Status};

use super::{
    client::{Client, PATIENCE, eventually},
    operation::range,
    watching::{create, revision_of},
};

/// A record without its value's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub create_revision: i64,
    pub mod_revision: i64,
    pub version: i64,
    value: u64,
}

impl From<&KeyValue> for Record {
    fn from(kv: &KeyValue) -> Self {
        let mut hasher = DefaultHasher::new();
        kv.value.hash(&mut hasher);
        Self {
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            version: kv.version,
            value: hasher.finish(),
        }
    }
}

/// The keys of a range and what is known of each.
pub type Contents = BTreeMap<Bytes, Record>;

/// Lists a range in pages at one revision, as a Kubernetes client does: the revision, and what was there.
pub async fn list(client: &Client, key: &Bytes, end: &Bytes, page: i64) -> Result<(i64, Contents), Status> {
    let mut contents = Contents::new();
    let mut pinned = 0;
    let mut from = key.clone();
    loop {
        let request =
            pb::RangeRequest { limit: page, revision: pinned, serializable: true, ..range(from.clone(), end.clone()) };
        let answer = client.range(request).await?;
        let header = answer.header.expect("a range's answer has a header");
        assert!(header.revision >= pinned, "the header is older than the revision that was read");
        if pinned == 0 {
            pinned = header.revision;
        }
        check_page(&answer, &contents, page, pinned);
        contents.extend(answer.kvs.iter().map(|kv| (kv.key.clone(), Record::from(kv))));
        match answer.kvs.last() {
            Some(last) if answer.more => from = [&last.key[..], b"\0"].concat().into(),
            _ => return Ok((pinned, contents)),
        }
    }
}

fn check_page(answer: &pb::RangeResponse, before: &Contents, page: i64, pinned: i64) {
    let keys: Vec<&Bytes> = answer.kvs.iter().map(|kv| &kv.key).collect();
    assert!(keys.is_sorted_by(|left, right| left < right), "a page is sorted");
    assert!(before.keys().next_back() < keys.first().copied() || keys.is_empty(), "pages do not overlap");
    assert!(answer.kvs.iter().all(|kv| kv.mod_revision <= pinned), "nothing is newer than the pinned revision");
    let (length, count) = (keys.len() as i64, answer.count);
    let full = answer.more && length == page && count > length;
    assert!(full || !answer.more && count == length, "count {count} and more {} with {length} keys", answer.more);
}

/// What an informer knows and has been through.
#[derive(Debug, Default)]
pub struct State {
    pub revision: i64,
    pub contents: Contents,
    pub events: usize,
    /// Lists because a watch was cancelled by a compaction.
    pub relists: usize,
    /// Streams opened anew because one broke.
    pub reconnects: usize,
    /// What the server did that it must not.
    pub breach: Option<String>,
}

impl State {
    fn apply(&mut self, event: &Event) -> Result<(), String> {
        let kv = event.kv.as_ref().ok_or("an event without a record")?;
        let known = self.contents.get(&kv.key);
        if event.r#type == EventType::Delete as i32 {
            known.ok_or_else(|| format!("the delete of an unknown key: {event:?}"))?;
            self.contents.remove(&kv.key);
        } else {
            check_put(known, kv).map_err(|what| format!("{what}: known {known:?}, event {event:?}"))?;
            self.contents.insert(kv.key.clone(), Record::from(kv));
        }
        self.events += 1;
        Ok(())
    }

    /// Takes a response's events; the error says what is wrong with them.
    pub fn apply_all(&mut self, events: &[Event]) -> Result<(), String> {
        for event in events {
            let revision = revision_of(event);
            if revision <= self.revision {
                return Err(format!("revision {revision} again, or late, after {}", self.revision));
            }
            self.apply(event)?;
        }
        self.revision = events.last().map_or(self.revision, revision_of);
        Ok(())
    }
}

fn check_put(known: Option<&Record>, kv: &KeyValue) -> Result<(), &'static str> {
    match known {
        None if kv.version == 1 && kv.create_revision == kv.mod_revision => Ok(()),
        None => Err("an update of an unknown key"),
        Some(_) if kv.version == 1 => Err("the create of a known key"),
        Some(known) if kv.version != known.version + 1 => Err("an update is missing"),
        Some(known) if kv.create_revision != known.create_revision => Err("another create revision"),
        Some(_) => Ok(()),
    }
}

/// A running informer.
pub struct Informer {
    pub key: Bytes,
    pub end: Bytes,
    state: Arc<Mutex<State>>,
    following: JoinHandle<()>,
}

impl Informer {
    /// Lists, then follows until dropped. Broken streams are opened again where they ended.
    pub fn start(client: Client, key: impl Into<Bytes>, end: impl Into<Bytes>) -> Self {
        let (key, end) = (key.into(), end.into());
        let state = Arc::new(Mutex::new(State::default()));
        let following = tokio::spawn(follow(client, key.clone(), end.clone(), Arc::clone(&state)));
        Self { key, end, state, following }
    }

    /// Looks at the state.
    pub fn look<T>(&self, at: impl FnOnce(&State) -> T) -> T {
        let state = self.state.lock().unwrap();
        assert!(state.breach.is_none(), "the watcher of {:?} was misled: {:?}", self.key, state.breach);
        assert!(!self.following.is_finished(), "the informer's own task ended");
        at(&state)
    }

    /// Waits until the first list is there.
    pub async fn listed(&self) {
        eventually("an informer's first list", async || (self.look(|state| state.revision) > 0).then_some(())).await;
    }

    /// Waits until the informer knows exactly what `upstream` has of its range. That is looked up again each time: a
    /// write whose client went away may still come, and a member may still lag.
    pub async fn until_equal(&self, upstream: &Client) {
        let mut apart = String::new();
        let equal = timeout(PATIENCE, async {
            while let Some(now) = self.apart_from(upstream).await {
                apart = now;
                sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(equal.await.is_ok(), "the watcher of {:?} stays apart from the upstream: {apart}", self.key);
    }

    /// What the informer knows otherwise than `upstream`, if there is anything.
    async fn apart_from(&self, upstream: &Client) -> Option<String> {
        let (revision, expected) = match list(upstream, &self.key, &self.end, 500).await {
            Ok(listed) => listed,
            Err(status) => return Some(format!("it cannot be listed: {status:?}")),
        };
        self.look(|state| {
            let known = &state.contents;
            let differing = |key: &&Bytes| known.get(*key) != expected.get(*key);
            let keys: BTreeSet<&Bytes> = known.keys().chain(expected.keys()).filter(differing).collect();
            let pairs: Vec<_> = keys.iter().map(|key| (*key, known.get(*key), expected.get(*key))).collect();
            let (count, at, first) = (pairs.len(), state.revision, pairs.first());
            first.map(|first| format!("{count} keys, at {at} and {revision}; the first, known and there: {first:?}"))
        })
    }
}

impl Drop for Informer {
    fn drop(&mut self) {
        self.following.abort();
    }
}

/// Why following a range paused.
enum Pause {
    /// The stream broke: go on where it ended.
    Broken,
    /// What comes next was compacted: list anew.
    Compacted,
    /// The server did what it must not.
    Breach(String),
}

async fn follow(client: Client, key: Bytes, end: Bytes, state: Arc<Mutex<State>>) {
    relist(&client, &key, &end, &state).await;
    loop {
        match watch(&client, &key, &end, &state).await {
            Pause::Broken => state.lock().unwrap().reconnects += 1,
            Pause::Compacted => relist(&client, &key, &end, &state).await,
            Pause::Breach(what) => {
                state.lock().unwrap().breach = Some(what);
                return std::future::pending().await;
            }
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn relist(client: &Client, key: &Bytes, end: &Bytes, state: &Mutex<State>) {
    loop {
        match list(client, key, end, 500).await {
            Ok((revision, contents)) => {
                let mut state = state.lock().unwrap();
                state.relists += usize::from(state.revision > 0);
                (state.revision, state.contents) = (revision, contents);
                return;
            }
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn watch(client: &Client, key: &Bytes, end: &Bytes, state: &Mutex<State>) -> Pause {
    let start = state.lock().unwrap().revision + 1;
    let request = pb::watch_request::RequestUnion::CreateRequest(create(key.clone(), end.clone(), start));
    // The request stream stays open for as long as the watch.
    let requests = tokio_stream::StreamExt::chain(
        tokio_stream::once(pb::WatchRequest { request_union: Some(request) }),
        tokio_stream::pending(),
    );
    let mut responses = match client.watch.clone().watch(requests).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return pause_of(&status),
    };
    loop {
        let response = match responses.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Pause::Broken,
            Err(status) => return pause_of(&status),
        };
        if response.canceled && response.compact_revision > 0 {
            return Pause::Compacted;
        }
        if response.canceled {
            return Pause::Breach(format!("cancelled without a reason to: {response:?}"));
        }
        if let Err(what) = state.lock().unwrap().apply_all(&response.events) {
            return Pause::Breach(what);
        }
    }
}

/// The codes on which the Go client resumes a watch, and those that a broken connection has in this client.
fn pause_of(status: &Status) -> Pause {
    match status.code() {
        Code::Unavailable | Code::Internal | Code::Unknown | Code::Cancelled => Pause::Broken,
        _ => Pause::Breach(format!("a watch ended with {status:?}, which ends it for good in etcd's client")),
    }
}
