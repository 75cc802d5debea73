//! Answers to pings wait for company.
//!
//! A peer that measures its bandwidth, as Go's gRPC does, sends a ping with nearly everything that it sends, and for nearly
//! everything that it is sent. The answer is ready long before what the peer is waiting for, be that a forwarded call or the next
//! event, and by itself it would cost a system call, as much as all the rest of a small delivery. So it leaves with
//! whatever is sent next, or after a pause, as acknowledgements in TCP do. Who asks whether a connection lives waits for seconds.

use std::{future::Future, pin::Pin, task::Context, time::Duration};

use tokio::time::{Instant, Sleep, sleep};

/// How long an answer to a ping waits at most.
const LONGEST: Duration = Duration::from_millis(100);
/// How the answer to a ping begins: its length, its type, the flag of an answer.
const PONG: [u8; 5] = [0, 0, 8, 6, 1];
const PONG_BYTES: usize = 17;
/// A peer with more pings than these has something in mind.
const MOST: usize = 8 * PONG_BYTES;
/// Pings that are answered at once after one for which nothing came.
const DISCOURAGED: u8 = 16;

/// How one connection's answers to pings wait.
#[derive(Default)]
pub(super) struct Courtesy {
    /// Once it has been needed. A timer that runs on costs less than one that is set and cancelled each time.
    pause: Option<Pin<Box<Sleep>>>,
    waiting: bool,
    discouraged: u8,
}

impl Courtesy {
    /// Whether `frames`, all that there is to be sent, wait. If so, the task of `cx` is woken at the end of the pause.
    pub(super) fn waits(&mut self, frames: &[u8], cx: &mut Context<'_>) -> bool {
        if !may_wait(frames) {
            self.waiting = false;
            return false;
        }
        if !self.waiting && self.discouraged > 0 {
            self.discouraged -= 1;
            return false;
        }
        if !self.waiting {
            let pause = self.pause.get_or_insert_with(|| Box::pin(sleep(LONGEST)));
            pause.as_mut().reset(Instant::now() + LONGEST);
        }
        self.waiting = self.pause.as_mut().is_some_and(|pause| pause.as_mut().poll(cx).is_pending());
        if !self.waiting {
            self.pause = None;
            self.discouraged = DISCOURAGED;
        }
        self.waiting
    }
}

/// Whether `frames` are answers to pings and nothing else. Bytes that begin within a frame may be taken for them, which
/// costs a pause.
fn may_wait(frames: &[u8]) -> bool {
    let is_pong = |frame: &[u8]| frame.len() == PONG_BYTES && frame.starts_with(&PONG);
    (1..=MOST).contains(&frames.len()) && frames.chunks(PONG_BYTES).all(is_pong)
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
