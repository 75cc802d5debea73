//! The watchers of one Watch stream.
//!
//! A session does no I/O. The stream tells it of requests; whenever the transport has room it pumps bytes out: letters
//! from its hubs for the watchers that keep up, a stretch of the history for those that are behind. A watcher whose next
//! revision lies before the history window asks, through [`Session::take_relays`], to be relayed from the upstream until it
//! is inside.

mod alike;
mod deliver;
mod progress;

use std::{collections::HashMap, sync::Arc, task::Waker};

use super::{
    Hub, Out, Start, WatchOptions,
    encode::Envelope,
    lane::{Lane, Notice},
    push_snugly,
    watcher::{State, Watcher},
};
use crate::{
    rules::watch::Refusal,
    status::Status,
    store::{Position, Responder, Revision},
};
use deliver::{SCRATCH, Scratch};

/// What holds for every session.
#[derive(Clone, Copy, Debug)]
pub struct SessionSettings {
    /// A response at least this large, in bytes, is cut into fragments for a watcher that asked for it.
    pub fragment_bytes: usize,
}

/// A watcher's wish to be relayed from the upstream.
#[derive(Clone, Debug)]
pub struct Relay {
    /// The watcher; see [`Session::relayed`].
    pub slot: u32,
    /// Tells it from later watchers in the same slot.
    pub serial: u64,
    /// What it wants to see.
    pub options: WatchOptions,
    /// The first revision that it has not seen.
    pub from: Revision,
    /// It begins with what follows on a revision that the upstream has reached, rather than at one that its client named.
    pub begins_now: bool,
    /// The epoch of the history that it follows; zero: nothing had been loaded.
    pub epoch: u64,
    /// The hub that can take over, by its place in the session's list; none: nothing cached covers the range.
    pub lane: Option<usize>,
}

/// The watchers of one Watch stream.
pub struct Session {
    settings: SessionSettings,
    hubs: Arc<[Arc<Hub>]>,
    /// One for each hub that has been needed.
    lanes: Box<[Option<Lane>]>,
    watchers: Vec<Option<Watcher>>,
    free: Vec<u32>,
    by_id: HashMap<i64, u32>,
    /// How many watchers asked to be told their progress now and then: a stream looks at that each time it is woken.
    ticking: usize,
    behind: Vec<u32>,
    relays: Vec<Relay>,
    next_id: i64,
    serial: u64,
    asked: Option<progress::Asked>,
}

/// How a pump ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Everything that there is has been put out; the waker will be called when there is more.
    Idle,
    /// There is more at once.
    Busy,
    /// The stream ends with this status after what has been put out.
    Ended(Status),
}

impl Session {
    /// A session on `hubs`, each of which has its cached range.
    pub fn new(hubs: Arc<[Arc<Hub>]>, settings: SessionSettings) -> Self {
        Self {
            settings,
            lanes: hubs.iter().map(|_| None).collect(),
            hubs,
            watchers: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::new(),
            ticking: 0,
            behind: Vec::new(),
            relays: Vec::new(),
            next_id: 0,
            serial: 0,
            asked: None,
        }
    }

    /// How many ids are taken.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether no id is taken.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Creates a watcher over a range that is not empty, and answers with `created`, or with the refusal as etcd words
    /// it. `id` zero picks one. `lane` is the hub whose store covers the range, if any. `now` is the revision that the
    /// client may take for the present.
    pub fn create(
        &mut self,
        id: i64,
        options: WatchOptions,
        start: Start,
        lane: Option<usize>,
        now: (Responder, Revision),
        out: &mut Out,
    ) {
        match self.admit(id) {
            Ok(id) => {
                Envelope { watch_id: id, created: true, ..Envelope::default() }.put(
                    out.append(),
                    &now.0.field(now.1),
                    &[],
                );
                self.add(id, options, lane, start);
            }
            Err(refusal) => refuse(refusal.to_string(), now, out),
        }
    }

    /// Which id a new watcher gets.
    fn admit(&mut self, id: i64) -> Result<i64, Refusal> {
        if id != 0 {
            return if self.by_id.contains_key(&id) { Err(Refusal::DuplicateId) } else { Ok(id) };
        }
        while self.by_id.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        Ok(id)
    }

    fn add(&mut self, id: i64, options: WatchOptions, lane: Option<usize>, start: Start) {
        self.serial += 1;
        self.ticking += usize::from(options.progress_notify);
        let (next, start) = match start {
            Start::After(revision) => (revision.next(), Revision::ZERO),
            Start::At(revision) => (revision, revision),
        };
        let (serial, state) = (self.serial, State::Behind);
        let watcher = Watcher { id, serial, options, lane, next, start, quiet: true, state };
        let slot = self.free.pop().unwrap_or(self.watchers.len() as u32);
        match self.watchers.get_mut(slot as usize) {
            Some(free) => *free = Some(watcher),
            None => push_snugly(&mut self.watchers, Some(watcher)),
        }
        self.by_id.insert(id, slot);
        self.attend(lane);
        match lane {
            Some(_) => self.behind.push(slot),
            None => self.relay(slot),
        }
    }

    /// Begins to hear from the hub whose history decides over watchers of `lane`. To be called before the present is asked for in
    /// which such a watcher begins: should another history begin after that, the watcher is told.
    pub fn attend(&mut self, lane: Option<usize>) {
        // What nothing cached covers is left to the first hub.
        let lane = lane.unwrap_or(0);
        if let (Some(open @ None), Some(hub)) = (self.lanes.get_mut(lane), self.hubs.get(lane)) {
            *open = Some(Lane::open(hub));
        }
    }

