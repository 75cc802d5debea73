//! Events on their way out: letters for watchers that keep up, the history for those that are behind, and what the
//! upstream sends for those that are relayed.

use std::{cell::RefCell, sync::Arc};

use bytes::BufMut;

use super::{Relay, Session, State, alike::Alike};
use crate::{
    aside,
    fanout::{
        Out,
        encode::{Envelope, LONGEST_HEAD, event_len, put_event},
        watcher::Watcher,
    },
    proto::{etcdserverpb::WatchResponse, mvccpb},
    store::{Entry, Event, HeaderField, Position, Responder, Revision, View},
};
use prost::Message;

/// Events in one response to a watcher that is behind, in bytes, after which the next response begins.
const BATCH_BYTES: usize = 256 << 10;
/// Entries of the history that one pump looks at for watchers that are behind.
const ENTRIES_PER_PUMP: usize = 8192;

thread_local! {
    /// For one session after the other: a stream that waits keeps nothing of what it has sent.
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Encoded events, kept between responses so that watchers who see the same thing share one encoding.
#[derive(Default)]
pub(super) struct Scratch {
    bytes: Vec<u8>,
    /// Where the encoding for each variant of the current letter lies.
    spans: [Option<(usize, usize)>; 8],
    /// The last response that other streams may have to send as well.
    alike: Option<Alike>,
}

impl Scratch {
    fn clear(&mut self) {
        self.bytes.clear();
        self.spans = [None; 8];
        if self.bytes.capacity() > BATCH_BYTES {
            self.bytes = Vec::new();
        }
    }

    /// The events of `entry` that `watcher` wants, encoded once for all watchers of its group that want the same.
    fn entry(&mut self, entry: &Entry, watcher: &Watcher) -> &[u8] {
        let variant = watcher.options.variant();
        let (start, end) = self.spans[variant].unwrap_or_else(|| {
            let start = self.bytes.len();
            aside::walk(entry.events.len() as u64, || {
                for event in entry.events.iter().filter(|event| watcher.options.wants(event)) {
                    put_event(&mut self.bytes, event, watcher.options.prev_kv);
                }
            });
            (start, self.bytes.len())
        });
        self.spans[variant] = Some((start, end));
        &self.bytes[start..end]
    }
}

impl Session {
    /// Works the lane's letters off, as far as the budget goes.
    pub(super) fn deliver(&mut self, lane: usize, scratch: &mut Scratch, out: &mut Out, budget: usize) {
        let Some(lane) = &mut self.lanes[lane] else { return };
        let (responder, fragment_bytes) = (lane.hub.store().view().responder, self.settings.fragment_bytes);
        while let Some(letter) = lane.letters.get(lane.read) {
            if out.len() >= budget {
                return;
            }
            let entry = &letter.entry;
            scratch.clear();
            let members = lane.group(letter.group).map_or(&[][..], |group| &group.members[..]);
            // What this says may be all that the stream says now, and then other streams may say the same.
            let is_alone = members.len() == 1 && lane.letters.len() == 1 && out.is_empty();
            let mut delivery = Delivery { entry, responder, header: None, budget, fragment_bytes };
            for (at, slot) in members.iter().enumerate() {
                let Some(Some(watcher)) = self.watchers.get_mut(*slot as usize) else { continue };
                if watcher.next > entry.revision {
                    continue;
                }
                if out.len() >= budget {
                    return;
                }
                watcher.next = entry.revision.next();
                match is_alone {
                    true => delivery.tell_alone(watcher, scratch, out),
                    false => delivery.tell(watcher, members.len() - at, scratch, out),
                }
            }
            lane.read += 1;
        }
        lane.letters.clear();
        lane.read = 0;
    }

    /// Lets the watchers that are behind read on. True when there is more to read at once.
    pub(super) fn catch_up(&mut self, scratch: &mut Scratch, out: &mut Out, budget: usize) -> bool {
        let mut entries = ENTRIES_PER_PUMP;
        let mut at = 0;
        while let Some(&slot) = self.behind.get(at) {
            if out.len() >= budget || entries == 0 {
                return true;
            }
            if self.read_on(slot, &mut entries, scratch, out) {
                self.behind.swap_remove(at);
            } else {
                at += 1;
            }
        }
        !self.behind.is_empty()
    }

    /// Reads a stretch of the history for one watcher. True when it is not behind any more.
    fn read_on(&mut self, slot: u32, entries: &mut usize, scratch: &mut Scratch, out: &mut Out) -> bool {
        let Some(Some(watcher)) = self.watchers.get_mut(slot as usize) else { return true };
        let (State::Behind, Some(at)) = (watcher.state, watcher.lane) else { return true };
        let Some(lane) = &mut self.lanes[at] else { return true };
        let view = lane.hub.store().view_owned();
        if view.position.epoch != lane.epoch {
            // Its revisions mean nothing in a history that the session has yet to hear of.
            return false;
        }
        if watcher.next < view.compacted {
            self.cancel_compacted(slot, view.compacted, out);
            return true;
        }
        if !view.is_loaded() || !stretch(watcher, &view, entries, scratch, self.settings.fragment_bytes, out) {
            self.relay(slot);
            return true;
        }
        if watcher.next <= view.revision() {
            return false;
        }
        let reached = Position { epoch: view.position.epoch, revision: watcher.next.previous() };
        match lane.join(&watcher.options.range, slot, reached) {
            Some(seat) => {
                watcher.state = State::Live(seat);
                true
            }
            None => false,
        }
    }

    pub(super) fn relay(&mut self, slot: u32) {
        let Some(Some(watcher)) = self.watchers.get_mut(slot as usize) else { return };
        watcher.state = State::Relayed { told: None };
        let lane = self.lanes.get(watcher.lane.unwrap_or(0)).and_then(Option::as_ref);
        self.relays.push(Relay {
            slot,
            serial: watcher.serial,
            options: watcher.options.clone(),
            from: watcher.next,
            begins_now: watcher.start == Revision::ZERO,
            epoch: lane.map_or(0, |lane| lane.epoch),
            lane: watcher.lane,
        });
    }

    /// The watchers that have come to need a relay since the last call.
    pub fn take_relays(&mut self) -> Vec<Relay> {
        std::mem::take(&mut self.relays)
    }

    fn relayed_watcher(&mut self, slot: u32, serial: u64) -> Option<&mut Watcher> {
        let watcher = self.watchers.get_mut(slot as usize)?.as_mut()?;
        (watcher.serial == serial && matches!(watcher.state, State::Relayed { .. })).then_some(watcher)
    }

    /// Whether the watcher still wants to be relayed.
    pub fn is_relayed(&mut self, slot: u32, serial: u64) -> bool {
        self.relayed_watcher(slot, serial).is_some()
    }

    /// Passes on what the upstream sent for a relayed watcher: events, progress or a cancellation.
    pub fn relayed(&mut self, slot: u32, serial: u64, response: WatchResponse, out: &mut Out) {
        let fragment_bytes = self.settings.fragment_bytes;
        let Some(watcher) = self.relayed_watcher(slot, serial) else { return };
        let header = response.header.unwrap_or_default();
        let (responder, revision) = (Responder::from(&header), Revision(header.revision));
        if response.canceled {
            watcher.state = State::Dead;
            let Watcher { id: watch_id, .. } = *watcher;
            let WatchResponse { compact_revision, cancel_reason, .. } = response;
            let canceled = true;
            Envelope { watch_id, canceled, compact_revision, cancel_reason, ..Envelope::default() }.put(
                out.append(),
                &responder.field(revision),
                &[],
            );
        } else if let Some(last) = response.events.last().map(revision_of) {
            watcher.next = watcher.next.max(last.next());
            watcher.quiet = false;
            if watcher.start == Revision::ZERO {
                // Etcd would have sent it each revision by itself. Together they came because the relay began a little later.
                for events in response.events.chunk_by(|one, next| revision_of(one) == revision_of(next)) {
                    let revision = events.first().map_or(revision, revision_of);
                    put_decoded(watcher, &responder.field(revision), events, fragment_bytes, out);
                }
            } else {
                put_decoded(watcher, &responder.field(revision), &response.events, fragment_bytes, out);
            }
        } else {
            watcher.next = watcher.next.max(revision.next());
            watcher.state = State::Relayed { told: Some((responder, revision)) };
        }
    }

    /// Ends the relay of a watcher that has everything before its next revision: it reads the history window from there.
    pub fn end_relay(&mut self, slot: u32, serial: u64) {
        if let Some(watcher) = self.relayed_watcher(slot, serial)
            && watcher.lane.is_some()
        {
            watcher.state = State::Behind;
            self.behind.push(slot);
        }
    }
}

/// An entry on its way to the watchers of one group.
struct Delivery<'a> {
    entry: &'a Arc<Entry>,
    responder: Responder,
    /// The header of all responses, once there is one.
    header: Option<HeaderField>,
    budget: usize,
    fragment_bytes: usize,
}

