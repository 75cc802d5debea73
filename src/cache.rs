//! The watch cache as a client sees it: stores and their feeds behind reads at a freshness.
//!
//! - A **serializable** read takes the current view, provided that it is not behind anything that we ourselves have relayed
//!   to a client.
//! - A **linearizable** read waits for proof of how far the cluster has got ([`Consensus`]), and then for the view to have
//!   got there. Only a view that is proven to belong to the upstream's history, on a live stream, may answer.
//!
//! What cannot be shown is not guessed: the read is [`Unserved`], and the caller forwards it.

mod begin;
mod check;
mod consensus;
mod metrics;
mod prefix;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::Guard;
use tokio::time::timeout;

pub use check::{CheckError, CheckReport};
pub use consensus::{Consensus, Proof, Stamp, Tense};
pub use metrics::Metrics;
pub use prefix::Prefix;

use crate::{
    feed::{Phase, Signals},
    proto::etcdserverpb::PutRequest,
    rules::KeyRange,
    signal::SignalReader,
    store::{Limits, Responder, Revision, View},
    upstream::{AuthState, ConnectionNumber, Gate, Upstream},
};

/// What a cache is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The ranges to cache, which do not overlap.
    pub prefixes: Vec<KeyRange>,
    /// Bytes of memory for the index, shared evenly by the prefixes.
    pub cache_bytes: usize,
    /// How much history is kept, for each prefix; the age is in milliseconds.
    pub history: Limits,
    /// How long a serializable read waits for what we have relayed, before it is forwarded.
    pub floor_patience: Duration,
    /// How long a linearizable read waits for the view to reach what consensus has shown, before it is forwarded. A feed
    /// that stays behind for this long is moved to another endpoint.
    pub view_patience: Duration,
    /// How long a linearizable read waits for the cluster to answer. Etcd gives up after 7 seconds itself.
    pub consensus_patience: Duration,
    /// Between two comparisons of the cache with the upstream; zero: none.
    pub check_interval: Duration,
}

/// Why the cache does not answer. The upstream may.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// No cached prefix covers the range.
    #[error("the range is not cached")]
    NotCached,
    /// Authentication is on, or may be.
    #[error("authentication is on")]
    Barred,
    /// Nothing has been loaded yet.
    #[error("the cache is warming up")]
    Cold,
    /// The keyspace is larger than the cache limit.
    #[error("the keyspace is over the cache limit")]
    OverLimit,
    /// Whether the view belongs to the upstream's history is being found out.
    #[error("the cache is proving that its state is the upstream's")]
    Proving,
    /// The upstream is gone, so nothing can be shown to be current.
    #[error("the upstream is gone")]
    Lost,
    /// The view did not get as far as it must in time.
    #[error("the view is behind")]
    Behind,
    /// The upstream's progress answers may be wrong.
    #[error("the upstream's version cannot be trusted with consistent reads")]
    Gated,
    /// Only the upstream remembers the revision.
    #[error("the revision is older than what is in memory")]
    TooOld,
    /// The cluster did not answer in time.
    #[error("the cluster did not answer")]
    NoConsensus,
}

impl Unserved {
    /// A word for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NotCached => "not_cached",
            Self::Barred => "auth",
            Self::Cold => "cold",
            Self::OverLimit => "over_limit",
            Self::Proving => "proving",
            Self::Lost => "upstream_lost",
            Self::Behind => "behind",
            Self::Gated => "version_gate",
            Self::TooOld => "revision_not_in_memory",
            Self::NoConsensus => "no_consensus",
        }
    }
}

/// A watch cache on one upstream. Cheap to clone; everything behind it ends with the last clone.
#[derive(Clone)]
pub struct Cache(Arc<Shared>);

struct Shared {
    upstream: Upstream,
    settings: Settings,
    prefixes: Arc<[Prefix]>,
    consensus: Consensus,
    /// The newest connection over which clients were told something.
    heard: AtomicU64,
    auth: SignalReader<AuthState>,
    metrics: Metrics,
}

