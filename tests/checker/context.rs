//! What all clients share: where the servers are, what is noted down, and when to stop.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use tokio::sync::watch;

use super::{
    record::{Notes, Target},
    timeline::Timeline,
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
