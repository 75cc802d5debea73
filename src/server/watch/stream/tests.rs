//! What a stream does by itself.

use std::future::{pending, ready};

use super::*;

#[tokio::test]
async fn a_create_request_waits_no_longer_than_authentication_is_off() {
    let (set, auth) = watch::channel(AuthState::Off);
    assert_eq!(while_open(auth.clone(), ready(7)).await, Ok(7));
    for (settled, expected) in [(AuthState::Off, Ok(7)), (AuthState::On, Err(Status::WATCH_AGAIN))] {
        set.send_replace(AuthState::Changing);
        let waits = tokio::spawn(while_open(auth.clone(), ready(7)));
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        set.send_replace(settled);
        assert_eq!(waits.await.unwrap(), expected);
    }
    set.send_replace(AuthState::Off);
    let waits = tokio::spawn(while_open(auth, pending::<()>()));
    set.send_replace(AuthState::On);
    assert_eq!(waits.await.unwrap(), Err(Status::WATCH_AGAIN));
}

#[test]
fn the_first_response_that_is_too_long_is_found() {
    let framed = |lengths: &[usize]| {
        let frame = |length: &usize| [&grpc::prefix(*length)[..], &vec![0; *length]].concat();
        lengths.iter().flat_map(frame).collect::<Vec<_>>()
    };
    assert_eq!(too_long(&framed(&[]), 10), None);
    assert_eq!(too_long(&framed(&[3, 10, 0]), 10), None);
    assert_eq!(too_long(&framed(&[3, 10, 11, 12, 1]), 10), Some((3 + 10 + 2 * PREFIX, 11)));
    let beyond = [framed(&[3]), grpc::prefix(1 << 32).to_vec(), vec![0; 50]].concat();
    assert_eq!(too_long(&beyond, 10), Some((3 + PREFIX, 50)));
}
