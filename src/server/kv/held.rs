//! What large answers have still to write, and for how long a client that stops reading may keep it.
//!
//! A run of the tree holds on to its view: whatever is overwritten meanwhile stays in memory for it. HTTP/2 lets a client
//! stop reading for ever, and then nobody asks the answer for its next piece, so runs are looked after from outside. What has been
//! handed over is not: of a large answer that is two pieces at most, the one on its way and the one behind it.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use prometheus::IntCounter;
use tokio::time::sleep;

use crate::{
    grpc::BodyError,
    server::data::List,
    store::{Record, Run, Tree, range::Records},
};

/// Between two looks at who has stopped reading.
const SWEEP: Duration = Duration::from_secs(15);
/// So many looks in a row may find that nothing was read: a minute, as for forwarded answers.
const PATIENCE: u32 = 4;

/// Bytes of the records of a leaf that may be held as a whole. A larger one's are held singly, so that an answer keeps little
/// in memory that is not in it.
const SMALL_LEAF: u64 = 128 << 10;

/// Records that are still to be written.
pub(super) enum Rest {
    /// In key order.
    Run {
        /// The tree of the answer's view.
        tree: Tree,
        /// The key of the next record.
        start: Bytes,
        /// How many are left.
        left: u64,
    },
    /// In any order.
    List(std::vec::IntoIter<Record>),
}

impl From<Records> for Rest {
    fn from(records: Records) -> Self {
        match records {
            Records::Run(tree, start, sums) => Self::Run { tree, start, left: sums.keys },
            Records::List(records, _) => Self::List(records.into_iter()),
        }
    }
}

impl Rest {
    /// Calls `each` with all records that are left.
    pub(super) fn for_each(&self, each: impl FnMut(&Record)) {
        match self {
            Self::Run { tree, start, left } => tree.iter_from(start).take(*left as usize).for_each(each),
            Self::List(records) => records.as_slice().iter().for_each(each),
        }
    }

    /// Hands out records until `take` wants no more. True when none is left.
    pub(super) fn hand_out(&mut self, mut take: impl FnMut(&Record) -> bool) -> bool {
        match self {
            Self::Run { tree, start, left } => {
                let mut records = tree.iter_from(start).take(*left as usize);
                let mut taken = 0;
                for record in records.by_ref() {
                    taken += 1;
                    if !take(record) {
                        break;
                    }
                }
                *left -= taken;
                let Some(next) = records.next() else { return true };
                *start = Bytes::copy_from_slice(next.key());
                false
            }
            Self::List(records) => {
                for record in records.by_ref() {
                    if !take(&record) {
                        break;
                    }
                }
                records.as_slice().is_empty()
            }
        }
    }

    /// Appends references to records until `list` has `until` bytes, or a small leaf more. True when none is left.
    pub(super) fn refer(&mut self, list: &mut List, until: usize) -> bool {
        let Self::Run { tree, start, left } = self else {
            return self.hand_out(|record| {
                list.push_record(record);
                list.len() < until
            });
        };
        for mut run in tree.runs_from(start) {
            run.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            let fitting = fitting(&run, list.len(), until);
            let next = run.get(fitting).map(|next| Bytes::copy_from_slice(next.key()));
            run.truncate(fitting);
            *left -= fitting as u64;
            match is_small(&run) {
                true => list.push_run(run),
                false => run.records().for_each(|record| list.push_record(record)),
            }
            if let Some(next) = next {
                *start = next;
                return false;
            }
            if *left == 0 {
                break;
            }
        }
        true
    }
}

/// Whether the records of a run may be held by their leaf, which keeps all of its records in memory.
fn is_small(run: &Run) -> bool {
    run.kept().wire <= SMALL_LEAF
}

/// How many records of a run follow on `length` bytes until there are `until`.
fn fitting(run: &Run, mut length: usize, until: usize) -> usize {
    if is_small(run) {
        return if length < until { run.len() } else { 0 };
    }
    let mut fitting = 0;
    for record in run.records() {
        if length >= until {
            break;
        }
        length += record.field().len();
        fitting += 1;
    }
    fitting
}

/// Looks after what is still to be written.
pub(super) struct Holder {
    slots: Mutex<Vec<Weak<Slot>>>,
    given_up: IntCounter,
}

/// Rests, one after the other, that their client has to keep reading.
pub(super) struct Held(Arc<Slot>);

struct Slot {
    /// Together, since whoever reads the first of them is not idle about the others.
    rests: Mutex<Option<VecDeque<Rest>>>,
    /// How many looks in a row have found that nothing was read.
    idle: AtomicU32,
}

impl Holder {
    /// Counts the answers that were given up in `given_up`.
    pub(super) fn new(given_up: IntCounter) -> Arc<Self> {
        Arc::new(Self { slots: Mutex::default(), given_up })
    }

    /// Looks after everything for as long as there is somebody else who needs the holder.
    pub(super) async fn look_after(holder: Weak<Self>) {
        while let Some(holder) = holder.upgrade() {
            holder.sweep();
            drop(holder);
            sleep(SWEEP).await;
        }
    }

    /// Takes the rests of one answer into care.
    pub(super) fn hold(&self, rests: impl Into<VecDeque<Rest>>) -> Held {
        let slot = Arc::new(Slot { rests: Mutex::new(Some(rests.into())), idle: AtomicU32::new(0) });
        self.slots.lock().push(Arc::downgrade(&slot));
        Held(slot)
    }

