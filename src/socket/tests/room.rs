//! Who waits for room in the socket, and is woken.

use super::*;

/// The calls of a connection are tasks to the socket, which knows the one that asked last.
#[tokio::test]
async fn who_waits_for_room_is_woken_though_the_outlet_asked_after_it() {
    let (near, mut far) = tokio::io::duplex(16);
    let mut gather = Gather::new(near);
    let mut outlet = gather.outlet();
    write(&mut gather, &[1; 40]);
    let (writer, writers) = Wakes::task();
    let (turn, turns) = Wakes::task();
    let large = [2; LARGE];
    assert!(Pin::new(&mut gather).poll_write(&mut Context::from_waker(&writers), &large).is_pending());
    outlet.end_turn(&mut Context::from_waker(&turns), false);
    for rest in [8, 0] {
        far.read_exact(&mut [0; 16]).await.unwrap();
        outlet.end_turn(&mut Context::from_waker(&turns), false);
        assert_eq!(pending(&gather), rest);
    }
    assert!(turn.count() > 0, "the socket knows the outlet");
    assert!(writer.count() > 0, "it has room, and nobody says so");
}

#[tokio::test]
async fn who_waits_for_room_is_woken_when_the_outlet_finds_the_socket_broken() {
    let (near, far) = tokio::io::duplex(16);
    let mut gather = Gather::new(near);
    let mut outlet = gather.outlet();
    write(&mut gather, &[1; 40]);
    let (writer, writers) = Wakes::task();
    let large = [2; LARGE];
    assert!(Pin::new(&mut gather).poll_write(&mut Context::from_waker(&writers), &large).is_pending());
    end_turn(&mut outlet, false);
    assert_eq!(writer.count(), 0);
    drop(far);
    end_turn(&mut outlet, false);
    assert!(writer.count() > 0, "it will never have room, and nobody says so");
}