    /// Ends the watcher `id` and answers so; an unknown id gets no answer, as in etcd.
    pub fn cancel(&mut self, id: i64, now: (Responder, Revision), out: &mut Out) {
        let Some(slot) = self.by_id.remove(&id) else { return };
        self.detach(slot);
        if let Some(watcher) = self.watchers[slot as usize].take() {
            self.ticking -= usize::from(watcher.options.progress_notify);
            if watcher.state == State::Behind {
                self.behind.retain(|behind| *behind != slot);
            }
        }
        self.free.push(slot);
        Envelope { watch_id: id, canceled: true, ..Envelope::default() }.put(out.append(), &now.0.field(now.1), &[]);
    }

    /// Takes the watcher out of its group, so that it is told of nothing more.
    fn detach(&mut self, slot: u32) {
        let Some(Some(watcher)) = self.watchers.get(slot as usize) else { return };
        if let (State::Live(seat), Some(lane)) = (watcher.state, watcher.lane)
            && let Some(lane) = &mut self.lanes[lane]
            && let Some(moved) = lane.leave(seat)
            && let Some(Some(moved)) = self.watchers.get_mut(moved as usize)
        {
            moved.state = State::Live(seat);
        }
    }

    /// Cancels the watcher because of a compaction. Its id stays taken until the client cancels it too.
    fn cancel_compacted(&mut self, slot: u32, compacted: Revision, out: &mut Out) {
        self.detach(slot);
        let Some(Some(watcher)) = self.watchers.get_mut(slot as usize) else { return };
        watcher.state = State::Dead;
        let hub = self.hubs.get(watcher.lane.unwrap_or(0));
        let responder = hub.map_or_else(Responder::default, |hub| hub.store().view().responder);
        let watch_id = watcher.id;
        Envelope { watch_id, canceled: true, compact_revision: compacted.0, ..Envelope::default() }.put(
            out.append(),
            &responder.field(Revision::ZERO),
            &[],
        );
    }

    /// Puts out what there is to say, until `out` holds `budget` bytes or more. `waker` is called when there is more.
    pub fn pump(&mut self, out: &mut Out, budget: usize, waker: &Waker) -> Pumped {
        SCRATCH.with_borrow_mut(|scratch| self.pump_with(scratch, out, budget, waker))
    }

    fn pump_with(&mut self, scratch: &mut Scratch, out: &mut Out, budget: usize, waker: &Waker) -> Pumped {
        let mut unfinished = false;
        for lane in 0..self.lanes.len() {
            let Some(open) = &mut self.lanes[lane] else { continue };
            open.register(waker);
            // With letters left from the last time, nothing is fetched: what came since has to wait for the next pump.
            unfinished |= !open.is_idle();
            match open.fetch() {
                Some(Notice::Ended(status)) => return Pumped::Ended(status),
                Some(Notice::Replaced(position)) => self.replace(lane, position, out),
                None => {}
            }
            self.deliver(lane, scratch, out, budget);
            let lost = self.lanes[lane].as_mut().and_then(Lane::settle);
            if let Some(lost) = lost {
                self.fall_behind(lane, lost);
            }
        }
        unfinished |= self.catch_up(scratch, out, budget);
        if unfinished || !self.lanes.iter().flatten().all(Lane::is_idle) {
            return Pumped::Busy;
        }
        if self.answer_progress(out) { Pumped::Idle } else { Pumped::Busy }
    }

    /// Every watcher of a lane reads on by itself: it was not told of something from `lost` on.
    fn fall_behind(&mut self, lane: usize, lost: Revision) {
        for slot in 0..self.watchers.len() as u32 {
            let Some(Some(watcher)) = self.watchers.get(slot as usize) else { continue };
            if watcher.lane == Some(lane) && matches!(watcher.state, State::Live(_)) {
                self.detach(slot);
                if let Some(Some(watcher)) = self.watchers.get_mut(slot as usize) {
                    watcher.next = watcher.next.max(lost);
                    watcher.state = State::Behind;
                    self.behind.push(slot);
                }
            }
        }
    }

    /// Another history has begun at `position`: nobody's cursor means anything in it, so everybody is told to list anew.
    fn replace(&mut self, lane: usize, position: Position, out: &mut Out) {
        for slot in 0..self.watchers.len() as u32 {
            let Some(Some(watcher)) = self.watchers.get(slot as usize) else { continue };
            if watcher.lane.unwrap_or(0) == lane && watcher.state != State::Dead {
                self.cancel_compacted(slot, position.revision, out);
            }
        }
        let dead = |slot: &u32| matches!(&self.watchers[*slot as usize], Some(watcher) if watcher.state == State::Dead);
        self.behind.retain(|slot| !dead(slot));
        if let Some(lane) = &mut self.lanes[lane] {
            lane.forget(position.epoch);
        }
    }
}

/// Answers a create request that is refused. The stream stays open.
pub fn refuse(reason: String, now: (Responder, Revision), out: &mut Out) {
    let (created, canceled) = (true, true);
    Envelope { watch_id: -1, created, canceled, cancel_reason: reason, ..Envelope::default() }.put(
        out.append(),
        &now.0.field(now.1),
        &[],
    );
}

#[cfg(test)]
mod tests;
