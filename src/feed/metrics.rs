//! What the feed lets an operator see.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{IntCounter, IntGauge, IntGaugeVec, Opts, Registry};
use tokio::time::Instant;

use super::Phase;
use crate::store::{Store, Tree};

/// Counters and gauges of one feed.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) attempts: IntCounter,
    pub(super) lists: IntCounter,
    pub(super) events: IntCounter,
    pub(super) progress_requests: IntCounter,
    pub(super) over_limit: IntGauge,
    revision: IntGauge,
    keys: IntGauge,
    index_bytes: IntGauge,
    history_bytes: IntGauge,
    window_start: IntGauge,
    lost_since: IntGauge,
    phase: IntGaugeVec,
}

impl Metrics {
    /// Registers the metrics of the feed of `prefix`.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register(registry: &Registry, prefix: &str) -> Result<Self, prometheus::Error> {
        let opts =
            |name: &str, help: &str| Opts::new(format!("millpond_feed_{name}"), help).const_label("prefix", prefix);
        let counter = |name, help| {
            let counter = IntCounter::with_opts(opts(name, help))?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let gauge = |name, help| {
            let gauge = IntGauge::with_opts(opts(name, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok::<_, prometheus::Error>(gauge)
        };
        let phase = IntGaugeVec::new(opts("phase", "1 for what the feed is doing, 0 for the rest."), &["phase"])?;
        registry.register(Box::new(phase.clone()))?;
        Ok(Self {
            attempts: counter("ended_attempts_total", "Times that the feed had to begin again at an endpoint.")?,
            lists: counter("lists_total", "Full lists taken from the upstream.")?,
            events: counter("events_total", "Events received.")?,
            progress_requests: counter("progress_requests_total", "Requests for progress sent to the upstream.")?,
            over_limit: gauge("over_limit", "1 while the keyspace is larger than the cache limit and is not indexed.")?,
            revision: gauge("revision", "Revision of the published view.")?,
            keys: gauge("keys", "Keys in the index.")?,
            index_bytes: gauge("index_bytes", "Memory of the index, keys and values included.")?,
            history_bytes: gauge("history_bytes", "Memory of the history window.")?,
            window_start: gauge("window_start_revision", "First revision of the history window.")?,
            lost_since: gauge(
                "lost_since_seconds",
                "Unix time since when the view has not been known to be the upstream's present; 0 while it is.",
            )?,
            phase,
        })
    }

    pub(super) fn phase(&self, phase: Phase) {
        let names = ["cold", "live", "lost", "proving", "barred"];
        let current = match phase {
            Phase::Cold => 0,
            Phase::Live => 1,
            Phase::Lost(_) => 2,
            Phase::Proving => 3,
            Phase::Barred => 4,
        };
        for (index, name) in names.iter().enumerate() {
            self.phase.with_label_values(&[name]).set((index == current).into());
        }
    }

    /// `lost`: since when the view has not been known to be the upstream's present.
    pub(super) fn lost(&self, lost: Option<Instant>) {
        let since =
            lost.and_then(|lost| SystemTime::now().checked_sub(lost.elapsed())?.duration_since(UNIX_EPOCH).ok());
        self.lost_since.set(since.map_or(0, |since| since.as_secs() as i64));
    }

    pub(super) fn published(&self, store: &Store) {
        let view = store.view();
        self.revision.set(view.revision().0);
        self.keys.set(view.tree.as_ref().map_or(0, Tree::len) as i64);
        self.window_start.set(view.window.start().0);
        self.index_bytes.set(store.index_bytes() as i64);
        self.history_bytes.set(store.history_bytes() as i64);
    }
}
