//! Millpond: a watch-cache proxy for etcd.
//!
//! One upstream watch fills an in-memory copy of an etcd keyspace; any number of clients list, read and watch from it.
//!
//! - [`proto`]: the etcd v3 messages, and the paths of methods.
//! - [`status`]: outcomes in etcd's words.
//! - [`grpc`]: gRPC over HTTP/2 as far as a proxy needs it.
//! - [`rules`]: what etcd's API says of a request before any data is looked at.
//! - [`store`]: records, the counted copy-on-write index, the history window, views.
//! - [`upstream`]: talking to etcd.
//! - [`feed`]: list, watch, resume, resync; the only writer of a store.
//! - [`cache`]: a store and its feed behind reads at a freshness.
//! - [`fanout`]: watchers as cursors over the history.
//! - [`server`]: the gRPC and HTTP faces.
//! - [`signal`]: values that every call looks at.
//! - [`socket`]: gathers the small writes of HTTP/2 connections.
//! - [`sql`]: an etcd v3 server over SQL.
//! - `aside`: long work, and how nobody waits for it; `vital`: tasks without which nothing is true.
//! - [`cli`], [`config`], [`telemetry`]: commands, settings, logs and metrics.

mod aside;
pub mod cache;
pub mod cli;
pub mod config;
pub mod fanout;
pub mod feed;
pub mod grpc;
pub mod proto;
pub mod rules;
pub mod server;
pub mod signal;
pub mod socket;
pub mod sql;
pub mod status;
pub mod store;
pub mod telemetry;
pub mod upstream;
mod vital;
