//! Of which history a relay is: it may outlive its upstream, and then has to know that what comes next follows on what it has
//! relayed. The prefix tells, once it is loaded; nobody can before.

use std::time::Duration;

use tokio::time::timeout;

use crate::{
    cache::{Cache, Prefix},
    upstream::ConnectionNumber,
};

/// The epoch of a prefix that has not been loaded yet.
const NOTHING_LOADED: u64 = 0;
/// For a proof that the history goes on. If it takes longer, nobody's watch is to stand still for it.
const PROOF: Duration = Duration::from_secs(5);

/// The history that a relay follows.
pub(super) struct Lineage {
    cache: Cache,
    /// The prefix whose history decides, by its place.
    lane: usize,
    /// The epoch of the history that is relayed.
    epoch: u64,
    /// The prefix's proofs when the upstream watch was opened.
    proofs: u64,
    /// While the epoch is not known: the server that was followed is the one that all connections up to this led to.
    followed: Option<ConnectionNumber>,
}

/// What is known of the history that a relay is to go on with.
pub(super) enum Descent {
    /// It is the one that was relayed before.
    Same,
    /// It is another.
    Another,
    /// Nobody can tell.
    Unknown,
}

impl Lineage {
    /// That of a relay which follows the history of `epoch`; zero: nothing had been loaded. `lane`: the prefix that covers it, by its
    /// place; what nothing cached covers is left to the first.
    pub(super) fn new(cache: Cache, lane: Option<usize>, epoch: u64) -> Self {
        Self { cache, lane: lane.unwrap_or(0), epoch, proofs: 0, followed: None }
    }

    /// The prefix whose history decides over the watcher.
    pub(super) fn prefix(&self) -> Option<&Prefix> {
        self.cache.prefixes().get(self.lane)
    }

    /// Whether anything has been loaded that another upstream watch can be held against.
    pub(super) fn can_resume(&self) -> bool {
        self.loaded_epoch() != NOTHING_LOADED
    }

    /// Whether the history that is relayed is known.
    pub(super) fn is_known(&self) -> bool {
        self.epoch != NOTHING_LOADED
    }

    /// Whether what comes over `connection`, on an upstream watch that is about to be opened, follows on what was relayed before.
    pub(super) async fn descent(&mut self, connection: ConnectionNumber) -> Descent {
        let Some(proofs) = self.await_proof().await else { return Descent::Unknown };
        self.proofs = proofs;
        if !self.can_resume() {
            // Its first server is as good as any.
            return if self.followed.is_none() { Descent::Same } else { Descent::Unknown };
        }
        if !self.settle().await {
            return Descent::Unknown;
        }
        let Some(prefix) = self.prefix() else { return Descent::Same };
        prefix.confirm(connection).await;
        let now = self.loaded_epoch();
        if !self.is_known() {
            self.epoch = now;
        }
        if self.epoch == now { Descent::Same } else { Descent::Another }
    }

    /// An upstream watch was opened by the server that all connections up to `opened` led to.
    pub(super) fn follow(&mut self, opened: ConnectionNumber) {
        self.followed = Some(opened);
    }

    /// Finds out, now that something is loaded, whether that is of the history that was relayed. False: nobody can tell.
    pub(super) async fn settle(&mut self) -> bool {
        let (NOTHING_LOADED, Some(followed), Some(prefix)) = (self.epoch, self.followed, self.prefix()) else {
            return true;
        };
        let Some(epoch) = prefix.epoch_behind(followed).await else { return false };
        self.epoch = epoch;
        true
    }

    /// Whether the prefix has proven meanwhile that its history goes on. The upstream watch may be of one that ended before, and the
    /// proof has not heard of what it has yet to say.
    pub(super) fn is_outlived(&self) -> bool {
        self.prefix().is_some_and(|prefix| prefix.proofs() != self.proofs)
    }

    /// Waits until no proof is under way, and counts the prefix's proofs; none: that takes too long. Whoever has followed nobody yet
    /// need not wait: a server that is there now is the one whose history is being looked at.
    async fn await_proof(&self) -> Option<u64> {
        let Some(prefix) = self.prefix() else { return Some(0) };
        match self.followed {
            None => Some(prefix.proofs()),
            Some(_) => timeout(PROOF, prefix.proven()).await.ok(),
        }
    }

    fn loaded_epoch(&self) -> u64 {
        self.prefix().map_or(NOTHING_LOADED, |prefix| prefix.store().view().position.epoch)
    }
}