    /// Looks once, and takes away what has been left alone for too long.
    pub(super) fn sweep(&self) {
        let mut slots = self.slots.lock();
        let is_idle = |slot: &Slot| slot.idle.fetch_add(1, Ordering::Relaxed) >= PATIENCE;
        let mut idle = Vec::new();
        slots.retain(|slot| {
            let Some(slot) = slot.upgrade() else { return false };
            let keeps = !is_idle(&slot);
            if !keeps {
                idle.push(slot);
            }
            keeps
        });
        let fitting = slots.len() * 2;
        slots.shrink_to(fitting);
        // Dropping a tree takes time, which nobody else is to wait for.
        drop(slots);
        let given_up = idle.iter().filter_map(|slot| slot.rests.lock().take()).count();
        self.given_up.inc_by(given_up as u64);
    }
}

impl Held {
    /// Hands out records of the first rest until `take` wants no more. True when none is left of it; then the next is the first.
    ///
    /// # Errors
    /// When the answer was given up.
    pub(super) fn hand_out(&mut self, take: impl FnMut(&Record) -> bool) -> Result<bool, BodyError> {
        self.with_rest(|rest| rest.hand_out(take))
    }

    /// Appends references to records of the first rest until `list` has `until` bytes, or a small leaf more. True when none is
    /// left of it; then the next is the first.
    ///
    /// # Errors
    /// When the answer was given up.
    pub(super) fn refer(&mut self, list: &mut List, until: usize) -> Result<bool, BodyError> {
        self.with_rest(|rest| rest.refer(list, until))
    }

    fn with_rest(&mut self, act: impl FnOnce(&mut Rest) -> bool) -> Result<bool, BodyError> {
        self.0.idle.store(0, Ordering::Relaxed);
        let given_up = || BodyError(io::Error::new(io::ErrorKind::TimedOut, "the client had stopped reading").into());
        let mut rests = self.0.rests.lock();
        let rests = rests.as_mut().ok_or_else(given_up)?;
        let last = rests.front_mut().is_none_or(act);
        if last {
            rests.pop_front();
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Buf;

    use super::*;
    use crate::store::Revision;

    fn record(number: u32, size: usize) -> Record {
        Record::new(format!("k{number:04}").as_bytes(), &vec![b'v'; size], Revision(2), Revision(3), 1, 0)
    }

    fn rest(keys: u32) -> Rest {
        let tree: Tree = (0..keys).map(|number| record(number, 1)).collect();
        Rest::Run { left: tree.len(), start: Bytes::new(), tree }
    }

    fn holder() -> Arc<Holder> {
        Holder::new(IntCounter::new("given_up", "for the test").unwrap())
    }

    #[test]
    fn whoever_reads_on_keeps_its_run_to_the_end() {
        let holder = holder();
        let mut held = holder.hold([rest(10)]);
        for written in 1..=10 {
            (0..PATIENCE).for_each(|_| holder.sweep());
            let last = held.hand_out(|_| false).unwrap();
            assert_eq!(last, written == 10);
        }
        drop(held);
        holder.sweep();
        assert!(holder.slots.lock().is_empty() && holder.given_up.get() == 0);
    }

    /// Each by itself would have been given up while the one before it was read.
    #[test]
    fn whoever_reads_one_rest_keeps_those_behind_it() {
        let holder = holder();
        let mut held = holder.hold([rest(10), rest(1)]);
        for written in 1..=11 {
            (0..PATIENCE).for_each(|_| holder.sweep());
            assert_eq!(held.hand_out(|_| false).unwrap(), written >= 10);
        }
        assert!(held.0.rests.lock().as_ref().is_some_and(VecDeque::is_empty));
    }

    #[test]
    fn references_come_in_pieces_whatever_the_size_of_records() {
        for (size, most) in [(1 << 10, SMALL_LEAF as usize), (64 << 10, 65 << 10)] {
            let tree: Tree = (0..50).map(|number| record(number, size)).collect();
            for (from, left, until) in
                [(0, 50, 1), (7, 43, 100 << 10), (7, 20, 100 << 10), (3, 1, 1), (49, 1, usize::MAX)]
            {
                let start = Bytes::copy_from_slice(record(from, 0).key());
                let mut rest = Rest::Run { tree: tree.clone(), start, left };
                let (mut taken, mut last) = (Vec::new(), false);
                while !last {
                    let mut list = List::default();
                    last = rest.refer(&mut list, until);
                    assert!(list.len() < until.saturating_add(most) && (last || list.len() >= until));
                    let mut data = crate::server::data::Data::from(list);
                    taken.extend_from_slice(&data.copy_to_bytes(data.remaining()));
                }
                let expected = (from..from + left as u32).map(|number| record(number, size).field().to_vec());
                assert!(taken == expected.collect::<Vec<_>>().concat(), "{size} {from} {left} {until}");
            }
        }
    }

    #[test]
    fn whoever_stops_reading_loses_it() {
        let holder = holder();
        let mut held = holder.hold([rest(10)]);
        assert!(!held.hand_out(|record| record.key() < &b"k0004"[..]).unwrap());
        (0..=PATIENCE).for_each(|_| holder.sweep());
        assert!(held.0.rests.lock().is_none() && holder.given_up.get() == 1);
        assert!(held.hand_out(|_| true).is_err());
    }
}
