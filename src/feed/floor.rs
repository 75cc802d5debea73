//! What clients were told of a prefix by others than its view: the highest revision, below which nothing is served, and the
//! newest events, which are to be found in the history that the view goes on with.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicI64, Ordering},
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::seen::{Known, Newest, Seen, What};
use crate::{
    proto::{
        etcdserverpb::PutRequest,
        mvccpb::{self, event::EventType},
    },
    rules::KeyRange,
    store::Revision,
    upstream::ConnectionNumber,
};

/// Connections whose answers are kept apart; of more than that, the oldest are taken together.
const REMEMBERED: usize = 256;

/// A point in the order of what was noted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark(u64);

/// What clients were told by others. Only a change of history takes back any of it.
#[derive(Debug)]
pub struct Floor {
    /// The keys of the prefix. It also decides over the watchers of keys that no prefix has.
    range: KeyRange,
    /// The highest of `notes`. Changed under their lock.
    revision: AtomicI64,
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    now: Mark,
    /// The highest revision over each connection, and when something was noted over it last. A connection leads to one
    /// server for as long as it lives, and so to one history.
    revisions: BTreeMap<ConnectionNumber, (Revision, Mark)>,
    /// Of the prefix's keys, and of others.
    newest: [Newest; 2],
    /// The same when the feed ended. What is noted until it has found its way back may be of another history, and is not to take
    /// the place of what was known of ours.
    held: Option<[Newest; 2]>,
}

impl Notes {
    fn mark(&mut self) -> Mark {
        self.now.0 += 1;
        self.now
    }

    /// Forgets the events of which `is_over` is true.
    fn forget(&mut self, is_over: impl Fn(Mark, &Seen) -> bool + Copy) {
        let held = self.held.iter_mut().flatten();
        self.newest.iter_mut().chain(held).for_each(|newest| newest.forget(is_over));
    }
}

impl Floor {
    /// The floor of the prefix with the keys of `range`.
    pub fn new(range: KeyRange) -> Self {
        Self { range, revision: AtomicI64::new(0), notes: Mutex::default() }
    }

