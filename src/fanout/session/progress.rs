//! Progress notifications: a revision up to which a watcher, or every watcher of the stream, has been sent everything.

use super::{Session, State};
use crate::{
    fanout::{Out, encode::Envelope, watcher::Watcher},
    store::{Responder, Revision},
};

/// Requests for progress that wait for their answers. A client that was told of a revision before it asked is not told less
/// then: of each request, what was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    least: Revision,
    most: Revision,
}

impl Asked {
    fn at(known: Revision) -> Self {
        Self { least: known, most: known }
    }

    fn also_at(self, known: Revision) -> Self {
        Self { least: self.least.min(known), most: self.most.max(known) }
    }

    /// What is left when `revision`, which is not below the least, was told.
    fn answered(self, revision: Revision) -> Option<Self> {
        (revision < self.most).then(|| Self::at(self.most))
    }
}

/// How a request for progress stands.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Every watcher has everything up to here.
    At(Responder, Revision),
    /// Some watcher is still catching up, or behind what was known when it was asked.
    NotYet,
    /// Etcd would stay silent.
    Never,
}

impl Session {
    /// Notes that the client, which may know of the revision `known`, asks how far the stream has got. The answer goes out once
    /// it is true and not below that. The upstream is to be asked for the watchers that it alone can tell of: true when there
    /// are such.
    pub fn request_progress(&mut self, known: Revision) -> bool {
        self.asked = Some(self.asked.map_or(Asked::at(known), |asked| asked.also_at(known)));
        self.ask_relays()
    }

    /// Forgets what the upstream has told of the watchers that nothing cached covers. True when there are such.
    pub fn ask_relays(&mut self) -> bool {
        let mut any = false;
        for watcher in self.watchers.iter_mut().flatten().filter(|watcher| watcher.lane.is_none()) {
            if let State::Relayed { told } = &mut watcher.state {
                *told = None;
                any = true;
            }
        }
        any
    }

    /// Whether some watcher asked to be told its progress now and then.
    pub fn wants_ticks(&self) -> bool {
        self.ticking > 0
    }

    /// Whether a request for progress is waiting for its answer.
    pub fn awaits_progress(&self) -> bool {
        self.asked.is_some()
    }

    /// A tick of the progress timer: tells every watcher that asked for it, and has seen nothing since the last tick, how
    /// far it has got.
    pub fn tick(&mut self, out: &mut Out) {
        for slot in 0..self.watchers.len() {
            let Some(watcher) = &self.watchers[slot] else { continue };
            if !watcher.options.progress_notify {
                continue;
            }
            let due = watcher.quiet.then(|| self.progress_of(watcher)).flatten();
            if let Some((responder, revision)) = due.filter(|(_, revision)| *revision >= watcher.start) {
                let watch_id = watcher.id;
                Envelope { watch_id, ..Envelope::default() }.put(out.append(), &responder.field(revision), &[]);
            }
            if let Some(watcher) = &mut self.watchers[slot] {
                watcher.quiet = true;
            }
        }
    }

    /// The revision up to which `watcher` has been sent everything, if it is not behind.
    fn progress_of(&self, watcher: &Watcher) -> Option<(Responder, Revision)> {
        if let (State::Relayed { told }, None) = (watcher.state, watcher.lane) {
            return told;
        }
        let lane = self.lanes[watcher.lane?].as_ref()?;
        let live = matches!(watcher.state, State::Live(_)) && lane.is_idle();
        (live && lane.told >= watcher.next.previous()).then(|| (lane.hub.store().view().responder, lane.told))
    }

    /// Whether a watcher waits for a revision that neither the view nor anybody else, up to `known`, has yet.
    fn begins_later(&self, watcher: &Watcher, known: Revision) -> bool {
        let present = |lane: usize| self.hubs[lane].store().view().revision().max(known);
        matches!(watcher.state, State::Live(_)) && watcher.lane.is_some_and(|lane| present(lane) < watcher.start)
    }

    /// Answers a request for progress, if it can be answered. False: it can be as soon as the hubs' mail is fetched.
    pub(super) fn answer_progress(&mut self, out: &mut Out) -> bool {
        let Some(asked) = self.asked else { return true };
        match self.progress(asked.least) {
            Answer::At(responder, revision) => {
                self.asked = asked.answered(revision);
                Envelope { watch_id: -1, ..Envelope::default() }.put(out.append(), &responder.field(revision), &[]);
            }
            Answer::Never => self.asked = None,
            // The answer of a relay wakes the stream by itself.
            Answer::NotYet if self.lanes.iter().flatten().any(|lane| lane.told < lane.hub.told()) => return false,
            Answer::NotYet => self.lanes.iter().flatten().for_each(|lane| lane.wake_after(lane.told)),
        }
        true
    }

    /// What is to be told to a client that may know of the revision `known`.
    fn progress(&self, known: Revision) -> Answer {
        let mut told: Option<(Responder, Revision)> = None;
        for watcher in self.watchers.iter().flatten() {
            let Some((responder, revision)) = self.progress_of(watcher) else {
                let never = watcher.state == State::Dead || self.begins_later(watcher, known);
                return if never { Answer::Never } else { Answer::NotYet };
            };
            if revision.max(known) < watcher.start {
                return Answer::Never;
            }
            if told.is_none_or(|(_, least)| revision < least) {
                told = Some((responder, revision));
            }
        }
        match told {
            Some((responder, revision)) if revision >= known => Answer::At(responder, revision),
            Some(_) => Answer::NotYet,
            None => Answer::Never,
        }
    }
}
