//! The latest revisions in memory, from which live watchers are served without reading the database.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::RwLock;
use prost::Message;

use super::backend::Record;
use crate::proto::mvccpb::Event;

/// All events of one revision, in their order.
#[derive(Debug)]
pub struct Revision {
    /// The revision.
    pub revision: i64,
    /// Its events, at least one.
    pub events: Vec<Event>,
    bytes: usize,
}

impl Revision {
    /// The revision that `records` make up.
    pub fn new(revision: i64, records: Vec<Record>) -> Self {
        let events: Vec<_> = records.into_iter().map(Record::into_event).collect();
        let bytes = events.iter().map(|event| event.encoded_len() + size_of::<Event>()).sum();
        Self { revision, events, bytes }
    }

    /// About how much memory it takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A window over the end of history: consecutive revisions up to the last one published.
pub struct History {
    limit: usize,
    window: RwLock<Window>,
}

#[derive(Default)]
struct Window {
    revisions: VecDeque<Arc<Revision>>,
    bytes: usize,
}

impl History {
    /// An empty window that will keep about `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, window: RwLock::default() }
    }

    /// Appends revisions that follow the window's end. The newest one is kept even when it is larger than the limit.
    pub fn extend(&self, revisions: impl IntoIterator<Item = Arc<Revision>>) {
        let mut window = self.window.write();
        for revision in revisions {
            window.bytes += revision.bytes;
            window.revisions.push_back(revision);
        }
        while window.bytes > self.limit && window.revisions.len() > 1 {
            if let Some(oldest) = window.revisions.pop_front() {
                window.bytes -= oldest.bytes;
            }
        }
    }

    /// The revisions from `from` on, as many as fit `budget` bytes but at least one; `None` when `from` is not in the window.
    pub fn since(&self, from: i64, budget: usize) -> Option<Vec<Arc<Revision>>> {
        let window = self.window.read();
        let first = window.revisions.front()?.revision;
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        let mut left = budget;
        let fits = |revision: &&Arc<Revision>| {
            let fits = left > 0;
            left = left.saturating_sub(revision.bytes);
            fits
        };
        let found: Vec<_> = window.revisions.iter().skip(skip).take_while(fits).cloned().collect();
        (!found.is_empty()).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::sql::backend::{EventId, Version};

    fn revision(number: i64, size: usize) -> Arc<Revision> {
        let version = Version { id: EventId::first(number), create_revision: number, version: 1, lease: 0 };
        let record = Record { key: Bytes::from_static(b"k"), value: vec![0; size].into(), version };
        Arc::new(Revision::new(number, vec![record]))
    }

    #[test]
    fn keeps_the_newest_within_its_limit_and_answers_only_for_those() {
        let history = History::new(4096);
        assert!(history.since(2, usize::MAX).is_none());
        history.extend((2..100).map(|number| revision(number, 200)));
        let all =
            |from| history.since(from, usize::MAX).map(|found| found.iter().map(|r| r.revision).collect::<Vec<_>>());
        assert_eq!(all(2), None);
        assert_eq!(all(97), Some(vec![97, 98, 99]));
        assert_eq!(all(100), None);
        history.extend([revision(100, 10_000)]);
        assert_eq!((all(99), all(100)), (None, Some(vec![100])));
    }

    #[test]
    fn a_budget_cuts_between_revisions() {
        let history = History::new(1 << 20);
        history.extend((2..10).map(|number| revision(number, 1000)));
        assert_eq!(history.since(3, 1).map(|found| found.len()), Some(1));
        assert_eq!(history.since(3, 2500).map(|found| found.len()), Some(3));
    }
}