    /// The highest revision that a client was told.
    pub fn revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::Acquire))
    }

    /// Notes what a client is told over `connection`.
    pub fn raise(&self, revision: Revision, connection: ConnectionNumber) {
        let mut notes = self.notes.lock();
        let mark = notes.mark();
        let highest = notes.revisions.entry(connection).or_default();
        *highest = (revision.max(highest.0), mark);
        if notes.revisions.len() > REMEMBERED
            && let Some((_, oldest)) = notes.revisions.pop_first()
            && let Some(mut next) = notes.revisions.first_entry()
        {
            // Counted with a newer connection, it may survive its history: the floor is too high then, never too low.
            let both = (oldest.0.max(next.get().0), oldest.1.max(next.get().1));
            next.insert(both);
        }
        self.revision.fetch_max(revision.0, Ordering::AcqRel);
    }

    /// Notes the events that a client is sent, in their order: the newest, and the newest put, because deletions look alike.
    pub fn note_events(&self, events: &[mvccpb::Event]) {
        let newest_put = (0..events.len()).rev().find(|place| is_left(events, *place)).map(|place| &events[place]);
        for event in newest_put.into_iter().chain(events.last()) {
            let Some(record) = &event.kv else { continue };
            let revision = Revision(record.mod_revision);
            match event.r#type() {
                EventType::Put => self.note(&record.key, revision, true, || What::Put(Known::by_event(record))),
                EventType::Delete => self.note(&record.key, revision, false, || What::Delete),
            }
        }
    }

    /// Notes that a client is told that `request` was done at `revision`.
    pub fn note_put(&self, request: &PutRequest, revision: Revision) {
        self.note(&request.key, revision, true, || What::Put(Known::by_request(request)));
    }

    /// Of an event that many watchers are sent, `what` it was is looked at once.
    fn note(&self, key: &[u8], revision: Revision, is_put: bool, what: impl FnOnce() -> What) {
        let of = usize::from(!self.range.contains(key));
        if !self.notes.lock().newest[of].is_news(revision, is_put) {
            return;
        }
        let seen = Seen { key: Bytes::copy_from_slice(key), revision, what: what() };
        let mut notes = self.notes.lock();
        let mark = notes.mark();
        notes.newest[of].note(mark, &seen);
    }

    /// Whether the event is of one of the prefix's keys.
    pub(super) fn is_within(&self, seen: &Seen) -> bool {
        self.range.contains(&seen.key)
    }

    /// The newest events that clients know of: of the prefix's keys and of others, and the newest puts among them; and those
    /// that are held.
    pub(super) fn events(&self) -> Vec<Seen> {
        let notes = self.notes.lock();
        let mut events: Vec<Seen> = notes.newest.iter().flat_map(Newest::events).cloned().collect();
        let held: Vec<&Seen> = notes.held.iter().flatten().flat_map(Newest::events).collect();
        events.extend(held.into_iter().filter(|seen| !events.contains(seen)).cloned().collect::<Vec<_>>());
        events
    }

    /// The feed has ended: what is known now is held until [`Floor::let_go`].
    pub(super) fn hold(&self) {
        let mut notes = self.notes.lock();
        if notes.held.is_none() {
            notes.held = Some(notes.newest.clone());
        }
    }

    /// The feed follows a history in which everything that clients know has been looked for, or that is another.
    pub(super) fn let_go(&self) {
        self.notes.lock().held = None;
    }

    /// Now, for [`Floor::sink`].
    pub(super) fn mark(&self) -> Mark {
        self.notes.lock().mark()
    }

    /// The history is another, and was listed since `listed`. Connections that have been silent since then led to the old
    /// one, or told nothing that the list does not have. Of events the list has only those of the prefix's keys, so what was
    /// noted since `begun`, when the new history was already being looked at, is kept.
    pub(super) fn sink(&self, begun: Mark, listed: Mark) {
        let mut notes = self.notes.lock();
        notes.revisions.retain(|_, (_, mark)| *mark > listed);
        notes.forget(|mark, _| mark < begun);
        self.lower(&notes);
    }

    /// The cluster was asked after `asked`, and is at `present`: what had been noted of anything newer was late word of a
    /// history that has ended.
    pub(super) fn trim(&self, asked: Mark, present: Revision) {
        let mut notes = self.notes.lock();
        notes.revisions.retain(|_, (revision, mark)| *mark > asked || *revision <= present);
        let is_over = |mark, seen: &Seen| mark < asked && seen.revision > present;
        notes.forget(is_over);
        self.lower(&notes);
    }

    fn lower(&self, notes: &Notes) {
        let highest = notes.revisions.values().map(|(revision, _)| *revision).max().unwrap_or_default();
        self.revision.store(highest.0, Ordering::Release);
    }
}

