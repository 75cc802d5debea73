//! One response for many streams.
//!
//! Most streams have one watcher, under the id that they all begin with. Those of the same range are sent the same bytes to the
//! last one, so each thread keeps the last response that was all that a stream had to say. The streams that come to the same
//! entry next hold references to it, and nothing is encoded or copied again before it goes into their sockets.

use std::{
    ptr,
    sync::{Arc, Weak},
};

use bytes::Bytes;

use crate::{
    fanout::{Out, watcher::Watcher},
    store::{Entry, Responder},
};

/// A response above this many bytes is kept for nobody.
const MOST: usize = 2 << 20;

/// A response, and to whom else it may go.
pub(super) struct Alike {
    // What is pointed to stays a place of its own for as long as this lives, so no other entry passes for it.
    entry: Weak<Entry>,
    responder: Responder,
    watch_id: i64,
    variant: usize,
    response: Bytes,
}

impl Alike {
    /// `out` is what `watcher` is sent of `entry`, and is shared if it may be of use to others. It is not where they may have to
    /// be sent something else though the entry concerns them and they have the same options: where only some of its events
    /// may be theirs.
    pub(super) fn new(entry: &Arc<Entry>, responder: Responder, watcher: &Watcher, out: &mut Out) -> Option<Self> {
        let (watch_id, variant) = (watcher.id, watcher.options.variant());
        let keeps = entry.events.len() == 1 && out.len() <= MOST;
        keeps.then(|| Self { entry: Arc::downgrade(entry), responder, watch_id, variant, response: out.share() })
    }

    /// The response, if it is what `watcher`, whom `entry` concerns, is to be sent of it.
    pub(super) fn of(&self, entry: &Arc<Entry>, responder: Responder, watcher: &Watcher) -> Option<Bytes> {
        let is_same = ptr::eq(self.entry.as_ptr(), Arc::as_ptr(entry))
            && self.watch_id == watcher.id
            && self.variant == watcher.options.variant()
            && self.responder == responder;
        is_same.then(|| self.response.clone())
    }
}
