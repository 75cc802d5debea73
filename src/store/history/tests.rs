//! What the history takes is what it is said to take, and within its limits.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::store::{Change, Position, Store, View, Writer};

const KIB: usize = 1 << 10;
const BEFORE: Revision = Revision(10);

fn record(key: usize, size: usize, revision: Revision) -> Record {
    Record::new(format!("k{key:05}").as_bytes(), &vec![b'v'; size], revision, revision, 1, 0)
}

fn put(key: usize, size: usize, revision: Revision) -> Change {
    Change { kind: EventKind::Put, record: record(key, size, revision), previous: None }
}

fn delete(key: usize, revision: Revision) -> Change {
    let record = Record::tombstone(format!("k{key:05}").as_bytes(), revision);
    Change { kind: EventKind::Delete, record, previous: None }
}

/// A tree of `keys` keys with values of `size` bytes.
fn tree(keys: usize, size: usize) -> Tree {
    let mut tree = Tree::default();
    (0..keys).for_each(|key| drop(tree.insert(record(key, size, BEFORE))));
    tree
}

fn loaded(limits: Limits, tree: Tree) -> Writer {
    let (_, mut writer) = Store::new(limits);
    writer.reset(Position { epoch: 1, revision: BEFORE }, Some(tree));
    writer.publish(0);
    writer
}

/// How many events the window has, and what the records take that they hold: each of these once.
fn held(view: &View) -> (usize, usize) {
    let events = || view.window.backwards().flat_map(|entry| &entry.events);
    let records = events().flat_map(|event| [Some(&event.record), event.previous.as_ref()]).flatten();
    let once: HashMap<_, _> = records.map(|record| (record.field().as_ptr(), record.memory())).collect();
    (events().count(), once.values().sum())
}

/// Before, only what events wrote was counted, so the values of deleted keys stayed until they were too old.
#[test]
fn deleted_values_count() {
    let limit = 1024 * KIB;
    let mut writer = loaded(Limits { bytes: limit, age: u64::MAX }, tree(500, 20 * KIB));
    for key in 0..500 {
        let revision = writer.position().revision.next();
        writer.apply(revision, vec![delete(key, revision)], 0);
        writer.publish(0);
        let view = writer.store().view_owned();
        assert!(held(&view).1 <= limit && writer.store().history_bytes() <= limit as u64);
    }
    assert!(held(&writer.store().view()).1 > limit / 2, "the limit is used");
}

#[test]
fn a_range_that_is_deleted_at_once_is_shown_and_then_not_kept_over_the_limit() {
    let mut writer = loaded(Limits { bytes: 1024 * KIB, age: u64::MAX }, tree(500, 20 * KIB));
    let revision = BEFORE.next();
    writer.apply(revision, (0..500).map(|key| delete(key, revision)).collect(), 0);
    writer.publish(0);
    assert_eq!(writer.store().view().window.after(BEFORE).unwrap().count(), 1, "watchers can be told");
    writer.publish(0);
    assert_eq!((held(&writer.store().view()), writer.store().history_bytes()), ((0, 0), 0));
    assert!(writer.store().view().window.after(revision).is_some(), "whoever has been told goes on");
}

/// Before, a segment was full with 256 events, whatever they took.
#[test]
fn few_large_events_stay_within_the_limit() {
    let limit = 1024 * KIB;
    let mut writer = loaded(Limits { bytes: limit, age: u64::MAX }, Tree::default());
    for key in 0..100 {
        let revision = writer.position().revision.next();
        writer.apply(revision, vec![put(key, 100 * KIB, revision)], 0);
        writer.publish(0);
        assert!(held(&writer.store().view()).1 <= limit);
    }
    let view = writer.store().view_owned();
    assert!(held(&view).1 > limit / 2, "the limit is used");
    assert!(view.tree_at(view.window.start()).is_some());
}

/// Before, the last events stayed until others came, however old they were.
#[test]
fn a_quiet_history_is_empty_when_its_age_has_come() {
    let mut writer = loaded(Limits { bytes: usize::MAX, age: 100 }, Tree::default());
    for time in 1..=10 {
        let revision = writer.position().revision.next();
        writer.apply(revision, vec![put(1, KIB, revision), put(2, KIB, revision)], time);
    }
    let last = writer.position().revision;
    writer.publish(110);
    assert_eq!(writer.store().view().window.len(), 10);
    writer.publish(111);
    let view = writer.store().view_owned();
    assert_eq!((view.window.len(), view.window.start(), writer.store().history_bytes()), (0, last.next(), 0));
    assert!(view.tree_at(last).is_some() && view.tree_at(last.previous()).is_none());
    let witness = writer.last_entry().unwrap();
    assert_eq!((witness.revision, witness.events.len()), (last, 1));
    assert_eq!(witness.events[0].record.key(), b"k00002");

    writer.apply(last.next(), vec![put(1, KIB, last.next())], 112);
    writer.publish(112);
    let view = writer.store().view_owned();
    assert_eq!(view.window.after(last).unwrap().count(), 1);
    assert!(view.tree_at(last).is_some());
}

