//! The embedded store through its gRPC face: every RPC and option, refusals by code and text, and what a restart keeps.

mod damage;
mod kv;
mod lease;
mod lifecycle;
mod maintenance;
mod store;
mod txn;
mod watch;
