//! What really happened, as the recorder saw it, and what every request must therefore be answered with.

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;
use millpond::proto::{
    etcdserverpb::{
        RangeRequest, RangeResponse, WatchCreateRequest,
        range_request::{SortOrder, SortTarget},
        watch_create_request::FilterType,
    },
    mvccpb::{Event, KeyValue, event::EventType},
};

/// Every event of one history, by revision, and every version of every key.
#[derive(Clone, Debug, Default)]
pub struct History {
    revisions: BTreeMap<i64, Vec<Event>>,
    versions: BTreeMap<Bytes, Vec<(i64, Option<KeyValue>)>>,
    /// The highest revision that is known to exist, with or without events.
    pub last: i64,
}

impl History {
    /// Of a new etcd: its revisions begin with 1, without an event.
    pub fn empty() -> Self {
        Self { last: 1, ..Self::default() }
    }

    /// Adds all events of one revision, which is higher than all before.
    pub fn append(&mut self, revision: i64, events: Vec<Event>) {
        assert!(
            revision > self.revisions.keys().next_back().copied().unwrap_or(0),
            "the recorder sees revisions in order"
        );
        for event in &events {
            let record = event.kv.clone().expect("every event has a record");
            let value = (event.r#type == EventType::Put as i32).then(|| record.clone());
            self.versions.entry(record.key).or_default().push((revision, value));
        }
        self.last = self.last.max(revision);
        self.revisions.insert(revision, events);
    }

    /// What a store has that was restored from a snapshot at `revision`.
    pub fn truncated(&self, revision: i64) -> Self {
        let mut kept = Self::default();
        for (at, events) in self.revisions.range(..=revision) {
            kept.append(*at, events.clone());
        }
        kept
    }

    pub fn revisions(&self) -> impl Iterator<Item = (&i64, &Vec<Event>)> {
        self.revisions.iter()
    }

    /// The events of one revision.
    pub fn at(&self, revision: i64) -> &[Event] {
        self.revisions.get(&revision).map_or(&[], Vec::as_slice)
    }

    /// A key as it was at a revision.
    pub fn get(&self, key: &Bytes, at: i64) -> Option<&KeyValue> {
        let versions = self.versions.get(key)?;
        let after = versions.partition_point(|(revision, _)| *revision <= at);
        versions[..after].last()?.1.as_ref()
    }

    /// The answer to `request` for the state at `at`, without a header.
    pub fn select(&self, request: &RangeRequest, at: i64, keys_only_keeps_lease: bool) -> RangeResponse {
        let keys = self.versions.range::<Bytes, _>(bounds(&request.key, &request.range_end));
        let mut kvs: Vec<KeyValue> = keys.filter_map(|(key, _)| self.get(key, at)).cloned().collect();
        let count = kvs.len() as i64;
        if request.count_only {
            return RangeResponse { count, ..Default::default() };
        }
        // As etcd: without a sort order and filters, the limit is applied first, whatever the sort target.
        if request.sort_order == SortOrder::None as i32 && !is_filtered(request) && request.limit > 0 {
            kvs.truncate((request.limit as usize).saturating_add(1));
        }
        kvs.retain(|record| passes(request, record));
        sort(request, &mut kvs);
        let more = request.limit > 0 && kvs.len() as i64 > request.limit;
        if more {
            kvs.truncate(request.limit as usize);
        }
        if request.keys_only {
            let keeps_lease = keys_only_keeps_lease || request.sort_target == SortTarget::Value as i32;
            for record in &mut kvs {
                record.value = Bytes::new();
                record.lease = if keeps_lease { record.lease } else { 0 };
            }
        }
        RangeResponse { kvs, count, more, ..Default::default() }
    }

    /// The events that a watcher is to be sent for the revisions `from` to `to`, both included, without previous records.
    pub fn watched<'a>(
        &'a self,
        request: &'a WatchCreateRequest,
        from: i64,
        to: i64,
    ) -> impl Iterator<Item = &'a Event> {
        let revisions = (from <= to).then(|| self.revisions.range(from..=to));
        revisions.into_iter().flatten().flat_map(|(_, events)| events).filter(|event| wants(request, event))
    }

    /// The state at the end, as a list of keys and records.
    pub fn contents(&self, at: i64) -> Vec<KeyValue> {
        self.versions.keys().filter_map(|key| self.get(key, at)).cloned().collect()
    }
}

fn wants(request: &WatchCreateRequest, event: &Event) -> bool {
    let filter = if event.r#type == EventType::Put as i32 { FilterType::Noput } else { FilterType::Nodelete };
    let key = &event.kv.as_ref().expect("every event has a record").key;
    // As in etcd, an empty key in a watch is the first possible one.
    let start = if request.key.is_empty() { Bytes::from_static(b"\0") } else { request.key.clone() };
    contains(&start, &request.range_end, key) && !request.filters.contains(&(filter as i32))
}

fn contains(key: &Bytes, range_end: &Bytes, candidate: &Bytes) -> bool {
    match &range_end[..] {
        [] => candidate == key,
        [0] => candidate >= key,
        _ => candidate >= key && candidate < range_end,
    }
}

fn bounds<'a>(key: &'a Bytes, range_end: &'a Bytes) -> (Bound<&'a Bytes>, Bound<&'a Bytes>) {
    match &range_end[..] {
        [] => (Bound::Included(key), Bound::Included(key)),
        [0] => (Bound::Included(key), Bound::Unbounded),
        // A reversed range is empty, and no range of a map.
        _ if range_end <= key => (Bound::Excluded(key), Bound::Included(key)),
        _ => (Bound::Included(key), Bound::Excluded(range_end)),
    }
}

fn is_filtered(request: &RangeRequest) -> bool {
    let filters =
        [request.min_mod_revision, request.max_mod_revision, request.min_create_revision, request.max_create_revision];
    filters.iter().any(|filter| *filter != 0)
}

fn passes(request: &RangeRequest, record: &KeyValue) -> bool {
    let at_least = |bound: i64, revision: i64| bound == 0 || revision >= bound;
    let at_most = |bound: i64, revision: i64| bound == 0 || revision <= bound;
    at_least(request.min_mod_revision, record.mod_revision)
        && at_most(request.max_mod_revision, record.mod_revision)
        && at_least(request.min_create_revision, record.create_revision)
        && at_most(request.max_create_revision, record.create_revision)
}

fn sort(request: &RangeRequest, kvs: &mut [KeyValue]) {
    match SortTarget::try_from(request.sort_target) {
        Ok(SortTarget::Version) => kvs.sort_by_key(|record| record.version),
        Ok(SortTarget::Create) => kvs.sort_by_key(|record| record.create_revision),
        Ok(SortTarget::Mod) => kvs.sort_by_key(|record| record.mod_revision),
        Ok(SortTarget::Value) => kvs.sort_by(|left, right| left.value.cmp(&right.value)),
        Ok(SortTarget::Key) | Err(_) => {}
    }
    if request.sort_order == SortOrder::Descend as i32 {
        kvs.reverse();
    }
}
