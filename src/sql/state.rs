//! What an open store keeps in memory for everyone: who it is, where it stands, its leases, alarms and latest events.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::Instant,
};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    SqlError, Trouble,
    alarms::Alarms,
    backend::{Meta, Writer},
    counts::Counts,
    history::History,
    leases::Leases,
    options::Options,
    range::Position,
};
use crate::proto::etcdserverpb::ResponseHeader;

/// Who the store is. The ids stay for the life of the data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's id.
    pub cluster_id: u64,
    /// The id of its one member.
    pub member_id: u64,
    /// The Raft term; it rises with every start.
    pub term: u64,
}

/// What is known of the store without reading it.
pub struct State {
    /// Who it is.
    pub identity: Identity,
    /// How it was opened.
    pub options: Options,
    /// The leases.
    pub leases: Mutex<Leases>,
    /// The latest events.
    pub history: History,
    /// Counts of ranges that are read page by page.
    pub counts: Counts,
    revision: watch::Sender<i64>,
    compacted: watch::Sender<i64>,
    compaction_done: watch::Sender<i64>,
    alarms: Mutex<Alarms>,
    size: AtomicI64,
}

impl State {
    /// The latest revision and the compacted one.
    pub fn position(&self) -> Position {
        Position { current: *self.revision.borrow(), compacted: *self.compacted.borrow() }
    }

    /// Makes a new position known: the compacted revision first, since whatever is read after it must not be read below it.
    pub fn set_position(&self, at: Position) {
        self.options.metrics.revision.set(at.current);
        self.options.metrics.compacted_revision.set(at.compacted);
        let raise = |sender: &watch::Sender<i64>, to: i64| {
            sender.send_if_modified(|value| to > std::mem::replace(value, to));
        };
        raise(&self.compacted, at.compacted);
        raise(&self.revision, at.current);
    }

    /// Tells when the latest revision has moved.
    pub fn revisions(&self) -> watch::Receiver<i64> {
        self.revision.subscribe()
    }

    /// Tells when the compacted revision has moved.
    pub fn compactions(&self) -> watch::Receiver<i64> {
        self.compacted.subscribe()
    }

    /// The alarms that are on.
    pub fn alarms(&self) -> Alarms {
        self.alarms.lock().clone()
    }

    /// Makes the alarms known.
    pub fn set_alarms(&self, alarms: Alarms) {
        *self.alarms.lock() = alarms;
    }

    /// The last revision for which compaction has removed everything that it can.
    pub fn compaction_done(&self) -> watch::Receiver<i64> {
        self.compaction_done.subscribe()
    }

    /// Makes it known that compaction has finished for `revision`.
    pub fn set_compaction_done(&self, revision: i64) {
        self.compaction_done.send_if_modified(|done| revision > std::mem::replace(done, revision));
    }

    /// Bytes of the database as of the last commit.
    pub fn size(&self) -> i64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Makes the size known.
    pub fn set_size(&self, bytes: i64) {
        self.options.metrics.size_bytes.set(bytes);
        self.size.store(bytes, Ordering::Relaxed);
    }

    /// The header of an answer at `revision`.
    pub fn header_at(&self, revision: i64) -> ResponseHeader {
        let Identity { cluster_id, member_id, term } = self.identity;
        ResponseHeader { cluster_id, member_id, revision, raft_term: term }
    }

    /// The header of an answer at the latest revision.
    pub fn header(&self) -> ResponseHeader {
        self.header_at(self.position().current)
    }

    /// Completes a header that has at most a revision.
    pub fn fill(&self, header: &mut Option<ResponseHeader>) {
        let revision = header.as_ref().map_or(0, |header| header.revision);
        *header = Some(if revision == 0 { self.header() } else { self.header_at(revision) });
    }
}

/// Writes the term down. Where there is no room for it, it is used all the same: it has not fallen, and the next start may
/// have the same one.
fn keep_term(store: &mut dyn Writer, term: i64) -> Result<(), SqlError> {
    let kept = store.begin_write().and_then(|()| store.set_meta(Meta::Term, term)).and_then(|()| store.commit());
    match kept {
        Err(error) if matches!(error.trouble(), Trouble::Full | Trouble::Unindexed) => {
            tracing::warn!(%error, "the disk is full: reads go on, writes are refused until there is room");
            store.rollback()
        }
        kept => kept,
    }
}

/// Reads what is kept in memory, and begins a new term.
pub fn load(store: &mut dyn Writer, options: Options) -> Result<State, SqlError> {
    let term = store.meta(Meta::Term)?.unwrap_or(0).saturating_add(1);
    keep_term(store, term)?;
    let bits = |value: Option<i64>| value.unwrap_or(1).cast_unsigned();
    let identity = Identity {
        cluster_id: bits(store.meta(Meta::ClusterId)?),
        member_id: bits(store.meta(Meta::MemberId)?),
        term: term.cast_unsigned(),
    };
    let compacted = store.meta(Meta::Compacted)?.unwrap_or(-1);
    let last = store.last_event()?.map_or(1, |event| event.revision());
    let at = Position { current: last.max(compacted).max(1), compacted };
    let state = State {
        identity,
        leases: Mutex::new(Leases::recover(store.leases()?, Instant::now())),
        history: History::new(options.history_bytes),
        counts: Counts::default(),
        revision: watch::Sender::new(at.current),
        compacted: watch::Sender::new(compacted),
        compaction_done: watch::Sender::new(store.meta(Meta::CompactionDone)?.unwrap_or(-1)),
        size: AtomicI64::new(store.size()?.total),
        alarms: Mutex::new(store.alarms()?.into_iter().collect()),
        options,
    };
    state.set_position(at);
    Ok(state)
}
