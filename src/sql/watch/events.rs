//! Reading history for watchers, the pairs before it, and cutting large responses.

use std::{
    collections::{HashMap, HashSet},
    ops::ControlFlow,
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;

use crate::{
    proto::{
        etcdserverpb::WatchResponse,
        mvccpb::{Event, KeyValue, event::EventType},
    },
    rules::KeyRange,
    sql::{
        Engine,
        backend::{EventId, Reader, Record},
        error::Fault,
        history::Revision,
        range::{self, Position},
    },
    status::Status,
};

/// Bytes of events that are read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A stretch of history: every event from the revision asked for to `last`.
pub struct Chunk {
    /// The revisions with events, in order.
    pub revisions: Vec<Arc<Revision>>,
    /// The last revision that the stretch covers.
    pub last: i64,
}

/// Previous pairs by revision and place in it.
pub type Previous = HashMap<(i64, usize), KeyValue>;

/// The stretch that begins at `from`, from memory where it can be; `None` when `from` has been compacted.
pub async fn next_chunk(engine: &Engine, from: i64) -> Result<Option<Chunk>, Status> {
    // Nobody is shown a revision that a read may not find yet.
    let published = engine.state().position().current;
    if let Some(mut revisions) = engine.state().history.since(from, CHUNK_BYTES) {
        revisions.retain(|revision| revision.revision <= published);
        let last = revisions.last().map_or(from.saturating_sub(1), |revision| revision.revision);
        return Ok(Some(Chunk { revisions, last }));
    }
    engine.read(move |store, at| read_chunk(store, at, from)).await
}

fn read_chunk(store: &mut dyn Reader, at: Position, from: i64) -> Result<Option<Chunk>, Fault> {
    if from < at.compacted {
        return Ok(None);
    }
    let mut revisions = Vec::new();
    let (mut records, mut bytes): (Vec<Record>, usize) = (Vec::new(), 0);
    let mut full = false;
    store.log(EventId::first(from), EventId::last(at.current), &mut |record| {
        let revision = record.version.id.revision();
        let begun = records.first().map_or(revision, |first| first.version.id.revision());
        if revision != begun {
            revisions.push(Arc::new(Revision::new(begun, std::mem::take(&mut records))));
            full = bytes >= CHUNK_BYTES;
            if full {
                return ControlFlow::Break(());
            }
        }
        bytes += record.key.len() + record.value.len() + size_of::<Event>();
        records.push(record);
        ControlFlow::Continue(())
    })?;
    if let Some(first) = records.first() {
        revisions.push(Arc::new(Revision::new(first.version.id.revision(), records)));
    }
    let last = if full { revisions.last().map_or(at.current, |revision| revision.revision) } else { at.current };
    Ok(Some(Chunk { revisions, last }))
}

/// Which events of a revision etcd keeps when it is compacted at just that one: the last of each key. A transaction can put a key
/// and delete it again.
pub fn left_by_compaction(events: &[Event]) -> Vec<bool> {
    let mut later = HashSet::new();
    let key = |event: &Event| event.kv.as_ref().map(|kv| kv.key.clone());
    let mut left: Vec<bool> = events.iter().rev().map(|event| later.insert(key(event))).collect();
    left.reverse();
    left
}

/// The pairs as they were before each event of the stretch whose key is in one of `ranges`. As in etcd, there is none before
/// a creation, and none where it has been compacted.
pub async fn previous(engine: &Engine, chunk: &Chunk, ranges: Vec<KeyRange>) -> Result<Previous, Status> {
    let mut wanted: Vec<(i64, usize, Bytes)> = Vec::new();
    for revision in &chunk.revisions {
        for (sub, event) in revision.events.iter().enumerate() {
            if let Some(kv) = event.kv.as_ref().filter(|kv| !is_creation(event, kv))
                && ranges.iter().any(|range| range.contains(&kv.key))
            {
                wanted.push((revision.revision, sub, kv.key.clone()));
            }
        }
    }
    if wanted.is_empty() {
        return Ok(Previous::new());
    }
    engine.read(move |store, at| read_previous(store, at, wanted)).await
}

fn is_creation(event: &Event, kv: &KeyValue) -> bool {
    event.r#type == i32::from(EventType::Put) && kv.create_revision == kv.mod_revision
}

fn read_previous(store: &mut dyn Reader, at: Position, wanted: Vec<(i64, usize, Bytes)>) -> Result<Previous, Fault> {
    let mut previous = Previous::new();
    for (revision, sub, key) in wanted.into_iter().filter(|(revision, ..)| *revision > at.compacted) {
        let before = store.newest(&key, EventId::last(revision - 1))?;
        if let Some(version) = before.filter(|version| !version.is_deletion()) {
            previous.insert((revision, sub), range::fetch_record(store, version.id)?.into_kv());
        }
    }
    Ok(previous)
}

/// Cuts a response that reaches `limit` bytes into several, all but the last marked as a fragment, each with at least one
/// event.
pub fn fragments(response: WatchResponse, limit: usize) -> Vec<WatchResponse> {
    if response.events.len() < 2 || response.encoded_len() < limit {
        return vec![response];
    }
    let WatchResponse { header, watch_id, events, .. } = response;
    let part = || WatchResponse { header, watch_id, fragment: true, ..Default::default() };
    let overhead = part().encoded_len();
    let mut parts = vec![part()];
    let mut bytes = overhead;
    for event in events {
        let length = event.encoded_len();
        let size = 1 + prost::length_delimiter_len(length) + length;
        let Some(last) = parts.last_mut() else { break };
        if !last.events.is_empty() && bytes + size >= limit {
            bytes = overhead + size;
            parts.push(WatchResponse { events: vec![event], ..part() });
        } else {
            bytes += size;
            last.events.push(event);
        }
    }
    if let Some(last) = parts.last_mut() {
        last.fragment = false;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(sizes: &[usize]) -> WatchResponse {
        let event = |size: &usize| {
            let kv = KeyValue { value: vec![0; *size].into(), ..Default::default() };
            Event { kv: Some(kv), ..Default::default() }
        };
        WatchResponse { watch_id: 7, events: sizes.iter().map(event).collect(), ..Default::default() }
    }

    fn cut(sizes: &[usize], limit: usize) -> Vec<(usize, bool)> {
        fragments(response(sizes), limit).iter().map(|part| (part.events.len(), part.fragment)).collect()
    }

    #[test]
    fn only_large_responses_are_cut_and_no_event_is() {
        assert_eq!(cut(&[100, 100], 1000), [(2, false)]);
        assert_eq!(cut(&[5000], 1000), [(1, false)]);
        assert_eq!(cut(&[400, 400, 400], 1000), [(2, true), (1, false)]);
        assert_eq!(cut(&[5000, 1, 5000], 1000), [(1, true), (1, true), (1, false)]);
    }

    #[test]
    fn every_fragment_stays_below_the_limit_where_it_can() {
        let parts = fragments(response(&[300; 50]), 1000);
        assert!(parts.iter().all(|part| part.encoded_len() < 1000 && part.watch_id == 7));
        assert_eq!(parts.iter().map(|part| part.events.len()).sum::<usize>(), 50);
    }

    #[test]
    fn a_compaction_leaves_the_last_event_of_each_key_of_its_revision() {
        let event = |key: &'static str| {
            let kv = KeyValue { key: key.into(), ..Default::default() };
            Event { kv: Some(kv), ..Default::default() }
        };
        assert_eq!(left_by_compaction(&["a", "b", "a", "c"].map(event)), [false, true, true, true]);
    }
}
