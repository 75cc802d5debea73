//! The clients: each worker is one task with one connection to every server.

pub mod calls;
pub mod reader;
pub mod session;
pub mod watcher;
pub mod writer;
