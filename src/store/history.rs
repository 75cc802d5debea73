//! The history window: the log of recent revisions, shared by everyone who reads it.
//!
//! The log is cut into segments. A segment is filled by the one writer and read without locks: its slots are written once,
//! and a reader looks only at those that its window says are there. A full segment keeps the tree as it stood at its end,
//! so the state at any revision in the window is the tree at the end of its segment with at most one segment's events
//! undone. Segments are also what is dropped, so one that has grown heavy is full with fewer events.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwapOption;

use super::{Record, Revision, Tree};

/// Events after which a segment is full.
const SEGMENT_EVENTS: usize = 256;
/// The share of the limit that makes a segment full, however few events that is: segments are cut whole.
const SEGMENT_SHARE: usize = 16;
/// But no less than this: a segment costs a few KiB itself.
const LIGHTEST_SEGMENT: usize = 64 << 10;
/// What a segment's tree costs for each event in it: a copied leaf and a share of its ancestors. Reckoned for random keys among
/// 100,000, from the sizes of their entries.
const TREE_BYTES_PER_EVENT: usize = 1024;

/// What an event did to its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The key was written.
    Put,
    /// The key was deleted.
    Delete,
}

/// One change of one key.
#[derive(Clone, Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The new version, or the tombstone.
    pub record: Record,
    /// The version before the revision; none on a creation.
    pub previous: Option<Record>,
}

/// All events of one revision. Never empty.
#[derive(Debug)]
pub struct Entry {
    /// The revision.
    pub revision: Revision,
    /// Its events, in the order of the transaction.
    pub events: Box<[Event]>,
}

impl Entry {
    /// What etcd keeps of it when it is compacted at just this revision: the last event of each key. A transaction can put a
    /// key and delete it again.
    pub fn left_by_compaction(&self) -> Vec<&Event> {
        let mut later = HashSet::new();
        let mut left: Vec<_> = self.events.iter().rev().filter(|event| later.insert(event.record.key())).collect();
        left.reverse();
        left
    }

    /// Its last event by itself.
    fn last_alone(&self) -> Option<Self> {
        self.events.last().map(|event| Self { revision: self.revision, events: [event.clone()].into() })
    }

    /// What it takes, but for the previous versions: see [`History::hold`].
    fn memory(&self) -> usize {
        let event = |event: &Event| size_of::<Event>() + event.record.memory() + TREE_BYTES_PER_EVENT;
        self.events.iter().map(event).sum()
    }
}

/// A run of consecutive entries.
#[derive(Debug)]
struct Segment {
    /// Filled from the front, by the writer alone.
    slots: Box<[OnceLock<Arc<Entry>>]>,
    /// How much is in here and what it led to; set when the segment is full.
    sealed: OnceLock<Sealed>,
    /// The tree at the revision in here that was asked for last: pages of one list ask for the same one again and again.
    recent: ArcSwapOption<(Revision, Tree)>,
}

#[derive(Debug)]
struct Sealed {
    len: usize,
    last: Revision,
    /// None while there is no index.
    tree: Option<Tree>,
}

impl Segment {
    fn new() -> Self {
        Self {
            slots: (0..SEGMENT_EVENTS).map(|_| OnceLock::new()).collect(),
            sealed: OnceLock::new(),
            recent: ArcSwapOption::empty(),
        }
    }

    /// The same entries, without any tree.
    fn without_trees(&self) -> Self {
        let sealed = self.sealed.get().map(|sealed| Sealed { tree: None, ..*sealed });
        Self {
            slots: self.slots.clone(),
            sealed: sealed.map_or_else(OnceLock::new, OnceLock::from),
            recent: ArcSwapOption::empty(),
        }
    }

    fn entries(&self, len: usize) -> impl DoubleEndedIterator<Item = &Arc<Entry>> {
        self.slots[..len].iter().filter_map(OnceLock::get)
    }
}

/// The window as of one view: an immutable list of segments, and how far the last one was filled.
#[derive(Clone, Debug)]
pub struct Window {
    segments: Arc<[Arc<Segment>]>,
    /// Entries in the last segment.
    tail: usize,
    start: Revision,
}

impl Window {
    /// The first revision of which, and of everything after which, the window has all events.
    pub fn start(&self) -> Revision {
        self.start
    }

    /// How many revisions with events there are.
    pub fn len(&self) -> usize {
        (0..self.segments.len()).map(|index| self.entries(index).count()).sum()
    }

    /// Whether there is no event.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The entries of the segment at `index` that this window has.
    fn entries(&self, index: usize) -> impl DoubleEndedIterator<Item = &Arc<Entry>> {
        // The writer may have sealed the last segment meanwhile; what it added is not of this window.
        let last = index + 1 == self.segments.len();
        let segment = &self.segments[index];
        let len = segment.sealed.get().filter(|_| !last).map_or(self.tail, |sealed| sealed.len);
        segment.entries(len)
    }

