//! What the store measures about itself.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry, core::Collector};

/// The store's metrics, `millpond_sql_...`. Clones share their numbers.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Writes that were evaluated, refused ones included.
    pub writes: IntCounter,
    /// Commits.
    pub commits: IntCounter,
    /// Writes of one commit.
    pub group_size: Histogram,
    /// Seconds that a commit took, its sync included.
    pub commit_seconds: Histogram,
    /// Writes that were undone because the store failed.
    pub failures: IntCounter,
    /// The latest revision.
    pub revision: IntGauge,
    /// The compacted revision.
    pub compacted_revision: IntGauge,
    /// Events that compaction has removed.
    pub removed: IntCounter,
    /// Leases that are alive.
    pub leases: IntGauge,
    /// Open watch streams.
    pub watch_streams: IntGauge,
    /// Bytes of the database.
    pub size_bytes: IntGauge,
}

impl Metrics {
    /// Makes the metrics and registers them.
    ///
    /// # Errors
    /// When a metric of the same name is registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let metrics = Self::new()?;
        for collector in metrics.collectors() {
            registry.register(collector)?;
        }
        Ok(metrics)
    }

    fn new() -> Result<Self, prometheus::Error> {
        let seconds = prometheus::exponential_buckets(0.000_1, 2.0, 16)?;
        let sizes = prometheus::exponential_buckets(1.0, 2.0, 12)?;
        let group = HistogramOpts::new("millpond_sql_group_size", "Writes of one commit").buckets(sizes);
        let commit = HistogramOpts::new("millpond_sql_commit_seconds", "Seconds that a commit took").buckets(seconds);
        Ok(Self {
            writes: IntCounter::new("millpond_sql_writes_total", "Writes that were evaluated")?,
            commits: IntCounter::new("millpond_sql_commits_total", "Commits")?,
            group_size: Histogram::with_opts(group)?,
            commit_seconds: Histogram::with_opts(commit)?,
            failures: IntCounter::new("millpond_sql_failures_total", "Writes undone because the store failed")?,
            revision: IntGauge::new("millpond_sql_revision", "The latest revision")?,
            compacted_revision: IntGauge::new("millpond_sql_compacted_revision", "The compacted revision")?,
            removed: IntCounter::new("millpond_sql_compaction_removed_total", "Events that compaction removed")?,
            leases: IntGauge::new("millpond_sql_leases", "Leases that are alive")?,
            watch_streams: IntGauge::new("millpond_sql_watch_streams", "Open watch streams")?,
            size_bytes: IntGauge::new("millpond_sql_size_bytes", "Bytes of the database")?,
        })
    }

    fn collectors(&self) -> Vec<Box<dyn Collector>> {
        vec![
            Box::new(self.writes.clone()),
            Box::new(self.commits.clone()),
            Box::new(self.group_size.clone()),
            Box::new(self.commit_seconds.clone()),
            Box::new(self.failures.clone()),
            Box::new(self.revision.clone()),
            Box::new(self.compacted_revision.clone()),
            Box::new(self.removed.clone()),
            Box::new(self.leases.clone()),
            Box::new(self.watch_streams.clone()),
            Box::new(self.size_bytes.clone()),
        ]
    }
}

impl Default for Metrics {
    /// Metrics that nobody reads.
    fn default() -> Self {
        Self::new().expect("the names and buckets are constants that a test has tried")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_registered_under_the_rooms_name() -> Result<(), prometheus::Error> {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry)?;
        metrics.writes.inc();
        let names: Vec<_> = registry.gather().iter().map(|family| family.name().to_owned()).collect();
        assert_eq!(names.len(), metrics.collectors().len());
        assert!(names.iter().all(|name| name.starts_with("millpond_sql_")), "{names:?}");
        Ok(())
    }
}
