//! Watchers that are relayed from the upstream.

use super::*;

#[test]
fn a_watcher_that_the_window_has_left_behind_asks_for_a_relay() {
    let mut stage = Stage::new(100);
    (0..2000).for_each(|_| stage.write(&[(1, false)]));
    stage.publish();
    // What the first view has shown may be cut now.
    stage.publish();
    stage.create(everything(), Start::At(Revision(5)));
    stage.pump_all();
    let relays = stage.session.take_relays();
    assert_eq!(relays.iter().map(|relay| relay.from).collect::<Vec<_>>(), [Revision(5)]);
    let start = stage.hub.store().view().window.start();
    let response = WatchResponse {
        header: Some(RESPONDER.header(start)),
        events: vec![crate::proto::mvccpb::Event {
            r#type: 0,
            kv: Some(crate::proto::mvccpb::KeyValue {
                key: vec![1].into(),
                mod_revision: start.0,
                ..Default::default()
            }),
            prev_kv: None,
        }],
        ..Default::default()
    };
    let mut out = Out::default();
    stage.session.relayed(relays[0].slot, relays[0].serial, response, &mut out);
    stage.session.end_relay(relays[0].slot, relays[0].serial);
    stage.hear(out);
    stage.pump_all();
    let seen: Vec<_> = stage.events(0).iter().map(|event| event.0).collect();
    assert_eq!(seen, (start.0..=2001).collect::<Vec<_>>());
}

/// As etcd sends them to a watcher that was there before them. One that begins in the past is sent several in a response.
#[test]
fn what_is_relayed_to_who_began_with_the_present_comes_revision_by_revision() {
    for (start, expected) in [(Start::After(Revision(1)), &[(5, 2), (6, 1)][..]), (Start::At(Revision(2)), &[(9, 3)])] {
        let mut stage = Stage::new(100);
        (0..2000).for_each(|_| stage.write(&[(1, false)]));
        stage.publish();
        stage.publish();
        stage.create(everything(), start);
        stage.pump_all();
        let relays = stage.session.take_relays();
        let event = |revision| crate::proto::mvccpb::Event {
            kv: Some(crate::proto::mvccpb::KeyValue {
                key: vec![1].into(),
                mod_revision: revision,
                ..Default::default()
            }),
            ..Default::default()
        };
        let header = Some(RESPONDER.header(Revision(9)));
        let response = WatchResponse { header, events: [5, 5, 6].map(event).into(), ..Default::default() };
        let mut out = Out::default();
        stage.session.relayed(relays[0].slot, relays[0].serial, response, &mut out);
        let before = stage.heard.len();
        stage.hear(out);
        let heard = stage.heard[before..].iter();
        let heard: Vec<_> = heard.map(|one| (one.header.as_ref().unwrap().revision, one.events.len())).collect();
        assert_eq!(heard, expected);
    }
}
