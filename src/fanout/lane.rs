//! The part of a session that hangs on one hub: groups of watchers of the same range, and the mail that comes for them.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    task::Waker,
};

use hashbrown::HashTable;

use super::{
    Hub,
    mailbox::{Letter, Mailbox, Subscription},
    push_snugly,
    watcher::Seat,
};
use crate::{
    rules::KeyRange,
    status::Status,
    store::{Position, Revision},
};

/// Watchers of one session with the same range.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) range: KeyRange,
    pub(super) members: Vec<u32>,
    subscription: Arc<Subscription>,
}

pub(super) struct Lane {
    pub(super) hub: Arc<Hub>,
    /// The epoch of the history that its watchers follow; zero before there is one.
    pub(super) epoch: u64,
    mailbox: Arc<Mailbox>,
    session: u64,
    groups: Vec<Option<Group>>,
    free: Vec<u32>,
    /// Groups by their ranges, which only the groups themselves hold.
    by_range: HashTable<u32>,
    hasher: RandomState,
    pub(super) letters: Vec<Letter>,
    /// How many of the letters have been worked off.
    pub(super) read: usize,
    /// Every live watcher has been sent everything up to here.
    pub(super) told: Revision,
    /// What `told` becomes when the letters have been worked off.
    pending_told: Revision,
    lost: Option<Revision>,
}

/// Word that concerns all watchers of a lane.
pub(super) enum Notice {
    /// The stream is to end.
    Ended(Status),
    /// Another history has begun.
    Replaced(Position),
}

impl Lane {
    pub(super) fn open(hub: &Arc<Hub>) -> Self {
        let mailbox = Arc::new(Mailbox::default());
        let (session, epoch) = hub.open(&mailbox);
        Self {
            session,
            epoch,
            hub: hub.clone(),
            mailbox,
            groups: Vec::new(),
            free: Vec::new(),
            by_range: HashTable::new(),
            hasher: RandomState::new(),
            letters: Vec::new(),
            read: 0,
            told: Revision::ZERO,
            pending_told: Revision::ZERO,
            lost: None,
        }
    }

    pub(super) fn register(&self, waker: &Waker) {
        self.mailbox.register(waker);
    }

    pub(super) fn wake_after(&self, seen: Revision) {
        self.hub.wake_after(seen, self.session);
    }

    /// Fetches new mail when the old has been worked off.
    pub(super) fn fetch(&mut self) -> Option<Notice> {
        if self.read < self.letters.len() {
            return None;
        }
        self.letters.clear();
        self.read = 0;
        // Before the mail: what has been told by now is in the mailbox already.
        self.pending_told = self.hub.told();
        if self.epoch == 0 {
            // Of the first history there is no word.
            self.epoch = self.hub.epoch();
        }
        let (lost, replaced, ended) = self.mailbox.take(&mut self.letters);
        self.lost = lost;
        ended.map(Notice::Ended).or(replaced.map(Notice::Replaced))
    }

    /// When all letters have been worked off: the revision from which the lane's watchers must read by themselves, if they
    /// were not told of something.
    pub(super) fn settle(&mut self) -> Option<Revision> {
        if self.read < self.letters.len() {
            return None;
        }
        if self.lost.is_none() {
            self.told = self.told.max(self.pending_told);
        }
        self.lost.take()
    }

    /// Forgets the mail and how far it had got: the history of `epoch` has begun.
    pub(super) fn forget(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.letters.clear();
        self.read = 0;
        self.lost = None;
        self.told = Revision::ZERO;
        self.pending_told = Revision::ZERO;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.read == self.letters.len() && self.lost.is_none()
    }

    /// How many different ranges there are.
    #[cfg(test)]
    pub(super) fn ranges(&self) -> usize {
        self.by_range.len()
    }

    pub(super) fn group(&self, group: u32) -> Option<&Group> {
        self.groups.get(group as usize)?.as_ref()
    }

    /// Lets the watcher in `slot`, who has everything up to `reached`, be told of what follows in `range`. None when the
    /// hub is further already.
    pub(super) fn join(&mut self, range: &KeyRange, slot: u32, reached: Position) -> Option<Seat> {
        let hash = self.hasher.hash_one(range);
        let same = |group: &u32| self.group(*group).is_some_and(|group| group.range == *range);
        if let Some(&group) = self.by_range.find(hash, same) {
            let members = self.hub.is_at_most(reached).then(|| self.groups[group as usize].as_mut())??;
            members.members.push(slot);
            return Some(Seat { group, place: members.members.len() as u32 - 1 });
        }
        let group = self.free.last().copied().unwrap_or(self.groups.len() as u32);
        let subscription = Subscription::new(self.mailbox.clone(), group);
        if !self.hub.join(range, &subscription, reached) {
            return None;
        }
        let joined = Some(Group { range: range.clone(), members: vec![slot], subscription });
        match self.free.pop() {
            Some(group) => self.groups[group as usize] = joined,
            None => push_snugly(&mut self.groups, joined),
        }
        let (groups, hasher) = (&self.groups, &self.hasher);
        let rehash = |group: &u32| groups[*group as usize].as_ref().map_or(0, |group| hasher.hash_one(&group.range));
        self.by_range.insert_unique(hash, group, rehash);
        Some(Seat { group, place: 0 })
    }

    /// Lets the watcher on `seat` be told of nothing more. Gives the slot of the one that has the seat from now on, if any.
    pub(super) fn leave(&mut self, seat: Seat) -> Option<u32> {
        let Seat { group, place } = seat;
        let found = self.groups.get_mut(group as usize)?.as_mut()?;
        found.members.swap_remove(place as usize);
        if found.members.is_empty() {
            self.hub.leave(&found.range, &found.subscription);
            let hash = self.hasher.hash_one(&found.range);
            if let Ok(entry) = self.by_range.find_entry(hash, |entry| *entry == group) {
                entry.remove();
            }
            self.groups[group as usize] = None;
            self.free.push(group);
            return None;
        }
        found.members.get(place as usize).copied()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        for group in self.groups.iter().flatten() {
            self.hub.leave(&group.range, &group.subscription);
        }
        self.hub.close(self.session);
    }
}
