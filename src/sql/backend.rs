//! What the engine asks of a database: a log of events in order, an index of every key's versions, leases, alarms and a
//! few named numbers.
//!
//! The engine is written against these traits alone; [`super::sqlite`] is the first implementation.

use std::ops::ControlFlow;

use bytes::{Bytes, BytesMut};

use super::{alarms::Alarm, error::SqlError};
use crate::{
    proto::mvccpb::{Event, KeyValue, event::EventType},
    rules::{KeyRange, Number, Numbers},
};

/// Bits of an [`EventId`] that number the events of one revision.
const SUB_BITS: u32 = 22;

/// The most events that one revision can have.
pub const MAX_EVENTS: i64 = 1 << SUB_BITS;

/// The last revision that an [`EventId`] can carry.
pub const MAX_REVISION: i64 = i64::MAX >> SUB_BITS;

/// One change in the order in which all changes happened: the revision and the place within it, packed so that the
/// database orders by one integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId(pub i64);

impl EventId {
    /// The event numbered `sub` of `revision`. Both are clamped to what fits.
    pub fn new(revision: i64, sub: i64) -> Self {
        Self(revision.clamp(0, MAX_REVISION) << SUB_BITS | sub.clamp(0, MAX_EVENTS - 1))
    }

    /// The first event that `revision` can have.
    pub fn first(revision: i64) -> Self {
        Self::new(revision, 0)
    }

    /// The last event that `revision` can have.
    pub fn last(revision: i64) -> Self {
        Self::new(revision, MAX_EVENTS - 1)
    }

    /// The revision.
    pub fn revision(self) -> i64 {
        self.0 >> SUB_BITS
    }

    /// The place within the revision, from 0.
    pub fn sub(self) -> i64 {
        self.0 & (MAX_EVENTS - 1)
    }
}

/// What the index knows of one version of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The event that made it.
    pub id: EventId,
    /// The revision at which the key was created; 0 for a deletion.
    pub create_revision: i64,
    /// Counts the puts since the creation; 0 for a deletion.
    pub version: i64,
    /// The lease that the key hangs on, or 0.
    pub lease: i64,
}

impl Version {
    /// Whether this version is a deletion.
    pub fn is_deletion(&self) -> bool {
        self.version == 0
    }
}

impl Numbers for Version {
    fn number_of(&self, which: Number) -> i64 {
        match which {
            Number::Version => self.version,
            Number::Create => self.create_revision,
            Number::Mod => self.id.revision(),
            Number::Lease => self.lease,
        }
    }
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Bytes,
    /// The value; empty for a deletion.
    pub value: Bytes,
    /// The rest.
    pub version: Version,
}

impl Record {
    /// The record in memory of its own: what arrived in a request is a slice of a buffer several times as large.
    pub fn detached(self) -> Self {
        let mut bytes = BytesMut::with_capacity(self.key.len() + self.value.len());
        bytes.extend_from_slice(&self.key);
        bytes.extend_from_slice(&self.value);
        let mut value = bytes.freeze();
        let key = value.split_to(self.key.len());
        Self { key, value, version: self.version }
    }

    /// The key-value pair as clients see it. A deletion has only its key and revision.
    pub fn into_kv(self) -> KeyValue {
        KeyValue {
            key: self.key,
            create_revision: self.version.create_revision,
            mod_revision: self.version.id.revision(),
            version: self.version.version,
            value: self.value,
            lease: self.version.lease,
        }
    }

    /// The event as watchers see it, without the previous pair.
    pub fn into_event(self) -> Event {
        let kind = if self.version.is_deletion() { EventType::Delete } else { EventType::Put };
        Event { r#type: kind.into(), kv: Some(self.into_kv()), prev_kv: None }
    }
}

/// A lease as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredLease {
    /// Its id.
    pub id: i64,
    /// The granted time to live, in seconds.
    pub ttl: i64,
    /// What remained of it at the last checkpoint, in seconds; 0 when there was none since the last renewal.
    pub remaining: i64,
}

/// The numbers that a store keeps by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    /// The id of the cluster, as the bits of a `u64`.
    ClusterId,
    /// The id of the one member, as the bits of a `u64`.
    MemberId,
    /// The Raft term: how often the store was opened.
    Term,
    /// A floor under the current revision, for when the log's end has been compacted away.
    Revision,
    /// The compacted revision; absent before the first compaction.
    Compacted,
    /// The revision up to which the last finished compaction removed what it could.
    CompactionDone,
    /// The revision that the compaction under way is for, or the last one was.
    CompactionTarget,
    /// Where in the log the compaction under way stands.
    CompactionCursor,
    /// How often a commit that failed was written over in the database's log: something that differs each time.
    WrittenOver,
}

impl Meta {
    /// The name in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::ClusterId => "cluster_id",
            Self::MemberId => "member_id",
            Self::Term => "term",
            Self::Revision => "revision",
            Self::Compacted => "compacted",
            Self::CompactionDone => "compaction_done",
            Self::CompactionTarget => "compaction_target",
            Self::CompactionCursor => "compaction_cursor",
            Self::WrittenOver => "written_over",
        }
    }
}