impl Cache {
    /// A cache that begins to fill at once; to be called inside a tokio runtime.
    ///
    /// # Errors
    /// When metrics of the same names are registered already.
    pub fn start(
        upstream: Upstream,
        settings: Settings,
        registry: &prometheus::Registry,
    ) -> Result<Self, prometheus::Error> {
        let started = settings.prefixes.iter().map(|range| Prefix::start(range, &upstream, &settings, registry));
        let prefixes = started.collect::<Result<Arc<[_]>, _>>()?;
        let metrics = Metrics::register(registry)?;
        let consensus =
            Consensus::start(upstream.clone(), prefixes.clone(), settings.consensus_patience, metrics.clone());
        let (auth, interval) = (upstream.auth(), settings.check_interval);
        let cache =
            Self(Arc::new(Shared { upstream, settings, prefixes, consensus, heard: AtomicU64::new(0), auth, metrics }));
        if !interval.is_zero() {
            cache.upstream().vital().spawn("check", check::keep_checking(Arc::downgrade(&cache.0), interval));
        }
        Ok(cache)
    }

    /// The cached prefixes.
    pub fn prefixes(&self) -> &[Prefix] {
        &self.0.prefixes
    }

    /// Waits until a task has panicked without which what is served may not be true. Nothing is to be served after that.
    pub async fn failed(&self) {
        self.0.upstream.vital().failed().await;
    }

    /// The upstream behind the cache.
    pub fn upstream(&self) -> &Upstream {
        &self.0.upstream
    }

    /// What consensus has shown, for those who forward calls.
    pub fn consensus(&self) -> &Consensus {
        &self.0.consensus
    }

    /// The upstream's versions, as far as reads depend on them.
    pub fn gate(&self) -> Gate {
        self.0.upstream.gate()
    }

    /// Whether cached bytes may be given to everyone.
    pub fn is_open(&self) -> bool {
        self.0.auth.now() == AuthState::Off
    }

    /// The cached prefix that covers `range`, and its place among the prefixes.
    pub fn covering(&self, range: &KeyRange) -> Option<(usize, &Prefix)> {
        self.0.prefixes.iter().enumerate().find(|(_, prefix)| prefix.range().covers(range))
    }

    /// Whether every prefix has been loaded and follows the upstream.
    pub fn is_warm(&self) -> bool {
        self.0.prefixes.iter().all(|prefix| prefix.phase() == Phase::Live)
    }

    /// Notes the revision that a client is told from elsewhere, and the connection that it came over: from now on nothing older
    /// is served, and nothing of another history.
    pub fn note_told(&self, revision: Revision, connection: ConnectionNumber) {
        self.0.heard.fetch_max(connection.0, Ordering::AcqRel);
        for prefix in self.0.prefixes.iter() {
            prefix.raise(revision, connection);
            // At once: should the upstream be lost, it will be too late to ask.
            if prefix.confirmed() < connection {
                prefix.want_confirmed(connection);
            }
        }
    }

    /// Notes that a client is told that `request` was done at `revision`: this is to be found in the history that the
    /// cache goes on with.
    pub fn note_put(&self, request: &PutRequest, revision: Revision) {
        // As with what watchers were sent, the first prefix decides over keys that none has.
        let covering = self.0.prefixes.iter().find(|prefix| prefix.range().contains(&request.key));
        if let Some(prefix) = covering.or(self.0.prefixes.first()) {
            prefix.note_put(request, revision);
        }
    }

    /// Notes that a client is told that the cluster has been compacted at `revision`: older revisions are not served then.
    pub fn note_compacted(&self, revision: Revision) {
        self.0.prefixes.iter().for_each(|prefix| prefix.note_compacted(revision));
    }

    /// Who answers from `prefix`, and the revision that its clients may take for the present.
    pub fn present(&self, prefix: &Prefix) -> (Responder, Revision) {
        let view = prefix.store().view();
        (view.responder, view.revision().max(prefix.floor()))
    }

