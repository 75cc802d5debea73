//! Follows the upstream and is the only writer of a store.
//!
//! A feed works at one endpoint at a time, through these states:
//!
//! 1. **Examine**: ask, through consensus, which cluster this is, in which term, at which revision.
//! 2. **Prove** (when there is a state already): is this the history that the state came from? The last event applied must
//!    be found at its revision as it was. Doubt leads to a new list, which is compared with the old state.
//! 3. **List** (when there is nothing to go on from): everything at one pinned revision.
//! 4. **Follow**: one watch from the next revision on. Whole revisions go to the store, a view is published per batch.
//!
//! Whatever goes wrong ends the attempt, and the next begins with the first state, at another endpoint if there is one.
//! What cannot be continued is begun anew: after a compaction in the same history (watchers read the gap from the upstream,
//! or are told of the compaction), after a change of history in a new epoch (every watcher is told to list again). No event
//! is ever made up from the difference of two states.

mod decode;
mod floor;
mod follow;
mod index;
mod list;
mod metrics;
mod prove;
mod seen;
mod signals;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tonic::Code;
use tracing::{info, warn};

use crate::{
    aside,
    proto::etcdserverpb::{RangeRequest, ResponseHeader},
    rules::KeyRange,
    signal::Signal,
    status::Status,
    store::{Position, Revision, Writer},
    upstream::{AuthState, ConnectionNumber, EndpointId, Link, PageSize, Upstream},
};
pub use floor::Floor;
use floor::Mark;
use list::{Listed, PAGES, examine};
pub use metrics::Metrics;
use prove::Continuity;
pub use signals::{Demand, Phase, Signals};

/// What a feed is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The keys to follow.
    pub range: KeyRange,
    /// Bytes of memory for the index; above it the index is dropped, and only the history goes on.
    pub cache_bytes: usize,
    /// How long the view may stay below a revision that is known to exist, without an event, before another endpoint is
    /// tried; ten times as long while there is no other.
    pub stall: Duration,
}

/// The cheapest question: who answers, and at which revision that member is.
pub(crate) fn serializable_question() -> RangeRequest {
    let key = Bytes::from_static(&[0]);
    RangeRequest { key, serializable: true, count_only: true, ..Default::default() }
}

/// Why an attempt ended.
#[derive(Debug, thiserror::Error)]
enum End {
    /// The endpoint cannot be reached, or failed.
    #[error("{0}")]
    Failed(Status),
    /// The stream stays below a revision that the cluster has.
    #[error("the stream stays at revision {at} though the cluster has reached {goal}")]
    Stalled { at: Revision, goal: Revision },
    /// What the upstream sent cannot be understood.
    #[error("unreadable answer: {0}")]
    Unreadable(String),
    /// To be tried again at once, from the first state.
    #[error("{0}")]
    Again(&'static str),
    /// Authentication is on.
    #[error("authentication is on")]
    Barred,
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        let barred = status == Status::USER_EMPTY
            || status == Status::INVALID_AUTH_TOKEN
            || status.code == Code::PermissionDenied;
        if barred { Self::Barred } else { Self::Failed(status) }
    }
}

/// Follows the upstream for one range of keys.
pub struct Feed {
    upstream: Upstream,
    settings: Settings,
    writer: Writer,
    demand: watch::Receiver<Demand>,
    floor: Arc<Floor>,
    phase: Signal<Phase>,
    confirmed: Signal<ConnectionNumber>,
    begun: Signal<ConnectionNumber>,
    proofs: Signal<u64>,
    /// When the last proof was begun, in the order of what clients are told by others.
    proof: Mark,
    /// Since when the view has not been known to be the upstream's present.
    lost: Option<Instant>,
    metrics: Metrics,
    started: Instant,
    /// When to try again to build an index that was too large, and how long to wait if it still is.
    retry_index: Option<(Instant, Duration)>,
    /// With how many keys it was too large.
    too_many: u64,
    /// Of lists; it outlives an attempt, so that one that fails because of a page helps the next.
    page_size: PageSize,
    /// How many messages with events have come.
    arrived: u64,
    /// How many demands to rebuild have been met.
    rebuilt: u64,
    /// The state may not be served, whether the upstream is there or not: it is known to be of another history, or was cached
    /// when authentication came on. Until it is proven, or replaced.
    condemned: bool,
}

