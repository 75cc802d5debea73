//! The cluster: one log of committed entries, and members that apply it, each at its own pace.
//!
//! Raft itself is not modelled, only what a client can see of it. Whatever is committed stays in the log until a restore.
//! A member that is connected to a majority learns of it after a while; one that is cut off stands still, keeps its term,
//! and goes on answering what needs no consensus. Every kill and every restore gives a member a new incarnation, so that
//! what an earlier process of it was doing ends.

use std::sync::Arc;

use millpond::{
    proto::{etcdserverpb::ResponseHeader, mvccpb::KeyValue},
    rules::KeyRange,
    status::Status,
};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    sync::Notify,
    time::{Duration, Instant, sleep, timeout},
};

use super::history::{History, Write};
use crate::dice::Dice;

const CLUSTER_ID: u64 = 0xc1;
/// After which etcd gives up on a request that needs consensus.
const CONSENSUS_PATIENCE: Duration = Duration::from_secs(7);
/// How long a stream that asked for a leader goes on without one: three election timeouts.
const LEADERLESS: Duration = Duration::from_secs(3);

/// A committed entry: how far the cluster has got with it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    revision: i64,
    compacted: i64,
}

/// One member.
#[derive(Debug)]
pub struct Member {
    pub alive: bool,
    /// Cut off from the other members.
    pub cut_off: bool,
    /// It takes up to as many milliseconds to apply what was committed.
    pub lag: u64,
    pub incarnation: u64,
    /// Entries applied.
    applied: usize,
    term: u64,
    /// Since when it has no leader.
    leaderless: Option<Instant>,
}

/// What a member is at, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standpoint {
    pub revision: i64,
    pub compacted: i64,
    /// The history that these are of, by its place among the cluster's.
    pub generation: usize,
}

/// The cluster's state.
pub struct Inner {
    term: u64,
    log: Vec<Entry>,
    pub members: Vec<Member>,
    /// Every history that there has been; a restore begins one.
    pub histories: Vec<History>,
    /// The highest revision of each history that anybody was told of.
    pub told: Vec<i64>,
    /// The revision at which each history began.
    pub began: Vec<i64>,
    /// The newest compaction of each history.
    compactions: Vec<i64>,
    /// Up to where the present history was compacted when it began. No backup of it knows of less.
    marked: i64,
    /// How many lists have been asked for.
    pub lists: usize,
    /// A count of a range gets no answer.
    pub counts_hang: bool,
}

impl Inner {
    pub fn generation(&self) -> usize {
        self.histories.len() - 1
    }

    pub fn history(&self) -> &History {
        &self.histories[self.generation()]
    }

    /// Whether the histories of two generations have the same state of `range` at `revision`.
    pub fn are_alike(&self, one: usize, other: usize, range: &KeyRange, revision: i64) -> bool {
        let (one, other) = (&self.histories[one], &self.histories[other]);
        let state = |history: &'_ History| -> Vec<KeyValue> {
            history.state(revision).values().filter(|kv| range.contains(&kv.key)).cloned().collect()
        };
        std::ptr::eq(one, other) || revision <= one.head().min(other.head()) && state(one) == state(other)
    }

    fn has_quorum(&self) -> bool {
        let connected = self.members.iter().filter(|member| member.alive && !member.cut_off).count();
        connected * 2 > self.members.len()
    }

    /// Whether the member takes part in a majority.
    pub fn is_connected(&self, at: usize) -> bool {
        self.members[at].alive && !self.members[at].cut_off && self.has_quorum()
    }

    pub fn standpoint(&self, at: usize) -> Standpoint {
        let Entry { revision, compacted } = self.log[self.members[at].applied - 1];
        Standpoint { revision, compacted, generation: self.generation() }
    }

    /// The newest compaction.
    pub fn compacted(&self) -> i64 {
        self.log.last().map_or(0, |entry| entry.compacted)
    }

    /// The newest compaction that anybody can know of who knows the histories from `generation` on.
    pub fn compacted_since(&self, generation: usize) -> i64 {
        self.compactions[generation..].iter().copied().max().unwrap_or(0)
    }

    pub fn header(&self, at: usize, revision: i64) -> ResponseHeader {
        let member_id = at as u64 + 1;
        ResponseHeader { cluster_id: CLUSTER_ID, member_id, revision, raft_term: self.members[at].term }
    }

    fn commit(&mut self, entry: Entry) -> usize {
        self.log.push(entry);
        self.log.len()
    }

    /// Brings what follows from who is connected up to date.
    fn settle(&mut self) {
        for at in 0..self.members.len() {
            let connected = self.is_connected(at);
            let term = self.term;
            let member = &mut self.members[at];
            if connected {
                member.term = term;
                member.leaderless = None;
            } else {
                member.leaderless.get_or_insert_with(Instant::now);
            }
        }
    }
}