/// Whether the event at `place` is a put whose own transaction has left it.
fn is_left(events: &[mvccpb::Event], place: usize) -> bool {
    let Some(record) = events[place].kv.as_ref().filter(|_| events[place].r#type() == EventType::Put) else {
        return false;
    };
    let later = events[place + 1..].iter().filter_map(|event| event.kv.as_ref());
    later.take_while(|later| later.mod_revision == record.mod_revision).all(|later| later.key != record.key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor() -> Floor {
        Floor::new(KeyRange::prefix(Bytes::from_static(b"k")))
    }

    fn raise(floor: &Floor, told: &[(i64, u64)]) {
        told.iter().for_each(|(revision, connection)| floor.raise(Revision(*revision), ConnectionNumber(*connection)));
    }

    /// The history has ended, just now.
    fn sink(floor: &Floor) {
        let now = floor.mark();
        floor.sink(now, now);
    }

    fn event(key: &'static str, mod_revision: i64, version: i64) -> mvccpb::Event {
        let kv = mvccpb::KeyValue { key: key.into(), mod_revision, version, ..Default::default() };
        mvccpb::Event { r#type: (version == 0).into(), kv: Some(kv), ..Default::default() }
    }

    fn seen(key: &'static str, revision: i64, version: i64) -> Seen {
        let put = || What::Put(Known::by_event(event(key, revision, version).kv.as_ref().unwrap()));
        let what = if version == 0 { What::Delete } else { put() };
        Seen { key: key.into(), revision: Revision(revision), what }
    }

    #[test]
    fn sinks_to_what_was_heard_of_the_history_that_goes_on() {
        let floor = floor();
        raise(&floor, &[(100, 1), (90, 2), (7, 3)]);
        assert_eq!(floor.revision(), Revision(100));
        let listed = floor.mark();
        raise(&floor, &[(5, 4), (6, 3)]);
        floor.sink(listed, listed);
        assert_eq!(floor.revision(), Revision(7), "connection 3 leads to the new history, and had told of 7");
        sink(&floor);
        assert_eq!(floor.revision(), Revision::ZERO);
    }

    #[test]
    fn late_word_of_a_history_that_has_ended_is_forgotten() {
        let floor = floor();
        raise(&floor, &[(100, 1), (7, 2)]);
        let asked = floor.mark();
        raise(&floor, &[(9, 3)]);
        floor.trim(asked, Revision(8));
        assert_eq!(floor.revision(), Revision(9), "what is noted after the question may be newer than its answer");
    }

    #[test]
    fn of_many_connections_the_oldest_are_taken_together() {
        let floor = floor();
        let listed = floor.mark();
        let told: Vec<_> = (0..10 * REMEMBERED as u64).map(|number| (5000 - number as i64, number)).collect();
        raise(&floor, &told);
        assert_eq!(floor.notes.lock().revisions.len(), REMEMBERED);
        floor.sink(listed, listed);
        assert_eq!(floor.revision(), Revision(5000));
    }

    #[test]
    fn the_newest_event_is_kept_until_its_history_ends() {
        let floor = floor();
        let listed = floor.mark();
        floor.note_events(&[event("k", 7, 2)]);
        floor.note_events(&[event("k", 5, 1)]);
        floor.sink(listed, listed);
        assert_eq!(floor.events(), [seen("k", 7, 2)]);
        floor.note_events(&[event("k", 9, 0)]);
        floor.note_events(&[event("other", 8, 0)]);
        assert_eq!(floor.events(), [seen("k", 9, 0), seen("k", 7, 2), seen("other", 8, 0)]);
        floor.trim(floor.mark(), Revision(8));
        assert_eq!(floor.events(), [seen("k", 7, 2), seen("other", 8, 0)]);
        sink(&floor);
        assert_eq!(floor.events(), []);
    }

    #[test]
    fn of_many_events_the_newest_put_is_kept_as_well() {
        let floor = floor();
        floor.note_events(&[event("a", 5, 1), event("b", 6, 1), event("a", 7, 0), event("c", 7, 0)]);
        assert_eq!(floor.events(), [seen("c", 7, 0), seen("b", 6, 1)]);
        floor.note_events(&[event("a", 8, 1), event("b", 9, 1), event("c", 9, 0), event("b", 9, 0)]);
        assert_eq!(floor.events(), [seen("b", 9, 0), seen("a", 8, 1)], "9 has not left what it put");
        floor.note_events(&[]);
    }

    #[test]
    fn what_was_known_when_the_feed_ended_is_held_until_it_has_found_its_way_back() {
        let floor = floor();
        floor.note_events(&[event("other", 7, 1)]);
        floor.hold();
        assert_eq!(floor.events(), [seen("other", 7, 1)]);
        floor.note_events(&[event("other", 9, 1)]);
        // It failed to come back, and tries again.
        floor.hold();
        assert_eq!(floor.events(), [seen("other", 9, 1), seen("other", 7, 1)]);
        floor.let_go();
        assert_eq!(floor.events(), [seen("other", 9, 1)]);
        floor.hold();
        sink(&floor);
        assert_eq!(floor.events(), []);
    }

    /// The list of a prefix has nothing of other keys.
    #[test]
    fn what_was_noted_while_the_new_history_was_looked_at_outlives_the_list() {
        let floor = floor();
        floor.note_events(&[event("other", 9, 1)]);
        let begun = floor.mark();
        floor.sink(begun, floor.mark());
        floor.note_events(&[event("other", 5, 1)]);
        floor.sink(begun, floor.mark());
        assert_eq!(floor.events(), [seen("other", 5, 1)]);
        floor.sink(Mark::default(), floor.mark());
        assert_eq!(floor.events(), [seen("other", 5, 1)]);
    }
}
