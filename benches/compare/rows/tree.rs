//! A Millpond behind a Millpond: does a leaf cost its trunk what one watcher costs, and itself what it would cost at the
//! etcd?

use millpond::cli::bench::{
    loads::{Delivery, WatchLoad},
    watchers::Fleet,
    wire::Manners,
};

use super::RowKind;
use crate::{
    Outcome,
    report::{Row, amount},
    servers::{
        Server,
        System::{self, Etcd, Millpond},
    },
    world::{WINDOW, World, fleet, measure},
};

/// Writes per second.
const RATE: f64 = 100.0;

pub fn leaf_and_trunk(_: &mut World, kind: &RowKind) -> Outcome<Row> {
    let mut row = Row::new(kind.id, kind.work, "µs", &[]);
    let (trunk, etcd) = World::fresh(System::Millpond)?;
    let etcd = etcd.ok_or("Millpond stands in front of an etcd")?;
    let leaf = World::millpond(&trunk.endpoint)?;
    let (one, many) = (fleet(1, 1, 1), fleet(10, 100, 1));
    let mut cost = |on: &Server, fleet: &Fleet, of: &Server| -> Outcome<f64> {
        let (cost, generator_cores) = per_write(&etcd, on, fleet, of)?;
        row.generator_cores = row.generator_cores.max(generator_cores);
        Ok(cost)
    };
    let one_on_trunk = cost(&trunk, &one, &trunk)?;
    let many_on_trunk = cost(&trunk, &many, &trunk)?;
    let trunk_of_leaf = cost(&leaf, &many, &trunk)?;
    let leaf_cost = cost(&leaf, &many, &leaf)?;
    let etcd_cost = cost(&leaf, &many, &etcd)?;
    row.cells.extend([(Etcd, etcd_cost), (Millpond, leaf_cost)]);
    row.remarks.push(format!(
        "per write; the leaf: {} expected of a trunk with the same watchers; its trunk: {}, {} expected of one watcher",
        amount(many_on_trunk),
        amount(trunk_of_leaf),
        amount(one_on_trunk)
    ));
    Ok(row)
}

/// Microseconds of the CPU time of `of` per write at the etcd, with a fleet on `on`, and the generator's cores.
fn per_write(etcd: &Server, on: &Server, fleet: &Fleet, of: &Server) -> Outcome<(f64, f64)> {
    let load = WatchLoad {
        endpoints: std::slice::from_ref(&on.endpoint),
        write_endpoint: &etcd.endpoint,
        fleet: fleet.clone(),
        rate: RATE,
        value_size: 512,
        manners: Manners::Go,
        delivery: Delivery::default(),
    };
    let report = measure(&load, of, "event", WINDOW)?;
    let per_event = report.server_cpu_micros.ok_or("the server's CPU time could not be read")?;
    Ok((per_event * fleet.total() as f64, report.own_cores))
}
