//! The store: one writer, and the views that it publishes.

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use super::{
    Event, EventKind, Limits, Record, Responder, Revision, Tree,
    history::{Entry, History, Window},
};

/// How far a store has got, and in which history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Counts the histories: it grows when the upstream turned out to be another cluster, or a restored one.
    pub epoch: u64,
    /// Everything up to here is in the view.
    pub revision: Revision,
}

/// The state at one revision and the history that led there. Immutable.
#[derive(Clone, Debug)]
pub struct View {
    /// Which revision, of which history.
    pub position: Position,
    /// Whose state this is.
    pub responder: Responder,
    /// The keys; none while there is no index: before the first list, or because the keyspace is over the limit.
    pub tree: Option<Tree>,
    /// The recent revisions.
    pub window: Window,
    /// The highest compaction that is known of the revisions up to this one; nothing older than it may be read.
    pub compacted: Revision,
}

impl View {
    /// The revision of the state.
    pub fn revision(&self) -> Revision {
        self.position.revision
    }

    /// The keys as they were at `revision`, which must not lie after the view's own. None when that cannot be told from
    /// memory.
    pub fn tree_at(&self, revision: Revision) -> Option<Cow<'_, Tree>> {
        let now = self.tree.as_ref()?;
        if revision == self.revision() {
            return Some(Cow::Borrowed(now));
        }
        self.window.tree_at(revision, now).map(Cow::Owned)
    }

    /// Whether a first list has been loaded.
    pub fn is_loaded(&self) -> bool {
        self.revision() > Revision::ZERO
    }
}

/// Where views are published. Reading takes no lock.
pub struct Store {
    current: ArcSwap<View>,
    position: watch::Sender<Position>,
    index_bytes: AtomicU64,
    history_bytes: AtomicU64,
}

impl Store {
    /// An empty store and its only writer.
    pub fn new(limits: Limits) -> (Arc<Self>, Writer) {
        let history = History::new(Revision::ZERO, limits);
        let view = View {
            position: Position::default(),
            responder: Responder::default(),
            tree: None,
            window: history.window(),
            compacted: Revision::ZERO,
        };
        let store = Arc::new(Self {
            current: ArcSwap::from_pointee(view.clone()),
            position: watch::Sender::new(view.position),
            index_bytes: AtomicU64::new(0),
            history_bytes: AtomicU64::new(0),
        });
        (store.clone(), Writer { store, next: view, compacted: Revision::ZERO, history, limits, index_bytes: 0 })
    }

    /// The current view, for a look.
    pub fn view(&self) -> Guard<Arc<View>> {
        self.current.load()
    }

    /// The current view, to keep for longer.
    pub fn view_owned(&self) -> Arc<View> {
        self.current.load_full()
    }

    /// Where the store is, with a signal at every change of it, and at every compaction.
    pub fn position(&self) -> watch::Receiver<Position> {
        self.position.subscribe()
    }

    /// Waits until the view has reached `revision`, of whatever history. Never ends if that never happens.
    pub async fn reached(&self, revision: Revision) {
        if self.view().revision() >= revision {
            return;
        }
        let mut position = self.position();
        // The sender lives as long as `self`, so this cannot fail.
        let _ = position.wait_for(|position| position.revision >= revision).await;
    }

    /// Bytes of memory that the index takes, keys and values included.
    pub fn index_bytes(&self) -> u64 {
        self.index_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of memory that the history takes.
    pub fn history_bytes(&self) -> u64 {
        self.history_bytes.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("position", &self.view().position).finish_non_exhaustive()
    }
}

/// A change as the upstream tells it.
#[derive(Clone, Debug)]
pub struct Change {
    /// What happened.
    pub kind: EventKind,
    /// The new version, or the tombstone.
    pub record: Record,
    /// The version before, where the upstream was asked for it; the index, where there is one, knows better.
    pub previous: Option<Record>,
}

/// The only one who changes a store. Changes are seen by readers when they are published, all at once.
#[derive(Debug)]
pub struct Writer {
    store: Arc<Store>,
    /// The view to be published next.
    next: View,
    /// The highest compaction that is known.
    compacted: Revision,
    history: History,
    limits: Limits,
    index_bytes: usize,
}

impl Writer {
    /// The store that this writer fills.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Up to where changes have been applied, published or not.
    pub fn position(&self) -> Position {
        self.next.position
    }

    /// Bytes of memory that the index takes.
    pub fn index_bytes(&self) -> usize {
        self.index_bytes
    }

    /// The record of `key` as of the last change.
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        self.next.tree.as_ref()?.get(key)
    }