/// Before, the trees of full segments kept an index that was given up for its size.
#[test]
fn an_index_that_is_taken_away_is_not_kept_by_the_history() {
    let mut writer = loaded(Limits { bytes: usize::MAX, age: u64::MAX }, tree(10, KIB));
    let write = |writer: &mut Writer| {
        let revision = writer.position().revision.next();
        writer.apply(revision, vec![put(0, 10, revision)], 0);
    };
    (0..SEGMENT_EVENTS + 10).for_each(|_| write(&mut writer));
    writer.publish(0);
    let view = writer.store().view_owned();
    let (oldest, last) = (view.window.start(), view.revision());
    assert!(view.tree_at(oldest).is_some() && view.tree_at(last.previous()).is_some());

    writer.set_tree(None);
    writer.publish(0);
    let view = writer.store().view_owned();
    let has_tree = |segment: &Arc<Segment>| {
        let sealed = segment.sealed.get().is_some_and(|sealed| sealed.tree.is_some());
        sealed || segment.recent.load().is_some()
    };
    assert!(!view.window.segments.iter().any(has_tree));
    assert_eq!(view.window.len(), SEGMENT_EVENTS + 10);

    writer.set_tree(Some(tree(10, KIB)));
    write(&mut writer);
    writer.publish(0);
    let view = writer.store().view_owned();
    assert!(view.tree_at(oldest).is_none() && view.tree_at(last).is_some());
}

#[derive(Clone, Debug)]
enum Step {
    /// Changes of these keys in one revision: written with a value of so many bytes, or deleted.
    Apply(Vec<(usize, Option<usize>)>),
    Publish,
    /// Whether there is an index from now on: the records of a new one are copies.
    Index(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let change = (0..20usize, prop::option::of(0..20 * KIB));
    let step = prop_oneof![
        20 => prop::collection::vec(change, 1..5).prop_map(Step::Apply),
        10 => Just(Step::Publish),
        1 => any::<bool>().prop_map(Step::Index),
    ];
    prop::collection::vec(step, 1..200)
}

/// A writer, and what the upstream would say.
struct Stage {
    writer: Writer,
    upstream: HashMap<usize, Record>,
}

impl Stage {
    fn copy(record: &Record) -> Record {
        Record::from_wire(record.wire()).unwrap()
    }

    fn apply(&mut self, changes: Vec<(usize, Option<usize>)>) {
        let revision = self.writer.position().revision.next();
        let before = self.upstream.clone();
        let change = |(key, size): (usize, Option<usize>)| {
            let change = size.map_or_else(|| delete(key, revision), |size| put(key, size, revision));
            match change.kind {
                EventKind::Put => drop(self.upstream.insert(key, Self::copy(&change.record))),
                EventKind::Delete => drop(self.upstream.remove(&key)),
            }
            Change { previous: before.get(&key).map(Self::copy), ..change }
        };
        let changes = changes.into_iter().map(change).collect();
        self.writer.apply(revision, changes, revision.0 as u64);
    }

    fn index(&mut self, is_there: bool) {
        let copies = || {
            let mut tree = Tree::default();
            self.upstream.values().for_each(|record| drop(tree.insert(Self::copy(record))));
            tree
        };
        let tree = is_there.then(copies);
        self.writer.set_tree(tree);
    }

    fn publish(&mut self) -> Arc<View> {
        self.writer.publish(self.writer.position().revision.0 as u64);
        self.writer.store().view_owned()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_counted_is_what_is_held(
        steps in steps(),
        bytes in prop_oneof![Just(usize::MAX), 0..2048 * KIB],
        age in prop_oneof![Just(u64::MAX), 1..50u64],
    ) {
        let mut stage = Stage { writer: loaded(Limits { bytes, age }, Tree::default()), upstream: HashMap::new() };
        for step in steps {
            match step {
                Step::Apply(changes) => stage.apply(changes),
                Step::Index(is_there) => stage.index(is_there),
                Step::Publish => {
                    // The first shows what is new, with nothing of it cut; the second is within the limits.
                    let shown = stage.writer.store().view().revision();
                    prop_assert!(stage.publish().window.after(shown).is_some());
                    let view = stage.publish();
                    let (events, records) = held(&view);
                    let counted = stage.writer.store().history_bytes() as usize;
                    prop_assert_eq!(counted, records + events * (size_of::<Event>() + TREE_BYTES_PER_EVENT));
                    prop_assert!(counted <= bytes.max(LIGHTEST_SEGMENT));
                    let oldest = view.window.backwards().last().map_or(view.revision(), |entry| entry.revision);
                    let old = (view.revision().0 - oldest.0) as u64;
                    prop_assert!(old <= age.saturating_add(SEGMENT_EVENTS as u64));
                }
            }
        }
    }
}