    /// The highest revision that a client may have been told.
    pub fn told(&self) -> Revision {
        self.0.prefixes.iter().map(|prefix| self.present(prefix).1).max().unwrap_or_default()
    }

    /// Whether `revision` of `range`, which is cached, lies before what is in memory, and is not known to be compacted.
    pub fn is_before_memory(&self, range: &KeyRange, revision: Revision) -> bool {
        self.covering(range).is_some_and(|(_, prefix)| {
            let view = prefix.store().view();
            view.is_loaded() && (view.compacted..view.window.start().previous()).contains(&revision)
        })
    }

    /// A view of `range` that is not behind anything that we have relayed. It may be older than what the cluster has.
    ///
    /// # Errors
    /// When the cache cannot answer; the upstream may.
    pub async fn serializable(&self, range: &KeyRange) -> Result<Guard<Arc<View>>, Unserved> {
        let (_, prefix) = self.covering(range).ok_or(Unserved::NotCached)?;
        let mut view = self.servable(prefix)?;
        let heard = self.heard();
        if prefix.confirmed() < heard {
            drop(view);
            self.confirm(prefix, heard, self.0.settings.floor_patience).await?;
            view = self.servable(prefix)?;
        }
        let floor = prefix.floor();
        let same_epoch = view.position.epoch == prefix.store().view().position.epoch;
        if view.revision() >= floor && same_epoch && prefix.knows_compactions(&view) {
            return Ok(self.show(prefix, view));
        }
        drop(view);
        Box::pin(self.serializable_from(prefix, floor)).await
    }

    /// A view of `prefix` that has got to `floor`.
    async fn serializable_from(&self, prefix: &Prefix, floor: Revision) -> Result<Guard<Arc<View>>, Unserved> {
        self.reach(prefix, floor, self.0.settings.floor_patience).await?;
        let view = self.servable(prefix)?;
        if view.revision() < floor {
            return Err(Unserved::Proving);
        }
        Ok(self.show(prefix, view))
    }

    /// A view of `range` that has every write acknowledged, to anybody, before the call; and every compaction, if it is to be read
    /// as it was in the past.
    ///
    /// # Errors
    /// When that cannot be shown; the upstream may answer.
    pub async fn linearizable(&self, range: &KeyRange, tense: Tense) -> Result<Guard<Arc<View>>, Unserved> {
        let (_, prefix) = self.covering(range).ok_or(Unserved::NotCached)?;
        let View { position, responder: known, .. } = **self.provable(prefix)?;
        if !self.gate().progress_is_proof {
            return Err(Unserved::Gated);
        }
        let Some(proof) = self.0.consensus.ask(tense).await else {
            return Err(if self.is_open() { Unserved::NoConsensus } else { Unserved::Barred });
        };
        let shown = proof.responder;
        let same = shown.cluster_id == known.cluster_id && shown.raft_term >= known.raft_term;
        if !same || proof.revision < position.revision {
            // The cluster cannot be behind what it has sent us: this is not the history that the view came from.
            prefix.doubt(position);
            return Err(Unserved::Proving);
        }
        let heard = proof.connection.max(self.heard());
        self.confirm(prefix, heard, self.0.settings.view_patience).await?;
        self.reach(prefix, proof.revision, self.0.settings.view_patience).await?;
        let view = self.provable(prefix)?;
        if view.position.epoch != position.epoch || view.revision() < proof.revision {
            return Err(Unserved::Proving);
        }
        Ok(self.show(prefix, view))
    }

    /// Sees to it that nobody who was answered from one prefix is answered from another that is behind it, or of another
    /// history.
    fn show(&self, prefix: &Prefix, view: Guard<Arc<View>>) -> Guard<Arc<View>> {
        let known = |other: &Prefix| other.floor() >= view.revision();
        if self.0.prefixes.len() > 1 && !(self.heard() >= prefix.confirmed() && self.0.prefixes.iter().all(known)) {
            self.note_told(view.revision(), prefix.confirmed());
        }
        view
    }

