//! Writes through the proxies, and reads while writes stream in.

use std::{cell::RefCell, sync::atomic::AtomicU64, thread, time::Duration};

use millpond::{
    cli::bench::{
        drive::{Conduct, Load, drive},
        link::LinkError,
        loads::Delivery,
        report::Report,
        requests::{Keys, Ready, Shape, Source, reads, writes},
        tally::{Tally, Window},
        writer::{NextRequest, Writer, stamped_puts},
    },
    proto::paths,
};

use super::{RowKind, reads};
use crate::{
    Outcome,
    report::{Aim, Row, amount},
    servers::{
        Server,
        System::{self, Etcd, Millpond},
    },
    world::{Loading, WINDOW, World, calls, measure, ranges},
};

pub fn put_latency(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "µs", &[Aim::Beyond(Etcd, 100.0)]);
    let requests = writes(&Keys { prefix: "/p15/".to_owned(), count: 1000 }, 512);
    for system in System::REAL {
        let Some(server) = world.server(system)? else { continue };
        let source = |_| Box::new(Ready::new(&requests)) as Box<dyn Source>;
        let report = calls(server, paths::PUT, &source, Loading { connections: 1, in_flight: 1 })?;
        row.generator_cores = row.generator_cores.max(report.own_cores);
        row.cells.push((system, report.latency_micros.p50 as f64));
    }
    Ok(row)
}

/// What goes on beside the reads that are measured: writes to the etcd, and small pages from Millpond.
struct Beside {
    etcd: String,
    millpond: String,
    written: Keys,
    paged: Keys,
    delivery: Delivery,
}

/// Each a second.
const WRITES: f64 = 5000.0;
const PAGES: f64 = 1000.0;

impl Beside {
    fn pages(&self) -> NextRequest {
        let mut pages = Ready::new(&reads(Shape::Page, &self.paged, 10, false));
        Box::new(move || pages.request(0))
    }
}

impl Load for Beside {
    type Ready = (Writer, f64);

    fn connections(&self) -> usize {
        2
    }

    async fn connect(&self, connection: usize) -> Result<Self::Ready, LinkError> {
        Ok(match connection {
            0 => (Writer::connect(&self.etcd, paths::PUT, stamped_puts(self.written.clone(), 512)).await?, WRITES),
            _ => (Writer::connect(&self.millpond, paths::RANGE, self.pages()).await?, PAGES),
        })
    }

    async fn run(
        &self,
        (mut writer, rate): Self::Ready,
        window: Window,
        _: &RefCell<Tally>,
        _: &AtomicU64,
    ) -> Result<(), LinkError> {
        writer.run(rate, window, &self.delivery).await
    }
}

/// CPU seconds of the server in the window.
fn cpu(report: &Report) -> f64 {
    report.server_cores.unwrap_or(f64::NAN) * report.seconds
}

fn busy_over_quiet(world: &mut World, kind: &RowKind, shape: Shape, loading: Loading) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "ratio", &[Aim::AtMost(1.2)]);
    let (read, paged) = (reads::small(world)?, reads::large(world)?);
    let written = world.keys("/p16/", 10_000, 512)?;
    let etcd = world.etcd().endpoint.clone();
    let Some(server) = world.server(Millpond)? else { return Ok(row) };
    let requests = reads(shape, &read, 0, false);
    let beside = Beside { etcd, millpond: server.endpoint.clone(), written, paged, delivery: Delivery::default() };
    let quiet = ranges(server, &requests, loading)?;
    let alone = measure(&beside, server, "call", WINDOW)?;
    let busy = both(server, &beside, || ranges(server, &requests, loading))?;
    let quiet_cost = cpu(&quiet) / quiet.operations as f64;
    let busy_cost = (cpu(&busy) - cpu(&alone)) / busy.operations as f64;
    row.generator_cores = busy.own_cores;
    row.cells.push((Millpond, busy_cost / quiet_cost));
    let [quiet_cost, busy_cost] = [quiet_cost, busy_cost].map(|cost| amount(cost * 1e6));
    row.remarks.push(format!(
        "{quiet_cost} µs quiet, {busy_cost} µs busy; writes and pages alone: {:.2} cores",
        cpu(&alone) / alone.seconds
    ));
    Ok(row)
}

/// Runs `measured` while the load beside it goes on for longer at both ends.
fn both(server: &Server, beside: &Beside, measured: impl FnOnce() -> Outcome<Report>) -> Outcome<Report> {
    let around = Conduct {
        threads: 1,
        warmup: Duration::ZERO,
        duration: WINDOW + Duration::from_secs(4),
        pid: Some(server.pid()),
    };
    thread::scope(|scope| {
        let running = scope.spawn(|| drive(beside, around, |_, _| {}));
        // Its connections are set up and its writes flow by then.
        thread::sleep(Duration::from_secs(1));
        let report = measured();
        running.join().map_err(|_| "the load beside failed")??;
        report
    })
}

pub fn one_key(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    busy_over_quiet(world, kind, Shape::Key, reads::BUSY)
}

pub fn everything(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    busy_over_quiet(world, kind, Shape::All, reads::CALM)
}
