//! What etcd's API says of a request before any data is looked at, and what a request means for one record.
//!
//! Pure: no I/O, no clock, and nothing of where records are kept. The cache and the embedded store go by the same text.
//!
//! - [`validate`]: what is refused, in etcd's order and words.
//! - [`KeyRange`]: the keys that a request names.
//! - [`Numbers`]: what requests ask about a record.
//! - [`range`]: the order, the filters and the limit of a Range request.
//! - [`compare`]: how the compares of a transaction are decided.
//! - [`watch`]: what a request for a watcher asks for, and its refusals.

pub mod compare;
mod key;
mod numbers;
pub mod range;
pub mod validate;
pub mod watch;

pub use key::{KeyRange, successor};
pub use numbers::{Number, Numbers};
