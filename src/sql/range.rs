//! Evaluates a range request against one state of the store.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{
    backend::{EventId, Reader, Record, Version},
    error::{Fault, SqlError, Trouble},
};
use crate::{
    proto::{
        etcdserverpb::{
            RangeRequest, RangeResponse, ResponseHeader,
            range_request::{SortOrder, SortTarget},
        },
        mvccpb::KeyValue,
    },
    rules::KeyRange,
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

/// Answers `request`, which has passed [`super::validate::range`], from `store`. The header carries only the revision.
pub fn evaluate(store: &mut dyn Reader, request: &RangeRequest, at: Position) -> Result<RangeResponse, Fault> {
    let bound = EventId::last(at.resolve(request.revision)?);
    let range = KeyRange::from_request(&request.key, &request.range_end);
    let mut response = RangeResponse { header: header(at.current), ..Default::default() };
    if request.count_only {
        response.count = count(store, &range, bound)?;
        return Ok(response);
    }
    let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
    let by_value = SortTarget::try_from(request.sort_target) == Ok(SortTarget::Value);
    let keep = if limits_work(request) { limit.saturating_add(1) } else { usize::MAX };
    let (mut entries, count) = select(store, &range, bound, keep, request)?;
    let matching = entries.len();
    response.count = i64::try_from(count).unwrap_or(i64::MAX);
    response.more = matching > limit;
    response.kvs = if by_value {
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
    let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
    let mut entries: Vec<Entry> = Vec::new();
    store.scan(&KeyRange::from_request(&request.key, &request.range_end), bound, &mut |key, version| {
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

/// Whether a limit applies before sorting. As in etcd that is so without an order even when there is a target: then the
/// first keys of the range (one more than the limit) are sorted and cut.
fn limits_work(request: &RangeRequest) -> bool {
    is_default_order(request) && !has_filters(request)
}

/// Whether the order is the one in which the store has the keys, by etcd's reckoning.
pub fn is_default_order(request: &RangeRequest) -> bool {
    let by_key = SortTarget::try_from(request.sort_target) == Ok(SortTarget::Key);
    match SortOrder::try_from(request.sort_order) {
        Ok(SortOrder::None) => true,
        Ok(SortOrder::Ascend) => by_key,
        _ => false,
    }
}

/// Whether the request filters by revision.
pub fn has_filters(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

/// Whether `version` passes the request's filters; 0 is no filter, any other number is one.
fn passes(version: &Version, request: &RangeRequest) -> bool {
    let (created, modified) = (version.create_revision, version.id.revision());
    (request.max_mod_revision == 0 || modified <= request.max_mod_revision)
        && (request.min_mod_revision == 0 || modified >= request.min_mod_revision)
        && (request.max_create_revision == 0 || created <= request.max_create_revision)
        && (request.min_create_revision == 0 || created >= request.min_create_revision)
}

/// Up to `keep` entries that pass the filters, and the number of keys in the range whether they pass or not.
fn select(
    store: &mut dyn Reader,
    range: &KeyRange,
    bound: EventId,
    keep: usize,
    request: &RangeRequest,
) -> Result<(Vec<Entry>, usize), Fault> {
    let (mut entries, mut count) = (Vec::new(), 0_usize);
    store.scan(range, bound, &mut |key, version| {
        count += 1;
        if entries.len() < keep && passes(&version, request) {
            entries.push((Bytes::copy_from_slice(key), version));
        }
        ControlFlow::Continue(())
    })?;
    Ok((entries, count))
}

/// Sorts by anything but the value. Ties stay in the order of keys.
fn sort(entries: &mut [Entry], request: &RangeRequest) {
    let number: fn(&Entry) -> i64 = match SortTarget::try_from(request.sort_target).unwrap_or_default() {
        SortTarget::Version => |entry| entry.1.version,
        SortTarget::Create => |entry| entry.1.create_revision,
        SortTarget::Mod => |entry| entry.1.id.revision(),
        SortTarget::Key | SortTarget::Value => |_| 0,
    };
    let by_key = SortTarget::try_from(request.sort_target) == Ok(SortTarget::Key);
    match (descends(request), by_key) {
        (true, true) => entries.reverse(),
        (true, false) => entries.sort_by_key(|entry| std::cmp::Reverse(number(entry))),
        (false, _) => entries.sort_by_key(number),
    }
}

fn descends(request: &RangeRequest) -> bool {
    SortOrder::try_from(request.sort_order) == Ok(SortOrder::Descend)
}

fn sorted_by_value(
    store: &mut dyn Reader,
    entries: Vec<Entry>,
    limit: usize,
    request: &RangeRequest,
) -> Result<Vec<KeyValue>, Fault> {
    let mut kvs = fetch(store, entries, false)?;
    kvs.sort_by(|a, b| if descends(request) { b.value.cmp(&a.value) } else { a.value.cmp(&b.value) });
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