    /// The newest connection that is known to matter: clients were told something over it, or one of several prefixes has
    /// begun its history over it, so that another's may be over.
    fn heard(&self) -> ConnectionNumber {
        let told = ConnectionNumber(self.0.heard.load(Ordering::Acquire));
        match &self.0.prefixes[..] {
            [_] => told,
            several => several.iter().map(Prefix::begun).fold(told, ConnectionNumber::max),
        }
    }

    /// Makes sure that `connection` leads to the history of the prefix's view. While the feed has lost its upstream, only
    /// what had been shown before is known.
    async fn confirm(&self, prefix: &Prefix, connection: ConnectionNumber, patience: Duration) -> Result<(), Unserved> {
        if prefix.confirmed() >= connection {
            return Ok(());
        }
        prefix.want_confirmed(connection);
        if prefix.phase() != Phase::Live {
            return Err(Unserved::Proving);
        }
        let confirmed = Box::pin(timeout(patience, prefix.confirm(connection))).await;
        confirmed.map_err(|_| Unserved::Proving)
    }

    /// Waits until the view of `prefix` has got to `revision`, and knows of the compactions that clients were told of.
    async fn reach(&self, prefix: &Prefix, revision: Revision, patience: Duration) -> Result<(), Unserved> {
        if prefix.is_at(revision) {
            return Ok(());
        }
        prefix.want(revision);
        Box::pin(timeout(patience, prefix.reached(revision))).await.map_err(|_| Unserved::Behind)
    }

    /// Whether a watcher may begin on the view of `prefix`: not while its history may be another than what is relayed, or
    /// authentication may be on.
    fn is_settled_for(&self, prefix: &Prefix, heard: ConnectionNumber) -> bool {
        if !self.is_open() {
            return false;
        }
        match prefix.phase() {
            Phase::Live | Phase::Lost(_) => prefix.confirmed() >= heard,
            Phase::Cold | Phase::Proving | Phase::Barred => false,
        }
    }

    /// Waits until a watcher may begin on the view of `prefix`, as far as its history goes.
    async fn settled(&self, prefix: &Prefix) {
        let Signals { phase, confirmed, .. } = prefix.signals();
        let (mut phase, mut confirmed, mut auth) = (phase.changes(), confirmed.changes(), self.0.auth.changes());
        // What is heard from now on is no matter of this call's.
        let heard = self.heard();
        while !self.is_settled_for(prefix, heard) {
            prefix.want_confirmed(heard);
            // The senders live as long as the feed, which lives as long as `prefix`.
            let changed = tokio::select! {
                changed = phase.changed() => changed,
                changed = confirmed.changed() => changed,
                changed = auth.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
        }
    }

    /// Whether the view of `prefix` has all that clients were told of, or cannot get there: the upstream is lost.
    fn is_level(&self, prefix: &Prefix) -> bool {
        prefix.is_at(prefix.floor()) || prefix.phase() != Phase::Live
    }

    /// The current view of `prefix`, if anything may be read from it. The guard is not to be kept across a wait: a thread has few
    /// that are cheap.
    fn servable(&self, prefix: &Prefix) -> Result<Guard<Arc<View>>, Unserved> {
        if !self.is_open() {
            return Err(Unserved::Barred);
        }
        match prefix.phase() {
            Phase::Live | Phase::Lost(_) => {}
            Phase::Cold => return Err(Unserved::Cold),
            Phase::Proving => return Err(Unserved::Proving),
            Phase::Barred => return Err(Unserved::Barred),
        }
        let view = prefix.store().view();
        match &view.tree {
            Some(_) => Ok(view),
            None => Err(if view.is_loaded() { Unserved::OverLimit } else { Unserved::Cold }),
        }
    }

    /// As [`Cache::servable`], on a stream that is alive.
    fn provable(&self, prefix: &Prefix) -> Result<Guard<Arc<View>>, Unserved> {
        let view = self.servable(prefix)?;
        if prefix.phase() == Phase::Live { Ok(view) } else { Err(Unserved::Lost) }
    }
}