/// The model cluster. Cheap to clone.
#[derive(Clone)]
pub struct Cluster(Arc<Shared>);

struct Shared {
    inner: Mutex<Inner>,
    changed: Notify,
}

impl Cluster {
    /// A cluster whose members apply what is committed until the runtime ends.
    pub fn start(members: usize, dice: &mut Dice) -> Self {
        let member =
            |_| Member { alive: true, cut_off: false, lag: 3, incarnation: 0, applied: 1, term: 2, leaderless: None };
        let inner = Inner {
            term: 2,
            log: vec![Entry { revision: 1, compacted: 0 }],
            members: (0..members).map(member).collect(),
            histories: vec![History::new()],
            told: vec![1],
            began: vec![1],
            compactions: vec![0],
            marked: 0,
            lists: 0,
            counts_hang: false,
        };
        let cluster = Self(Arc::new(Shared { inner: Mutex::new(inner), changed: Notify::new() }));
        for at in 0..members {
            tokio::spawn(cluster.clone().keep_applying(at, dice.fork()));
        }
        cluster
    }

    pub fn look(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock()
    }

    /// Changes something, and wakes everybody who waits for a change.
    pub fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.look();
        let outcome = change(&mut inner);
        inner.settle();
        drop(inner);
        self.0.changed.notify_waiters();
        outcome
    }

    /// Waits until `look` finds something.
    pub async fn until<T>(&self, mut look: impl FnMut(&Inner) -> Option<T>) -> T {
        loop {
            let changed = self.0.changed.notified();
            if let Some(found) = look(&self.look()) {
                return found;
            }
            changed.await;
        }
    }

    async fn keep_applying(self, at: usize, mut dice: Dice) {
        loop {
            let behind = |inner: &Inner| {
                (inner.is_connected(at) && inner.members[at].applied < inner.log.len()).then(|| inner.members[at].lag)
            };
            let lag = self.until(behind).await;
            sleep(dice.pause(lag)).await;
            let all = dice.chance(2);
            self.change(|inner| {
                if inner.is_connected(at) && inner.members[at].applied < inner.log.len() {
                    let applied = inner.members[at].applied;
                    inner.members[at].applied = if all { inner.log.len() } else { applied + 1 };
                }
            });
        }
    }

    /// Waits for what `look` finds in the present incarnation of the member.
    async fn in_life<T>(&self, at: usize, mut look: impl FnMut(&Inner) -> Option<T>) -> Result<T, Status> {
        let incarnation = self.look().members[at].incarnation;
        let found = self.until(|inner| {
            if inner.members[at].incarnation != incarnation {
                return Some(Err(Status::STOPPED));
            }
            look(inner).map(Ok)
        });
        timeout(CONSENSUS_PATIENCE, found).await.unwrap_or(Err(Status::TIMEOUT))
    }

    /// As etcd's ReadIndex: everything that is committed when a majority is asked, applied at the member. Refused when the
    /// leader changes meanwhile.
    pub async fn consent(&self, at: usize, round_trip: Duration) -> Result<Standpoint, Status> {
        sleep(round_trip).await;
        let asked = |inner: &Inner| inner.is_connected(at).then_some((inner.log.len(), inner.term));
        let (index, term) = self.in_life(at, asked).await?;
        sleep(round_trip).await;
        if self.look().term != term {
            return Err(Status::LEADER_CHANGED);
        }
        self.applied(at, index).await
    }

    async fn applied(&self, at: usize, index: usize) -> Result<Standpoint, Status> {
        self.in_life(at, |inner| (inner.members[at].applied >= index).then(|| inner.standpoint(at))).await
    }

    /// Writes through a member: the header of the answer, whose revision is that of the write. `lose` leaves the client
    /// without an answer though it is done.
    pub async fn write(&self, at: usize, writes: &[Write], lose: bool) -> Result<ResponseHeader, Status> {
        self.in_life(at, |inner| inner.is_connected(at).then_some(())).await?;
        let (index, revision) = self.change(|inner| {
            let generation = inner.generation();
            let revision = inner.histories[generation].write(writes);
            let compacted = inner.compacted();
            (inner.commit(Entry { revision, compacted }), revision)
        });
        if lose {
            return Err(Status::TIMEOUT);
        }
        self.applied(at, index).await?;
        Ok(self.look().header(at, revision))
    }

    /// Compacts at `revision`, if that is possible and news.
    pub fn compact(&self, revision: i64) {
        self.change(|inner| {
            let head = inner.history().head();
            if inner.has_quorum() && inner.compacted() < revision && revision <= head {
                let generation = inner.generation();
                inner.compactions[generation] = revision;
                inner.commit(Entry { revision: head, compacted: revision });
            }
        });
    }

    /// Compacts through a member, which answers for it.
    pub async fn compact_through(&self, at: usize, revision: i64) -> Result<ResponseHeader, Status> {
        self.in_life(at, |inner| inner.is_connected(at).then_some(())).await?;
        let (compacted, head) = {
            let inner = self.look();
            (inner.compacted(), inner.history().head())
        };
        match revision {
            _ if revision <= compacted => return Err(Status::COMPACTED),
            _ if revision > head => return Err(Status::FUTURE_REVISION),
            _ => self.compact(revision),
        }
        let index = self.look().log.len();
        self.applied(at, index).await?;
        Ok(self.look().header(at, head))
    }

    /// Another leader.
    pub fn elect(&self) {
        self.change(|inner| inner.term += u64::from(inner.has_quorum()));
    }

    pub fn kill(&self, at: usize) {
        self.change(|inner| {
            inner.members[at].alive = false;
            inner.members[at].incarnation += 1;
        });
    }

    pub fn revive(&self, at: usize) {
        self.change(|inner| inner.members[at].alive = true);
    }

    /// Begins another history with what a backup taken at `revision` holds. All members must be dead. `held` leaves the
    /// term where it was, as elections since can have done.
    pub fn restore(&self, revision: i64, bump: i64, held: bool) {
        self.change(|inner| {
            let history = inner.history().restored(revision, bump);
            let head = history.head();
            inner.histories.push(history);
            inner.told.push(head);
            inner.began.push(head);
            let compacted = if bump > 0 { head } else { inner.marked };
            inner.compactions.push(compacted);
            inner.marked = compacted;
            inner.log = vec![Entry { revision: head, compacted }];
            inner.term = if held { inner.term } else { 2 };
            let term = inner.term;
            inner.members.iter_mut().for_each(|member| (member.applied, member.term) = (1, term));
        });
    }

    /// Commits one revision after the other, whoever is there.
    pub fn go_on_with(&self, revisions: &[Vec<Write>]) {
        self.change(|inner| {
            for writes in revisions {
                let generation = inner.generation();
                let (revision, compacted) = (inner.histories[generation].write(writes), inner.compacted());
                inner.commit(Entry { revision, compacted });
            }
        });
    }

    /// Notes that somebody was told of `revision` of the history that is the present one.
    pub fn tell(&self, generation: usize, revision: i64) {
        let mut inner = self.look();
        inner.told[generation] = inner.told[generation].max(revision);
    }

    /// Ends when the member's process ends, or, if it is `required`, when it has had no leader for long.
    pub async fn ended(&self, at: usize, incarnation: u64, required: bool) -> Status {
        loop {
            let changed = self.0.changed.notified();
            let (alive, leaderless) = {
                let inner = self.look();
                (inner.members[at].incarnation == incarnation, inner.members[at].leaderless)
            };
            if !alive {
                return Status::STOPPED;
            }
            match leaderless.filter(|_| required) {
                Some(since) if since.elapsed() >= LEADERLESS => return Status::NO_LEADER,
                Some(since) => drop(timeout(LEADERLESS.saturating_sub(since.elapsed()), changed).await),
                None => changed.await,
            }
        }
    }
}
