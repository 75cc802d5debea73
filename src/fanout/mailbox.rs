//! Where a hub leaves word for a session: which entries concern it, and what ends it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    task::Waker,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::ranges::Placed;
use crate::{
    status::Status,
    store::{Entry, Position, Revision},
};

/// Entries that wait for a session before it is left to read the history by itself.
const CAPACITY: usize = 512;

/// An entry that concerns the watchers of one group.
#[derive(Clone, Debug)]
pub(super) struct Letter {
    pub(super) entry: Arc<Entry>,
    pub(super) group: u32,
}

/// Word from a hub to one session.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    waker: AtomicWaker,
}

/// What lies in a mailbox.
#[derive(Debug, Default)]
pub(super) struct Mail {
    pub(super) letters: Vec<Letter>,
    /// The first revision of which the session was not told any more: it must read on from there by itself.
    pub(super) lost: Option<Revision>,
    /// The history that the session's watchers follow is over; this one has begun.
    pub(super) replaced: Option<Position>,
    /// The stream is to end.
    pub(super) ended: Option<Status>,
}

impl Mailbox {
    /// Leaves word of an entry. True when the session must be woken for it.
    pub(super) fn deliver(&self, entry: &Arc<Entry>, group: u32) -> bool {
        let mut mail = self.mail.lock();
        if mail.lost.is_some() {
            return false;
        }
        if mail.letters.len() == CAPACITY {
            mail.lost = Some(entry.revision);
            return false;
        }
        mail.letters.push(Letter { entry: entry.clone(), group });
        mail.letters.len() == 1
    }

    /// Notes that everything from `revision` on has to be read from the history, or from the upstream.
    pub(super) fn lose(&self, revision: Revision) {
        self.mail.lock().lost.get_or_insert(revision);
        self.waker.wake();
    }

    /// Notes that another history has begun.
    pub(super) fn replace(&self, position: Position) {
        let mut mail = self.mail.lock();
        mail.letters.clear();
        mail.lost = None;
        mail.replaced = Some(position);
        drop(mail);
        self.waker.wake();
    }

    /// Ends the session's stream with `status`.
    pub(super) fn end(&self, status: Status) {
        self.mail.lock().ended.get_or_insert(status);
        self.waker.wake();
    }

    /// Empties the mailbox into `letters`, which is empty; gives back the rest.
    pub(super) fn take(&self, letters: &mut Vec<Letter>) -> (Option<Revision>, Option<Position>, Option<Status>) {
        let mut mail = self.mail.lock();
        std::mem::swap(&mut mail.letters, letters);
        if mail.letters.capacity() > 64 {
            mail.letters = Vec::new();
        }
        (mail.lost.take(), mail.replaced.take(), mail.ended.clone())
    }

    pub(super) fn register(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    pub(super) fn wake(&self) {
        self.waker.wake();
    }
}

/// One group of a session's watchers as it stands in a hub's index.
#[derive(Debug)]
pub(super) struct Subscription {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) group: u32,
    place: AtomicUsize,
    /// The last revision that was delivered: an entry with many events concerns the group once.
    last: AtomicI64,
}

impl Subscription {
    pub(super) fn new(mailbox: Arc<Mailbox>, group: u32) -> Arc<Self> {
        Arc::new(Self { mailbox, group, place: AtomicUsize::new(0), last: AtomicI64::new(0) })
    }

    /// Whether `revision` is new here. Only the hub's dispatcher asks.
    pub(super) fn is_new(&self, revision: Revision) -> bool {
        self.last.swap(revision.0, Ordering::Relaxed) != revision.0
    }
}

impl Placed for Arc<Subscription> {
    fn place(&self) -> usize {
        self.place.load(Ordering::Relaxed)
    }

    fn set_place(&self, place: usize) {
        self.place.store(place, Ordering::Relaxed);
    }
}
