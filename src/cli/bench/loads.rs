//! The loads that can be driven: unary calls in a closed loop, and watchers beside a writer at a fixed rate.

use std::{
    cell::RefCell,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use tokio::time::timeout;

use super::{
    calls,
    drive::Load,
    link::{Link, LinkError},
    requests::Source,
    tally::{Tally, Window},
    watchers::{Fleet, WatchLink},
    wire::Manners,
    writer::{Writer, stamped_puts},
};
use crate::proto::paths;

/// How long watchers wait after the window for events that are under way.
const DRAIN: Duration = Duration::from_secs(5);

/// How often they look whether all have come.
const LOOK: Duration = Duration::from_millis(20);

/// Makes the requests of one connection.
pub type MakeSource<'a> = dyn Fn(usize) -> Box<dyn Source> + Sync + 'a;

/// Unary calls to one path.
pub struct CallLoad<'a> {
    /// `host:port` of each server; connections take turns.
    pub endpoints: &'a [String],
    /// The gRPC path.
    pub path: &'a str,
    /// Connections.
    pub connections: usize,
    /// Calls in flight on each.
    pub in_flight: usize,
    /// How answers are received.
    pub manners: Manners,
    /// What each connection asks.
    pub source: &'a MakeSource<'a>,
}

/// The endpoint of a connection; all take turns.
fn endpoint(endpoints: &[String], connection: usize) -> &str {
    endpoints.get(connection % endpoints.len().max(1)).map_or("", String::as_str)
}

impl Load for CallLoad<'_> {
    type Ready = (Link, Box<dyn Source>);

    fn connections(&self) -> usize {
        self.connections
    }

    async fn connect(&self, connection: usize) -> Result<Self::Ready, LinkError> {
        let endpoint = endpoint(self.endpoints, connection);
        Ok((Link::connect(endpoint, self.path, self.manners).await?, (self.source)(connection)))
    }

    async fn run(
        &self,
        (mut link, mut source): Self::Ready,
        window: Window,
        tally: &RefCell<Tally>,
        done: &AtomicU64,
    ) -> Result<(), LinkError> {
        calls::run(&mut link, &mut *source, self.in_flight, window, tally, done).await
    }
}

/// Watchers, and one connection that writes what they see.
pub struct WatchLoad<'a> {
    /// `host:port` of each server to watch; connections take turns.
    pub endpoints: &'a [String],
    /// `host:port` to write to.
    pub write_endpoint: &'a str,
    /// The watchers.
    pub fleet: Fleet,
    /// Writes per second. Zero: the watchers stay idle.
    pub rate: f64,
    /// Bytes of each value.
    pub value_size: usize,
    /// How events are received.
    pub manners: Manners,
    /// What is to come and what has come.
    pub delivery: Delivery,
}

/// Events written and events seen, from the first on, warm-up included.
#[derive(Debug, Default)]
pub struct Delivery {
    written: AtomicU64,
    seen: AtomicU64,
    writer_done: AtomicU64,
}

impl Delivery {
    /// Notes an acknowledged write.
    pub fn wrote(&self) {
        self.written.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes events that a watcher was sent.
    pub fn saw(&self, events: u64) {
        self.seen.fetch_add(events, Ordering::Relaxed);
    }

    /// Events that watchers should have seen by now, given how many see each write.
    pub fn expected(&self, per_write: u64) -> u64 {
        self.written.load(Ordering::Relaxed).saturating_mul(per_write)
    }

    /// Events that watchers have seen.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    fn is_complete(&self, per_write: u64) -> bool {
        self.writer_done.load(Ordering::Acquire) > 0 && self.seen() >= self.expected(per_write)
    }
}

/// A connection of a [`WatchLoad`].
pub enum WatchRole {
    /// The one that writes.
    Writer(Writer),
    /// One that watches.
    Watcher(WatchLink),
}

impl WatchLoad<'_> {
    /// Whether every event that was written reached every watcher.
    pub fn is_complete(&self) -> bool {
        self.delivery.is_complete(self.fleet.watchers_per_write())
    }

    async fn watch(
        &self,
        mut link: WatchLink,
        window: Window,
        tally: &RefCell<Tally>,
        done: &AtomicU64,
    ) -> Result<(), LinkError> {
        let per_write = self.fleet.watchers_per_write();
        let mut on = |events: u64, latency: Duration, bytes: u64, now: Instant| {
            self.delivery.saw(events);
            if window.contains(now) {
                tally.borrow_mut().succeeded(latency, bytes);
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        while Instant::now() < window.end + DRAIN {
            let left = window.end.saturating_duration_since(Instant::now()).max(LOOK);
            match timeout(left, link.turn(&mut on)).await {
                Ok(turned) => turned?,
                Err(_) if self.rate == 0.0 || self.delivery.is_complete(per_write) => break,
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl Load for WatchLoad<'_> {
    type Ready = WatchRole;

    fn connections(&self) -> usize {
        self.fleet.connections + usize::from(self.rate > 0.0)
    }

    async fn connect(&self, connection: usize) -> Result<WatchRole, LinkError> {
        if connection == self.fleet.connections {
            let puts = stamped_puts(self.fleet.keys(), self.value_size);
            return Ok(WatchRole::Writer(Writer::connect(self.write_endpoint, paths::PUT, puts).await?));
        }
        let endpoint = endpoint(self.endpoints, connection);
        Ok(WatchRole::Watcher(WatchLink::connect(endpoint, &self.fleet, connection, self.manners).await?))
    }

    async fn run(
        &self,
        role: WatchRole,
        window: Window,
        tally: &RefCell<Tally>,
        done: &AtomicU64,
    ) -> Result<(), LinkError> {
        match role {
            WatchRole::Watcher(link) => self.watch(link, window, tally, done).await,
            WatchRole::Writer(mut writer) => {
                let outcome = writer.run(self.rate, window, &self.delivery).await;
                self.delivery.writer_done.store(1, Ordering::Release);
                outcome
            }
        }
    }
}
