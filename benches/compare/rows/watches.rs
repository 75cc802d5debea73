//! Deliveries to watchers: what one costs, and how long one takes.

use std::time::Duration;

use millpond::cli::bench::{report::Report, watchers::Fleet};

use super::{RowKind, sweeps::sweep};
use crate::{
    Outcome,
    report::{Aim, Row, amount},
    servers::{
        Server,
        System::{self, Bare, Etcd, GrpcProxy, Millpond},
    },
    world::{WINDOW, World, fleet, nothing, watchers},
};

/// Writes per second at which the search for the saturating rate begins and ends.
const LOWEST: f64 = 50.0;
const HIGHEST: f64 = 6400.0;

/// Time at each of these rates.
const PROBE: Duration = Duration::from_millis(1200);

/// Share of the deliveries due in time below which a server does not keep up.
const KEEPS_UP: f64 = 0.95;

/// Measures a fleet on one of the three servers that do everything. None: it could not be started.
pub fn on(world: &mut World, system: System, fleet: Fleet, rate: f64, window: Duration) -> Option<Outcome<Report>> {
    let write_endpoint = world.etcd().endpoint.clone();
    let measured = |server: &Server| watchers(server, &write_endpoint, fleet, rate, window);
    world.server(system).map(|server| server.map(measured)).unwrap_or_else(|error| Some(Err(error)))
}

fn measure(world: &mut World, kind: &RowKind, fleet: &Fleet, rate: f64, aims: &[Aim]) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "µs", aims);
    for system in System::REAL {
        if let Some(measured) = on(world, system, fleet.clone(), rate, WINDOW) {
            row.attempt(system, measured);
        }
    }
    Ok(row)
}

/// The same, and what a delivery costs that is nothing but HTTP/2. The bare server knows streams, and no watchers on them.
fn measure_streams(world: &mut World, kind: &RowKind, fleet: &Fleet, rate: f64, aims: &[Aim]) -> Outcome<Row> {
    let mut row = measure(world, kind, fleet, rate, aims)?;
    let bare = Server::bare(&nothing())?;
    row.attempt(Bare, watchers(&bare, &bare.endpoint, fleet.clone(), rate, WINDOW));
    Ok(row)
}

pub fn connections(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure_streams(world, kind, &fleet(100, 1, 1), 100.0, &[Aim::Better(Etcd, 4.0)])
}

pub fn streams(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure_streams(world, kind, &fleet(10, 100, 1), 100.0, &[Aim::Better(Etcd, 9.0), Aim::Better(GrpcProxy, 6.0)])
}

pub fn shared_stream(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure(world, kind, &fleet(10, 1, 1000), 10.0, &[Aim::Better(Etcd, 6.0), Aim::Better(GrpcProxy, 8.0)])
}

pub fn shared_stream_fast(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure(world, kind, &fleet(10, 1, 1000), 100.0, &[Aim::Better(Etcd, 6.0), Aim::Better(GrpcProxy, 3.0)])
}

pub fn many_connections(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    measure_streams(world, kind, &fleet(1000, 1, 1), 20.0, &[Aim::Better(Etcd, 3.0)])
}

/// Watchers with a key each: what counts is that the cost does not follow their number.
pub fn distinct(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    const SIZES: [usize; 3] = [1000, 10_000, 100_000];
    let title = "CPU per delivery, watchers of one key each, 1,000 events/s";
    let mut row = sweep(world, kind, (title, "watchers"), &SIZES, |world, system, size| {
        on(world, system, Fleet { distinct: true, ..fleet(10, 10, size / 100) }, 1000.0, WINDOW)
    });
    let ends = |line: &[(f64, f64)]| Some((*line.first()?, *line.last()?));
    let lines = row.plots.iter().flat_map(|plot| &plot.lines);
    let growth: Vec<String> = lines
        .filter_map(|(system, line)| {
            let ((fewest, least), (_, most)) = ends(line)?;
            Some(format!("{}: {}x the cost at {fewest} watchers", system.name(), amount(most / least)))
        })
        .collect();
    row.remarks.extend(growth);
    row.remarks.push("etcd's figure holds the writes too, one for each delivery".into());
    Ok(row)
}

pub fn latency_streams(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    latency(world, kind, &fleet(10, 100, 1))
}

pub fn latency_shared(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    latency(world, kind, &fleet(10, 1, 1000))
}

/// Finds what each server can deliver at most, then measures at half of that.
fn latency(world: &mut World, kind: &RowKind, fleet: &Fleet) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "ms", &[Aim::AtMost(5.0)]);
    for system in [Etcd, GrpcProxy, Millpond] {
        match at_half(world, system, fleet) {
            Some(Ok((half, report))) => {
                row.generator_cores = row.generator_cores.max(report.own_cores);
                row.cells.push((system, report.latency_micros.p99 as f64 / 1000.0));
                row.remarks.push(format!("{}: measured at {} writes/s", system.name(), amount(half)));
            }
            Some(Err(error)) => row.remarks.push(format!("{} failed: {error}", system.name())),
            None => {}
        }
    }
    Ok(row)
}

/// Writes per second at half of what saturates the server, and the measurement at that.
fn at_half(world: &mut World, system: System, fleet: &Fleet) -> Option<Outcome<(f64, Report)>> {
    let watchers = fleet.total() as f64;
    let mut most = 0.0f64;
    let mut rate = LOWEST;
    while rate <= HIGHEST {
        let delivered = match on(world, system, fleet.clone(), rate, PROBE)? {
            Ok(report) => report.rate / watchers,
            Err(error) => return Some(Err(error)),
        };
        most = most.max(delivered);
        if delivered < rate * KEEPS_UP {
            break;
        }
        rate *= 2.0;
    }
    let measured = on(world, system, fleet.clone(), most / 2.0, WINDOW)?;
    Some(measured.map(|report| (most / 2.0, report)))
}
