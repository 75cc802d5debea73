//! Writes as they are evaluated, one after another, inside the transaction that a group of them shares.

mod lease;
mod txn;

use std::{collections::HashMap, ops::ControlFlow, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tonic::Code;

pub use txn::{is_read_only, read_only};

use super::{
    alarms::{Alarm, Alarms},
    backend::{EventId, MAX_EVENTS, MAX_REVISION, Meta, Record, Version, Writer},
    error::{Fault, SqlError},
    history::Revision,
    leases::Leases,
    range::{self, Position, header},
};
use crate::{
    proto::{
        etcdserverpb::{DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse},
        mvccpb::KeyValue,
    },
    rules::KeyRange,
    status::Status,
};

/// The transaction of one group. Each operation gets its own revision and its own success or failure; a refused operation
/// leaves nothing behind, a failure of the store undoes the whole group.
pub struct Transaction<'a> {
    store: &'a mut dyn Writer,
    leases: &'a Mutex<Leases>,
    /// Leases granted (with their time to live) or revoked in this group.
    lease_changes: HashMap<i64, Option<i64>>,
    alarms: Alarms,
    at: Position,
    /// What the operation under way has written so far.
    draft: Vec<Record>,
    revisions: Vec<Arc<Revision>>,
    wrote: bool,
}

/// What a group changed, to be published once it is durable.
pub struct Changes {
    /// The new revisions, in order.
    pub revisions: Vec<Arc<Revision>>,
    /// The latest revision and the compacted one.
    pub at: Position,
    /// Leases granted (with their time to live) or revoked.
    pub lease_changes: HashMap<i64, Option<i64>>,
    /// The alarms that are on.
    pub alarms: Alarms,
    /// Whether anything was written at all.
    pub wrote: bool,
}

impl<'a> Transaction<'a> {
    /// Starts on a store that has an open write transaction.
    pub fn new(store: &'a mut dyn Writer, leases: &'a Mutex<Leases>, at: Position, alarms: Alarms) -> Self {
        let (lease_changes, draft, revisions) = Default::default();
        Self { store, leases, lease_changes, alarms, at, draft, revisions, wrote: false }
    }

    /// What the group came to.
    pub fn into_changes(self) -> Changes {
        let Self { revisions, at, lease_changes, alarms, wrote, .. } = self;
        Changes { revisions, at, lease_changes, alarms, wrote }
    }

    /// The latest revision, this group's included.
    pub fn revision(&self) -> i64 {
        self.at.current
    }

    /// The alarms that are on.
    pub fn alarms(&self) -> &Alarms {
        &self.alarms
    }

    /// Turns an alarm on, if it is off.
    pub fn activate(&mut self, alarm: Alarm) -> Result<(), Fault> {
        if self.alarms.contains(alarm) {
            return Ok(());
        }
        self.wrote = true;
        self.alarms.insert(alarm);
        Ok(self.store.put_alarm(alarm)?)
    }

    /// Turns an alarm off; whether it was on.
    pub fn deactivate(&mut self, alarm: Alarm) -> Result<bool, Fault> {
        if !self.alarms.contains(alarm) {
            return Ok(false);
        }
        self.wrote = true;
        self.alarms.remove(alarm);
        self.store.delete_alarm(alarm)?;
        Ok(true)
    }

    /// Bytes of the database, as far as this transaction has made it grow.
    pub fn size(&mut self) -> Result<i64, Fault> {
        Ok(self.store.size()?.total)
    }

    /// Puts a key. The header carries only the revision.
    pub fn put(&mut self, request: PutRequest) -> Result<PutResponse, Fault> {
        self.check_put(&request)?;
        let response = self.write_put(request)?;
        self.seal();
        Ok(response)
    }

