//! One watch on the etcd itself, over links without faults, that sees everything: the history against which all is judged.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use millpond::proto::{
    etcdserverpb::{self as pb, watch_request::RequestUnion},
    mvccpb::Event,
};
use tokio::{task::JoinHandle, time::sleep};
use tokio_stream::StreamExt;

use super::history::History;
use crate::support::{
    client::{Client, eventually},
    watching::{create, revision_of},
};

/// A recorder at work; it ends when dropped.
pub struct Recorder {
    history: Arc<Mutex<History>>,
    following: JoinHandle<()>,
}

impl Recorder {
    /// Goes on from `history` with the revision `next`. The endpoints are the members' own; any one that works will do.
    pub fn start(endpoints: Vec<String>, history: History, next: i64) -> Self {
        let history = Arc::new(Mutex::new(history));
        let following = tokio::spawn(follow(endpoints, Arc::clone(&history), next));
        Self { history, following }
    }

    /// The highest revision recorded.
    pub fn position(&self) -> i64 {
        self.history.lock().unwrap().last
    }

    pub fn history(&self) -> History {
        self.history.lock().unwrap().clone()
    }

    /// Ends the recording.
    pub fn stop(&self) {
        self.following.abort();
    }

    /// Waits until everything up to `revision` has been recorded.
    pub async fn until(&self, revision: i64) {
        eventually(&format!("the recorder to reach revision {revision}"), async || {
            assert!(!self.following.is_finished(), "the recorder's own task ended");
            (self.position() >= revision).then_some(())
        })
        .await;
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.following.abort();
    }
}

async fn follow(endpoints: Vec<String>, history: Arc<Mutex<History>>, mut next: i64) {
    for endpoint in endpoints.iter().cycle() {
        // An error is a member that is down or has stopped: the next one, or the same one again, will do.
        let _ = watch(&Client::new(endpoint), &history, &mut next).await;
        sleep(Duration::from_millis(20)).await;
    }
}

async fn watch(client: &Client, history: &Mutex<History>, next: &mut i64) -> Result<(), tonic::Status> {
    let request = RequestUnion::CreateRequest(create("\0", "\0", *next));
    let requests = tokio_stream::once(pb::WatchRequest { request_union: Some(request) }).chain(tokio_stream::pending());
    let mut responses = client.watch.clone().watch(requests).await?.into_inner();
    while let Some(response) = responses.message().await? {
        assert!(!response.canceled, "the recorder was cancelled at {next}: {response:?}");
        let mut history = history.lock().unwrap();
        for events in response.events.chunk_by(|left, right| revision_of(left) == revision_of(right)) {
            take(&mut history, events, next);
        }
    }
    Ok(())
}

fn take(history: &mut History, events: &[Event], next: &mut i64) {
    let revision = revision_of(&events[0]);
    assert!(revision >= *next, "etcd sent revision {revision} when {next} was next");
    history.append(revision, events.to_vec());
    *next = revision + 1;
}