impl Delivery<'_> {
    /// Puts out what `watcher` is to see of the entry, if anything. With it, `left` watchers may have yet to be told.
    fn tell(&mut self, watcher: &mut Watcher, left: usize, scratch: &mut Scratch, out: &mut Out) {
        let events = scratch.entry(self.entry, watcher);
        if events.is_empty() {
            return;
        }
        watcher.quiet = false;
        if self.header.is_none() && left > 1 {
            out.make_room(left, LONGEST_HEAD + events.len(), self.budget);
        }
        let header = self.header.get_or_insert_with(|| self.responder.field(self.entry.revision));
        let wanted = || self.entry.events.iter().filter(|event| watcher.options.wants(event));
        let lengths = || wanted().map(|event| event_len(event, watcher.options.prev_kv));
        respond(watcher, header, events, lengths, self.fragment_bytes, out);
    }

    /// The same, where it is all that the stream says.
    fn tell_alone(&mut self, watcher: &mut Watcher, scratch: &mut Scratch, out: &mut Out) {
        let known = scratch.alike.as_ref().and_then(|alike| alike.response_for(self.entry, self.responder, watcher));
        if let Some(shared) = known {
            watcher.quiet = false;
            return out.put_shared(shared);
        }
        self.tell(watcher, 1, scratch, out);
        if !out.is_empty() {
            scratch.alike = Alike::new(self.entry, self.responder, watcher, out);
        }
    }
}

