//! Removes, in small steps between writes, what the compacted revision has made superfluous.
//!
//! A compaction at C keeps, of every key, its newest version at or before C, unless that is a deletion before C. The work
//! walks the log from the last compaction to C: each event there makes the older versions of its key superfluous, and a
//! deletion makes itself so. Like etcd since 3.5.18, a deletion exactly at C stays for watchers that resume there, and goes
//! with the next compaction, whose walk begins at C again.
//!
//! So a walk keeps the C that it began with, over restarts too. A later compaction that is announced meanwhile has a walk
//! of its own afterwards: if this one went on to it, the deletions at C that it has passed would stay for good.

mod pace;

use std::{ops::ControlFlow, time::Duration};

use bytes::Bytes;

use self::pace::Pace;
use super::{
    backend::{EventId, Meta, Reader, Writer},
    error::SqlError,
};

/// Where compaction stands.
#[derive(Clone, Copy, Debug)]
struct Stand {
    /// The revision that the last finished walk was for.
    done: i64,
    /// The revision that the walk under way is for; that of the last one when there is none.
    target: i64,
    /// The next log entry to look at.
    cursor: EventId,
}

/// The compaction under way, if any.
#[derive(Debug)]
pub struct Compaction {
    durable: Stand,
    current: Stand,
    pace: Pace,
}

impl Compaction {
    /// Reads where the last run left off.
    ///
    /// Where the target is missing or behind, a version of this program ran last that keeps none and leaves deletions
    /// behind; the next walk begins at the log's beginning.
    pub fn open(store: &mut dyn Reader) -> Result<Self, SqlError> {
        let done = store.meta(Meta::CompactionDone)?.unwrap_or(-1);
        let stand = match store.meta(Meta::CompactionTarget)?.filter(|target| *target >= done) {
            Some(target) => Stand { done, target, cursor: EventId(store.meta(Meta::CompactionCursor)?.unwrap_or(0)) },
            None => Stand { done, target: done, cursor: EventId(0) },
        };
        Ok(Self { durable: stand, current: stand, pace: Pace::default() })
    }

    /// Whether something remains to be removed for the compacted revision `announced`.
    pub fn is_pending(&self, announced: i64) -> bool {
        self.current.done < announced
    }

    /// The revision that the last finished walk was for, -1 before the first.
    pub fn done(&self) -> i64 {
        self.durable.done
    }

    /// Whether the commit under way, which has so many writes, should take a step.
    pub fn has_turn(&mut self, writes: usize) -> bool {
        self.pace.has_turn(writes)
    }

    /// How long to wait for a write before a step has a commit of its own.
    pub fn gap(&self) -> Duration {
        self.pace.gap()
    }

    /// Takes one step inside an open write transaction, of the walk under way or else of one for `announced`. Returns how
    /// many events it removed.
    pub fn step(&mut self, store: &mut dyn Writer, announced: i64) -> Result<u64, SqlError> {
        if self.current.target <= self.current.done {
            self.current.target = announced;
            store.set_meta(Meta::CompactionTarget, announced)?;
        }
        let target = self.current.target;
        let limit = self.pace.step();
        let seen = upcoming(store, self.current.cursor, target, limit)?;
        let mut removed = 0;
        for (key, id, is_deletion) in &seen {
            for older in store.older(key, *id)? {
                store.remove(key, older)?;
                removed += 1;
            }
            if *is_deletion && id.revision() < target {
                store.remove(key, *id)?;
                removed += 1;
            }
        }
        match seen.last() {
            Some((_, last, _)) if seen.len() == limit => self.current.cursor = EventId(last.0.saturating_add(1)),
            _ => {
                self.current = Stand { done: target, target, cursor: EventId::first(target) };
                store.set_meta(Meta::CompactionDone, target)?;
            }
        }
        store.set_meta(Meta::CompactionCursor, self.current.cursor.0)?;
        Ok(removed)
    }

    /// A commit with so many writes, and perhaps a step, is durable; it took that long from its beginning.
    pub fn committed(&mut self, writes: usize, stepped: bool, took: Duration) {
        self.durable = self.current;
        self.pace.committed(writes, stepped, took);
    }

    /// The step was undone.
    pub fn rolled_back(&mut self) {
        self.current = self.durable;
    }
}

fn upcoming(
    store: &mut dyn Writer,
    from: EventId,
    target: i64,
    limit: usize,
) -> Result<Vec<(Bytes, EventId, bool)>, SqlError> {
    let mut seen = Vec::with_capacity(limit);
    store.log(from, EventId::last(target), &mut |record| {
        seen.push((record.key, record.version.id, record.version.is_deletion()));
        if seen.len() == limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    Ok(seen)
}

#[cfg(test)]
mod tests;
