//! Sessions under random writes, budgets and delays: every watcher sees each event of its range once, in order, whole.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Buf, Bytes};
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::{
    fanout::encode::FRAME_HEAD,
    proto::{etcdserverpb::WatchResponse, mvccpb::event::EventType},
    rules::KeyRange,
    store::{Change, EventKind, Limits, Record, Store, Tree, Writer},
};

mod alike;
mod histories;
mod relayed;

const RESPONDER: Responder = Responder { cluster_id: 1, member_id: 2, raft_term: 3 };

/// A store, its hub, and one session whose output is decoded.
struct Stage {
    writer: Writer,
    hub: Arc<Hub>,
    session: Session,
    heard: Vec<WatchResponse>,
}

impl Stage {
    fn new(age: u64) -> Self {
        let (store, mut writer) = Store::new(Limits { bytes: usize::MAX, age });
        writer.set_responder(RESPONDER);
        writer.reset(Position { epoch: 1, revision: Revision(1) }, Some(Tree::default()));
        writer.publish(0);
        let hub = Hub::new(store);
        let session = Session::new(Arc::new([hub.clone()]), SessionSettings { fragment_bytes: 2000 });
        Self { writer, hub, session, heard: vec![] }
    }

    fn write(&mut self, keys: &[(u8, bool)]) {
        let revision = self.writer.position().revision.next();
        let mut changes = vec![];
        for (key, delete) in keys.iter().copied().collect::<BTreeMap<_, _>>() {
            let (kind, record) = match delete {
                true if self.writer.get(&[key]).is_none() => continue,
                true => (EventKind::Delete, Record::tombstone(&[key], revision)),
                false => (EventKind::Put, Record::new(&[key], &[key; 300], revision, revision, 1, 0)),
            };
            changes.push(Change { kind, record, previous: None });
        }
        self.writer.apply(revision, changes, revision.0 as u64);
    }

    fn publish(&mut self) {
        self.writer.publish(self.writer.position().revision.0 as u64);
    }

    fn dispatch(&self) {
        self.hub.dispatch(&self.hub.store().view());
    }

    fn create(&mut self, options: WatchOptions, start: Start) {
        let mut out = Out::default();
        let now = (RESPONDER, self.hub.store().view().revision());
        self.session.create(0, options, start, Some(0), now, &mut out);
        self.hear(out);
    }

    fn pump(&mut self, budget: usize) -> Pumped {
        let mut out = Out::default();
        let pumped = self.session.pump(&mut out, budget, std::task::Waker::noop());
        self.hear(out);
        pumped
    }

    fn pump_all(&mut self) {
        self.dispatch();
        while self.pump(1 << 20) == Pumped::Busy {}
    }

    fn hear(&mut self, mut out: Out) {
        let mut out = out.take();
        while out.has_remaining() {
            let length = u32::from_be_bytes(out[1..FRAME_HEAD].try_into().unwrap()) as usize;
            out.advance(FRAME_HEAD);
            self.heard.push(WatchResponse::decode(out.split_to(length)).unwrap());
        }
    }

