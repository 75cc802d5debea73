//! A model of an etcd cluster, as far as a watch cache can see of one, that speaks etcd's API over pipes.
//!
//! - [`history`]: revisions, their events, the state after each.
//! - [`cluster`]: what is committed, who has applied it, who can reach whom.
//! - [`server`]: KV and Maintenance of one member.
//! - [`watch`]: its Watch streams, with etcd's rules for catching up and for progress.

pub mod cluster;
pub mod history;
pub mod server;
mod watch;
