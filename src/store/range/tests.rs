//! Range evaluation, views and history against a model that keeps every state there ever was.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{
    proto::etcdserverpb::range_request::{SortOrder, SortTarget},
    rules::range::{has_filters, range_of},
    store::{Change, EventKind, Limits, Position, Store, Writer},
};

type State = BTreeMap<Vec<u8>, Record>;

/// One transaction: puts and deletes of distinct keys.
type Txn = Vec<(u8, Option<u8>)>;

fn history() -> impl Strategy<Value = Vec<Txn>> {
    let write = (0..40u8, prop::option::weighted(0.7, 0..4u8));
    prop::collection::vec(prop::collection::vec(write, 1..6), 1..400)
}

fn name(key: u8) -> Vec<u8> {
    format!("k{key:02}").into_bytes()
}

struct Model {
    writer: Writer,
    states: Vec<State>,
}

impl Model {
    fn new(limits: Limits) -> Self {
        let (_, mut writer) = Store::new(limits);
        writer.reset(Position { epoch: 1, revision: Revision(1) }, Some(Tree::default()));
        writer.publish(0);
        Self { writer, states: vec![State::new(), State::new()] }
    }

    fn run(&mut self, txn: Txn) {
        let revision = self.writer.position().revision.next();
        let mut state = self.states.last().cloned().unwrap_or_default();
        let mut changes = vec![];
        for (key, value) in txn.into_iter().collect::<BTreeMap<_, _>>() {
            let key = name(key);
            match value {
                Some(value) => {
                    let old = state.get(&key);
                    let create = old.map_or(revision, |old| old.create_revision());
                    let version = old.map_or(1, |old| old.version() + 1);
                    let record = Record::new(&key, &[value], create, revision, version, i64::from(value));
                    state.insert(key, record.clone());
                    changes.push(Change { kind: EventKind::Put, record, previous: None });
                }
                None if state.remove(&key).is_some() => {
                    let record = Record::tombstone(&key, revision);
                    changes.push(Change { kind: EventKind::Delete, record, previous: None });
                }
                None => {}
            }
        }
        if !changes.is_empty() {
            self.writer.apply(revision, changes, revision.0 as u64);
            self.writer.publish(revision.0 as u64);
            self.states.push(state);
        }
    }
}

fn request() -> impl Strategy<Value = RangeRequest> {
    let filter = || prop_oneof![3 => Just(0i64), 1 => -1..500i64];
    (
        (0..41u8, prop::option::of(0..41u8), any::<bool>(), -1..60i64, -1..500i64),
        (0..3i32, 0..5i32, any::<bool>(), prop::bool::weighted(0.1)),
        (filter(), filter(), filter(), filter()),
    )
        .prop_map(|((key, end, open, limit, revision), (order, target, keys_only, count_only), filters)| {
            RangeRequest {
                key: name(key).into(),
                range_end: match end {
                    Some(end) => name(end).into(),
                    None if open => Bytes::from_static(&[0]),
                    None => Bytes::new(),
                },
                limit,
                revision,
                sort_order: order,
                sort_target: target,
                keys_only,
                count_only,
                serializable: true,
                min_mod_revision: filters.0,
                max_mod_revision: filters.1,
                min_create_revision: filters.2,
                max_create_revision: filters.3,
            }
        })
}

/// The plainest reading of etcd's `executeRange`.
fn expected(state: &State, request: &RangeRequest) -> (u64, bool, Vec<Record>) {
    let range = range_of(request);
    let all: Vec<_> = state.values().filter(|record| range.contains(record.key())).cloned().collect();
    let count = all.len() as u64;
    if request.count_only {
        return (count, false, vec![]);
    }
    let limit = if request.limit > 0 { request.limit as usize } else { usize::MAX };
    let mut kept = all;
    if request.sort_order() == SortOrder::None && !has_filters(request) {
        kept.truncate(limit.saturating_add(1));
    }
    kept.retain(|record| passes(record, request));
    let key = |record: &Record| match request.sort_target() {
        SortTarget::Key => (0, vec![]),
        SortTarget::Version => (record.version(), vec![]),
        SortTarget::Create => (record.create_revision().0, vec![]),
        SortTarget::Mod => (record.mod_revision().0, vec![]),
        SortTarget::Value => (0, record.value().to_vec()),
    };
    if request.sort_order() == SortOrder::Descend {
        if request.sort_target() == SortTarget::Key {
            kept.reverse();
        }
        kept.sort_by_key(|record| std::cmp::Reverse(key(record)));
    } else {
        kept.sort_by_key(key);
    }
    let more = kept.len() > limit;
    kept.truncate(limit);
    (count, more, kept)
}

