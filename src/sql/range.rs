//! Evaluates a range request against one state of the store.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{
    backend::{EventId, Reader, Record, Version},
    error::{Fault, SqlError, Trouble},
};
use crate::{
    proto::{
        etcdserverpb::{RangeRequest, RangeResponse, ResponseHeader},
        mvccpb::KeyValue,
    },
    rules::{
        KeyRange, Number, Numbers,
        range::{is_by_value, limit, most_fetched, passes, range_of, sort, sort_by_value},
    },
    status::Status,
};

/// Where a read stands in history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The latest revision that the read may see.
    pub current: i64,
    /// The compacted revision, -1 before the first compaction.
    pub compacted: i64,
}

impl Position {
    /// The revision to read for a request that names `revision` (0 or less: the latest), or etcd's refusal.
    pub fn resolve(self, revision: i64) -> Result<i64, Status> {
        let wanted = if revision <= 0 { self.current } else { revision };
        match wanted {
            _ if wanted > self.current => Err(Status::FUTURE_REVISION),
            _ if wanted < self.compacted => Err(Status::COMPACTED),
            _ => Ok(wanted),
        }
    }
}

/// A key with its version, before its value is fetched.
type Entry = (Bytes, Version);

impl Numbers for Entry {
    fn number_of(&self, which: Number) -> i64 {
        self.1.number_of(which)
    }
}

/// Answers `request`, which has passed [`validate::range`](crate::rules::validate::range), from `store`. The header
/// carries only the revision.
pub fn evaluate(store: &mut dyn Reader, request: &RangeRequest, at: Position) -> Result<RangeResponse, Fault> {
    let bound = EventId::last(at.resolve(request.revision)?);
    let range = range_of(request);
    let mut response = RangeResponse { header: header(at.current), ..Default::default() };
    if request.count_only {
        response.count = count(store, &range, bound)?;
        return Ok(response);
    }
    let limit = limit(request);
    let (mut entries, count) = select(store, &range, bound, request)?;
    let matching = entries.len();
    response.count = i64::try_from(count).unwrap_or(i64::MAX);
    response.more = matching > limit;
    response.kvs = if is_by_value(request) {
        sorted_by_value(store, entries, limit, request)?
    } else {
        sort(&mut entries, request);
        entries.truncate(limit);
        fetch(store, entries, request.keys_only)?
    };
    Ok(response)
}

/// The first keys of a range in the order of keys, up to the request's limit, without counting the rest. Takes no order and
/// no filters.
pub fn first(store: &mut dyn Reader, request: &RangeRequest, at: Position) -> Result<RangeResponse, Fault> {
    let bound = EventId::last(at.resolve(request.revision)?);
    let limit = limit(request);
    let mut entries: Vec<Entry> = Vec::new();
    store.scan(&range_of(request), bound, &mut |key, version| {
        entries.push((Bytes::copy_from_slice(key), version));
        if entries.len() > limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let more = entries.len() > limit;
    entries.truncate(limit);
    let kvs = fetch(store, entries, request.keys_only)?;
    Ok(RangeResponse { header: header(at.current), kvs, more, count: 0 })
}

/// A header that carries only a revision.
pub fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..Default::default() })
}

/// The number of keys of `range` as of `bound`.
pub fn count(store: &mut dyn Reader, range: &KeyRange, bound: EventId) -> Result<i64, Fault> {
    let mut count = 0;
    store.scan(range, bound, &mut |_, _| {
        count += 1;
        ControlFlow::Continue(())
    })?;
    Ok(count)
}

/// The key-value pair of one event.
pub fn fetch_record(store: &mut dyn Reader, id: EventId) -> Result<Record, SqlError> {
    store.record(id)?.ok_or_else(|| missing(id))
}

fn missing(id: EventId) -> SqlError {
    SqlError::Database {
        context: "reading a value",
        kind: Trouble::Corrupt,
        source: format!("revision {} is in the index and not in the log", id.revision()).into(),
    }
}

/// The entries that pass the filters, as many as are to be fetched, and the number of keys in the range whether they pass
/// or not.
fn select(
    store: &mut dyn Reader,
    range: &KeyRange,
    bound: EventId,
    request: &RangeRequest,
) -> Result<(Vec<Entry>, usize), Fault> {
    let (keep, mut entries, mut count) = (most_fetched(request), Vec::new(), 0_usize);
    store.scan(range, bound, &mut |key, version| {
        count += 1;
        if entries.len() < keep && passes(&version, request) {
            entries.push((Bytes::copy_from_slice(key), version));
        }
        ControlFlow::Continue(())
    })?;
    Ok((entries, count))
}

fn sorted_by_value(
    store: &mut dyn Reader,
    entries: Vec<Entry>,
    limit: usize,
    request: &RangeRequest,
) -> Result<Vec<KeyValue>, Fault> {
    let mut kvs = fetch(store, entries, false)?;
    sort_by_value(&mut kvs, request, |kv| &kv.value);
    kvs.truncate(limit);
    if request.keys_only {
        kvs.iter_mut().for_each(|kv| kv.value = Bytes::new());
    }
    Ok(kvs)
}

/// The pairs of `entries`. As in etcd 3.7, a pair without its value is also without its lease.
fn fetch(store: &mut dyn Reader, entries: Vec<Entry>, keys_only: bool) -> Result<Vec<KeyValue>, Fault> {
    if keys_only {
        let pair = |(key, version): Entry| {
            let version = Version { lease: 0, ..version };
            Record { key, value: Bytes::new(), version }.into_kv()
        };
        return Ok(entries.into_iter().map(pair).collect());
    }
    let ids: Vec<EventId> = entries.iter().map(|(_, version)| version.id).collect();
    let records = store.records(&ids)?.into_iter().zip(ids);
    records.map(|(record, id)| Ok(record.ok_or_else(|| missing(id))?.into_kv())).collect()
}
