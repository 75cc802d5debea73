//! One response for many streams.
//!
//! Most streams have one watcher, and it has the id that all streams begin with. Those of one range are sent the very same bytes for
//! an event. So each thread keeps the last response that was made of a letter for a lone watcher, until there is another: the
//! streams that come to the same letter next send references to it, and nothing is encoded again.

use std::{
    ptr,
    sync::{Arc, Weak},
};

use bytes::Bytes;

use crate::{
    fanout::{Out, watcher::Watcher},
    store::{Entry, Responder},
};

/// A response above this many bytes is kept for nobody: each thread that serves connections keeps one.
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
    /// Keeps `out`, which is what `watcher` is sent of `entry`. Only of an entry with one event: of several, only some may lie in
    /// another's range. One event is never cut into fragments, so it does not matter who asked for those.
    pub(super) fn new(entry: &Arc<Entry>, responder: Responder, watcher: &Watcher, out: &mut Out) -> Option<Self> {
        let (watch_id, variant) = (watcher.id, watcher.options.variant());
        let is_kept = entry.events.len() == 1 && out.len() <= MOST;
        is_kept.then(|| Self { entry: Arc::downgrade(entry), responder, watch_id, variant, response: out.share() })
    }

    /// The response, if it is what `watcher`, whom `entry` concerns, is to be sent of it.
    pub(super) fn response_for(&self, entry: &Arc<Entry>, responder: Responder, watcher: &Watcher) -> Option<Bytes> {
        let is_same = ptr::eq(self.entry.as_ptr(), Arc::as_ptr(entry))
            && self.watch_id == watcher.id
            && self.variant == watcher.options.variant()
            && self.responder == responder;
        is_same.then(|| self.response.clone())
    }
}