    /// Whether there is an index.
    pub fn has_index(&self) -> bool {
        self.next.tree.is_some()
    }

    /// The last entry of the history, if there is one. When it has left the window, the last of its events is there still.
    pub fn last_entry(&self) -> Option<Arc<Entry>> {
        self.history.last()
    }

    /// Begins anew from a list at `position`: the history window starts after it. `tree: None` goes on without an index.
    pub fn reset(&mut self, position: Position, tree: Option<Tree>) {
        if position.epoch != self.next.position.epoch {
            (self.compacted, self.next.compacted) = (Revision::ZERO, Revision::ZERO);
        }
        self.history = History::new(position.revision, self.limits);
        self.next.position = position;
        self.set_tree(tree);
    }

    /// Puts in a new index for the revision at which the writer stands, or takes it away. The events of the history stay; what
    /// was read from the old index at older revisions is not kept.
    pub fn set_tree(&mut self, tree: Option<Tree>) {
        let memory = |tree: &Tree| tree.iter_from(b"").map(|record| record.memory()).sum();
        self.index_bytes = tree.as_ref().map_or(0, memory);
        self.history.change_index(tree.is_some().then(|| self.next.position.revision.next()));
        self.next.tree = tree;
    }

    /// Applies all changes of `revision`. What is not after the writer's position is dropped: it is there already.
    pub fn apply(&mut self, revision: Revision, changes: Vec<Change>, now: u64) {
        if revision <= self.next.position.revision || changes.is_empty() {
            return;
        }
        let mut events = Vec::with_capacity(changes.len());
        for change in changes {
            let event = self.change(change, &events);
            events.push(event);
        }
        self.next.position.revision = revision;
        self.history.push(Entry { revision, events: events.into() }, self.next.tree.as_ref(), now);
    }

    /// `earlier`: what happened before in the same revision.
    fn change(&mut self, Change { kind, record, mut previous }: Change, earlier: &[Event]) -> Event {
        if let Some(tree) = &mut self.next.tree {
            let replaced = match kind {
                EventKind::Put => {
                    self.index_bytes += record.memory();
                    tree.insert(record.clone())
                }
                EventKind::Delete => tree.remove(record.key()),
            };
            self.index_bytes -= replaced.as_ref().map_or(0, |replaced| replaced.memory());
            if replaced.as_ref().is_some_and(|replaced| replaced.mod_revision() == record.mod_revision()) {
                // The earlier event holds it already.
                let previous = before_revision(kind, &record, earlier);
                return Event { kind, record, previous };
            }
            previous = replaced;
        }
        if let Some(previous) = &previous {
            self.history.hold(previous);
        }
        Event { kind, record, previous }
    }

    /// Notes that everything up to `revision` has been applied, though the last revisions changed nothing here.
    pub fn advance(&mut self, revision: Revision) {
        self.next.position.revision = self.next.position.revision.max(revision);
    }

    /// Notes whose state it is.
    pub fn set_responder(&mut self, responder: Responder) {
        self.next.responder = responder;
    }

    /// Notes a compaction. It shows in views that have got to it: watchers who begin on an older one begin before the compaction, though
    /// they are about to be told of everything up to it.
    pub fn compacted(&mut self, revision: Revision) {
        if revision <= self.next.position.revision {
            self.next.compacted = self.next.compacted.max(revision);
        }
        self.compacted = self.compacted.max(revision);
    }

    /// Lets readers see everything applied so far, in one swap, and wakes those who wait for it. `now` is in the unit of
    /// [`Limits::age`].
    pub fn publish(&mut self, now: u64) {
        self.history.trim(now);
        self.next.window = self.history.window();
        if self.compacted <= self.next.position.revision {
            self.next.compacted = self.compacted;
        }
        let before = self.store.current.swap(Arc::new(self.next.clone())).compacted;
        self.store.index_bytes.store(self.index_bytes as u64, Ordering::Relaxed);
        self.store.history_bytes.store(self.history.bytes() as u64, Ordering::Relaxed);
        self.store.position.send_if_modified(|position| {
            let changed = *position != self.next.position || before != self.next.compacted;
            *position = self.next.position;
            changed
        });
    }
}

/// The version that etcd calls the previous one where a transaction touches a key twice, which it lets pass in some shapes: the
/// one before the revision, and none for a key that the revision created.
fn before_revision(kind: EventKind, record: &Record, earlier: &[Event]) -> Option<Record> {
    if kind == EventKind::Put && record.create_revision() == record.mod_revision() {
        return None;
    }
    earlier.iter().find(|event| event.record.key() == record.key())?.previous.clone()
}

#[cfg(test)]
mod tests;
