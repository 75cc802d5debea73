//! One cached prefix: its store, the feed that fills it, the hub that tells its watchers.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::AbortHandle};

use super::{Settings, floor::Floor};
use crate::{
    fanout::Hub,
    feed::{self, Demand, Feed, Phase},
    store::{KeyRange, Position, Revision, Store},
    upstream::Upstream,
};

/// One cached prefix. Its tasks end with it.
pub struct Prefix {
    range: KeyRange,
    store: Arc<Store>,
    hub: Arc<Hub>,
    demand: watch::Sender<Demand>,
    phase: watch::Receiver<Phase>,
    tasks: [AbortHandle; 3],
}

impl Prefix {
    pub(super) fn start(
        range: &KeyRange,
        upstream: &Upstream,
        settings: &Settings,
        floor: &Arc<Floor>,
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
        let (feed, phase) = Feed::new(upstream.clone(), feed_settings, writer, demands, metrics);
        let tasks = [
            tokio::spawn(feed.run()).abort_handle(),
            tokio::spawn(hub.clone().run()).abort_handle(),
            tokio::spawn(mind(floor.clone(), hub.clone(), phase.clone())).abort_handle(),
        ];
        Ok(Self { range: range.clone(), store, hub, demand, phase, tasks })
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
        *self.phase.borrow()
    }

    /// What its feed is doing, with a signal at every change.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
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
        self.demand.send_if_modified(|demand| {
            let goal = Position { epoch, revision };
            let further = demand.goal.epoch != epoch || demand.goal.revision < revision;
            if further {
                demand.goal = goal;
            }
            further
        });
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

    /// Lets the feed prove anew that this is the upstream's history, and waits until it has, or has nothing to prove.
    pub async fn reprove(&self) {
        let mut phases = self.phase.clone();
        if *phases.borrow_and_update() == Phase::Live {
            self.doubt(self.store.view().position);
            // The sender lives as long as the feed, which lives as long as `self`: neither wait can fail.
            let _ = phases.changed().await;
        }
        let _ = phases.wait_for(|phase| !matches!(phase, Phase::Lost(_) | Phase::Proving)).await;
    }

    pub(super) fn note_compacted(&self, revision: Revision) {
        self.demand.send_if_modified(|demand| {
            let higher = demand.compacted < revision;
            demand.compacted = demand.compacted.max(revision);
            higher
        });
    }
}

impl Drop for Prefix {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Keeps the floor true when the history changes, and ends the watchers' streams when authentication comes on.
async fn mind(floor: Arc<Floor>, hub: Arc<Hub>, mut phase: watch::Receiver<Phase>) {
    let mut position = hub.store().position();
    let mut epoch = position.borrow().epoch;
    loop {
        tokio::select! {
            // A loss is seen before the change of history that it may lead to.
            biased;
            changed = phase.changed() => {
                if changed.is_err() {
                    return;
                }
                match *phase.borrow_and_update() {
                    Phase::Lost(_) | Phase::Proving => floor.part(),
                    Phase::Barred => hub.end_all(&crate::status::Status::unavailable("authentication is on: watch again")),
                    _ => {}
                }
            }
            changed = position.wait_for(|position| position.epoch != epoch) => {
                let Ok(position) = changed else { return };
                if epoch > 0 {
                    floor.sink();
                }
                epoch = position.epoch;
            }
        }
    }
}