/// How much room a database takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Bytes of the file.
    pub total: i64,
    /// Bytes of it in use.
    pub used: i64,
}

/// The database's own log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogPages {
    /// Pages in it.
    pub total: u64,
    /// Pages of it that have been copied to where they stay.
    pub copied: u64,
}

/// Called for each index entry of a scan, with the key; breaks to end the scan.
pub type VisitVersion<'a> = dyn FnMut(&[u8], Version) -> ControlFlow<()> + 'a;

/// Called for each log entry of a read; breaks to end it.
pub type VisitRecord<'a> = dyn FnMut(Record) -> ControlFlow<()> + 'a;

/// Reading. Between [`Reader::begin`] and [`Reader::end`] everything is read from one state of the database.
pub trait Reader: Send {
    /// Pins the state to read from.
    fn begin(&mut self) -> Result<(), SqlError>;
    /// Lets go of it. Harmless without a `begin`.
    fn end(&mut self);
    /// The newest version of `key` at or before `bound`, deletions included.
    fn newest(&mut self, key: &[u8], bound: EventId) -> Result<Option<Version>, SqlError>;
    /// Visits, in the order of keys, each key of the range that exists as of `bound`, with its newest version.
    fn scan(&mut self, range: &KeyRange, bound: EventId, visit: &mut VisitVersion<'_>) -> Result<(), SqlError>;
    /// The log entry of an event.
    fn record(&mut self, id: EventId) -> Result<Option<Record>, SqlError>;
    /// The log entries of several events, in the order of `ids`.
    fn records(&mut self, ids: &[EventId]) -> Result<Vec<Option<Record>>, SqlError>;
    /// Visits the log from `from` to `to`, both included, in order.
    fn log(&mut self, from: EventId, to: EventId, visit: &mut VisitRecord<'_>) -> Result<(), SqlError>;
    /// The last event in the log.
    fn last_event(&mut self) -> Result<Option<EventId>, SqlError>;
    /// The ids of the versions of `key` before `id`.
    fn older(&mut self, key: &[u8], id: EventId) -> Result<Vec<EventId>, SqlError>;
    /// A named number.
    fn meta(&mut self, name: Meta) -> Result<Option<i64>, SqlError>;
    /// All leases.
    fn leases(&mut self) -> Result<Vec<StoredLease>, SqlError>;
    /// The keys that hang on a lease, sorted.
    fn lease_keys(&mut self, lease: i64) -> Result<Vec<Bytes>, SqlError>;
    /// All alarms.
    fn alarms(&mut self) -> Result<Vec<Alarm>, SqlError>;
    /// The database's size.
    fn size(&mut self) -> Result<Size, SqlError>;
}

/// Writing, from one thread. Reads between [`Writer::begin_write`] and [`Writer::commit`] see what was written.
pub trait Writer: Reader {
    /// Opens a transaction.
    fn begin_write(&mut self) -> Result<(), SqlError>;
    /// Makes the transaction durable.
    fn commit(&mut self) -> Result<(), SqlError>;
    /// Undoes the transaction.
    fn rollback(&mut self) -> Result<(), SqlError>;
    /// Marks a point to go back to.
    fn savepoint(&mut self) -> Result<(), SqlError>;
    /// Forgets the mark.
    fn release(&mut self) -> Result<(), SqlError>;
    /// Goes back to the mark and forgets it.
    fn rollback_to_savepoint(&mut self) -> Result<(), SqlError>;
    /// Appends to the log and the index.
    fn append(&mut self, record: &Record) -> Result<(), SqlError>;
    /// Removes a version from the log and the index.
    fn remove(&mut self, key: &[u8], id: EventId) -> Result<(), SqlError>;
    /// Sets a named number.
    fn set_meta(&mut self, name: Meta, value: i64) -> Result<(), SqlError>;
    /// Adds or replaces a lease.
    fn put_lease(&mut self, lease: StoredLease) -> Result<(), SqlError>;
    /// Removes a lease; its keys must have been detached.
    fn delete_lease(&mut self, id: i64) -> Result<(), SqlError>;
    /// Hangs a key on a lease.
    fn attach(&mut self, lease: i64, key: &[u8]) -> Result<(), SqlError>;
    /// Takes a key off a lease.
    fn detach(&mut self, lease: i64, key: &[u8]) -> Result<(), SqlError>;
    /// Adds an alarm, which may be there.
    fn put_alarm(&mut self, alarm: Alarm) -> Result<(), SqlError>;
    /// Removes an alarm.
    fn delete_alarm(&mut self, alarm: Alarm) -> Result<(), SqlError>;
    /// Pages that commits have appended to the database's log since it last started over.
    fn log_pages(&mut self) -> Result<LogPages, SqlError>;
    /// Copies the pages of the log to where they stay, as far as no reader needs them where they are. Outside a transaction.
    fn checkpoint(&mut self) -> Result<(), SqlError>;
    /// Gives free room back to the file system. Outside a transaction.
    fn defragment(&mut self) -> Result<(), SqlError>;
}
