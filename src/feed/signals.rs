//! What a feed lets others know, and what they ask of it.

use tokio::time::Instant;

use crate::{signal::SignalReader, store::Position, upstream::ConnectionNumber};

/// What the feed is doing, for those who read from its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing has been loaded yet.
    Cold,
    /// Connected, and the view is proven to be a state of this upstream's history.
    Live,
    /// The upstream is gone since then; the view is what was last known.
    Lost(Instant),
    /// Connected again, but whether the view belongs to this upstream's history is being found out.
    Proving,
    /// Authentication is on: nothing may be served from here.
    Barred,
}

/// What a feed lets others know.
#[derive(Clone)]
pub struct Signals {
    /// What it is doing.
    pub phase: SignalReader<Phase>,
    /// Connections up to this one lead to the history that the view belongs to, as far as they lead anywhere.
    pub confirmed: SignalReader<ConnectionNumber>,
    /// The connection over which the view's epoch began; older ones may have led elsewhere. Set before the epoch is seen.
    pub begun: SignalReader<ConnectionNumber>,
    /// Counts proofs that the history goes on: odd while one is under way. It rests on what clients had been told when it began, so
    /// watchers are told nothing afterwards that an upstream watch from before it sends.
    pub proofs: SignalReader<u64>,
}

/// What others need of the feed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// What the upstream is known to have reached, and somebody waits for. Of another epoch: meaningless.
    pub goal: Position,
    /// A compaction that is known to have been done. Of another epoch: meaningless.
    pub compacted: Position,
    /// Grows when an answer contradicted the view: continuity is to be proven anew.
    pub doubts: u64,
    /// Something was heard over this connection, so where it leads must be known.
    pub confirm: ConnectionNumber,
    /// Grows when the state was found to differ from the upstream's: it is to be thrown away.
    pub rebuilds: u64,
}
