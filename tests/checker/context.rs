//! What all clients share: where the servers are, what is noted down, and when to stop.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use tokio::sync::watch;

use super::{
    record::{Notes, Target},
    timeline::{Tick, Timeline},
};
use crate::support::random::Bounds;

/// How far a run has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Everybody works.
    Work,
    /// Watchers only wait for what is still to come.
    Drain,
    /// Everybody stops.
    Over,
}

/// Shared by all clients of a run.
pub struct Context {
    pub seed: u64,
    pub timeline: Timeline,
    pub notes: Notes,
    /// The servers' `host:port`.
    pub targets: Vec<(Target, String)>,
    pub stage: watch::Sender<Stage>,
    /// The newest revision that anybody was told of, to choose interesting ones from.
    current: AtomicI64,
    compacted: AtomicI64,
    answers: Mutex<HashMap<Target, Vec<Answer>>>,
}

/// An answer to a unary call.
struct Answer {
    begin: Tick,
    revision: i64,
}

/// What the clients of a server have been told since some time.
pub struct Knowledge {
    target: Target,
    since: Tick,
    /// How many answers have been looked at.
    read: usize,
    highest: i64,
}

impl Context {
    pub fn new(seed: u64, targets: Vec<(Target, String)>) -> Arc<Self> {
        Arc::new(Self {
            seed,
            timeline: Timeline::new(),
            notes: Notes::default(),
            targets,
            stage: watch::Sender::new(Stage::Work),
            current: AtomicI64::new(1),
            compacted: AtomicI64::new(0),
            answers: Mutex::default(),
        })
    }

    /// A seed of its own for each worker.
    pub fn seed_of(&self, worker: usize) -> u64 {
        self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(worker as u64)
    }

    pub fn endpoint(&self, target: Target) -> &str {
        let found = self.targets.iter().find(|(known, _)| *known == target);
        &found.expect("every target has an endpoint").1
    }

    pub fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    pub fn works(&self) -> bool {
        self.stage() == Stage::Work
    }

    pub fn seen(&self, revision: i64) {
        self.current.fetch_max(revision, Ordering::Relaxed);
    }

    /// Notes what a call that began at `begin` was answered.
    pub fn answered(&self, target: Target, begin: Tick, revision: i64) {
        self.seen(revision);
        self.answers.lock().unwrap().entry(target).or_default().push(Answer { begin, revision });
    }

    /// What is told to clients of `target` from now on.
    pub fn knowledge(&self, target: Target) -> Knowledge {
        let read = self.answers.lock().unwrap().get(&target).map_or(0, Vec::len);
        Knowledge { target, since: self.timeline.tick(), read, highest: 0 }
    }

    /// The highest revision of it.
    pub fn known(&self, knowledge: &mut Knowledge) -> i64 {
        let answers = self.answers.lock().unwrap();
        let answers = answers.get(&knowledge.target).map_or(&[][..], Vec::as_slice);
        let new = answers[knowledge.read..].iter().filter(|answer| answer.begin > knowledge.since);
        knowledge.highest = new.map(|answer| answer.revision).fold(knowledge.highest, i64::max);
        knowledge.read = answers.len();
        knowledge.highest
    }

    /// A restore may have brought back an older present.
    pub fn restart_at(&self, revision: i64, compacted: i64) {
        self.current.store(revision, Ordering::Relaxed);
        self.compacted.store(compacted, Ordering::Relaxed);
    }

    pub fn note_compacted(&self, revision: i64) {
        self.compacted.fetch_max(revision, Ordering::Relaxed);
    }

    pub fn bounds(&self) -> Bounds {
        let current = self.current.load(Ordering::Relaxed);
        Bounds { current, compacted: self.compacted.load(Ordering::Relaxed).min(current) }
    }
}
