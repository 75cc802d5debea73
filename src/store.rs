//! The cache's memory: records, the counted copy-on-write index, the history window and the views of both. Pure: no I/O
//! and no clock; the only async part is the signal that a revision has been reached.
//!
//! - [`wire`]: just enough protobuf to read and write records without decoding them.
//! - [`Record`]: one version of one key, kept as the bytes that will be sent.
//! - [`Tree`]: the index, ordered by key, copy-on-write, with counts and byte sums in its inner nodes.
//! - [`Window`]: the log of revisions behind the window, with a tree at every segment's end.
//! - [`View`]: everything at one revision, immutable, published with one atomic swap by the [`Store`].
//! - [`range`]: what a Range request selects from a view.

mod history;
pub mod range;
mod record;
mod responder;
mod revision;
mod tree;
mod view;
pub mod wire;

pub use history::{Entry, Event, EventKind, Limits, Window};
pub use record::{MalformedRecord, Record};
pub use responder::{HeaderField, Responder};
pub use revision::Revision;
pub use tree::{Run, Sums, Tree};
pub use view::{Change, Position, Store, View, Writer};
