//! Answers to pings wait for company, and let others go first.
//!
//! A peer that measures its bandwidth, as Go's gRPC does, sends a ping with nearly everything that it sends, and for nearly
//! everything that it is sent, except while it waits for the answer to one. The answer is ready long before what the peer is waiting
//! for, be that a forwarded call or the next event; by itself it would cost a system call, as much as all the rest of a small
//! delivery, and the next ping that it brings about costs another. So it stays behind what is sent meanwhile, for a while or until
//! that is enough for a bandwidth to show in it. Then it leaves with whatever is sent next, or by itself if nothing is, as
//! acknowledgements in TCP do.
//!
//! RFC 9113, 6.7, would rather have answers to pings before everything else. A peer that only asks whether the connection lives
//! allows seconds for the answer.

use std::{future::Future, io::IoSlice, pin::Pin, task::Context, time::Duration};

use bytes::BytesMut;
use tokio::time::{Instant, Sleep, sleep};

use super::frames::Frames;

/// How long an answer to a ping stays behind what is sent.
const STAY: Duration = Duration::from_millis(100);
/// How long it is held if nothing else is sent.
const LONGEST: Duration = Duration::from_millis(200);
/// Bytes sent meanwhile after which it is held no longer. Go's gRPC gives more room when two thirds of what it takes for the
/// bandwidth, 64 KiB at first, arrive between its ping and the answer.
const ENOUGH: usize = 32 * 1024;
/// How the answer to a ping begins: its length, its type, the flag of an answer.
const PONG: [u8; 5] = [0, 0, 8, 6, 1];
const PONG_BYTES: usize = 17;
/// Bytes of answers that are held at most. A peer with more pings than these has something in mind.
const MOST: usize = 8 * PONG_BYTES;
/// Pings that are answered at once after one for which nothing came.
const DISCOURAGED: u8 = 16;

/// How one connection's answers to pings wait.
#[derive(Default)]
pub(super) struct Courtesy {
    frames: Frames,
    discouraged: u8,
    waiting: Option<Box<Waiting>>,
}

/// Answers that wait, or did. A timer that runs on costs less than one that is set and cancelled each time.
struct Waiting {
    pongs: Vec<u8>,
    since: Instant,
    /// Bytes that were sent meanwhile.
    passed: usize,
    pause: Pin<Box<Sleep>>,
}

impl Waiting {
    fn new() -> Self {
        let pongs = Vec::with_capacity(MOST);
        Self { pongs, since: Instant::now(), passed: 0, pause: Box::pin(sleep(LONGEST)) }
    }

    fn begin(&mut self) {
        (self.since, self.passed) = (Instant::now(), 0);
        self.pause.as_mut().reset(self.since + LONGEST);
    }

    /// Whether the answers leave now, even with nothing else.
    fn must_leave(&self) -> bool {
        self.passed >= ENOUGH || self.pongs.len() >= MOST || self.pause.is_elapsed()
    }

    fn leave(&mut self, frames: &mut BytesMut) {
        frames.extend_from_slice(&self.pongs);
        self.pongs.clear();
    }
}

impl Courtesy {
    /// Takes the answer to a ping with which `bytes` begin, the next to be sent, if it is to wait. Returns its length.
    pub(super) fn keep(&mut self, bytes: &[u8]) -> Option<usize> {
        let pong = bytes.get(..PONG_BYTES).filter(|pong| pong.starts_with(&PONG) && self.frames.is_between())?;
        let is_first = self.waiting.as_ref().is_none_or(|waiting| waiting.pongs.is_empty());
        if is_first && self.discouraged > 0 {
            self.discouraged -= 1;
            return None;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::new(Waiting::new()));
        if is_first {
            waiting.begin();
        }
        waiting.pongs.extend_from_slice(pong);
        Some(PONG_BYTES)
    }

    #[cfg(test)]
    pub(super) fn is_at_rest(&self) -> bool {
        self.waiting.is_none()
    }

    /// Notes the first `length` bytes of `slices` as sent.
    pub(super) fn pass(&mut self, slices: &[IoSlice<'_>], length: usize) {
        let mut left = length;
        for slice in slices {
            let sent = &slice[..left.min(slice.len())];
            self.frames.pass(sent);
            left -= sent.len();
        }
        if let Some(waiting) = &mut self.waiting {
            waiting.passed += length;
        }
    }

    /// Adds the answers that can wait no longer to `frames`, before what is sent next. A turn may send much, and end each time in
    /// the middle of a frame.
    pub(super) fn cut_in(&mut self, frames: &mut BytesMut) {
        let Some(waiting) = &mut self.waiting else { return };
        if waiting.must_leave() && self.frames.is_between() {
            waiting.leave(frames);
        }
    }

    /// Adds the answers whose time has come to `frames`, which leave at the end of a turn. If that time is yet to come, the task
    /// of `cx` is woken then.
    pub(super) fn join(&mut self, frames: &mut BytesMut, cx: &mut Context<'_>) {
        let Some(waiting) = &mut self.waiting else { return };
        if waiting.pongs.is_empty() {
            if waiting.pause.is_elapsed() {
                self.waiting = None;
            }
            return;
        }
        let (is_over, has_company) = (waiting.pause.as_mut().poll(cx).is_ready(), !frames.is_empty());
        let leaves = waiting.must_leave() || has_company && waiting.since.elapsed() >= STAY;
        if !leaves || !self.frames.is_between() {
            return;
        }
        waiting.leave(frames);
        if is_over {
            self.waiting = None;
            self.discouraged = if has_company { 0 } else { DISCOURAGED };
        }
    }
}
