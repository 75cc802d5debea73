//! What a writer promises beyond what range evaluation already checks.

use super::*;

const UNBOUNDED: Limits = Limits { bytes: usize::MAX, age: u64::MAX };

fn put(key: &str, revision: i64) -> Vec<Change> {
    let revision = Revision(revision);
    let record = Record::new(key.as_bytes(), &[b'v'; 100], revision, revision, 1, 0);
    vec![Change { kind: EventKind::Put, record, previous: None }]
}

fn loaded(limits: Limits) -> Writer {
    let (_, mut writer) = Store::new(limits);
    writer.reset(Position { epoch: 1, revision: Revision(10) }, Some(Tree::default()));
    writer.publish(0);
    writer
}

#[test]
fn nothing_is_seen_before_it_is_published() {
    let mut writer = loaded(UNBOUNDED);
    writer.apply(Revision(11), put("a", 11), 0);
    writer.apply(Revision(12), put("b", 12), 0);
    assert_eq!(writer.store().view().revision(), Revision(10));
    writer.publish(0);
    let view = writer.store().view_owned();
    assert_eq!(view.revision(), Revision(12));
    assert_eq!(view.tree.as_ref().map(Tree::len), Some(2));
}

#[test]
fn a_revision_that_comes_again_is_dropped() {
    let mut writer = loaded(UNBOUNDED);
    writer.apply(Revision(12), put("a", 12), 0);
    writer.apply(Revision(11), put("b", 11), 0);
    writer.apply(Revision(12), put("c", 12), 0);
    writer.publish(0);
    let view = writer.store().view_owned();
    assert_eq!(view.window.after(Revision(10)).unwrap().count(), 1);
    assert_eq!(view.tree.as_ref().map(Tree::len), Some(1));
}

#[test]
fn the_history_stays_within_its_bytes() {
    let limit = 1 << 20;
    let mut writer = loaded(Limits { bytes: limit, age: u64::MAX });
    for revision in 11..20_000 {
        writer.apply(Revision(revision), put("a", revision), 0);
        writer.publish(0);
        assert!(writer.store().history_bytes() <= limit as u64);
    }
    let view = writer.store().view_owned();
    assert!(view.window.start() > Revision(11));
    let entries: Vec<_> = view.window.after(view.window.start().previous()).unwrap().collect();
    assert_eq!(entries.first().map(|entry| entry.revision), Some(view.window.start()));
    assert_eq!(entries.last().map(|entry| entry.revision), Some(Revision(19_999)));
}

#[test]
fn an_index_that_is_taken_away_leaves_the_history() {
    let mut writer = loaded(UNBOUNDED);
    writer.apply(Revision(11), put("a", 11), 0);
    writer.set_tree(None);
    writer.apply(Revision(12), put("a", 12), 0);
    writer.publish(0);
    let view = writer.store().view_owned();
    assert_eq!(writer.store().index_bytes(), 0);
    assert!(view.tree_at(Revision(11)).is_none());
    assert_eq!(view.window.after(Revision(10)).unwrap().count(), 2);
}

#[tokio::test]
async fn those_who_wait_for_a_revision_are_woken_by_its_publication() {
    let mut writer = loaded(UNBOUNDED);
    let store = writer.store().clone();
    let waiting = tokio::spawn(async move { store.reached(Revision(11)).await });
    tokio::task::yield_now().await;
    writer.apply(Revision(11), put("a", 11), 0);
    assert!(!waiting.is_finished());
    writer.publish(0);
    waiting.await.unwrap();
}

/// etcd looks a previous version up at the revision before, however often a transaction touches the key.
#[test]
fn the_previous_version_is_the_one_before_the_revision() {
    let mut writer = loaded(UNBOUNDED);
    let change = |kind, create, version| {
        let record = match kind {
            EventKind::Put => Record::new(b"a", b"v", Revision(create), Revision(12), version, 0),
            EventKind::Delete => Record::tombstone(b"a", Revision(12)),
        };
        Change { kind, record, previous: None }
    };
    writer.apply(Revision(11), put("a", 11), 0);
    let (put, delete) = (EventKind::Put, EventKind::Delete);
    writer.apply(
        Revision(12),
        vec![change(put, 11, 2), change(delete, 0, 0), change(put, 12, 1), change(delete, 0, 0)],
        0,
    );
    writer.publish(0);
    let view = writer.store().view_owned();
    let entry = view.window.after(Revision(11)).unwrap().next().unwrap();
    let previous = entry.events.iter().map(|event| event.previous.as_ref().map(|record| record.mod_revision().0));
    assert_eq!(previous.collect::<Vec<_>>(), [Some(11), Some(11), None, Some(11)]);
    assert_eq!((view.tree.as_ref().map(Tree::len), writer.store().index_bytes()), (Some(0), 0));
    let before = view.tree_at(Revision(11)).unwrap();
    assert_eq!(before.get(b"a").map(Record::mod_revision), Some(Revision(11)));
}
