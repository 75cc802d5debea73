//! One cached prefix: its store, the feed that fills it, the hub that tells its watchers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, task::AbortHandle};

use super::Settings;
use crate::{
    fanout::Hub,
    feed::{self, Demand, Feed, Floor, Phase, Signals},
    proto::{etcdserverpb::PutRequest, mvccpb},
    rules::KeyRange,
    status::Status,
    store::{Position, Revision, Store, View},
    upstream::{AuthState, ConnectionNumber, Upstream},
};

/// One cached prefix. Its tasks end with it.
pub struct Prefix {
    range: KeyRange,
    store: Arc<Store>,
    hub: Arc<Hub>,
    demand: watch::Sender<Demand>,
    signals: Signals,
    floor: Arc<Floor>,
    /// The highest compaction that was noted in the newest history that one was noted in.
    noted_compaction: AtomicI64,
    tasks: [AbortHandle; 3],
}

impl Prefix {
    pub(super) fn start(
        range: &KeyRange,
        upstream: &Upstream,
        settings: &Settings,
        registry: &prometheus::Registry,
    ) -> Result<Self, prometheus::Error> {
        let (store, writer) = Store::new(settings.history);
        let hub = Hub::new(store.clone());
        let (demand, demands) = watch::channel(Demand::default());
        let label = String::from_utf8_lossy(&range.start);
        let metrics = feed::Metrics::register(registry, &label)?;
        let feed_settings = feed::Settings {
            range: range.clone(),
            cache_bytes: settings.cache_bytes / settings.prefixes.len().max(1),
            stall: settings.view_patience,
        };
        let floor = Arc::new(Floor::new(range.clone()));
        let (feed, signals) = Feed::new(upstream.clone(), feed_settings, writer, demands, floor.clone(), metrics);
        let vital = upstream.vital();
        let tasks = [
            vital.spawn("feed", feed.run()),
            vital.spawn("hub", hub.clone().run()),
            vital.spawn("mind", mind(hub.clone(), signals.phase.changes(), upstream.auth().changes())),
        ];
        let noted_compaction = AtomicI64::new(0);
        Ok(Self { range: range.clone(), store, hub, demand, signals, floor, noted_compaction, tasks })
    }

    /// The keys.
    pub fn range(&self) -> &KeyRange {
        &self.range
    }

    /// Where views of it are published.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Who tells its watchers.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// What its feed is doing.
    pub fn phase(&self) -> Phase {
        self.signals.phase.now()
    }