/// Between two attempts while nothing works.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// For one question to an endpoint.
const DEADLINE: Duration = Duration::from_secs(5);

impl Feed {
    /// A feed that fills `writer`'s store. `floor` has what clients are told by others. [`Feed::run`] is to be spawned.
    pub fn new(
        upstream: Upstream,
        settings: Settings,
        writer: Writer,
        demand: watch::Receiver<Demand>,
        floor: Arc<Floor>,
        metrics: Metrics,
    ) -> (Self, Signals) {
        let phase = Signal::new(Phase::Cold);
        let (confirmed, begun) = (Signal::new(ConnectionNumber::default()), Signal::new(ConnectionNumber::default()));
        let proofs = Signal::new(0);
        let signals = Signals {
            phase: phase.reader(),
            confirmed: confirmed.reader(),
            begun: begun.reader(),
            proofs: proofs.reader(),
        };
        let started = Instant::now();
        let feed = Self {
            upstream,
            settings,
            writer,
            demand,
            floor,
            phase,
            confirmed,
            begun,
            proofs,
            proof: Mark::default(),
            lost: None,
            metrics,
            started,
            retry_index: None,
            too_many: 0,
            page_size: PageSize::new(PAGES),
            arrived: 0,
            rebuilt: 0,
            condemned: false,
        };
        (feed, signals)
    }

