//! How costs grow: the same work at several sizes, one plot each.

use std::time::Duration;

use millpond::cli::bench::{
    report::Report,
    requests::{Keys, Shape, reads},
    watchers::Fleet,
};

use super::{RowKind, reads, watches};
use crate::{
    Outcome,
    plot::Series,
    report::Row,
    servers::System,
    world::{World, fleet, ranges},
};

/// A shorter window: a plot needs less precision than a ratio.
const WINDOW: Duration = Duration::from_secs(2);

/// Adds each system's points; the row shows the last ones.
fn sweep(
    world: &mut World,
    kind: &RowKind,
    (title, x): (&str, &'static str),
    sizes: &[usize],
    mut at: impl FnMut(&mut World, System, usize) -> Outcome<Option<Report>>,
) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "µs", &[]);
    let mut lines = Vec::new();
    for system in System::REAL {
        let mut line = Vec::new();
        for &size in sizes {
            let Some(report) = at(world, system, size)? else { continue };
            line.push((size as f64, report.server_cpu_micros.unwrap_or(f64::NAN)));
            if Some(&size) == sizes.last() {
                row.add(system, &report);
            }
        }
        lines.push((system, line));
    }
    row.plots.push(Series { title: title.to_owned(), x, y: "µs", lines });
    Ok(row)
}

fn watched(world: &mut World, system: System, fleet: Fleet, rate: f64) -> Outcome<Option<Report>> {
    watches::on(world, system, fleet, rate, WINDOW)
}

pub fn connections(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let title = ("CPU per delivery, one watcher on each connection", "connections");
    sweep(world, kind, title, &[10, 100, 1000], |world, system, size| {
        watched(world, system, fleet(size, 1, 1), 10_000.0 / size as f64)
    })
}

pub fn watchers(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let title = ("CPU per delivery, watchers that share a stream, 10 streams, 20 events/s", "watchers on a stream");
    sweep(world, kind, title, &[1, 10, 100, 1000], |world, system, size| {
        watched(world, system, fleet(10, 1, size), 20.0)
    })
}

pub fn keys(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let all = reads::small(world)?;
    let title = ("CPU per range of 1 KiB keys", "keys in the range");
    sweep(world, kind, title, &[10, 100, 1000, 10_000], |world, system, size| {
        let Some(server) = world.server(system)? else { return Ok(None) };
        let part = Keys { count: size as u64, ..all.clone() };
        let mut requests = reads(Shape::All, &part, 0, false);
        requests.iter_mut().for_each(|request| request.range_end = all.key(size as u64));
        ranges(server, &requests, reads::CALM).map(Some)
    })
}

pub fn pages(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let all = reads::large(world)?;
    let title = ("CPU per page out of 100,000 keys of 300 B", "keys on a page");
    sweep(world, kind, title, &[1, 10, 100, 1000], |world, system, size| {
        let Some(server) = world.server(system)? else { return Ok(None) };
        ranges(server, &reads(Shape::Page, &all, size as i64, false), reads::CALM).map(Some)
    })
}