    /// What its feed is doing, with a signal at every change.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.signals.phase.changes()
    }

    /// What its feed lets others know.
    pub(super) fn signals(&self) -> Signals {
        self.signals.clone()
    }

    /// Up to which connection all lead to the view's history.
    pub(super) fn confirmed(&self) -> ConnectionNumber {
        self.signals.confirmed.now()
    }

    /// The highest revision that clients were given from elsewhere.
    pub fn floor(&self) -> Revision {
        self.floor.revision()
    }

    /// Notes the events that a watcher is sent from elsewhere.
    pub fn note_events(&self, events: &[mvccpb::Event]) {
        self.floor.note_events(events);
    }

    /// Notes that a client is told that `request` was done at `revision`.
    pub(super) fn note_put(&self, request: &PutRequest, revision: Revision) {
        // What the view knows already needs no other witness.
        if self.store.view().revision() < revision || !self.range.contains(&request.key) {
            self.floor.note_put(request, revision);
        }
    }

    /// Notes that a client was given `revision` from elsewhere, by a server that `connection` leads to.
    pub(super) fn raise(&self, revision: Revision, connection: ConnectionNumber) {
        self.floor.raise(revision, connection);
    }

    /// For how long the upstream has been gone; none while it is there.
    pub fn age(&self) -> Option<Duration> {
        match self.phase() {
            Phase::Lost(since) => Some(since.elapsed()),
            _ => None,
        }
    }

    /// Lets the feed know that somebody waits for the view to reach `revision`, which the cluster has.
    pub fn want(&self, revision: Revision) {
        let epoch = self.store.view().position.epoch;
        self.lead(Position { epoch, revision });
    }

    /// Lets the feed know how far the cluster has got. Of another epoch than the view's: meaningless.
    pub(super) fn lead(&self, to: Position) {
        self.demand.send_if_modified(|demand| move_on(&mut demand.goal, to));
    }

    /// Lets the feed know that an answer contradicted the view as it was at `seen`.
    pub(super) fn doubt(&self, seen: Position) {
        if self.store.view().position.epoch == seen.epoch && self.phase() == Phase::Live {
            self.demand.send_modify(|demand| demand.doubts += 1);
        }
    }

    /// Lets the feed throw the state of `seen`'s history away, for it differs from the upstream's.
    pub(super) fn rebuild(&self, seen: Position) {
        if self.store.view().position.epoch == seen.epoch {
            self.demand.send_modify(|demand| demand.rebuilds += 1);
        }
    }

    /// Lets the feed know that something was heard over `connection`.
    pub(super) fn want_confirmed(&self, connection: ConnectionNumber) {
        self.demand.send_if_modified(|demand| {
            let further = demand.confirm < connection;
            demand.confirm = demand.confirm.max(connection);
            further
        });
    }

    /// Waits until the view belongs to the history that `connection` leads to. Where that is another than now, the view is
    /// of another epoch afterwards.
    pub async fn confirm(&self, connection: ConnectionNumber) {
        if self.confirmed() < connection {
            self.want_confirmed(connection);
            // The sender lives as long as the feed, which lives as long as `self`.
            let _ = self.signals.confirmed.changes().wait_for(|confirmed| *confirmed >= connection).await;
        }
    }

    /// The connection over which the view's epoch began.
    pub(super) fn begun(&self) -> ConnectionNumber {
        self.signals.begun.now()
    }

    /// The epoch of the view, provided that the server which `connection` led to had the view's history. For one who has
    /// followed that server since before the epoch began.
    pub async fn epoch_behind(&self, connection: ConnectionNumber) -> Option<u64> {
        let epoch = || self.store.view().position.epoch;
        let found = epoch();
        if connection < self.begun() {
            return None;
        }
        self.confirm(connection).await;
        (epoch() == found).then_some(found)
    }

    /// How many proofs that the history goes on have been begun or concluded.
    pub fn proofs(&self) -> u64 {
        self.signals.proofs.now()
    }

    /// Waits until no such proof is under way, and counts them.
    pub async fn proven(&self) -> u64 {
        let mut proofs = self.signals.proofs.changes();
        // The sender lives as long as the feed, which lives as long as `self`.
        proofs.wait_for(|proofs| proofs % 2 == 0).await.map_or(0, |proofs| *proofs)
    }

    /// Notes that a client is told that the cluster has been compacted at `revision`.
    pub(super) fn note_compacted(&self, revision: Revision) {
        let epoch = self.store.view().position.epoch;
        self.note_compaction(Position { epoch, revision });
    }

    /// Notes a compaction. Of another epoch than the view's: meaningless.
    pub(super) fn note_compaction(&self, Position { epoch, revision }: Position) {
        self.demand.send_if_modified(|demand| {
            let further = move_on(&mut demand.compacted, Position { epoch, revision });
            if further {
                self.noted_compaction.store(revision.0, Ordering::Release);
            }
            further
        });
    }

    /// The oldest revision that may be read from memory, and its epoch; none while nothing has been loaded.
    pub(super) fn oldest(&self) -> Option<Position> {
        let view = self.store.view();
        let epoch = view.position.epoch;
        let noted = self.demand.borrow().compacted;
        let noted = if noted.epoch == epoch { noted.revision } else { Revision::ZERO };
        let revision = view.window.start().previous().max(view.compacted).max(noted);
        view.is_loaded().then_some(Position { epoch, revision })
    }

    /// Whether `view` knows of every compaction in its history that was noted and that it has got to, or cannot learn of it: the
    /// upstream is lost.
    pub(super) fn knows_compactions(&self, view: &View) -> bool {
        // Most often, that is all there is to look at.
        if self.noted_compaction.load(Ordering::Acquire) <= view.compacted.0 {
            return true;
        }
        let noted = self.demand.borrow().compacted;
        let concerns = noted.epoch == view.position.epoch && noted.revision <= view.revision();
        !concerns || noted.revision <= view.compacted || self.phase() != Phase::Live
    }

    /// Whether the view has got to `revision`, and knows of the compactions.
    pub(super) fn is_at(&self, revision: Revision) -> bool {
        let view = self.store.view();
        view.revision() >= revision && self.knows_compactions(&view)
    }

    /// Waits until [`Prefix::is_at`].
    pub(super) async fn reached(&self, revision: Revision) {
        // The sender lives as long as the store, so this cannot fail.
        let _ = self.store.position().wait_for(|_| self.is_at(revision)).await;
    }
}

impl Drop for Prefix {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Moves `known` on to `to`, if that lies further or in a later history. True when it did.
fn move_on(known: &mut Position, to: Position) -> bool {
    let further = known.epoch < to.epoch || known.epoch == to.epoch && known.revision < to.revision;
    if further {
        *known = to;
    }
    further
}

/// Ends the watchers' streams when authentication comes on, whoever learns of it first: the feed may be waiting for an upstream.
async fn mind(hub: Arc<Hub>, mut phase: watch::Receiver<Phase>, mut auth: watch::Receiver<AuthState>) {
    loop {
        let is_on = tokio::select! {
            Ok(()) = phase.changed() => *phase.borrow_and_update() == Phase::Barred,
            Ok(()) = auth.changed() => *auth.borrow_and_update() == AuthState::On,
            // Both live as long as the feed.
            else => return,
        };
        if is_on {
            hub.end_all(&Status::WATCH_AGAIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fanout::{Out, Pumped, Session, SessionSettings},
        store::Limits,
    };

    /// The feed, which used to be the only one to tell, may be waiting for an upstream.
    #[tokio::test]
    async fn streams_end_whoever_learns_first_that_authentication_is_on() {
        for by_feed in [true, false] {
            let hub = Hub::new(Store::new(Limits { bytes: usize::MAX, age: u64::MAX }).0);
            let (phase, phases) = watch::channel(Phase::Live);
            let (auth, auths) = watch::channel(AuthState::Off);
            let minding = tokio::spawn(mind(hub.clone(), phases, auths));
            let mut session = Session::new(Arc::new([hub]), SessionSettings { fragment_bytes: 2000 });
            session.attend(Some(0));
            let mut pump = || session.pump(&mut Out::default(), 1000, std::task::Waker::noop());
            assert_eq!(pump(), Pumped::Idle);
            match by_feed {
                true => drop(phase.send_replace(Phase::Barred)),
                false => drop(auth.send_replace(AuthState::On)),
            }
            tokio::time::timeout(Duration::from_secs(10), async {
                while pump() == Pumped::Idle {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .unwrap();
            assert_eq!(pump(), Pumped::Ended(Status::WATCH_AGAIN));
            minding.abort();
        }
    }
}
