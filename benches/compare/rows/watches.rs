//! Deliveries to watchers: what one costs, and how long one takes.

use std::time::Duration;

use millpond::cli::bench::{report::Report, watchers::Fleet};

use super::RowKind;
use crate::{
    Outcome,
    plot::Series,
    report::{Aim, Row, amount},
    servers::{
        Server,
        System::{self, Bare, Etcd, GrpcProxy, Millpond},
    },
    world::{WINDOW, World, fleet, nothing, watchers},
};

/// Writes per second at which no server keeps up with a thousand watchers or more.
const FLOOD: f64 = 4000.0;

/// Time under flood.
const FLOOD_WINDOW: Duration = Duration::from_secs(2);

/// Measures a fleet on one of the three servers that do everything. None: it could not be started.
pub fn on(world: &mut World, system: System, fleet: Fleet, rate: f64, window: Duration) -> Outcome<Option<Report>> {
    let write_endpoint = world.etcd().endpoint.clone();
    match world.server(system)? {
        Some(server) => watchers(server, &write_endpoint, fleet, rate, window).map(Some),
        None => Ok(None),
    }
}

fn measure(world: &mut World, kind: &RowKind, fleet: &Fleet, rate: f64, aims: &[Aim]) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "µs", aims);
    for system in System::REAL {
        if let Some(report) = on(world, system, fleet.clone(), rate, WINDOW)? {
            row.add(system, &report);
        }
    }
    Ok(row)
}

pub fn connections(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure(world, kind, &fleet(100, 1, 1), 100.0, &[Aim::Better(Etcd, 4.0)])
}

pub fn streams(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let fleet = fleet(10, 100, 1);
    let mut row = measure(world, kind, &fleet, 100.0, &[Aim::Better(Etcd, 9.0), Aim::Better(GrpcProxy, 6.0)])?;
    let bare = Server::bare(&nothing())?;
    row.add(Bare, &watchers(&bare, &bare.endpoint, fleet, 100.0, WINDOW)?);
    Ok(row)
}

pub fn shared_stream(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure(world, kind, &fleet(10, 1, 1000), 10.0, &[Aim::Better(Etcd, 6.0), Aim::Better(GrpcProxy, 8.0)])
}

pub fn shared_stream_fast(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure(world, kind, &fleet(10, 1, 1000), 100.0, &[Aim::Better(Etcd, 6.0), Aim::Better(GrpcProxy, 3.0)])
}

pub fn many_connections(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure(world, kind, &fleet(1000, 1, 1), 20.0, &[Aim::Better(Etcd, 3.0)])
}

/// Watchers with a key each: what counts is that the cost does not follow their number.
pub fn distinct(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    const SIZES: [usize; 3] = [10, 100, 1000];
    let mut row = Row::new(kind.id, kind.work, "µs", &[]);
    let mut lines = Vec::new();
    for system in System::REAL {
        let mut line = Vec::new();
        for size in SIZES {
            let fleet = Fleet { distinct: true, ..fleet(10, 10, size) };
            let total = fleet.total() as f64;
            let Some(report) = on(world, system, fleet, 1000.0, WINDOW)? else { continue };
            line.push((total, report.server_cpu_micros.unwrap_or(f64::NAN)));
            if Some(&size) == SIZES.last() {
                row.add(system, &report);
            }
        }
        if let (Some(first), Some(last)) = (line.first(), line.last()) {
            let growth = amount(last.1 / first.1);
            row.remarks.push(format!("{}: {growth}x the cost at {} watchers", system.name(), first.0));
        }
        lines.push((system, line));
    }
    row.remarks.push("etcd's figure holds the writes too, one for each delivery".into());
    let title = "CPU per delivery, watchers of one key each, 1,000 events/s".to_owned();
    row.plots.push(Series { title, x: "watchers", y: "µs", lines });
    Ok(row)
}

pub fn latency_streams(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    latency(world, kind, &fleet(10, 100, 1))
}

pub fn latency_shared(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    latency(world, kind, &fleet(10, 1, 1000))
}

/// Floods each server to see what it can deliver at most, then measures at half of that.
fn latency(world: &mut World, kind: &RowKind, fleet: &Fleet) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "ms", &[Aim::AtMost(5.0)]);
    for system in [Etcd, GrpcProxy, Millpond] {
        let Some(flooded) = on(world, system, fleet.clone(), FLOOD, FLOOD_WINDOW)? else { continue };
        let half = flooded.rate / fleet.total() as f64 / 2.0;
        let Some(report) = on(world, system, fleet.clone(), half, WINDOW)? else { continue };
        row.generator_cores = row.generator_cores.max(report.own_cores);
        row.cells.push((system, report.latency_micros.p99 as f64 / 1000.0));
        row.remarks.push(format!("{}: measured at {} writes/s", system.name(), amount(half)));
    }
    Ok(row)
}
