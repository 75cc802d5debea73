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
        assert!(writer.store().history_bytes() < limit as u64 + (1 << 18));
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
