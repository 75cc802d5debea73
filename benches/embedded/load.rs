//! Loads on several servers in turns, so that whatever else the machine does strikes them alike.

use std::time::Duration;

use millpond::{
    cli::bench::{
        drive::{Conduct, drive},
        loads::CallLoad,
        report::Report,
        requests::{GuardedUpdates, Keys, Ready, Source, writes},
        wire::Manners,
    },
    proto::paths,
};

use super::{
    Outcome,
    servers::{Server, System, scratch},
};

/// Bytes of each value.
pub const VALUE: usize = 512;

/// How often each server has its turn.
const ROUNDS: usize = 3;
const WARMUP: Duration = Duration::from_millis(500);
const TURN: Duration = Duration::from_secs(2);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Puts of random keys out of this many.
    Puts(u64),
    /// Compare the revision, then put, else get; each call in flight has a key of its own.
    Updates,
}

/// Connections, and calls in flight on each.
pub type InFlight = (usize, usize);

/// Loads one server for as long as that.
pub fn load(server: &Server, work: Work, (connections, in_flight): InFlight, duration: Duration) -> Outcome<Report> {
    let puts = writes(&Keys { prefix: "/registry/pods/".to_owned(), count: keys_of(work) }, VALUE);
    let source = |connection| match work {
        Work::Puts(_) => Box::new(Ready::new(&puts)) as Box<dyn Source>,
        Work::Updates => Box::new(GuardedUpdates::new("/registry/", connection, in_flight, VALUE)),
    };
    let path = if work == Work::Updates { paths::TXN } else { paths::PUT };
    let endpoints = [server.endpoint.clone()];
    let load = CallLoad { endpoints: &endpoints, path, connections, in_flight, manners: Manners::Go, source: &source };
    let conduct = Conduct { threads: 1, warmup: WARMUP, duration, pid: Some(server.pid()) };
    let report = Report::new(server.system.name().to_owned(), "call", &drive(&load, conduct, |_, _| {})?, None);
    if report.errors > 0 || report.operations == 0 {
        let (failed, succeeded) = (report.errors, report.operations);
        return Err(format!("{}: {failed} calls failed, {succeeded} did not", server.system.name()).into());
    }
    Ok(report)
}

fn keys_of(work: Work) -> u64 {
    if let Work::Puts(keys) = work { keys } else { 1 }
}

/// Loads all of them in turns, and prints each one's middle round. The rates, in the order of `systems`.
pub fn compare(systems: &[System], work: Work, in_flight: InFlight) -> Outcome<Vec<f64>> {
    let mut turns: Vec<_> = systems.iter().map(|system| (*system, Vec::new())).collect();
    for _ in 0..ROUNDS {
        for (system, reports) in &mut turns {
            // Each has the machine to itself: some work on after a load.
            let home = scratch()?;
            let server = Server::start(*system, home.path())?;
            reports.push(load(&server, work, in_flight, TURN)?);
        }
    }
    println!("| server | per second | p50 | p99 | server's CPU per call |\n|---|---|---|---|---|");
    let middle = turns.iter_mut().map(|(_, reports)| {
        reports.sort_by(|one, other| one.rate.total_cmp(&other.rate));
        reports.swap_remove(reports.len() / 2)
    });
    Ok(middle.inspect(print).map(|report| report.rate).collect())
}

fn print(report: &Report) {
    let (Report { load, rate, .. }, latency) = (report, report.latency_micros);
    let cpu = report.server_cpu_micros.unwrap_or(f64::NAN);
    println!("| {load} | {rate:.0} | {} µs | {} µs | {cpu:.0} µs |", latency.p50, latency.p99);
}

/// Prints how we compare.
pub fn judge(what: &str, found: f64, aim: f64, at_least: bool) {
    let met = if at_least { found >= aim } else { found <= aim };
    let (sign, verdict) = (if at_least { ">=" } else { "<=" }, if met { "met" } else { "**short**" });
    println!("{what}: {found:.2} (aim {sign} {aim}) {verdict}");
}
