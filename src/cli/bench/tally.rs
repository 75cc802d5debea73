//! What a load run counts: operations, errors, bytes, and latencies in a histogram.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

/// The longest latency that is told apart; longer ones count as this.
const LONGEST_MICROS: u64 = 120_000_000;

/// The time in which operations count, between the warm-up and the end.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// From here on.
    pub start: Instant,
    /// Up to here.
    pub end: Instant,
}

impl Window {
    /// Whether something that ends now counts.
    pub fn contains(&self, now: Instant) -> bool {
        self.start <= now && now < self.end
    }
}

/// Counts of one thread, or of all once they are added up.
#[derive(Clone)]
pub struct Tally {
    /// Operations that succeeded.
    pub operations: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Message bytes received.
    pub bytes: u64,
    micros: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        let micros = Histogram::new_with_max(LONGEST_MICROS, 3);
        Self {
            operations: 0,
            errors: 0,
            bytes: 0,
            micros: micros.expect("the bounds are constants that the type allows"),
        }
    }
}

impl Tally {
    /// Counts one success.
    pub fn succeeded(&mut self, latency: Duration, bytes: u64) {
        self.operations += 1;
        self.bytes += bytes;
        self.micros.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(LONGEST_MICROS).max(1));
    }

    /// Adds another thread's counts.
    pub fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.errors += other.errors;
        self.bytes += other.bytes;
        // Both have the same bounds, the only way in which this can fail.
        let _ = self.micros.add(&other.micros);
    }

    /// The latencies' shape.
    pub fn latency(&self) -> Latency {
        let at = |quantile| self.micros.value_at_quantile(quantile);
        Latency {
            mean: self.micros.mean(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.micros.max(),
        }
    }
}

/// Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: u64,
    /// Nine tenths are at most this.
    pub p90: u64,
    /// 99 % are at most this.
    pub p99: u64,
    /// 99.9 % are at most this.
    pub p999: u64,
    /// The longest.
    pub max: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_add_up() {
        let mut all = Tally::default();
        for thread in 0..2u64 {
            let mut tally = Tally::default();
            (1..=50).for_each(|n| tally.succeeded(Duration::from_micros(thread * 50 + n), 10));
            all.add(&tally);
        }
        assert_eq!((all.operations, all.bytes, all.errors), (100, 1000, 0));
        let latency = all.latency();
        assert_eq!((latency.p50, latency.p99, latency.max), (50, 99, 100));
    }

    #[test]
    fn a_latency_beyond_the_scale_counts_as_the_longest() {
        let mut tally = Tally::default();
        tally.succeeded(Duration::MAX, 0);
        assert!(tally.latency().max >= LONGEST_MICROS);
    }
}
