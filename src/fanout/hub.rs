//! Takes each new entry of one store to the sessions that it concerns.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    mailbox::{Mailbox, Subscription},
    ranges::RangeIndex,
};
use crate::{
    aside,
    rules::KeyRange,
    status::Status,
    store::{Entry, Position, Revision, Store, View},
};

/// Entries that are dispatched before the registry is free for others in between.
const BATCH: usize = 256;

/// The watchers of one store, and the task that tells them of new entries.
pub struct Hub {
    store: Arc<Store>,
    registry: Mutex<Registry>,
    /// The revision up to which every session has been told; stored after the last letter, or the word of another history, has
    /// been delivered.
    told: AtomicI64,
    next_session: AtomicU64,
}

#[derive(Default)]
struct Registry {
    index: RangeIndex<Arc<Subscription>>,
    sessions: HashMap<u64, Arc<Mailbox>>,
    /// Sessions that want to be woken when the position moves, events or not.
    curious: HashSet<u64>,
    position: Position,
}

impl Hub {
    /// A hub on `store`. [`Hub::run`] is to be spawned.
    pub fn new(store: Arc<Store>) -> Arc<Self> {
        let position = store.view().position;
        Arc::new(Self {
            store,
            told: AtomicI64::new(position.revision.0),
            registry: Mutex::new(Registry { position, ..Registry::default() }),
            next_session: AtomicU64::new(0),
        })
    }

    /// The store that the hub's watchers follow.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// How many sessions there are.
    pub fn sessions(&self) -> usize {
        self.registry.lock().sessions.len()
    }

    /// Ends every stream that has watchers here.
    pub fn end_all(&self, status: &Status) {
        for mailbox in self.registry.lock().sessions.values() {
            mailbox.end(status.clone());
        }
    }

    /// The revision up to which every session has been told of everything.
    pub(super) fn told(&self) -> Revision {
        Revision(self.told.load(Ordering::Acquire))
    }

    /// Enters a session, which is told from now on when another history begins. Gives its number, and the epoch of the history
    /// until then.
    pub(super) fn open(&self, mailbox: &Arc<Mailbox>) -> (u64, u64) {
        let session = self.next_session.fetch_add(1, Ordering::Relaxed);
        let mut registry = self.registry.lock();
        registry.sessions.insert(session, mailbox.clone());
        (session, registry.position.epoch)
    }

    pub(super) fn close(&self, session: u64) {
        let mut registry = self.registry.lock();
        registry.sessions.remove(&session);
        registry.curious.remove(&session);
    }

    /// The epoch of the history that sessions are told of; zero before the first.
    pub(super) fn epoch(&self) -> u64 {
        self.registry.lock().position.epoch
    }

    /// Enters `subscription`, whose watchers have everything up to `reached`, unless the hub is further than that already:
    /// then they must read on. While the hub has yet to hear of the history that they follow, they must do so too: it begins
    /// with whatever view it sees first.
    pub(super) fn join(&self, range: &KeyRange, subscription: &Arc<Subscription>, reached: Position) -> bool {
        let mut registry = self.registry.lock();
        if !registry.may_rely(reached) {
            return false;
        }
        registry.index.insert(range, subscription.clone());
        true
    }

    /// Whether watchers that have everything up to `reached` may rely on being told of what follows, as members of a
    /// subscription that has been entered.
    pub(super) fn is_at_most(&self, reached: Position) -> bool {
        self.registry.lock().may_rely(reached)
    }

    pub(super) fn leave(&self, range: &KeyRange, subscription: &Arc<Subscription>) {
        self.registry.lock().index.remove(range, subscription);
    }

    /// Wakes the session as soon as the position is not `seen` any more.
    pub(super) fn wake_after(&self, seen: Revision, session: u64) {
        let mut registry = self.registry.lock();
        if registry.position.revision == seen {
            registry.curious.insert(session);
        } else {
            registry.wake(session);
        }
    }

    /// How many sessions want to be woken when the position moves.
    #[cfg(test)]
    pub(super) fn curious(&self) -> usize {
        self.registry.lock().curious.len()
    }

    /// Follows the store until its task is aborted.
    pub async fn run(self: Arc<Self>) {
        let mut position = self.store.position();
        loop {
            let view = self.store.view_owned();
            self.dispatch(&view);
            drop(view);
            if position.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tells the sessions of everything in `view` that is new.
    pub(super) fn dispatch(&self, view: &View) {
        let mut registry = self.registry.lock();
        if registry.position.epoch != view.position.epoch {
            let first = registry.position.epoch == 0;
            registry.position = view.position;
            if !first {
                registry.sessions.values().for_each(|mailbox| mailbox.replace(view.position));
            }
            // Only now, or a session could take it for what it has been told of the history before.
            self.told.store(view.revision().0, Ordering::Release);
            registry.wake_curious();
            return;
        }
        let from = registry.position.revision;
        let Some(mut entries) = view.window.after(from) else {
            registry.sessions.values().for_each(|mailbox| mailbox.lose(from.next()));
            return self.finish(&mut registry, view.revision());
        };
        loop {
            let mut last = None;
            let mut touched = Vec::new();
            for entry in entries.by_ref().take(BATCH) {
                aside::walk(entry.events.len() as u64, || registry.deliver(entry, &mut touched));
                last = Some(entry.revision);
            }
            touched.iter().for_each(|mailbox| mailbox.wake());
            let Some(last) = last else { return self.finish(&mut registry, view.revision()) };
            registry.position.revision = last;
            self.told.store(last.0, Ordering::Release);
            parking_lot::MutexGuard::bump(&mut registry);
        }
    }

    fn finish(&self, registry: &mut Registry, revision: Revision) {
        registry.position.revision = registry.position.revision.max(revision);
        self.told.store(registry.position.revision.0, Ordering::Release);
        registry.wake_curious();
    }
}

impl Registry {
    /// Whether all that follows on `reached` is still to be delivered.
    fn may_rely(&self, reached: Position) -> bool {
        self.position.epoch == reached.epoch && self.position.revision <= reached.revision
    }

    fn deliver<'a>(&'a self, entry: &Arc<Entry>, touched: &mut Vec<&'a Mailbox>) {
        for event in &entry.events {
            self.index.visit(event.record.key(), |subscription| {
                if subscription.is_new(entry.revision) && subscription.mailbox.deliver(entry, subscription.group) {
                    touched.push(&subscription.mailbox);
                }
            });
        }
    }

    fn wake_curious(&mut self) {
        std::mem::take(&mut self.curious).into_iter().for_each(|session| self.wake(session));
    }

    fn wake(&self, session: u64) {
        if let Some(mailbox) = self.sessions.get(&session) {
            mailbox.wake();
        }
    }
}
