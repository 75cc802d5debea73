//! An etcd v3 server over SQL; SQLite is the embedded default.
//!
//! - [`Engine`]: a store opened from a data directory, and its gRPC face.
//! - [`backend`]: what the engine asks of a database; [`sqlite`] is the one that exists.
//! - `checkpoint`: keeps SQLite's own log short.
//! - `state`: what is known of an open store without reading it. `writer`, `transaction`: one thread that commits groups of
//!   writes; how each write is evaluated.
//! - `range`, `counts`: how reads are evaluated. `history`, `watch`: how events reach watchers.
//! - `leases`, `compaction`, `quota`, `alarms`, `clock`: what happens by the passing of time.
//! - `service`: the gRPC services. `version`: what they say of theirs. `snapshot`, `transfer`, `check`: whole stores. `directory`:
//!   where a store lies.

mod alarms;
pub mod backend;
mod check;
mod checkpoint;
mod clock;
mod compaction;
mod counts;
mod directory;
mod engine;
mod error;
mod hash;
mod history;
mod leases;
mod metrics;
mod options;
mod quota;
mod range;
mod service;
mod snapshot;
pub mod sqlite;
mod state;
mod transaction;
mod transfer;
mod version;
mod watch;
mod writer;

pub use check::{Report, check};
pub use engine::Engine;
pub use error::{SqlError, Trouble};
pub use metrics::Metrics;
pub use options::{AutoCompaction, Options};
pub use snapshot::restore;
pub use transaction::Transaction;
pub use transfer::{Progress, export, import};
