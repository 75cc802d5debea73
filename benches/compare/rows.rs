//! What is measured. Names and aims are those of the project's performance goals.

use super::{Outcome, report::Row, world::World};

mod memory;
mod mixed;
mod reads;
mod sweeps;
mod tree;
mod watches;

/// A row of the table.
pub struct RowKind {
    /// Its name on the command line and in the table.
    pub id: &'static str,
    /// What is done.
    pub work: &'static str,
    /// Does it.
    pub measure: fn(&mut World, &RowKind) -> Outcome<Row>,
}

/// Each name, what is done, and by what.
type Listed = (&'static str, &'static str, fn(&mut World, &RowKind) -> Outcome<Row>);

const fn row((id, work, measure): Listed) -> RowKind {
    RowKind { id, work, measure }
}

/// All rows, in the order of the table.
pub static ROWS: &[RowKind] = &[
    row(("P1", "Range of one 1 KiB key, serializable, 10 connections x 10 in flight", reads::one_key)),
    row(("P2", "the same, linearizable", reads::one_key_linearizable)),
    row(("P3", "Range of 10,000 x 1 KiB keys", reads::everything)),
    row(("P4", "any page of 500 out of 100,000 keys of 300 B", reads::page)),
    row(("P5", "count_only of 100,000 keys", reads::count)),
    row(("P6", "keys_only of 10,000 keys", reads::keys_only)),
    row(("P7", "100 connections x 1 stream x 1 watcher, 100/s", watches::connections)),
    row(("P8", "10 connections x 100 streams x 1 watcher, 100/s", watches::streams)),
    row(("P9", "10 connections x 1 stream x 1,000 watchers, 10/s", watches::shared_stream)),
    row(("P9-100", "the same at 100/s", watches::shared_stream_fast)),
    row(("P10", "1,000 connections x 1 watcher, 20/s", watches::many_connections)),
    row(("P11-conn", "idle memory per connection with a watcher", memory::per_connection)),
    row(("P11-stream", "idle memory per stream with a watcher", memory::per_stream)),
    row(("P11-watcher", "idle memory per watcher on a shared stream", memory::per_watcher)),
    row(("P12", "100,000 watchers of one key each, 1,000/s", watches::distinct)),
    row(("P13", "memory above keys and values, 1,000,000 keys of 100 B values", memory::per_key)),
    row(("P14-P8", "delivery, p99, at half of the saturating rate, P8", watches::latency_streams)),
    row(("P14-P9", "delivery, p99, at half of the saturating rate, P9", watches::latency_shared)),
    row(("P15", "latency of a put, p50, one in flight", mixed::put_latency)),
    row(("P16-P1", "P1 while 5,000 writes/s stream in and 1,000 pages/s are read, against quiet", mixed::one_key)),
    row(("P16-P3", "P3 while 5,000 writes/s stream in and 1,000 pages/s are read, against quiet", mixed::everything)),
    row((
        "tree",
        "10 connections x 100 streams x 1 watcher, 100/s, on a Millpond behind a Millpond",
        tree::leaf_and_trunk,
    )),
    row(("connections", "1 watcher each on 10, 100, 1,000 connections, 10,000 events/s in all", sweeps::connections)),
    row(("watchers", "1, 10, 100, 1,000 watchers on each of 10 streams, 20/s", sweeps::watchers)),
    row(("keys", "Range of 10, 100, 1,000, 10,000 x 1 KiB keys", sweeps::keys)),
    row(("pages", "pages of 1, 10, 100, 1,000 out of 100,000 keys of 300 B", sweeps::pages)),
];
