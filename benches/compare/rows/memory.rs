//! What things cost in memory: connections, streams, watchers, keys.

use std::time::{Duration, Instant};

use millpond::{
    cli::bench::{
        link::Link,
        requests::Keys,
        watchers::Fleet,
        wire::{Frame, Manners},
    },
    grpc,
    proto::{etcdserverpb::RangeRequest, paths},
};

use super::RowKind;
use crate::{
    Outcome,
    report::{Aim, Row},
    servers::{
        Server,
        System::{self, Millpond},
    },
    world::{World, fill, fleet, watchers},
};

/// A window in which nothing happens.
const MOMENT: Duration = Duration::from_millis(100);

/// Keys of P13 and the size of their values.
const KEYS: u64 = 1_000_000;
const VALUE: usize = 100;
/// Keys in one page of a first list.
const PAGE: i64 = 10_000;

/// Memory that a fleet takes on servers of their own, per thing counted.
fn idle(world: &mut World, kind: &RowKind, fleet: &Fleet, things: usize, aim: f64) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "KiB", &[Aim::AtMost(aim)]);
    for system in System::REAL {
        if system == Millpond && !world.has_millpond()? {
            continue;
        }
        let (server, _upstream) = World::fresh(system)?;
        let report = watchers(&server, &server.endpoint, fleet.clone(), 0.0, MOMENT)?;
        if let (Some(before), Some(set_up)) = (report.server_bytes_before, report.server_bytes_set_up) {
            row.cells.push((system, set_up.saturating_sub(before) as f64 / 1024.0 / things as f64));
        }
    }
    Ok(row)
}

pub fn per_connection(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    idle(world, kind, &fleet(1000, 1, 1), 1000, 20.0)
}

pub fn per_stream(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    idle(world, kind, &fleet(10, 1000, 1), 10_000, 5.0)
}

pub fn per_watcher(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    idle(world, kind, &fleet(10, 1, 10_000), 100_000, 0.7)
}

/// A million keys: what each costs above its bytes, and how long loading them takes beside etcd sending them.
pub fn per_key(world: &mut World, kind: &RowKind) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "B", &[Aim::AtMost(200.0)]);
    if !world.has_millpond()? {
        return Ok(row);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let etcd = Server::etcd()?;
    let keys = Keys { prefix: "/p13/".to_owned(), count: KEYS };
    fill(&runtime, &etcd.endpoint, &keys, VALUE)?;
    let sent = runtime.block_on(list(&etcd.endpoint, &keys))?;
    let started = Instant::now();
    let mut millpond = Server::millpond(&etcd.endpoint)?;
    millpond.wait(Server::is_warm)?;
    let loaded = started.elapsed();
    let bytes = KEYS * (keys.key(0).len() + VALUE) as u64;
    row.cells.push((Millpond, millpond.resident()?.saturating_sub(bytes) as f64 / KEYS as f64));
    let allocated = millpond.metric("millpond_memory_allocated_bytes", "")? - bytes as f64;
    row.remarks
        .push(format!("allocated, without the allocator's own overhead: {:.0} B a key", allocated / KEYS as f64));
    row.remarks.push(format!(
        "Millpond started and loaded in {loaded:.2?}; etcd sends the pages to this client in {sent:.2?}"
    ));
    Ok(row)
}

/// Reads all keys page by page as fast as the etcd sends them.
async fn list(endpoint: &str, keys: &Keys) -> Outcome<Duration> {
    let mut link = Link::connect(endpoint, paths::RANGE, Manners::Quiet).await?;
    let started = Instant::now();
    for start in (0..keys.count).step_by(PAGE as usize) {
        let page = RangeRequest { key: keys.key(start), range_end: keys.end(), limit: PAGE, ..Default::default() };
        link.wire().open(grpc::frame(&page), true);
        let mut ended = false;
        while !ended {
            link.turn(|_, frame| {
                ended |= matches!(
                    frame,
                    Frame::Headers { end: true, .. } | Frame::Data { end: true, .. } | Frame::Reset { .. }
                );
            })
            .await?;
        }
    }
    Ok(started.elapsed())
}
