//! Answers to pings may wait for company.
//!
//! A peer that measures its bandwidth, as Go's gRPC does, sends a ping with nearly everything that it sends. The answer to it is
//! ready long before what the peer is waiting for, if that is a relayed call, and by itself it would cost a system call and
//! wake the peer, before the call can even be passed on. So it leaves with whatever is sent next, or after a [`Pause`].

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Sleep, sleep};

/// How long an answer to a ping waits at most.
const LONGEST: Duration = Duration::from_millis(1);
/// How the answer to a ping begins: its length, its type, the flag of an answer.
const PONG: [u8; 5] = [0, 0, 8, 6, 1];
const PONG_BYTES: usize = 17;
/// A peer with more pings than these has something in mind.
const MOST: usize = 8 * PONG_BYTES;

/// Whether `frames` are answers to pings and nothing else. Bytes that begin within a frame may be taken for them, which
/// costs a pause.
pub(super) fn may_wait(frames: &[u8]) -> bool {
    let is_pong = |frame: &[u8]| frame.len() == PONG_BYTES && frame.starts_with(&PONG);
    (1..=MOST).contains(&frames.len()) && frames.chunks(PONG_BYTES).all(is_pong)
}

/// The time for which answers to pings wait.
pub(super) struct Pause(Pin<Box<Sleep>>);

impl Pause {
    /// Begins; the task of `cx` is woken at the end.
    pub(super) fn begin(cx: &mut Context<'_>) -> Self {
        let mut pause = Self(Box::pin(sleep(LONGEST)));
        let _ = pause.is_over(cx);
        pause
    }

    /// Whether it is over; if not, the task of `cx` is woken at its end.
    pub(super) fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        self.0.as_mut().poll(cx) == Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_to_pings_may_wait() {
        let frame = |kind: u8, flags: u8| [&[0, 0, 8, kind, flags, 0, 0, 0, 0][..], &[7; 8]].concat();
        let (pong, ping, data) = (frame(6, 1), frame(6, 0), frame(0, 1));
        assert!(may_wait(&pong) && may_wait(&pong.repeat(8)));
        assert!(!may_wait(&ping) && !may_wait(&data), "somebody waits for these");
        assert!(!may_wait(&[&pong[..], &data].concat()));
        assert!(!may_wait(&pong[..16]) && !may_wait(&pong[1..]));
        assert!(!may_wait(&pong.repeat(9)) && !may_wait(&[]));
    }
}