    /// Follows the upstream for ever.
    pub async fn run(mut self) {
        let mut avoid = Vec::new();
        let mut pause = SHORTEST_PAUSE;
        loop {
            self.await_auth_off().await;
            let Some(at) = self.upstream.await_preferred(&avoid, LONGEST_PAUSE).await else {
                self.lose();
                avoid.clear();
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                continue;
            };
            let before = self.writer.position();
            let end = self.attempt(at).await;
            if self.writer.position() != before {
                pause = SHORTEST_PAUSE;
            }
            self.note(at, &end);
            avoid.clear();
            match end {
                End::Again(_) | End::Barred => {}
                End::Failed(_) => self.upstream.report_failure(at),
                End::Stalled { .. } | End::Unreadable(_) => avoid.push(at),
            }
            if !matches!(end, End::Again(_)) {
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    fn note(&mut self, at: EndpointId, end: &End) {
        let (endpoint, revision) = (self.upstream.name(at), self.writer.position().revision.0);
        self.metrics.attempts.inc();
        self.floor.hold();
        match end {
            End::Again(reason) => info!(endpoint, revision, reason, "feed begins again"),
            End::Barred => self.enter(Phase::Barred),
            end => {
                warn!(endpoint, revision, reason = %end, "feed lost its endpoint");
                self.lose();
            }
        }
    }

    fn enter(&mut self, phase: Phase) {
        match phase {
            Phase::Live => self.lost = None,
            _ => self.lost = self.lost.or_else(|| self.is_loaded().then(Instant::now)),
        }
        self.condemned |= phase == Phase::Barred;
        self.metrics.phase(phase);
        self.metrics.lost(self.lost);
        self.phase.set(phase);
    }

    /// Notes that the upstream is gone, unless that is known already. What may be served goes on to be served as what was last
    /// known.
    fn lose(&mut self) {
        match self.phase.now() {
            Phase::Cold => {}
            Phase::Live | Phase::Lost(_) if self.is_condemned() => self.enter(Phase::Proving),
            Phase::Live | Phase::Proving if !self.is_condemned() => {
                self.enter(Phase::Lost(self.lost.unwrap_or_else(Instant::now)));
            }
            Phase::Live | Phase::Lost(_) | Phase::Proving | Phase::Barred => {}
        }
    }

    /// Whether the state has to be proven or replaced before it is served.
    fn is_condemned(&self) -> bool {
        self.condemned || self.demand.borrow().rebuilds != self.rebuilt
    }

    /// Connections up to `number` have been shown to lead to the view's history.
    fn confirm(&self, number: ConnectionNumber) {
        self.confirmed.set(number.max(self.confirmed.now()));
    }

    fn is_asked_to_confirm(&self) -> bool {
        self.demand.borrow().confirm > self.confirmed.now()
    }

    fn is_loaded(&self) -> bool {
        self.writer.position().revision > Revision::ZERO
    }

    /// Waits while authentication is on. Whatever was cached until then is not served meanwhile, and proven before it is
    /// served again.
    async fn await_auth_off(&mut self) {
        let mut auth = self.upstream.auth().changes();
        if *auth.borrow_and_update() != AuthState::On {
            return;
        }
        self.enter(Phase::Barred);
        // The sender lives as long as the upstream, so this cannot fail.
        let _ = auth.wait_for(|auth| *auth == AuthState::Off).await;
        info!("authentication is off: the cache comes back");
    }

    /// Works at one endpoint until something goes wrong.
    async fn attempt(&mut self, at: EndpointId) -> End {
        match self.try_attempt(at).await {
            Err(end) => end,
            Ok(never) => match never {},
        }
    }

    async fn try_attempt(&mut self, at: EndpointId) -> Result<std::convert::Infallible, End> {
        if self.is_loaded() {
            self.enter(Phase::Proving);
        }
        let link = self.upstream.connect(at).await?;
        if self.is_loaded() {
            self.begin_proof();
        }
        let rebuilds = self.demand.borrow().rebuilds;
        let witnessed = !self.is_condemned() && self.take_witness(&link).await;
        // Before the question: the cluster must have had this much when it answers.
        let told = self.floor.revision();
        let header = examine(&link).await?;
        let continuity = match rebuilds == self.rebuilt {
            true => self.continuity(&link, &header, told, witnessed).await?,
            false => Continuity::Broken("the state was found to differ"),
        };
        match continuity {
            Continuity::Proven => {
                self.end_proof();
                self.retry_index(&link).await?;
            }
            Continuity::Nothing => self.load(&link, &header).await?,
            Continuity::Doubtful(why) => self.resolve(&link, &header, why).await?,
            Continuity::Broken(why) => {
                warn!(endpoint = self.upstream.name(at), why, "the upstream has another history: beginning anew");
                self.replace(&link, &header).await?;
            }
        }
        self.rebuilt = rebuilds;
        self.condemned = false;
        self.note_responder(&header);
        self.floor.let_go();
        self.end_proof();
        self.follow(&link).await
    }

    /// Looks for proof that needs no consensus. With that, whatever the cluster is able to answer, the view may be read from
    /// as when the upstream is gone.
    async fn take_witness(&mut self, link: &Link) -> bool {
        let newest = self.upstream.newest_connection();
        let witnessed = self.is_loaded() && self.is_witnessed(link).await;
        if witnessed {
            self.confirm(newest);
            self.lose();
            self.end_proof();
        }
        witnessed
    }

    /// From now on, what clients are told is part of the proof, or is told after it.
    fn begin_proof(&mut self) {
        self.proofs.set(self.proofs.now() | 1);
        self.proof = self.floor.mark();
    }

    fn end_proof(&self) {
        let proofs = self.proofs.now();
        self.proofs.set(proofs + proofs % 2);
    }

    fn note_responder(&mut self, header: &ResponseHeader) {
        self.writer.set_responder(header.into());
        self.publish();
    }

    fn publish(&mut self) {
        let now = self.started.elapsed().as_millis() as u64;
        self.writer.publish(now);
        self.metrics.published(self.writer.store());
    }

    /// Begins a new epoch with a list.
    async fn load(&mut self, link: &Link, header: &ResponseHeader) -> Result<(), End> {
        let mark = self.floor.mark();
        let listed = self.list(link, Revision::ZERO).await?;
        self.sink_floor(mark, &listed, link);
        self.adopt(listed, self.writer.position().epoch + 1, header);
        Ok(())
    }

    /// Begins a new epoch because the state is of another history.
    async fn replace(&mut self, link: &Link, header: &ResponseHeader) -> Result<(), End> {
        self.condemned = true;
        self.load(link, header).await
    }

    /// Finds out whether a doubtful history is ours: by everything at our own revision, while that can still be read.
    async fn resolve(&mut self, link: &Link, header: &ResponseHeader, doubt: &str) -> Result<(), End> {
        let revision = self.writer.position().revision;
        let listed = self.list(link, revision).await;
        let endpoint = self.upstream.name(link.at());
        match listed {
            Ok(listed) if self.is_same(&listed, self.is_term_held(header)) => {
                info!(endpoint, revision = revision.0, doubt, "everything is as it was: the history goes on");
                if !self.writer.has_index() {
                    self.index(listed.tree);
                }
                Ok(())
            }
            Ok(_) => {
                warn!(endpoint, revision = revision.0, doubt, "the upstream has another history: beginning anew");
                self.replace(link, header).await
            }
            Err(End::Failed(status)) if status == Status::COMPACTED => self.reload(link, header, doubt).await,
            Err(end) => Err(end),
        }
    }

    /// Lists anew, and goes on in the same epoch if the list agrees with the old state.
    async fn reload(&mut self, link: &Link, header: &ResponseHeader, doubt: &str) -> Result<(), End> {
        let mark = self.floor.mark();
        let edge = self.list_edge(link).await?;
        let listed = self.list(link, Revision::ZERO).await?;
        let (endpoint, revision) = (self.upstream.name(link.at()), listed.revision.0);
        let term_held = self.is_term_held(header);
        let disagreement = edge.iter().chain([&listed]).find_map(|list| self.disagreement(list, term_held));
        match &disagreement {
            None => info!(endpoint, revision, doubt, "listed anew: the history goes on"),
            Some(why) => warn!(endpoint, revision, doubt, why, "listed anew: the upstream may have another history"),
        }
        if disagreement.is_some() {
            self.sink_floor(mark, &listed, link);
        }
        let epoch = self.writer.position().epoch + u64::from(disagreement.is_some());
        self.adopt(listed, epoch, header);
        Ok(())
    }

    /// What followed at once on our revision, if the compaction is just there. Watchers that have everything of ours go on then, and
    /// later changes hide what another history lacks.
    async fn list_edge(&mut self, link: &Link) -> Result<Option<Listed>, End> {
        match self.list(link, self.writer.position().revision.next()).await {
            Ok(listed) => Ok(Some(listed)),
            Err(End::Failed(status)) if status == Status::COMPACTED => Ok(None),
            Err(end) => Err(end),
        }
    }

    /// The history of `listed`, which was asked for at `mark`, begins. What had been told of anything newer was of another.
    fn sink_floor(&self, mark: Mark, listed: &Listed, link: &Link) {
        self.floor.sink(self.proof, mark);
        self.floor.trim(mark, listed.revision);
        self.begun.set(link.number());
    }

    fn adopt(&mut self, listed: Listed, epoch: u64, header: &ResponseHeader) {
        let Listed { revision, tree } = listed;
        self.metrics.lists.inc();
        self.note_size(tree.as_ref());
        aside::walk(self.exchanged(tree.as_ref()), || {
            self.writer.reset(Position { epoch, revision }, tree);
            self.note_responder(header);
        });
    }

    fn is_term_held(&self, header: &ResponseHeader) -> bool {
        header.raft_term >= self.writer.store().view().responder.raft_term
    }
}
