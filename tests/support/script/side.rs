//! One of the two servers that a script is played on, and what its stream has been sent.

use std::collections::BTreeMap;

use millpond::proto::etcdserverpb as pb;
use tokio::time::{Duration, Instant, sleep};

use super::super::{
    client::{Client, PATIENCE},
    watching::{Item, WatchStream, by_watcher, revision_of},
};

/// One of the two servers, with the stream under test on it.
pub struct Side {
    pub client: Client,
    pub stream: WatchStream,
}

impl Side {
    /// What each watcher was told. Of the answers to progress requests one remains for each revision at which they were
    /// asked for: a request may have to be repeated, and a proxy may first tell how far it had got.
    pub fn items(&self, proven: &[i64]) -> BTreeMap<i64, Vec<Item>> {
        let mut watchers = by_watcher(&self.stream.responses());
        for items in watchers.values_mut() {
            let mut told = Vec::new();
            items.retain(|item| {
                let Some(revision) = item.progress() else { return true };
                let is_new = proven.contains(&revision) && !told.contains(&revision);
                told.push(revision);
                is_new
            });
        }
        watchers
    }
}

/// Waits for this many responses without events, progress aside, and events; the answer is what there was.
pub async fn eventually_counted(side: &Side, controls: usize, events: usize) -> (usize, usize) {
    let mut counted = (0, 0);
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let responses = side.stream.responses();
        let control = responses.iter().filter(|response| response.created || response.canceled).count();
        counted = (control, responses.iter().map(|response| response.events.len()).sum());
        if counted.0 >= controls && counted.1 >= events {
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    counted
}

/// How many answers to progress requests have come.
pub fn progress_count(stream: &WatchStream) -> usize {
    let responses = stream.responses();
    responses.iter().filter(|response| !response.created && !response.canceled && response.events.is_empty()).count()
}

/// Whether an answer to a progress request told this revision.
pub fn tells_progress_to(stream: &WatchStream, revision: i64) -> bool {
    let is_it = |response: &pb::WatchResponse| {
        let header = response.header.is_some_and(|header| header.revision == revision);
        header && !response.created && !response.canceled && response.events.is_empty()
    };
    stream.responses().iter().any(is_it)
}

/// The revision of the last event.
pub fn last_revision(responses: &[pb::WatchResponse]) -> i64 {
    responses.iter().rev().find_map(|response| response.events.last()).map_or(0, revision_of)
}