fn listed(records: &Records) -> Vec<Record> {
    match records {
        Records::Run(tree, start, sums) => {
            let records: Vec<_> = tree.iter_from(start).take(sums.keys as usize).cloned().collect();
            assert_eq!(*sums, records.iter().map(Sums::of).sum());
            records
        }
        Records::List(records, _) => records.clone(),
    }
}

fn same(a: &[Record], b: &[Record]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same_version(b))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_option_at_every_revision_of_the_window(
        history in history(),
        requests in prop::collection::vec(request(), 40),
        keep in prop_oneof![Just(u64::MAX), 50..300u64],
    ) {
        let mut model = Model::new(Limits { bytes: usize::MAX, age: keep });
        let half = history.len() / 2;
        for txn in &history[..half] {
            model.run(txn.clone());
        }
        let old = (model.writer.store().view_owned(), model.states.len());
        for txn in &history[half..] {
            model.run(txn.clone());
        }
        let new = (model.writer.store().view_owned(), model.states.len());
        // Views share what they remember of trees in between, so none may take what is later than itself.
        for request in &requests {
            for (view, revisions) in [&old, &new, &old] {
                let at = if request.revision > 0 { request.revision as usize } else { *revisions - 1 };
                match select(view, &range_of(request), request) {
                    Ok(selection) => {
                        let (count, more, records) = expected(&model.states[at], request);
                        prop_assert_eq!((selection.count, selection.more), (count, more));
                        prop_assert!(same(&listed(&selection.records), &records), "{:?}", request);
                    }
                    Err(RangeError::Future) => prop_assert!(at >= *revisions),
                    Err(error) => {
                        prop_assert_eq!(error, RangeError::NotInMemory);
                        prop_assert!((at as i64) < view.window.start().0 - 1);
                    }
                }
            }
        }
    }

    #[test]
    fn the_window_replays_every_revision_since_its_start(history in history(), keep in 50..300u64) {
        let mut model = Model::new(Limits { bytes: usize::MAX, age: keep });
        for txn in history {
            model.run(txn);
        }
        let view = model.writer.store().view_owned();
        let start = view.window.start();
        prop_assert!(view.window.after(start.previous().previous()).is_none());
        let mut state = model.states[start.previous().0 as usize].clone();
        let mut at = start.previous();
        for entry in view.window.after(at).unwrap() {
            prop_assert_eq!(entry.revision, at.next());
            at = entry.revision;
            for event in &entry.events {
                let previous = match event.kind {
                    EventKind::Put => state.insert(event.record.key().to_vec(), event.record.clone()),
                    EventKind::Delete => state.remove(event.record.key()),
                };
                prop_assert_eq!(previous.map(|old| old.mod_revision()), event.previous.as_ref().map(|old| old.mod_revision()));
            }
        }
        prop_assert_eq!(at, view.revision());
        prop_assert!(state.keys().eq(model.states.last().unwrap().keys()));
    }
}

#[test]
fn only_what_has_to_be_looked_at_one_by_one_counts_as_walked() {
    let mut model = Model::new(Limits { bytes: 1 << 20, age: u64::MAX });
    model.run((0..30).map(|key| (key, Some(1))).collect());
    model.writer.publish(0);
    let view = model.writer.store().view_owned();
    let all = RangeRequest { key: b"k".to_vec().into(), range_end: b"l".to_vec().into(), ..Default::default() };
    let by_version = RangeRequest { sort_target: SortTarget::Version.into(), ..all.clone() };
    let descending = RangeRequest { sort_order: SortOrder::Descend.into(), ..all.clone() };
    let filtered = RangeRequest { min_mod_revision: 1, limit: 4, ..all.clone() };
    for (request, walks) in [
        (RangeRequest { count_only: true, ..by_version.clone() }, 0),
        (RangeRequest { range_end: Bytes::new(), ..by_version.clone() }, 0),
        (all, 0),
        (RangeRequest { limit: 4, ..by_version.clone() }, 5),
        (by_version, 30),
        (RangeRequest { limit: 4, ..descending }, 30),
        (filtered, 30),
    ] {
        assert_eq!(walked(&view, &range_of(&request), &request), walks, "{request:?}");
    }
}
