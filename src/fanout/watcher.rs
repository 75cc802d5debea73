//! One watcher: what it wants, and how far it has got.

use crate::{
    proto::etcdserverpb::{WatchCreateRequest, watch_create_request::FilterType},
    rules::{
        KeyRange,
        watch::{is_filtered, watched},
    },
    store::{Event, EventKind, Responder, Revision},
};

/// What a watcher wants to see.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// The keys.
    pub range: KeyRange,
    /// Whether events carry the previous version.
    pub prev_kv: bool,
    /// Whether puts are left out.
    pub no_put: bool,
    /// Whether deletes are left out.
    pub no_delete: bool,
    /// Whether large responses may be cut into fragments.
    pub fragment: bool,
    /// Whether the watcher is told its progress while it is quiet.
    pub progress_notify: bool,
}

impl WatchOptions {
    /// The options of a create request.
    pub fn from_request(request: &WatchCreateRequest) -> Self {
        Self {
            range: watched(request),
            prev_kv: request.prev_kv,
            no_put: is_filtered(request, FilterType::Noput),
            no_delete: is_filtered(request, FilterType::Nodelete),
            fragment: request.fragment,
            progress_notify: request.progress_notify,
        }
    }

    /// Whether the watcher is to see `event`.
    pub(super) fn wants(&self, event: &Event) -> bool {
        self.passes(event) && self.range.contains(event.record.key())
    }

    /// Whether the filters let `event` through.
    pub(super) fn passes(&self, event: &Event) -> bool {
        match event.kind {
            EventKind::Put => !self.no_put,
            EventKind::Delete => !self.no_delete,
        }
    }

    /// Which of the eight ways to encode an entry for a group this watcher needs.
    pub(super) fn variant(&self) -> usize {
        usize::from(self.prev_kv) | usize::from(self.no_put) << 1 | usize::from(self.no_delete) << 2
    }
}

/// Where a watcher begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With whatever comes after the revision, which is the present.
    After(Revision),
    /// At a revision that the client named.
    At(Revision),
}

/// Where a watcher stands among those that its lane tells of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// Watchers of the same range.
    pub(super) group: u32,
    /// The place among the group's members.
    pub(super) place: u32,
}

/// How a watcher gets its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is told of them, as a member of a group of its lane.
    Live(Seat),
    /// It reads the history window.
    Behind,
    /// They are relayed from the upstream; `told` is its answer to the last request for progress.
    Relayed { told: Option<(Responder, Revision)> },
    /// It has been cancelled by us; the client has yet to free the id.
    Dead,
}

/// A cursor over the history.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) id: i64,
    /// Tells this watcher from later ones in the same slot.
    pub(super) serial: u64,
    pub(super) options: WatchOptions,
    /// The lane whose store covers the range; none: nothing cached does.
    pub(super) lane: Option<usize>,
    /// Everything before this revision has been sent.
    pub(super) next: Revision,
    /// The revision that the client named; zero for the present.
    pub(super) start: Revision,
    /// Nothing was sent since the last tick of the progress timer.
    pub(super) quiet: bool,
    pub(super) state: State,
}
