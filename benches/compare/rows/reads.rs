//! Reads of every shape.

use millpond::{
    cli::bench::requests::{Keys, Shape, reads},
    proto::etcdserverpb::RangeRequest,
};

use super::RowKind;
use crate::{
    Outcome,
    report::{Aim, Row},
    servers::System::{self, Bare, Etcd, GrpcProxy},
    world::{Loading, World, ranges},
};

/// What the reads of P1, P2, P3 and P6 are about.
pub fn small(world: &mut World) -> Outcome<Keys> {
    world.keys("/p1/", 10_000, 1024)
}

/// What the reads of P4 and P5 are about.
pub fn large(world: &mut World) -> Outcome<Keys> {
    world.keys("/p4/", 100_000, 300)
}

/// The load for small answers.
pub const BUSY: Loading = Loading { connections: 10, in_flight: 10 };

/// The load for large answers: enough to keep a server busy, few enough that buffers stay small.
pub const CALM: Loading = Loading { connections: 4, in_flight: 1 };

/// Measures the requests on every system, the floor included.
fn measure(world: &mut World, mut row: Row, requests: &[RangeRequest], loading: Loading) -> Outcome<Row> {
    for system in System::ALL {
        let measured = match system {
            Bare => {
                let Some(first) = requests.first() else { continue };
                let bare = world.bare(first)?;
                ranges(&bare, requests, loading)
            }
            real => match world.server(real)? {
                Some(server) => ranges(server, requests, loading),
                None => continue,
            },
        };
        row.attempt(system, measured);
    }
    Ok(row)
}

pub fn one_key(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let aims = [Aim::Better(Etcd, 4.5), Aim::Better(GrpcProxy, 2.5), Aim::Within(Bare, 1.3)];
    let requests = reads(Shape::Key, &small(world)?, 0, false);
    measure(world, Row::new(kind.id, kind.work, "µs", &aims), &requests, BUSY)
}

pub fn one_key_linearizable(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let requests = reads(Shape::Key, &small(world)?, 0, true);
    let mut row = Row::new(kind.id, kind.work, "µs", &[Aim::Better(Etcd, 4.0)]);
    for system in System::REAL {
        let before = questions(world)?;
        let Some(server) = world.server(system)? else { continue };
        let Some(report) = row.attempt(system, ranges(server, &requests, BUSY)) else { continue };
        if system != Etcd {
            let asked = questions(world)? - before;
            // The warm-up asks too, at the same rate as the window that is counted.
            let share = asked / (report.operations as f64 * (report.seconds + 0.7) / report.seconds);
            row.remarks.push(format!("{}: {:.1} % of reads asked the etcd", system.name(), share * 100.0));
        }
    }
    Ok(row)
}

/// KV calls that the etcd has been asked.
fn questions(world: &World) -> Outcome<f64> {
    world.etcd().metric("grpc_server_started_total", "grpc_service=\"etcdserverpb.KV\"")
}

pub fn everything(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let aims = [Aim::Better(Etcd, 12.0), Aim::Better(GrpcProxy, 2.0), Aim::Within(Bare, 1.5)];
    let requests = reads(Shape::All, &small(world)?, 0, false);
    measure(world, Row::new(kind.id, kind.work, "µs", &aims), &requests, CALM)
}

pub fn page(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let requests = reads(Shape::Page, &large(world)?, 500, false);
    let mut row = Row::new(kind.id, kind.work, "µs", &[Aim::Better(Etcd, 130.0)]);
    row.remarks.push("grpc-proxy answers these from what it remembers: 512 different pages, each asked often".into());
    measure(world, row, &requests, CALM)
}

pub fn count(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let requests = reads(Shape::Count, &large(world)?, 0, false);
    measure(world, Row::new(kind.id, kind.work, "µs", &[Aim::Better(Etcd, 1000.0)]), &requests, BUSY)
}

pub fn keys_only(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let requests = reads(Shape::Keys, &small(world)?, 0, false);
    measure(world, Row::new(kind.id, kind.work, "µs", &[Aim::Better(Etcd, 16.0)]), &requests, CALM)
}
