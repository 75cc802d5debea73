//! The floor: the highest revision in any answer that we have relayed. Nothing older is served.

use std::sync::atomic::{AtomicI64, Ordering};

use crate::store::Revision;

/// The highest relayed revision, which may only sink when the history changes.
#[derive(Debug, Default)]
pub(super) struct Floor {
    revision: AtomicI64,
    /// The highest since the feed last lost its upstream: what remains true should the history turn out to be another.
    recent: AtomicI64,
}

impl Floor {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::Acquire))
    }

    /// Whether anything has been relayed since the feed last lost its upstream.
    pub(super) fn has_relayed_since(&self) -> bool {
        self.recent.load(Ordering::Acquire) > 0
    }

    pub(super) fn raise(&self, revision: Revision) {
        self.recent.fetch_max(revision.0, Ordering::AcqRel);
        self.revision.fetch_max(revision.0, Ordering::AcqRel);
    }

    /// What is relayed from now on may be of another history than before.
    pub(super) fn part(&self) {
        self.recent.store(0, Ordering::Release);
    }

    /// The history is another.
    pub(super) fn sink(&self) {
        self.revision.store(self.recent.load(Ordering::Acquire), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks_to_what_was_relayed_since_the_upstream_was_lost() {
        let floor = Floor::default();
        floor.raise(Revision(100));
        floor.raise(Revision(90));
        assert_eq!(floor.revision(), Revision(100));
        assert!(floor.has_relayed_since());
        floor.part();
        assert!(!floor.has_relayed_since());
        floor.raise(Revision(7));
        assert_eq!(floor.revision(), Revision(100));
        floor.sink();
        assert_eq!(floor.revision(), Revision(7));
    }
}
