//! What the integration tests share: real etcds, the Millpond binary, faults between them, clients, and a comparison of
//! two servers' answers.
//!
//! - [`toolchain`]: gets the etcds, etcdctl and etcdutl that the tests need, and keeps them under `target/etcd`.
//! - [`etcd`]: clusters of one or three real members.
//! - [`millpond`]: the Millpond binary as a child process.
//! - [`subject`]: the server under test, and a plain etcd beside it that must answer the same.
//! - [`fault`]: a TCP proxy that breaks connections in chosen ways.
//! - [`pair`]: an etcd, and the embedded store with the same ids.
//! - [`scene`]: an etcd and a Millpond with such a link between them.
//! - [`etcdctl`]: the command line client.
//! - [`raw`]: gRPC by hand, for bad input.
//! - [`client`]: stubs and small calls.
//! - [`clock`]: a wall clock that jumps.
//! - [`informer`]: a client that lists and follows, and notices any gap.
//! - [`traffic`]: writes and reads that go on under faults, and notice wrong answers.
//! - [`operation`], [`random`], [`compare`], [`watching`], [`script`]: random requests, and the comparison of what comes back.

#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod client;
pub mod clock;
pub mod compare;
pub mod etcd;
pub mod etcdctl;
pub mod fault;
pub mod informer;
pub mod millpond;
pub mod operation;
pub mod pair;
pub mod ports;
pub mod process;
pub mod random;
pub mod raw;
pub mod scene;
pub mod script;
pub mod subject;
pub mod toolchain;
pub mod traffic;
pub mod watching;
