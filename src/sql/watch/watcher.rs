//! One watcher of a stream.

use super::events::{self, Chunk, Previous};
use crate::{
    proto::{
        etcdserverpb::{WatchCreateRequest, watch_create_request::FilterType},
        mvccpb::{Event, event::EventType},
    },
    rules::{KeyRange, watch::is_filtered},
};

/// How far a watcher has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It reads what happened before it was created.
    CatchingUp,
    /// It has once been up to date.
    Live,
    /// What it needed next is compacted; it waits to be cancelled.
    Compacted,
}

/// What a watcher wants and where it stands.
#[derive(Debug)]
pub struct Watcher {
    /// The keys that it watches.
    pub range: KeyRange,
    /// The revision that it asked to start at; 0 for now.
    pub start: i64,
    /// The next revision that it has not been sent.
    pub next: i64,
    /// Whether events come with the previous pair.
    pub prev_kv: bool,
    /// Whether large responses may be cut.
    pub fragment: bool,
    no_put: bool,
    no_delete: bool,
    progress_notify: bool,
    /// Whether events went out since the last progress tick.
    busy: bool,
    stage: Stage,
}

impl Watcher {
    /// A watcher created while `current` is the latest revision.
    pub fn new(request: &WatchCreateRequest, range: KeyRange, current: i64) -> Self {
        let start = request.start_revision;
        let live = start == 0 || start > current;
        Self {
            range,
            start,
            next: if start == 0 { current.saturating_add(1) } else { start },
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            no_put: is_filtered(request, FilterType::Noput),
            no_delete: is_filtered(request, FilterType::Nodelete),
            progress_notify: request.progress_notify,
            busy: false,
            stage: if live { Stage::Live } else { Stage::CatchingUp },
        }
    }

    /// Whether it has once been up to date and still can be.
    pub fn is_live(&self) -> bool {
        self.stage == Stage::Live
    }

    /// Whether there may be something to send, `current` being the latest revision.
    pub fn is_behind(&self, current: i64) -> bool {
        self.stage != Stage::Compacted && self.next <= current
    }

    /// What it needs is gone.
    pub fn set_compacted(&mut self) {
        self.stage = Stage::Compacted;
    }

    /// Whether a progress tick concerns it.
    pub fn take_progress(&mut self, current: i64) -> bool {
        let busy = std::mem::take(&mut self.busy);
        self.progress_notify && !busy && self.is_live() && self.start <= current
    }

    /// The responses that a stretch of history makes for it, each with the revision of its header: when live, one for each
    /// revision; when catching up, one for all at the store's revision. What a compaction at `compacted` took of that revision is
    /// gone for whoever begins there.
    pub fn advance(
        &mut self,
        chunk: &Chunk,
        previous: &Previous,
        current: i64,
        compacted: i64,
    ) -> Vec<(i64, Vec<Event>)> {
        let mut responses: Vec<(i64, Vec<Event>)> = Vec::new();
        let separate = self.is_live();
        for revision in chunk.revisions.iter().filter(|revision| revision.revision >= self.next) {
            let begins_compacted = !separate && self.start == compacted && revision.revision == compacted;
            let left = begins_compacted.then(|| events::left_by_compaction(&revision.events));
            let is_left = |sub: usize| left.as_ref().is_none_or(|left| left[sub]);
            let numbered = revision.events.iter().enumerate().filter(|(sub, event)| is_left(*sub) && self.wants(event));
            let events = numbered.map(|(sub, event)| self.dress(event, previous.get(&(revision.revision, sub))));
            match responses.last_mut() {
                Some((_, all)) if !separate => all.extend(events),
                _ => responses.push((if separate { revision.revision } else { current }, events.collect())),
            }
        }
        responses.retain(|(_, events)| !events.is_empty());
        self.busy |= !responses.is_empty();
        self.next = chunk.last.saturating_add(1);
        if self.next > current {
            self.stage = Stage::Live;
        }
        responses
    }

    fn wants(&self, event: &Event) -> bool {
        let filtered = if event.r#type == i32::from(EventType::Put) { self.no_put } else { self.no_delete };
        !filtered && event.kv.as_ref().is_some_and(|kv| self.range.contains(&kv.key))
    }

    fn dress(&self, event: &Event, previous: Option<&crate::proto::mvccpb::KeyValue>) -> Event {
        let mut event = event.clone();
        event.prev_kv = previous.filter(|_| self.prev_kv).cloned();
        event
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{proto::mvccpb::KeyValue, rules::watch::watched, sql::history::Revision};

    /// How many events of revision 5, which puts a key and deletes it again, a watcher is sent that begins at `start`, when
    /// `compacted` is.
    fn sent(start: i64, compacted: i64) -> usize {
        let event = |what: EventType| {
            let kv = Some(KeyValue { key: "k".into(), mod_revision: 5, ..Default::default() });
            Event { r#type: what.into(), kv, ..Default::default() }
        };
        let mut revision = Revision::new(5, vec![]);
        revision.events = [EventType::Put, EventType::Delete].map(event).to_vec();
        let chunk = Chunk { revisions: vec![Arc::new(revision)], last: 5 };
        let request = WatchCreateRequest { key: "k".into(), start_revision: start, ..Default::default() };
        let mut watcher = Watcher::new(&request, watched(&request), 5);
        watcher.advance(&chunk, &Previous::new(), 5, compacted).iter().map(|(_, events)| events.len()).sum()
    }

    #[test]
    fn who_begins_at_the_compaction_is_sent_what_it_left() {
        assert_eq!((sent(5, 0), sent(5, 4), sent(5, 5)), (2, 2, 1));
        assert_eq!(sent(4, 4), 2, "the compaction was of another revision");
    }
}
