//! How costs grow: the same work at several sizes, one plot each.

use std::time::Duration;

use millpond::{
    cli::bench::{
        report::Report,
        requests::{Keys, Shape, reads},
    },
    proto::etcdserverpb::RangeRequest,
};

use super::{RowKind, reads, watches};
use crate::{
    Outcome,
    plot::Series,
    report::Row,
    servers::{Server, System},
    world::{World, fleet, ranges},
};

/// A shorter window: a plot needs less precision than a ratio.
const WINDOW: Duration = Duration::from_secs(2);

/// Adds each system's points; the row shows the last ones.
pub fn sweep(
    world: &mut World,
    kind: &RowKind,
    (title, x): (&str, &'static str),
    sizes: &[usize],
    mut at: impl FnMut(&mut World, System, usize) -> Option<Outcome<Report>>,
) -> Row {
    let mut row = Row::new(kind.id, kind.work, "µs", &[]);
    let mut lines = Vec::new();
    for system in System::REAL {
        let mut line = Vec::new();
        for &size in sizes {
            let Some(measured) = at(world, system, size) else { continue };
            match measured {
                Ok(report) => {
                    line.push((size as f64, report.server_cpu_micros.unwrap_or(f64::NAN)));
                    if Some(&size) == sizes.last() {
                        row.add(system, &report);
                    }
                }
                Err(error) => row.remarks.push(format!("{} at {size} failed: {error}", system.name())),
            }
        }
        lines.push((system, line));
    }
    row.plots.push(Series { title: title.to_owned(), x, y: "µs", lines });
    row
}

fn read(world: &mut World, system: System, requests: &[RangeRequest]) -> Option<Outcome<Report>> {
    let measured = |server: &Server| ranges(server, requests, reads::CALM);
    world.server(system).map(|server| server.map(measured)).unwrap_or_else(|error| Some(Err(error)))
}

pub fn connections(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let title = ("CPU per delivery, one watcher on each connection", "connections");
    Ok(sweep(world, kind, title, &[10, 100, 1000], |world, system, size| {
        watches::on(world, system, fleet(size, 1, 1), 10_000.0 / size as f64, WINDOW)
    }))
}

pub fn watchers(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let title = ("CPU per delivery, watchers that share a stream, 10 streams, 20 events/s", "watchers on a stream");
    Ok(sweep(world, kind, title, &[1, 10, 100, 1000], |world, system, size| {
        watches::on(world, system, fleet(10, 1, size), 20.0, WINDOW)
    }))
}

pub fn keys(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let all = reads::small(world)?;
    let title = ("CPU per range of 1 KiB keys", "keys in the range");
    Ok(sweep(world, kind, title, &[10, 100, 1000, 10_000], |world, system, size| {
        let part = Keys { count: size as u64, ..all.clone() };
        let mut requests = reads(Shape::All, &part, 0, false);
        requests.iter_mut().for_each(|request| request.range_end = all.key(size as u64));
        read(world, system, &requests)
    }))
}

pub fn pages(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let all = reads::large(world)?;
    let title = ("CPU per page out of 100,000 keys of 300 B", "keys on a page");
    Ok(sweep(world, kind, title, &[1, 10, 100, 1000], |world, system, size| {
        read(world, system, &reads(Shape::Page, &all, size as i64, false))
    }))
}
