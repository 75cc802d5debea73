//! Sessions whose history is followed by another: its watchers are told so, and of nothing that is in the other.

use super::*;

#[test]
fn another_history_cancels_every_watcher_at_its_revision() {
    let mut stage = Stage::new(u64::MAX);
    stage.create(everything(), Start::After(Revision(1)));
    stage.pump_all();
    stage.writer.reset(Position { epoch: 2, revision: Revision(40) }, Some(Tree::default()));
    stage.publish();
    stage.pump_all();
    let last = stage.heard.last().unwrap();
    assert_eq!((last.watch_id, last.canceled, last.compact_revision), (0, true, 40));
    stage.write(&[(1, false)]);
    stage.publish();
    stage.pump_all();
    assert!(stage.events(0).is_empty());
}

/// The view is published before the hub has told anybody of it.
#[test]
fn nobody_reads_on_in_a_history_that_it_has_not_been_told_of() {
    for lane in [Some(0), None] {
        let mut stage = Stage::new(u64::MAX);
        stage.dispatch();
        stage.session.attend(lane);
        let (mut out, now) = (Out::default(), (RESPONDER, Revision(1)));
        stage.writer.reset(Position { epoch: 2, revision: Revision(1) }, Some(Tree::default()));
        stage.write(&[(1, false)]);
        stage.publish();
        stage.session.create(0, everything(), Start::After(Revision(1)), lane, now, &mut out);
        stage.hear(out);
        stage.pump(1 << 20);
        assert!(stage.session.take_relays().iter().all(|relay| relay.epoch == 1));
        stage.pump_all();
        assert!(stage.events(0).is_empty());
        assert!(stage.heard.last().unwrap().canceled);
    }
}

/// A watcher of one history was told how far the next has got.
#[test]
fn progress_of_a_history_is_not_told_to_watchers_of_the_one_before() {
    let mut stage = Stage::new(u64::MAX);
    stage.dispatch();
    let others: Vec<_> = (0..300)
        .map(|_| {
            let mut session = Session::new(Arc::new([stage.hub.clone()]), SessionSettings { fragment_bytes: 2000 });
            session.attend(Some(0));
            session
        })
        .collect();
    for epoch in 2..40 {
        let begun = stage.hub.store().view().revision();
        stage.create(everything(), Start::After(begun));
        let id = stage.heard.last().unwrap().watch_id;
        stage.pump_all();
        stage.heard.clear();
        stage.writer.reset(Position { epoch, revision: Revision(epoch as i64 * 1000) }, Some(Tree::default()));
        stage.publish();
        let hub = stage.hub.clone();
        std::thread::scope(|scope| {
            scope.spawn(move || hub.dispatch(&hub.store().view()));
            while !stage.heard.iter().any(|response| response.canceled) {
                stage.session.request_progress(begun);
                stage.pump(1 << 20);
            }
        });
        let told = stage.heard.iter().take_while(|response| !response.canceled).filter(|told| told.watch_id == -1);
        told.for_each(|told| assert_eq!(told.header.as_ref().unwrap().revision, begun.0));
        stage.session.cancel(id, (RESPONDER, begun), &mut Out::default());
    }
    drop(others);
}

/// It used to be relayed on, and so was sent the new history as if it followed on the old.
#[test]
fn another_history_cancels_also_who_watches_what_is_not_cached() {
    let mut stage = Stage::new(u64::MAX);
    let (mut out, now) = (Out::default(), (RESPONDER, Revision(1)));
    stage.session.create(0, everything(), Start::After(Revision(1)), None, now, &mut out);
    stage.hear(out);
    stage.pump_all();
    stage.writer.reset(Position { epoch: 2, revision: Revision(40) }, Some(Tree::default()));
    stage.publish();
    stage.pump_all();
    let last = stage.heard.last().unwrap();
    assert_eq!((last.watch_id, last.canceled, last.compact_revision), (0, true, 40));
    let relay = stage.session.take_relays().remove(0);
    assert!(!stage.session.is_relayed(relay.slot, relay.serial));
}
