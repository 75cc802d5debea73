//! What consistent reads let an operator see.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry};

/// Counters of consistent reads and of consistency checks.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Readers that waited for proof of how far the cluster has got.
    pub(super) readers: IntCounter,
    /// Questions put to the upstream, by outcome: for them, and once a second while there are none.
    pub(super) questions: IntCounterVec,
    /// How long a question took.
    pub(super) seconds: Histogram,
    /// Consistency checks, by result.
    pub(super) checks: IntCounterVec,
}

impl Metrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let readers = IntCounter::new("millpond_cache_consistent_reads_total", "Reads that needed proof of currency.")?;
        let questions = IntCounterVec::new(
            Opts::new(
                "millpond_cache_consensus_questions_total",
                "Questions put to the upstream for consistent reads, and once a second while there are none.",
            ),
            &["outcome"],
        )?;
        let seconds = Histogram::with_opts(
            HistogramOpts::new("millpond_cache_consensus_seconds", "How long such a question took.")
                .buckets(prometheus::exponential_buckets(0.0001, 2.0, 16)?),
        )?;
        let checks = IntCounterVec::new(
            Opts::new("millpond_cache_checks_total", "Comparisons of the cache with the upstream, by result."),
            &["result"],
        )?;
        registry.register(Box::new(checks.clone()))?;
        registry.register(Box::new(readers.clone()))?;
        registry.register(Box::new(questions.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        Ok(Self { readers, questions, seconds, checks })
    }
}
