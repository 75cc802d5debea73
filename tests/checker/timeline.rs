//! The order of what happened, and the histories that followed each other.
//!
//! Everything that is recorded draws ticks from one counter: one before a request is sent, one after its answer is there.
//! So "A was over before B began" is `A.end < B.begin`, whatever the wall clock does.
//!
//! A restore ends one history and begins another: an *era*. An era is closed before the etcd is cut off from everybody but
//! the recorder, and the next is open just before anybody can reach the restored one.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

/// A point in the order of what happened.
pub type Tick = u64;

/// One history, between two restores.
#[derive(Clone, Debug)]
pub struct Era {
    /// Nobody was answered from this history before.
    pub opened: Tick,
    /// From here on the etcd of this history was out of reach.
    pub closed: Option<Tick>,
    /// What this history shares with the one before: everything up to this revision.
    pub shared: i64,
    /// Compactions that were asked for, and when.
    pub compactions: Vec<(Tick, i64)>,
    /// Compactions that were done, and since when that is known.
    pub compacted: Vec<(Tick, i64)>,
}

/// The counter, and the eras so far.
pub struct Timeline {
    ticks: AtomicU64,
    eras: Mutex<Vec<Era>>,
}

impl Timeline {
    pub fn new() -> Self {
        let first = Era { opened: 0, closed: None, shared: 0, compactions: Vec::new(), compacted: Vec::new() };
        Self { ticks: AtomicU64::new(1), eras: Mutex::new(vec![first]) }
    }

    pub fn tick(&self) -> Tick {
        self.ticks.fetch_add(1, Ordering::SeqCst)
    }

    /// The number of the era that is open, or was last.
    pub fn era(&self) -> usize {
        self.eras.lock().unwrap().len() - 1
    }

    /// Whether the etcd is out of reach for a restore.
    pub fn is_closed(&self) -> bool {
        self.eras.lock().unwrap().last().is_some_and(|era| era.closed.is_some())
    }

    /// To be called before the etcd is cut off.
    pub fn close(&self) {
        let tick = self.tick();
        self.eras.lock().unwrap().last_mut().expect("there is always an era").closed = Some(tick);
    }

    /// To be called before the restored etcd can be reached. `compacted` is up to where it may answer that it was compacted.
    pub fn open(&self, shared: i64, compacted: i64) {
        let opened = self.tick();
        let compactions = vec![(opened, compacted)];
        self.eras.lock().unwrap().push(Era { opened, closed: None, shared, compactions, compacted: Vec::new() });
    }

    /// To be called before the compaction is asked for.
    pub fn compacting(&self, revision: i64) {
        let tick = self.tick();
        self.eras.lock().unwrap().last_mut().expect("there is always an era").compactions.push((tick, revision));
    }

    /// To be called when the compaction has been answered.
    pub fn compacted(&self, revision: i64) {
        let tick = self.tick();
        self.eras.lock().unwrap().last_mut().expect("there is always an era").compacted.push((tick, revision));
    }

    pub fn eras(&self) -> Eras {
        Eras(self.eras.lock().unwrap().clone())
    }
}

/// All eras, once it is known what they were.
#[derive(Clone, Debug)]
pub struct Eras(pub Vec<Era>);

impl Eras {
    /// The last era that had been opened by `tick`.
    pub fn at(&self, tick: Tick) -> usize {
        self.0.iter().rposition(|era| era.opened <= tick).unwrap_or(0)
    }

    pub fn last(&self) -> usize {
        self.0.len() - 1
    }

    /// The highest revision of `era` whose compaction had been asked for by `tick`.
    pub fn compacted(&self, era: usize, tick: Tick) -> i64 {
        let asked = self.0[era].compactions.iter().filter(|(asked, _)| *asked <= tick);
        asked.map(|(_, revision)| *revision).max().unwrap_or(0)
    }

    /// The highest revision of `era` that was known to be compacted by `tick`.
    pub fn surely_compacted(&self, era: usize, tick: Tick) -> i64 {
        let done = self.0[era].compacted.iter().filter(|(done, _)| *done <= tick);
        done.map(|(_, revision)| *revision).max().unwrap_or(0)
    }

    /// Whether `era` had ended by `tick`.
    pub fn has_ended(&self, era: usize, tick: Tick) -> bool {
        self.0[era].closed.is_some_and(|closed| closed < tick)
    }

    /// The last era to which somebody may belong who was told of `revision` at `tick`: after a history has ended, what it
    /// did not share with the next one can no longer be told of.
    pub fn bound(&self, tick: Tick, revision: i64) -> usize {
        let ends_before =
            |next: &Era, ended: &Era| ended.closed.is_some_and(|closed| tick <= closed) && revision > next.shared;
        let pairs = self.0.windows(2).position(|pair| ends_before(&pair[1], &pair[0]));
        pairs.unwrap_or(self.last())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_before_a_restore_binds_to_the_history_that_ended() {
        let timeline = Timeline::new();
        let told = timeline.tick();
        timeline.close();
        timeline.open(10, 0);
        let eras = timeline.eras();
        assert_eq!(eras.bound(told, 11), 0);
        assert_eq!(eras.bound(told, 10), 1);
        assert_eq!(eras.bound(timeline.tick(), 11), 1);
        assert!(eras.has_ended(0, timeline.tick()) && !eras.has_ended(0, told));
        assert_eq!((eras.at(told), eras.at(timeline.tick())), (0, 1));
    }
}