/// Sends `watcher` the next stretch of the history window. False when the window begins after the watcher's next revision.
fn stretch(
    watcher: &mut Watcher,
    view: &View,
    entries: &mut usize,
    scratch: &mut Scratch,
    fragment_bytes: usize,
    out: &mut Out,
) -> bool {
    let Some(window) = view.window.after(watcher.next.previous()) else { return false };
    scratch.clear();
    let mut lengths = Vec::new();
    let mut reached = watcher.next.max(view.revision().next());
    for entry in window {
        if *entries == 0 || scratch.bytes.len() >= BATCH_BYTES {
            reached = entry.revision;
            break;
        }
        *entries -= 1;
        // What a compaction took is gone for whoever begins at it, as in etcd; Kubernetes tells by that.
        let compacted = entry.revision == view.compacted && watcher.start == entry.revision;
        let prev_kv = watcher.options.prev_kv && !compacted;
        let mut put = |event: &Event| {
            if watcher.options.wants(event) {
                put_event(&mut scratch.bytes, event, prev_kv);
                lengths.push(event_len(event, prev_kv));
            }
        };
        match compacted {
            true => entry.left_by_compaction().into_iter().for_each(&mut put),
            false => entry.events.iter().for_each(&mut put),
        }
    }
    watcher.next = reached;
    if !lengths.is_empty() {
        watcher.quiet = false;
        let lengths = || lengths.iter().copied();
        respond(watcher, &view.responder.field(view.revision()), &scratch.bytes, lengths, fragment_bytes, out);
    }
    true
}

/// Puts out one response, or its fragments. `lengths` tells where the events in `encoded` end.
fn respond<I: Iterator<Item = usize>>(
    watcher: &Watcher,
    header: &HeaderField,
    encoded: &[u8],
    lengths: impl Fn() -> I,
    fragment_bytes: usize,
    out: &mut Out,
) {
    let envelope = Envelope { watch_id: watcher.id, ..Envelope::default() };
    if !watcher.options.fragment || envelope.message_len(header, encoded.len()) < fragment_bytes {
        return envelope.put(out.append(), header, encoded);
    }
    put_fragments(envelope, header, encoded, lengths(), fragment_bytes, out);
}

/// Cuts a response into fragments of at most `fragment_bytes`, or of one event where that is larger. As in etcd, all but
/// the last say that more follows.
fn put_fragments(
    mut envelope: Envelope,
    header: &HeaderField,
    encoded: &[u8],
    lengths: impl Iterator<Item = usize>,
    fragment_bytes: usize,
    out: &mut Out,
) {
    envelope.fragment = true;
    let (mut start, mut end) = (0, 0);
    for length in lengths {
        if end > start && envelope.message_len(header, end - start + length) >= fragment_bytes {
            envelope.put(out.append(), header, &encoded[start..end]);
            start = end;
        }
        end += length;
    }
    envelope.fragment = false;
    envelope.put(out.append(), header, &encoded[start..]);
}

fn revision_of(event: &mvccpb::Event) -> Revision {
    Revision(event.kv.as_ref().map_or(0, |kv| kv.mod_revision))
}

/// Puts out events that came decoded from the upstream.
fn put_decoded(
    watcher: &Watcher,
    header: &HeaderField,
    events: &[mvccpb::Event],
    fragment_bytes: usize,
    out: &mut Out,
) {
    let mut encoded = Vec::new();
    let mut lengths = Vec::with_capacity(events.len());
    for event in events {
        let start = encoded.len();
        encoded.put_u8(11 << 3 | 2);
        // A vector grows as needed, so encoding into one cannot fail.
        let _ = event.encode_length_delimited(&mut encoded);
        lengths.push(encoded.len() - start);
    }
    respond(watcher, header, &encoded, || lengths.iter().copied(), fragment_bytes, out);
}
