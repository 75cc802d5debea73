//! Framing against frames made by hand.

use super::*;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut wire = Wire::new("a", "/p", Manners::Quiet);
    wire.out.clear();
    wire.frame(kind, flags, stream, payload);
    wire.out
}

/// A wire after the peer's settings, with nothing left to write.
fn ready(settings: &[u8]) -> Wire {
    let mut wire = Wire::new("a", "/p", Manners::Quiet);
    let bytes = frame(kind::SETTINGS, 0, 0, settings);
    assert_eq!(wire.next(&mut &bytes[..]), Ok(Some(Frame::Ready)));
    wire.out.clear();
    wire
}

/// (kind, flags, stream, payload length) of each frame.
fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, usize)> {
    let mut found = Vec::new();
    while let Some((head, rest)) = bytes.split_at_checked(FRAME_HEAD) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        found.push((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), length));
        bytes = &rest[length..];
    }
    found
}

#[test]
fn a_second_request_is_a_few_bytes() {
    let mut wire = ready(&[]);
    wire.open(Bytes::from_static(b"12345"), true);
    wire.out.clear();
    assert_eq!(wire.open(Bytes::from_static(b"12345"), true), 3);
    assert_eq!(frames(&wire.out), [(kind::HEADERS, flag::END_HEADERS, 3, 7), (kind::DATA, flag::END_STREAM, 3, 5)]);
}

#[test]
fn a_frame_cut_anywhere_waits_for_its_rest() {
    let mut wire = ready(&[]);
    let bytes = frame(kind::DATA, flag::END_STREAM, 1, b"abc");
    for cut in 0..bytes.len() {
        assert_eq!(wire.next(&mut &bytes[..cut]), Ok(None));
    }
    assert_eq!(wire.next(&mut &bytes[..]), Ok(Some(Frame::Data { stream: 1, bytes: b"abc", end: true })));
}

#[test]
fn sending_stops_at_the_peers_windows_and_goes_on() {
    let mut wire = ready(&[0, 4, 0, 0, 0, 10]);
    let stream = wire.open(Bytes::from(vec![0; 25]), true);
    assert_eq!(frames(&wire.out)[1..], [(kind::DATA, 0, stream, 10)]);
    wire.out.clear();
    let update = frame(kind::WINDOW_UPDATE, 0, stream, &[0, 0, 0, 100]);
    assert_eq!(wire.next(&mut &update[..]), Ok(None));
    assert_eq!(frames(&wire.out), [(kind::DATA, flag::END_STREAM, stream, 15)]);
}

#[test]
fn messages_of_one_call_keep_their_order_when_blocked() {
    let mut wire = ready(&[0, 4, 0, 0, 0, 3]);
    let stream = wire.open(Bytes::from_static(b"abcd"), false);
    wire.send(stream, Bytes::from_static(b"ef"), true);
    wire.out.clear();
    let update = frame(kind::WINDOW_UPDATE, 0, stream, &[0, 0, 0, 9]);
    assert_eq!(wire.next(&mut &update[..]), Ok(None));
    assert_eq!(wire.out, [frame(kind::DATA, 0, stream, b"d"), frame(kind::DATA, 1, stream, b"ef")].concat());
}

#[test]
fn pings_are_answered_and_padding_taken_off() {
    let mut wire = ready(&[]);
    let ping = frame(kind::PING, 0, 0, b"12345678");
    assert_eq!(wire.next(&mut &ping[..]), Ok(None));
    assert_eq!(wire.out, frame(kind::PING, flag::ACK, 0, b"12345678"));
    let padded = frame(kind::DATA, flag::PADDED, 1, &[2, b'x', 0, 0]);
    assert_eq!(wire.next(&mut &padded[..]), Ok(Some(Frame::Data { stream: 1, bytes: b"x", end: false })));
    let broken = frame(kind::DATA, flag::PADDED, 1, &[9, b'x']);
    assert!(matches!(wire.next(&mut &broken[..]), Err(WireError::Protocol(_))));
}

#[test]
fn what_is_no_http2_is_refused() {
    let mut wire = ready(&[]);
    assert!(matches!(wire.next(&mut &b"HTTP/1.1 400 Bad Request\r\n"[..]), Err(WireError::Protocol(_))));
    let goaway = frame(kind::GOAWAY, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 11]);
    assert_eq!(wire.next(&mut &goaway[..]), Err(WireError::GoAway(11)));
}
