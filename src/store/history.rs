//! The history window: the log of recent revisions, shared by everyone who reads it.
//!
//! The log is cut into segments. A segment is filled by the one writer and read without locks: its slots are written once,
//! and a reader looks only at those that its window says are there. A full segment keeps the tree as it stood at its end,
//! so the state at any revision in the window is the tree at the end of its segment with at most one segment's events
//! undone.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, OnceLock},
};

use arc_swap::ArcSwapOption;

use super::{Record, Revision, Tree};

/// Events after which a segment is full.
const SEGMENT_EVENTS: usize = 256;
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
    /// Bytes of events and of what is kept to read at their revisions.
    pub bytes: usize,
    /// Age, in the unit of the `now` that is passed to the writer.
    pub age: u64,
}

/// The writer's side of the log.
#[derive(Debug)]
pub(super) struct History {
    segments: Vec<Arc<Segment>>,
    shared: Arc<[Arc<Segment>]>,
    tail: usize,
    tail_events: usize,
    start: Revision,
    /// Bytes and time of the last event of each segment.
    costs: VecDeque<(usize, u64)>,
    bytes: usize,
}

impl History {
    /// An empty log that goes on from `revision`.
    pub(super) fn new(revision: Revision) -> Self {
        let segments = vec![Arc::new(Segment::new())];
        Self {
            shared: segments.as_slice().into(),
            segments,
            tail: 0,
            tail_events: 0,
            start: revision.next(),
            costs: [(0, 0)].into(),
            bytes: 0,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends `entry`, after which the index is `tree`.
    pub(super) fn push(&mut self, entry: Entry, tree: Option<&Tree>, now: u64) {
        let memory = entry.memory();
        let (revision, events) = (entry.revision, entry.events.len());
        let Some(last) = self.segments.last() else { return };
        let slot = last.slots.get(self.tail);
        debug_assert!(slot.is_some_and(|slot| slot.get().is_none()));
        if let Some(slot) = slot {
            slot.get_or_init(|| Arc::new(entry));
        }
        self.tail += 1;
        self.tail_events += events;
        self.bytes += memory;
        if let Some(cost) = self.costs.back_mut() {
            *cost = (cost.0 + memory, now);
        }
        if self.tail_events >= SEGMENT_EVENTS {
            self.seal(revision, tree.cloned());
        }
    }

    fn seal(&mut self, last: Revision, tree: Option<Tree>) {
        if let Some(segment) = self.segments.last() {
            segment.sealed.get_or_init(|| Sealed { len: self.tail, last, tree });
        }
        self.segments.push(Arc::new(Segment::new()));
        self.costs.push_back((0, 0));
        self.tail = 0;
        self.tail_events = 0;
        self.shared = self.segments.as_slice().into();
    }

    /// Drops the oldest segments while the log is over its limits.
    pub(super) fn trim(&mut self, limits: Limits, now: u64) {
        let mut cut = 0;
        while cut + 1 < self.segments.len() {
            let Some(&(bytes, last_event)) = self.costs.front() else { break };
            if self.bytes <= limits.bytes && now.saturating_sub(last_event) <= limits.age {
                break;
            }
            if let Some(sealed) = self.segments[cut].sealed.get() {
                self.start = sealed.last.next();
            }
            self.bytes -= bytes;
            self.costs.pop_front();
            cut += 1;
        }
        if cut > 0 {
            self.segments.drain(..cut);
            self.shared = self.segments.as_slice().into();
        }
    }

    /// The newest entry.
    pub(super) fn last(&self) -> Option<&Arc<Entry>> {
        let newest = |segment: &Segment| segment.sealed.get().map_or(self.tail, |sealed| sealed.len);
        self.segments.iter().rev().take(2).find_map(|segment| segment.entries(newest(segment)).next_back())
    }

    pub(super) fn window(&self) -> Window {
        Window { segments: self.shared.clone(), tail: self.tail, start: self.start }
    }
}