    /// Events heard by `watch_id` as (revision, key, put, has previous).
    fn events(&self, watch_id: i64) -> Vec<(i64, u8, bool, bool)> {
        let responses = self.heard.iter().filter(|response| response.watch_id == watch_id);
        let events = responses.flat_map(|response| &response.events);
        let seen = |event: &crate::proto::mvccpb::Event| {
            let kv = event.kv.as_ref().unwrap();
            (kv.mod_revision, kv.key[0], event.r#type() == EventType::Put, event.prev_kv.is_some())
        };
        events.map(seen).collect()
    }

    /// The same from the history.
    fn expected(&self, options: &WatchOptions, from: Revision) -> Vec<(i64, u8, bool, bool)> {
        let view = self.hub.store().view_owned();
        let entries = view.window.after(from.previous()).unwrap();
        let events = entries.flat_map(|entry| entry.events.iter().map(|event| (entry.revision, event)));
        let wanted = events.filter(|(_, event)| options.wants(event));
        let seen = |(revision, event): (Revision, &crate::store::Event)| {
            let previous = options.prev_kv && event.previous.is_some();
            (revision.0, event.record.key()[0], event.kind == EventKind::Put, previous)
        };
        wanted.map(seen).collect()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<(u8, bool)>),
    Publish,
    Dispatch,
    Pump(usize),
    Create(WatchOptions, Option<u8>),
    Cancel(prop::sample::Index),
    Burst(usize),
}

fn options() -> impl Strategy<Value = WatchOptions> {
    // A few starts, so that several watchers have the same range.
    (0..4u8, prop::option::of(1..16u8), any::<[bool; 4]>()).prop_map(|(start, length, flags)| WatchOptions {
        range: match length.map(|length| length.next_multiple_of(5)) {
            None => KeyRange::single(Bytes::from(vec![start])),
            Some(length) => KeyRange { start: vec![start].into(), end: Some(vec![start + length].into()) },
        },
        prev_kv: flags[0],
        no_put: flags[1],
        no_delete: flags[2] && !flags[1],
        fragment: flags[3],
        progress_notify: false,
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let keys = prop::collection::vec((0..16u8, prop::bool::weighted(0.3)), 1..12);
    let step = prop_oneof![
        8 => keys.prop_map(Step::Write),
        4 => Just(Step::Publish),
        4 => Just(Step::Dispatch),
        4 => (1..4000usize).prop_map(Step::Pump),
        2 => (options(), prop::option::of(any::<u8>())).prop_map(|(options, back)| Step::Create(options, back)),
        1 => any::<prop::sample::Index>().prop_map(Step::Cancel),
        1 => (500..900usize).prop_map(Step::Burst),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_watcher_sees_each_revision_once_whole_and_in_order(steps in steps()) {
        let mut stage = Stage::new(u64::MAX);
        let mut watchers = vec![];
        let mut cancelled = std::collections::BTreeSet::new();
        for step in steps {
            match step {
                Step::Write(keys) => stage.write(&keys),
                Step::Publish => stage.publish(),
                Step::Dispatch => stage.dispatch(),
                Step::Pump(budget) => drop(stage.pump(budget)),
                Step::Burst(revisions) => {
                    (0..revisions).for_each(|n| stage.write(&[((n % 16) as u8, false)]));
                    stage.publish();
                    stage.dispatch();
                }
                Step::Cancel(_) if watchers.is_empty() => {}
                Step::Cancel(which) => {
                    let id = which.index(watchers.len());
                    cancelled.insert(id);
                    stage.session.cancel(id as i64, (RESPONDER, Revision(1)), &mut Out::default());
                }
                Step::Create(options, back) => {
                    let now = stage.hub.store().view().revision();
                    let from = match back {
                        Some(back) => Revision((now.0 - i64::from(back) / 2).max(2)),
                        None => now.next(),
                    };
                    watchers.push((options.clone(), from));
                    stage.create(options, if back.is_some() { Start::At(from) } else { Start::After(now) });
                }
            }
        }
        stage.publish();
        stage.session.request_progress(Revision::ZERO);
        stage.pump_all();
        for (id, (options, from)) in watchers.iter().enumerate() {
            let (seen, mut expected) = (stage.events(id as i64), stage.expected(options, *from));
            if cancelled.contains(&id) {
                expected.truncate(seen.len());
            }
            prop_assert_eq!(seen, expected, "watcher {} {:?}", id, options);
        }
        let told: Vec<_> = stage.heard.iter().filter(|response| response.watch_id == -1).collect();
        let now = stage.hub.store().view().revision();
        let left = watchers.iter().enumerate().filter(|(id, _)| !cancelled.contains(id));
        let starts: Vec<Revision> = left.map(|(_, (_, from))| *from).collect();
        if !starts.is_empty() && starts.iter().all(|from| *from <= now) {
            prop_assert_eq!(told.last().and_then(|told| told.header.as_ref()).map(|header| header.revision), Some(now.0));
        }
        let whole = stage.heard.iter().filter(|response| !response.events.is_empty() && !response.fragment);
        for response in whole.filter(|response| response.events.len() > 1) {
            let last = |response: &WatchResponse| response.events.last().unwrap().kv.as_ref().unwrap().mod_revision;
            prop_assert!(last(response) <= response.header.as_ref().unwrap().revision);
        }
    }
}

fn everything() -> WatchOptions {
    WatchOptions {
        range: KeyRange::everything(),
        prev_kv: false,
        no_put: false,
        no_delete: false,
        fragment: false,
        progress_notify: true,
    }
}

/// The hub begins with whatever view it sees first, which may have got further than the one that a session has read.
#[test]
fn who_comes_before_the_hub_has_seen_the_first_view_misses_nothing() {
    let (store, mut writer) = Store::new(Limits { bytes: usize::MAX, age: u64::MAX });
    let hub = Hub::new(store);
    writer.reset(Position { epoch: 1, revision: Revision(1) }, Some(Tree::default()));
    writer.publish(0);
    let session = Session::new(Arc::new([hub.clone()]), SessionSettings { fragment_bytes: 2000 });
    let mut stage = Stage { writer, hub, session, heard: vec![] };
    stage.create(everything(), Start::At(Revision(2)));
    stage.pump(1 << 20);
    stage.write(&[(1, false)]);
    stage.publish();
    stage.pump_all();
    stage.write(&[(2, false)]);
    stage.publish();
    stage.pump_all();
    assert_eq!(stage.events(0), stage.expected(&everything(), Revision(2)));
    assert_eq!(stage.events(0).len(), 2);
}

/// The request was kept, and answered when the watcher had been cancelled, between other answers.
#[test]
fn a_request_for_progress_while_a_watcher_begins_later_is_never_answered() {
    let mut stage = Stage::new(u64::MAX);
    stage.create(everything(), Start::After(Revision(1)));
    stage.create(everything(), Start::At(Revision(1000)));
    stage.pump_all();
    let before = stage.heard.len();
    stage.session.request_progress(Revision(1));
    stage.pump_all();
    assert!(!stage.session.awaits_progress());
    assert_eq!(stage.heard.len(), before);
}

#[test]
fn progress_is_not_told_before_the_events_it_covers() {
    let mut stage = Stage::new(u64::MAX);
    stage.create(everything(), Start::After(Revision(1)));
    stage.pump_all();
    (0..100).for_each(|_| stage.write(&[(1, false)]));
    stage.publish();
    stage.dispatch();
    stage.session.request_progress(Revision(1));
    while stage.pump(100) == Pumped::Busy {
        let seen = stage.events(0).last().map_or(1, |event| event.0);
        let told = stage.heard.iter().filter(|response| response.watch_id == -1);
        assert!(told.filter_map(|told| told.header.as_ref()).all(|header| header.revision <= seen));
    }
    assert_eq!(stage.heard.last().map(|response| response.watch_id), Some(-1));
}

#[test]
fn ticks_are_wanted_for_as_long_as_a_watcher_asks_for_them() {
    let mut stage = Stage::new(u64::MAX);
    let quiet = WatchOptions { progress_notify: false, ..everything() };
    for (options, wanted) in [(quiet, false), (everything(), true), (everything(), true)] {
        stage.create(options, Start::After(Revision(1)));
        assert_eq!(stage.session.wants_ticks(), wanted);
    }
    for (id, wanted) in [(1, true), (1, true), (0, true), (2, false)] {
        stage.session.cancel(id, (RESPONDER, Revision(1)), &mut Out::default());
        assert_eq!(stage.session.wants_ticks(), wanted);
    }
}

#[test]
fn a_compaction_cancels_whoever_is_below_it_and_keeps_the_id() {
    let mut stage = Stage::new(u64::MAX);
    (0..10).for_each(|_| stage.write(&[(1, false)]));
    stage.writer.compacted(Revision(8));
    stage.publish();
    stage.create(everything(), Start::At(Revision(5)));
    stage.create(everything(), Start::At(Revision(8)));
    stage.pump_all();
    let canceled = stage.heard.iter().find(|response| response.canceled).unwrap();
    assert_eq!((canceled.watch_id, canceled.compact_revision, canceled.created), (0, 8, false));
    assert_eq!(canceled.header.as_ref().map(|header| header.revision), Some(0));
    assert_eq!(stage.events(1).len(), 4);
    assert_eq!(stage.session.len(), 2);
}

/// Who began at the compaction's own revision was sent the value before it, which etcd no longer has: Kubernetes' own
/// tests take that for a compaction that did not happen.
#[test]
fn the_value_before_a_compaction_is_not_shown_to_whoever_begins_at_it() {
    let mut stage = Stage::new(u64::MAX);
    (0..4).for_each(|_| stage.write(&[(1, false)]));
    stage.writer.compacted(Revision(4));
    stage.publish();
    stage.create(WatchOptions { prev_kv: true, ..everything() }, Start::At(Revision(4)));
    stage.pump_all();
    assert_eq!(stage.events(0), [(4, 1, true, false), (5, 1, true, true)]);
}

#[test]
fn a_session_is_remembered_once_however_often_it_wants_to_be_woken() {
    let mut stage = Stage::new(u64::MAX);
    stage.create(everything(), Start::After(Revision(1)));
    stage.pump_all();
    for known in 2..100 {
        stage.session.request_progress(Revision(known));
        stage.pump_all();
    }
    assert_eq!(stage.hub.curious(), 1);
    stage.session = Session::new(Arc::new([stage.hub.clone()]), SessionSettings { fragment_bytes: 2000 });
    assert_eq!(stage.hub.curious(), 0);
}

#[test]
fn ids_are_picked_taken_and_freed_as_in_etcd() {
    let mut stage = Stage::new(u64::MAX);
    let mut out = Out::default();
    let now = (RESPONDER, Revision(1));
    let start = Start::After(Revision(1));
    stage.session.create(1, everything(), start, Some(0), now, &mut out);
    stage.session.create(0, everything(), start, Some(0), now, &mut out);
    stage.session.create(0, everything(), start, Some(0), now, &mut out);
    stage.session.create(-1, everything(), start, Some(0), now, &mut out);
    stage.session.create(1, everything(), start, Some(0), now, &mut out);
    stage.session.cancel(77, now, &mut out);
    stage.session.cancel(1, now, &mut out);
    stage.session.create(1, everything(), start, Some(0), now, &mut out);
    stage.hear(out);
    let said: Vec<_> =
        stage.heard.iter().map(|response| (response.watch_id, response.created, response.canceled)).collect();
    let expected = [
        (1, true, false),
        (0, true, false),
        (2, true, false),
        (-1, true, false),
        (-1, true, true),
        (1, false, true),
        (1, true, false),
    ];
    assert_eq!(said, expected);
    assert_eq!(stage.heard[4].cancel_reason, "mvcc: duplicate watch ID provided on the WatchStream");
}

/// The view may be behind what a client was told by others.
#[test]
fn progress_is_told_once_it_is_not_below_what_was_known_when_it_was_asked_for() {
    let mut stage = Stage::new(u64::MAX);
    let told = |stage: &Stage| -> Vec<i64> {
        let answers = stage.heard.iter().filter(|response| response.watch_id == -1);
        answers.map(|answer| answer.header.as_ref().unwrap().revision).collect()
    };
    stage.create(everything(), Start::After(Revision(1)));
    stage.create(everything(), Start::At(Revision(3)));
    let next = |stage: &mut Stage| {
        stage.write(&[(1, false)]);
        stage.publish();
        stage.pump_all();
        told(stage)
    };
    // Asked for by a client that knew of revision 5, and by one that knew of 3.
    stage.session.request_progress(Revision(5));
    stage.session.request_progress(Revision(3));
    for expected in [&[][..], &[3]] {
        assert_eq!(next(&mut stage), expected);
    }
    // Whoever asks now does not keep the request at 5 from its answer.
    stage.session.request_progress(Revision(7));
    for expected in [&[3][..], &[3, 5], &[3, 5], &[3, 5, 7], &[3, 5, 7]] {
        assert_eq!(next(&mut stage), expected);
    }
}

#[test]
fn watchers_of_the_same_range_are_found_whichever_come_and_go() {
    const KEYS: i64 = 100;
    let mut stage = Stage::new(u64::MAX);
    let ranges = |stage: &Stage| stage.session.lanes[0].as_ref().unwrap().ranges() as i64;
    let only = |key: i64| WatchOptions { range: KeyRange::single(vec![key as u8].into()), ..everything() };
    let create = |stage: &mut Stage, keys: &mut dyn Iterator<Item = i64>| {
        keys.for_each(|key| stage.create(only(key), Start::After(stage.hub.store().view().revision())));
        stage.pump_all();
    };
    let cancel = |stage: &mut Stage, ids: &mut dyn Iterator<Item = i64>| {
        ids.for_each(|id| stage.session.cancel(id, (RESPONDER, Revision(1)), &mut Out::default()));
    };
    let gone = |id: i64| id % KEYS % 3 == 0;
    create(&mut stage, &mut (0..2 * KEYS).map(|id| id % KEYS));
    assert_eq!(ranges(&stage), KEYS);
    cancel(&mut stage, &mut (0..2 * KEYS).filter(|id| gone(*id)));
    assert_eq!(ranges(&stage), (0..KEYS).filter(|key| !gone(*key)).count() as i64);
    // In the places of those that went, and beyond.
    create(&mut stage, &mut (KEYS..2 * KEYS).chain((0..KEYS).filter(|key| gone(*key))));
    assert_eq!(ranges(&stage), 2 * KEYS);
    stage.write(&(0..2 * KEYS).map(|key| (key as u8, false)).collect::<Vec<_>>());
    stage.publish();
    stage.pump_all();
    let told = |stage: &Stage, key: i64| {
        let ids = (0..4 * KEYS).filter(|id| stage.events(*id).iter().any(|event| i64::from(event.1) == key));
        ids.count()
    };
    for key in 0..2 * KEYS {
        assert_eq!(told(&stage, key), if key < KEYS && !gone(key) { 2 } else { 1 }, "key {key}");
    }
    assert!((0..4 * KEYS).all(|id| stage.events(id).len() <= 1));
    cancel(&mut stage, &mut (0..4 * KEYS));
    assert_eq!(ranges(&stage), 0);
}
