//! The result of a run, for people and as JSON.

use std::fmt::{self, Display};

use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use super::{drive::Outcome, tally::Latency};

/// What a run came to. Times per operation are CPU time, in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What was asked of the server.
    pub load: String,
    /// What one operation is: a call, or an event that reached a watcher.
    pub unit: &'static str,
    /// Operations that succeeded in the window.
    pub operations: u64,
    /// Operations that failed in the window.
    pub errors: u64,
    /// The window's length.
    pub seconds: f64,
    /// Operations per second.
    pub rate: f64,
    /// Bytes received per second.
    pub bytes_per_second: f64,
    /// Microseconds from the request to the end of its answer, or from a write's sending to its event's arrival.
    pub latency_micros: Latency,
    /// The server's CPU time per operation, when a pid was given.
    pub server_cpu_micros: Option<f64>,
    /// Cores that the server kept busy, when a pid was given.
    pub server_cores: Option<f64>,
    /// This program's own CPU time per operation.
    pub own_cpu_micros: f64,
    /// Cores that this program kept busy. Near its number of threads, it was the bottleneck.
    pub own_cores: f64,
    /// The server's resident memory before the first connection, when a pid was given.
    pub server_bytes_before: Option<u64>,
    /// The server's resident memory once all connections and watchers were set up, when a pid was given.
    pub server_bytes_set_up: Option<u64>,
    /// Events that should have reached watchers and events that did, from the first on.
    pub deliveries: Option<Deliveries>,
}

/// Whether all events came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Deliveries {
    /// Acknowledged writes times the watchers of each.
    pub expected: u64,
    /// Events received.
    pub seen: u64,
}

impl Report {
    /// Puts an outcome into figures.
    pub fn new(load: String, unit: &'static str, outcome: &Outcome, deliveries: Option<Deliveries>) -> Self {
        let seconds = outcome.duration.as_secs_f64();
        let operations = outcome.tally.operations;
        let per_operation = |cpu: f64| cpu * 1e6 / operations.max(1) as f64;
        let server = outcome.server_cpu.map(|cpu| cpu.as_secs_f64());
        let own = outcome.own_cpu.as_secs_f64();
        Self {
            load,
            unit,
            operations,
            errors: outcome.tally.errors,
            seconds,
            rate: operations as f64 / seconds,
            bytes_per_second: outcome.tally.bytes as f64 / seconds,
            latency_micros: outcome.tally.latency(),
            server_cpu_micros: server.map(per_operation),
            server_cores: server.map(|cpu| cpu / seconds),
            own_cpu_micros: per_operation(own),
            own_cores: own / seconds,
            server_bytes_before: outcome.server_memory.map(|(before, _)| before),
            server_bytes_set_up: outcome.server_memory.map(|(_, set_up)| set_up),
            deliveries,
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = self.unit;
        writeln!(f, "{}", self.load)?;
        let bytes = HumanBytes(self.bytes_per_second as u64);
        writeln!(f, "  {:<12} {}/s ({bytes}/s)", format!("{unit}s"), HumanCount(self.rate as u64))?;
        writeln!(f, "  {:<12} {} in {:.1} s, {} failed", "", HumanCount(self.operations), self.seconds, self.errors)?;
        let l = &self.latency_micros;
        let [mean, p50] = [l.mean as u64, l.p50].map(Micros);
        let [p90, p99, p999, max] = [l.p90, l.p99, l.p999, l.max].map(Micros);
        writeln!(f, "  {:<12} mean {mean}, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p999}, max {max}", "latency")?;
        if let (Some(each), Some(cores)) = (self.server_cpu_micros, self.server_cores) {
            writeln!(f, "  {:<12} {each:.2} µs per {unit}, {cores:.2} cores", "server CPU")?;
        }
        writeln!(f, "  {:<12} {:.2} µs per {unit}, {:.2} cores", "own CPU", self.own_cpu_micros, self.own_cores)?;
        if let (Some(before), Some(after)) = (self.server_bytes_before, self.server_bytes_set_up) {
            writeln!(f, "  {:<12} {}, {} once set up", "server RSS", HumanBytes(before), HumanBytes(after))?;
        }
        match self.deliveries {
            Some(Deliveries { expected, seen }) if seen >= expected => {
                writeln!(f, "  every event reached every watcher")
            }
            Some(Deliveries { expected, seen }) => writeln!(f, "  {seen} of {expected} events arrived in time"),
            None => Ok(()),
        }
    }
}

/// Microseconds in the unit that suits them.
struct Micros(u64);

impl Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            micros @ 0..1000 => write!(f, "{micros} µs"),
            micros @ 1000..1_000_000 => write!(f, "{:.2} ms", micros as f64 / 1e3),
            micros => write!(f, "{:.2} s", micros as f64 / 1e6),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::tally::Tally, *};

    fn report() -> Report {
        let mut tally = Tally::default();
        (0..1000).for_each(|_| tally.succeeded(Duration::from_micros(1500), 100));
        let outcome = Outcome {
            tally,
            duration: Duration::from_secs(2),
            server_cpu: Some(Duration::from_millis(10)),
            own_cpu: Duration::from_millis(5),
            server_memory: None,
        };
        Report::new("load".into(), "event", &outcome, Some(Deliveries { expected: 3, seen: 2 }))
    }

    #[test]
    fn cpu_is_told_per_operation() {
        let report = report();
        assert_eq!((report.rate, report.bytes_per_second), (500.0, 50_000.0));
        assert_eq!(
            (report.server_cpu_micros, report.server_cores, report.own_cpu_micros),
            (Some(10.0), Some(0.005), 5.0)
        );
    }

    #[test]
    fn people_are_told_what_is_missing() {
        let text = report().to_string();
        for words in ["500/s", "p99 1.50 ms", "10.00 µs per event", "2 of 3 events arrived"] {
            assert!(text.contains(words), "{words} is missing in:\n{text}");
        }
    }
}
