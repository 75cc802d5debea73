//! A closed loop of unary calls on one connection: a fixed number in flight, each answered one replaced at once.

use std::{
    cell::RefCell,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::time::timeout_at;

use super::{
    link::{Link, LinkError},
    requests::Source,
    tally::{Tally, Window},
    wire::{Frame, StreamId, Wire},
};

/// How long to wait for the last answers.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// The stream of a slot whose last call is over.
const CLOSED: StreamId = 0;

/// One call in flight.
struct Call {
    stream: StreamId,
    started: Instant,
    received: u64,
    answer: Vec<u8>,
}

/// The calls of one connection; the index of a call is its slot.
struct Calls<'a> {
    slots: Vec<Call>,
    source: &'a mut dyn Source,
    window: Window,
    tally: &'a RefCell<Tally>,
    done: &'a AtomicU64,
}

/// Keeps `in_flight` calls going until the window ends. `done` counts along for whoever watches.
pub async fn run(
    link: &mut Link,
    source: &mut dyn Source,
    in_flight: usize,
    window: Window,
    tally: &RefCell<Tally>,
    done: &AtomicU64,
) -> Result<(), LinkError> {
    let mut calls = Calls { slots: Vec::with_capacity(in_flight), source, window, tally, done };
    for slot in 0..in_flight {
        let call = calls.start(link.wire(), slot);
        calls.slots.push(call);
    }
    // Calls under way at the end are let finish: a server that has to throw answers away would spend time on that.
    let end = (window.end + LAST_ANSWERS).into();
    while calls.are_open() {
        match timeout_at(end, link.turn(|wire, frame| calls.on(wire, frame))).await {
            Ok(turned) => turned?,
            Err(_) => break,
        }
    }
    Ok(())
}

impl Calls<'_> {
    fn start(&mut self, wire: &mut Wire, slot: usize) -> Call {
        let stream = wire.open(self.source.request(slot), true);
        Call { stream, started: Instant::now(), received: 0, answer: Vec::new() }
    }

    fn on(&mut self, wire: &mut Wire, frame: Frame<'_>) {
        let (stream, over) = match frame {
            Frame::Ready => return,
            Frame::Data { stream, bytes, end } => {
                self.receive(stream, bytes);
                (stream, end)
            }
            Frame::Headers { stream, end } => (stream, end),
            Frame::Reset { stream } => (stream, true),
        };
        if over && let Some(slot) = self.slot(stream) {
            let now = self.finish(slot);
            if now < self.window.end {
                self.slots[slot] = self.start(wire, slot);
            } else {
                self.slots[slot].stream = CLOSED;
            }
        }
    }

    fn are_open(&self) -> bool {
        self.slots.iter().any(|call| call.stream != CLOSED)
    }

    fn slot(&self, stream: StreamId) -> Option<usize> {
        self.slots.iter().position(|call| call.stream == stream)
    }

    fn receive(&mut self, stream: StreamId, bytes: &[u8]) {
        if let Some(slot) = self.slot(stream) {
            let call = &mut self.slots[slot];
            call.received += bytes.len() as u64;
            if self.source.wants_answers() {
                call.answer.extend_from_slice(bytes);
            }
        }
    }

    /// Counts an answered call and returns when that was.
    fn finish(&mut self, slot: usize) -> Instant {
        let call = &self.slots[slot];
        if let Some((_, message)) = call.answer.split_at_checked(5) {
            self.source.answer(slot, message);
        }
        let now = Instant::now();
        if !self.window.contains(now) {
            return now;
        }
        let mut tally = self.tally.borrow_mut();
        if call.received == 0 {
            tally.errors += 1;
        } else {
            tally.succeeded(now - call.started, call.received);
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        now
    }
}
