//! The floor of a cached prefix: the highest revision in any answer that its clients were given from elsewhere. Nothing
//! older is served.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicI64, Ordering},
};

use parking_lot::Mutex;

use crate::{store::Revision, upstream::ConnectionNumber};

/// Connections whose answers are kept apart; of more than that, the oldest are taken together.
const REMEMBERED: usize = 256;

/// The highest revision heard, which may only sink when the history changes.
#[derive(Debug, Default)]
pub(super) struct Floor {
    /// The highest of `heard`. Changed under its lock.
    revision: AtomicI64,
    /// The highest that was heard over each connection.
    heard: Mutex<BTreeMap<ConnectionNumber, i64>>,
}

impl Floor {
    pub(super) fn revision(&self) -> Revision {
        Revision(self.revision.load(Ordering::Acquire))
    }

    /// Notes what was heard over `connection`.
    pub(super) fn raise(&self, revision: Revision, connection: ConnectionNumber) {
        let mut heard = self.heard.lock();
        let highest = heard.entry(connection).or_default();
        *highest = revision.0.max(*highest);
        if heard.len() > REMEMBERED
            && let Some((_, oldest)) = heard.pop_first()
            && let Some(mut next) = heard.first_entry()
        {
            // Counted with a newer connection, it may survive its history: the floor is too high then, never too low.
            *next.get_mut() = oldest.max(*next.get());
        }
        self.revision.fetch_max(revision.0, Ordering::AcqRel);
    }

    /// The history has changed: what was heard over connections up to `parted` is of the one that has ended.
    pub(super) fn sink(&self, parted: ConnectionNumber) {
        let mut heard = self.heard.lock();
        heard.retain(|connection, _| *connection > parted);
        self.revision.store(heard.values().copied().max().unwrap_or(0), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(heard: &[(i64, u64)]) -> Floor {
        let floor = Floor::default();
        heard.iter().for_each(|(revision, connection)| floor.raise(Revision(*revision), ConnectionNumber(*connection)));
        floor
    }

    #[test]
    fn sinks_to_what_was_heard_of_the_history_that_goes_on() {
        let floor = floor(&[(100, 1), (90, 2), (7, 3), (5, 4)]);
        assert_eq!(floor.revision(), Revision(100));
        floor.sink(ConnectionNumber(2));
        assert_eq!(floor.revision(), Revision(7));
        floor.raise(Revision(6), ConnectionNumber(4));
        assert_eq!(floor.revision(), Revision(7));
        floor.sink(ConnectionNumber(9));
        assert_eq!(floor.revision(), Revision::ZERO);
    }

    #[test]
    fn of_many_connections_the_oldest_are_taken_together() {
        let heard: Vec<_> = (0..10 * REMEMBERED as u64).map(|number| (5000 - number as i64, number)).collect();
        let floor = floor(&heard);
        assert_eq!(floor.heard.lock().len(), REMEMBERED);
        floor.sink(ConnectionNumber(0));
        assert_eq!(floor.revision(), Revision(5000));
    }
}
