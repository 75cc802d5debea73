//! Streams that are sent the very same, and those that only seem to be.

use super::*;

/// Another stream, with one watcher, which has everything so far.
fn other(stage: &Stage, id: i64, options: WatchOptions) -> Session {
    let mut session = Session::new(Arc::new([stage.hub.clone()]), SessionSettings { fragment_bytes: 200 });
    let now = (RESPONDER, stage.hub.store().view().revision());
    session.create(id, options, Start::After(now.1), Some(0), now, &mut Out::default());
    while session.pump(&mut Out::default(), 1 << 20, std::task::Waker::noop()) == Pumped::Busy {}
    session
}

fn pumped(session: &mut Session) -> Bytes {
    let mut out = Out::default();
    session.pump(&mut out, 1 << 20, std::task::Waker::noop());
    out.take()
}

#[test]
fn streams_of_which_each_has_the_same_to_say_send_the_same_bytes() {
    let mut stage = Stage::new(u64::MAX);
    stage.dispatch();
    let previous = WatchOptions { prev_kv: true, ..everything() };
    let streams = [
        (0, everything()),
        (0, WatchOptions { range: KeyRange::single(Bytes::from_static(&[1])), ..everything() }),
        (0, WatchOptions { fragment: true, ..everything() }),
        (0, previous.clone()),
        (0, previous),
        (0, WatchOptions { no_put: true, ..everything() }),
        (7, everything()),
        (0, everything()),
    ];
    let mut streams = streams.map(|(id, options)| other(&stage, id, options));
    let mut heard = |stage: &mut Stage, keys: &[(u8, bool)]| {
        stage.write(keys);
        stage.publish();
        stage.dispatch();
        streams.each_mut().map(pumped)
    };
    let place = |bytes: &Bytes| bytes.as_ptr();
    heard(&mut stage, &[(1, false)]);
    let [first, narrow, fragments, previous, previous_too, no_put, other_id, last] = heard(&mut stage, &[(1, false)]);
    assert_eq!([place(&narrow), place(&fragments)], [place(&first); 2]);
    assert_eq!(place(&previous_too), place(&previous));
    assert!(no_put.is_empty() && previous.len() > first.len() + 300);
    assert!(other_id != first && other_id.len() > first.len());
    assert!(last == first && place(&last) != place(&first), "what is shared is what each would have said by itself");
    // Of two events, one may be somebody's and the other not.
    let [both, one, ..] = heard(&mut stage, &[(1, false), (2, false)]);
    assert!(one != both && one.len() > 300 && both.len() > one.len() + 300);
}

#[test]
fn what_another_member_of_the_cluster_would_say_is_not_shared() {
    let mut stage = Stage::new(u64::MAX);
    stage.dispatch();
    let mut streams = [0, 0].map(|id| other(&stage, id, everything()));
    stage.write(&[(1, false)]);
    stage.publish();
    stage.dispatch();
    let first = pumped(&mut streams[0]);
    stage.writer.set_responder(Responder { member_id: 9, ..RESPONDER });
    stage.publish();
    stage.hear({
        let mut out = Out::default();
        streams[1].pump(&mut out, 1 << 20, std::task::Waker::noop());
        assert_ne!(out.bytes(), &first[..]);
        out
    });
    let response = stage.heard.pop().unwrap();
    assert_eq!((response.header.unwrap().member_id, response.events.len()), (9, 1));
}