    /// The index of the segment that holds the first entry after `revision`, or the last one.
    fn segment_after(&self, revision: Revision) -> usize {
        let full = &self.segments[..self.segments.len() - 1];
        full.partition_point(|segment| segment.sealed.get().is_some_and(|sealed| sealed.last <= revision))
    }

    /// The entries after `revision`, in order; none at all when the window begins later than that.
    pub fn after(&self, revision: Revision) -> Option<impl Iterator<Item = &Arc<Entry>>> {
        if revision.next() < self.start {
            return None;
        }
        let entries = (self.segment_after(revision)..self.segments.len()).flat_map(|index| self.entries(index));
        Some(entries.skip_while(move |entry| entry.revision <= revision))
    }

    /// The entries from the last one back.
    pub fn backwards(&self) -> impl Iterator<Item = &Arc<Entry>> {
        (0..self.segments.len()).rev().flat_map(|index| self.entries(index).rev())
    }

    /// The tree as it was at `revision`, when `now` is the tree of this window's own view. None when the window does not
    /// reach back that far, or there was no index then.
    pub(super) fn tree_at(&self, revision: Revision, now: &Tree) -> Option<Tree> {
        if revision.next() < self.start {
            return None;
        }
        let index = self.segment_after(revision);
        let segment = &self.segments[index];
        let last = index + 1 == self.segments.len();
        let end = if last { now } else { segment.sealed.get()?.tree.as_ref()? };
        let newest = self.entries(index).next_back().map_or(Revision::ZERO, |entry| entry.revision);
        let recent = segment.recent.load();
        // A later view may have left one there of which this window has not all that is to be undone.
        let recent = recent.as_deref().filter(|(at, _)| (revision..=newest).contains(at));
        let (tree, reached) = recent.map_or((end, newest), |(at, tree)| (tree, *at));
        let mut tree = tree.clone();
        let entries = self.entries(index).rev().skip_while(|entry| entry.revision > reached);
        for entry in entries.take_while(|entry| entry.revision > revision) {
            undo(&mut tree, entry);
        }
        segment.recent.store(Some(Arc::new((revision, tree.clone()))));
        Some(tree)
    }
}

/// Takes what `entry` did back out of `tree`.
fn undo(tree: &mut Tree, entry: &Entry) {
    for event in entry.events.iter().rev() {
        match &event.previous {
            Some(previous) => drop(tree.insert(previous.clone())),
            None => drop(tree.remove(event.record.key())),
        }
    }
}

/// How much history is kept: the window is cut when it is over either limit.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of events, of the versions that they replaced or deleted, and of what is kept to read at their revisions. Each
    /// version counts once, with the newest event that holds it, whether or not it is in the index too. What a view is the
    /// first to show stays until the next is published, or nobody could be told of it; all else is within the limit. Below
    /// 64 KiB it is as if that was the limit.
    pub bytes: usize,
    /// Age, in the unit of the `now` that is passed to the writer.
    pub age: u64,
}

impl Limits {
    /// Bytes that make a segment full.
    fn segment(&self) -> usize {
        (self.bytes / SEGMENT_SHARE).max(LIGHTEST_SEGMENT)
    }
}

/// What a segment takes, and how far it reaches.
#[derive(Clone, Copy, Debug)]
struct Cost {
    bytes: usize,
    /// The revision of its last event, or where it begins.
    last: Revision,
    /// The time of its last event.
    time: u64,
}

/// The writer's side of the log.
#[derive(Debug)]
pub(super) struct History {
    limits: Limits,
    segments: Vec<Arc<Segment>>,
    shared: Arc<[Arc<Segment>]>,
    tail: usize,
    tail_events: usize,
    start: Revision,
    /// The revision of the last event that a view has shown.
    shown: Revision,
    /// Of each segment.
    costs: VecDeque<Cost>,
    bytes: usize,
    /// From here on, the index holds the very records that the log has, not copies of them.
    shared_from: Revision,
    /// The last event of all, once it is cut: it tells this history from others when there is nothing newer.
    cut: Option<Arc<Entry>>,
}