    /// Deletes the keys of a range; without any, there is no new revision.
    pub fn delete_range(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Fault> {
        let response = self.write_delete(request)?;
        self.seal();
        Ok(response)
    }

    /// Sets the compacted revision; what it makes superfluous is removed later, step by step.
    pub fn compact(&mut self, revision: i64) -> Result<(), Fault> {
        if revision <= self.at.compacted {
            return Err(Status::COMPACTED.into());
        }
        if revision > self.at.current {
            return Err(Status::FUTURE_REVISION.into());
        }
        self.wrote = true;
        self.store.set_meta(Meta::Compacted, revision)?;
        self.at.compacted = revision;
        Ok(())
    }

    /// What a read inside the operation under way sees.
    fn position(&self) -> Position {
        let current = if self.draft.is_empty() { self.at.current } else { self.next_revision() };
        Position { current, ..self.at }
    }

    fn next_revision(&self) -> i64 {
        self.at.current.saturating_add(1)
    }

    fn check_put(&mut self, request: &PutRequest) -> Result<(), Fault> {
        if request.lease != 0 && !self.lease_exists(request.lease) {
            return Err(Status::LEASE_NOT_FOUND.into());
        }
        if (request.ignore_value || request.ignore_lease) && self.live(&request.key)?.is_none() {
            return Err(Status::KEY_NOT_FOUND.into());
        }
        Ok(())
    }

    fn live(&mut self, key: &[u8]) -> Result<Option<Version>, SqlError> {
        Ok(self.store.newest(key, EventId(i64::MAX))?.filter(|version| !version.is_deletion()))
    }

    fn write_put(&mut self, request: PutRequest) -> Result<PutResponse, Fault> {
        let id = self.next_event()?;
        let previous = self.live(&request.key)?;
        let needs_previous = request.ignore_value || request.prev_kv;
        let previous_kv = match previous.filter(|_| needs_previous) {
            Some(version) => Some(range::fetch_record(self.store, version.id)?.into_kv()),
            None => None,
        };
        if previous.is_none() && (request.ignore_value || request.ignore_lease) {
            return Err(Status::KEY_NOT_FOUND.into());
        }
        let old_lease = previous.map_or(0, |version| version.lease);
        let lease = if request.ignore_lease { old_lease } else { request.lease };
        let value = match &previous_kv {
            Some(kv) if request.ignore_value => kv.value.clone(),
            _ => request.value,
        };
        let version = Version {
            id,
            create_revision: previous.map_or(id.revision(), |version| version.create_revision),
            version: previous.map_or(0, |version| version.version).saturating_add(1),
            lease,
        };
        self.append(Record { key: request.key.clone(), value, version })?;
        self.move_lease(&request.key, old_lease, lease)?;
        let prev_kv = previous_kv.filter(|_| request.prev_kv);
        Ok(PutResponse { header: header(id.revision()), prev_kv })
    }

    fn move_lease(&mut self, key: &[u8], from: i64, to: i64) -> Result<(), SqlError> {
        if from == to {
            return Ok(());
        }
        if from != 0 {
            self.store.detach(from, key)?;
        }
        if to != 0 {
            self.store.attach(to, key)?;
        }
        Ok(())
    }

    fn write_delete(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Fault> {
        let range = KeyRange::from_request(&request.key, &request.range_end);
        let mut doomed: Vec<(Bytes, Version)> = Vec::new();
        self.store.scan(&range, EventId(i64::MAX), &mut |key, version| {
            doomed.push((Bytes::copy_from_slice(key), version));
            if doomed.len() > MAX_EVENTS as usize { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        self.check_room(doomed.len())?;
        let prev_kvs = if request.prev_kv { self.pairs(&doomed)? } else { Vec::new() };
        let deleted = i64::try_from(doomed.len()).unwrap_or(i64::MAX);
        for (key, version) in doomed {
            self.delete_key(key, version.lease)?;
        }
        Ok(DeleteRangeResponse { header: header(self.position().current), deleted, prev_kvs })
    }

    /// Refuses, before anything is written, to add more events than a revision can have.
    fn check_room(&self, events: usize) -> Result<(), Status> {
        if self.draft.len().saturating_add(events) > MAX_EVENTS as usize {
            return Err(Status::fixed(Code::InvalidArgument, "etcdserver: too many keys in one deletion"));
        }
        Ok(())
    }

    fn pairs(&mut self, entries: &[(Bytes, Version)]) -> Result<Vec<KeyValue>, Fault> {
        let mut pairs = Vec::with_capacity(entries.len());
        for (_, version) in entries {
            pairs.push(range::fetch_record(self.store, version.id)?.into_kv());
        }
        Ok(pairs)
    }

    fn delete_key(&mut self, key: Bytes, lease: i64) -> Result<(), Fault> {
        let id = self.next_event()?;
        self.move_lease(&key, lease, 0)?;
        let version = Version { id, create_revision: 0, version: 0, lease: 0 };
        self.append(Record { key, value: Bytes::new(), version })?;
        Ok(())
    }

    fn append(&mut self, record: Record) -> Result<(), SqlError> {
        self.wrote = true;
        self.store.append(&record)?;
        self.draft.push(record.detached());
        Ok(())
    }

    fn next_event(&self) -> Result<EventId, Fault> {
        let sub = i64::try_from(self.draft.len()).unwrap_or(i64::MAX);
        let revision = self.next_revision();
        if revision > MAX_REVISION || sub >= MAX_EVENTS {
            return Err(Status::new(Code::ResourceExhausted, "etcdserver: the store is out of revisions").into());
        }
        Ok(EventId::new(revision, sub))
    }

    /// Ends an operation: what it wrote becomes the next revision.
    fn seal(&mut self) {
        if !self.draft.is_empty() {
            let revision = self.next_revision();
            let records = std::mem::take(&mut self.draft);
            self.revisions.push(Arc::new(Revision::new(revision, records)));
            self.at.current = revision;
        }
    }
}

#[cfg(test)]
mod tests;
