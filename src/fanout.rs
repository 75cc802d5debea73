//! Delivers events to watchers.
//!
//! A watcher is a cursor: the revision up to which it has been sent everything. While it keeps up, the [`Hub`] tells its
//! [`Session`] which entries of the history concern it, found through an index over ranges; a session that falls behind is
//! no longer told, and reads the history by itself until it has caught up. So a slow client costs neither memory nor
//! anybody else's time. What lies before the history window is relayed from the upstream until the window is reached.
//!
//! - [`Hub`]: takes each new entry of a store to the sessions that it concerns.
//! - [`RangeIndex`](ranges::RangeIndex): which watchers does an event concern?
//! - [`Session`]: the watchers of one Watch stream. No I/O: it is asked for bytes when the transport has room for them.
//! - [`Out`]: what a stream is to send, which may be what other streams send too.
//! - [`encode`]: responses as gRPC frames, made of the bytes of records.

pub mod encode;
mod hub;
mod lane;
mod mailbox;
mod out;
pub mod ranges;
mod session;
mod watcher;

pub use hub::Hub;
pub use out::Out;
pub use session::{Pumped, Relay, Session, SessionSettings, refuse};
pub use watcher::{Start, WatchOptions};

/// Appends `item`. The first takes room for one: most sessions have one watcher, and there are many of them.
fn push_snugly<T>(items: &mut Vec<T>, item: T) {
    if items.capacity() == 0 {
        items.reserve_exact(1);
    }
    items.push(item);
}