impl History {
    /// An empty log that goes on from `revision`.
    pub(super) fn new(revision: Revision, limits: Limits) -> Self {
        let segments = vec![Arc::new(Segment::new())];
        Self {
            limits,
            shared: segments.as_slice().into(),
            segments,
            tail: 0,
            tail_events: 0,
            start: revision.next(),
            shown: revision,
            costs: [Cost { bytes: 0, last: revision, time: 0 }].into(),
            bytes: 0,
            shared_from: revision.next(),
            cut: None,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Notes that the index is another one now, or none, and which records the log will have in common with it: those from
    /// `shared_from` on. Trees of the old one are let go, since they would keep all of it in memory.
    pub(super) fn change_index(&mut self, shared_from: Option<Revision>) {
        self.shared_from = shared_from.unwrap_or(Revision(i64::MAX));
        self.segments.iter_mut().for_each(|segment| *segment = Arc::new(segment.without_trees()));
        self.shared = self.segments.as_slice().into();
    }

    /// Notes that the event to be pushed next is the newest that holds `previous`, and counts it there. The event that wrote it
    /// held it until now, if the log has that one: it will be cut earlier.
    pub(super) fn hold(&mut self, previous: &Record) {
        let (memory, written) = (previous.memory(), previous.mod_revision());
        let mut moved = 0;
        if written >= self.start.max(self.shared_from) {
            let at = self.costs.partition_point(|cost| cost.last < written);
            if let Some(cost) = self.costs.get_mut(at) {
                moved = memory.min(cost.bytes);
                cost.bytes -= moved;
            }
        }
        if let Some(cost) = self.costs.back_mut() {
            cost.bytes += memory;
        }
        self.bytes += memory - moved;
    }

    /// Appends `entry`, after which the index is `tree`.
    pub(super) fn push(&mut self, entry: Entry, tree: Option<&Tree>, now: u64) {
        let memory = entry.memory();
        let (revision, events) = (entry.revision, entry.events.len());
        let (Some(last), Some(cost)) = (self.segments.last(), self.costs.back_mut()) else { return };
        let slot = last.slots.get(self.tail);
        debug_assert!(slot.is_some_and(|slot| slot.get().is_none()));
        if let Some(slot) = slot {
            slot.get_or_init(|| Arc::new(entry));
        }
        self.tail += 1;
        self.tail_events += events;
        self.bytes += memory;
        *cost = Cost { bytes: cost.bytes + memory, last: revision, time: now };
        if self.tail_events >= SEGMENT_EVENTS || cost.bytes >= self.limits.segment() {
            self.seal(tree.cloned());
        }
    }

    fn seal(&mut self, tree: Option<Tree>) {
        let (Some(segment), Some(&Cost { last, time, .. })) = (self.segments.last(), self.costs.back()) else { return };
        segment.sealed.get_or_init(|| Sealed { len: self.tail, last, tree });
        self.segments.push(Arc::new(Segment::new()));
        self.costs.push_back(Cost { bytes: 0, last, time });
        self.tail = 0;
        self.tail_events = 0;
        self.shared = self.segments.as_slice().into();
    }

    /// Drops the oldest segments while the log is over its limits, before a view shows it.
    pub(super) fn trim(&mut self, now: u64) {
        let goes = |cost: &Cost| cost.last <= self.shown && self.is_too_old(cost, now);
        if self.tail > 0 && self.costs.back().is_some_and(goes) {
            // It is cut with all that is before it: nobody will read at its revisions.
            self.seal(None);
        }
        let is_over = |bytes: usize, cost: &Cost| bytes > self.limits.bytes || self.is_too_old(cost, now);
        let mut bytes = self.bytes;
        let full = self.costs.iter().take(self.costs.len() - 1);
        let cut = full
            .take_while(|cost| {
                let goes = cost.last <= self.shown && is_over(bytes, cost);
                bytes -= cost.bytes;
                goes
            })
            .count();
        if cut > 0 {
            self.drop_segments(cut);
        }
        self.shown = self.costs.back().map_or(self.shown, |cost| cost.last);
    }

    fn is_too_old(&self, cost: &Cost, now: u64) -> bool {
        now.saturating_sub(cost.time) > self.limits.age
    }

    fn drop_segments(&mut self, count: usize) {
        let is_all = self.tail == 0 && count + 1 == self.segments.len();
        self.cut = self.last().filter(|_| is_all).and_then(|entry| entry.last_alone()).map(Arc::new);
        for cost in self.costs.drain(..count) {
            self.bytes -= cost.bytes;
            self.start = cost.last.next();
        }
        self.segments.drain(..count);
        self.shared = self.segments.as_slice().into();
    }

    /// The newest entry, or what is left of it when it is cut: the last of its events.
    pub(super) fn last(&self) -> Option<Arc<Entry>> {
        let newest = |segment: &Segment| segment.sealed.get().map_or(self.tail, |sealed| sealed.len);
        let mut recent = self.segments.iter().rev().take(2);
        let last = recent.find_map(|segment| segment.entries(newest(segment)).next_back());
        last.or(self.cut.as_ref()).cloned()
    }

    pub(super) fn window(&self) -> Window {
        Window { segments: self.shared.clone(), tail: self.tail, start: self.start }
    }
}

#[cfg(test)]
mod tests;
