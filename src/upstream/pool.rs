//! The connections to one endpoint, by class of traffic.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    connection::{self, Class, Streams, Tuning},
    endpoint::Dial,
    metrics::Metrics,
    sender::Sender,
};
use crate::status::Status;

/// A connection without streams is closed after this time.
const IDLE_LIMIT: Duration = Duration::from_secs(120);

/// The place of a connection in the order in which connections to the upstream were opened, from one.
///
/// Behind an address there is one server at a time, though it may be replaced by one with another history; and the members of
/// a cluster are of one history, unless all of them are stopped and replaced. So if a server answers over connection A what
/// was asked after connection B had been opened, and B was opened after A, then B leads to the same history. An address
/// behind which servers of two histories stand at once is beyond what this can tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionNumber(pub u64);

/// Numbers connections, over all endpoints of an upstream.
#[derive(Clone, Default)]
pub(super) struct Numbers(Arc<AtomicU64>);

impl Numbers {
    /// The number of a connection that has just been opened.
    fn next(&self) -> ConnectionNumber {
        ConnectionNumber(self.0.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// The newest number.
    pub(super) fn newest(&self) -> ConnectionNumber {
        ConnectionNumber(self.0.load(Ordering::SeqCst))
    }
}

/// The connections to one endpoint.
pub(super) struct Pool {
    name: String,
    dial: Arc<dyn Dial>,
    tuning: Tuning,
    metrics: Metrics,
    numbers: Numbers,
    shelves: [Shelf; Class::ALL.len()],
}

/// The connections of one class.
#[derive(Default)]
struct Shelf {
    connections: Mutex<Vec<Arc<Pooled>>>,
    /// Held while dialling, so that a burst opens one connection and not one for each call. Holds the last failure, which
    /// is everyone's who waited for that dial.
    dialing: tokio::sync::Mutex<Option<(Instant, Status)>>,
}

struct Pooled {
    sender: Sender,
    /// How many streams the server takes.
    taken: Streams,
    number: ConnectionNumber,
    class: Class,
    /// Calls on it; changed under the shelf's lock when it grows.
    streams: AtomicUsize,
    last_used: Mutex<Instant>,
    metrics: Metrics,
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.metrics.connections(self.class).dec();
    }
}

/// The right to one stream on a connection; given back when dropped, so it lives as long as the call.
pub(super) struct Slot(Arc<Pooled>);

impl Slot {
    pub(super) fn sender(&self) -> Sender {
        self.0.sender.clone()
    }

    pub(super) fn number(&self) -> ConnectionNumber {
        self.0.number
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.last_used.lock() = Instant::now();
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    pub(super) fn new(name: String, dial: Arc<dyn Dial>, tuning: Tuning, metrics: Metrics, numbers: Numbers) -> Self {
        Self { name, dial, tuning, metrics, numbers, shelves: Default::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn is_in_process(&self) -> bool {
        self.dial.in_process().is_some()
    }

    /// A place on a live connection of `class`, dialling when there is none.
    ///
    /// # Errors
    /// Unavailable when the dial fails or takes too long.
    pub(super) async fn slot(&self, class: Class) -> Result<Slot, Status> {
        if class == Class::Feed {
            // A feed's connection is its own from the dial to the end.
            return self.open(class).await.map(Slot);
        }
        let shelf = &self.shelves[class as usize];
        if let Some(slot) = shelf.free(class) {
            return Ok(slot);
        }
        let asked = Instant::now();
        let mut last_failure = shelf.dialing.lock().await;
        if let Some(slot) = shelf.free(class) {
            return Ok(slot);
        }
        if let Some((_, status)) = last_failure.as_ref().filter(|(failed, _)| *failed > asked) {
            return Err(status.clone());
        }
        let pooled = self.open(class).await.inspect_err(|status| {
            *last_failure = Some((Instant::now(), status.clone()));
        })?;
        shelf.connections.lock().push(pooled.clone());
        Ok(Slot(pooled))
    }

    /// A new connection that already carries its first stream.
    async fn open(&self, class: Class) -> Result<Arc<Pooled>, Status> {
        let opened = connection::http2(&self.dial, &self.name, class, &self.tuning).await;
        self.metrics.dialed(&self.name, opened.is_ok());
        let (sender, taken) = opened?;
        let pooled = Pooled {
            sender,
            taken,
            number: self.numbers.next(),
            class,
            streams: AtomicUsize::new(1),
            last_used: Mutex::new(Instant::now()),
            metrics: self.metrics.clone(),
        };
        self.metrics.connections(class).inc();
        Ok(Arc::new(pooled))
    }

    /// An HTTP/1.1 connection for one request.
    ///
    /// # Errors
    /// As [`Pool::slot`].
    pub(super) async fn http1(
        &self,
    ) -> Result<(hyper::client::conn::http1::SendRequest<super::body::RequestBody>, ConnectionNumber), Status> {
        let sender = connection::http1(&self.dial, &self.name, &self.tuning).await;
        self.metrics.dialed(&self.name, sender.is_ok());
        Ok((sender?, self.numbers.next()))
    }

    /// Lets no new call onto the present connections; those on them go on.
    pub(super) fn retire(&self) {
        self.shelves.iter().for_each(|shelf| shelf.connections.lock().clear());
    }

    /// Closes what has been idle for long, and forgets what has died.
    pub(super) fn reap(&self, now: Instant) {
        let stale = |pooled: &Arc<Pooled>| {
            pooled.streams.load(Ordering::Acquire) == 0
                && now.saturating_duration_since(*pooled.last_used.lock()) > IDLE_LIMIT
        };
        for shelf in &self.shelves {
            shelf.connections.lock().retain(|pooled| !pooled.sender.is_closed() && !stale(pooled));
        }
    }
}

impl Shelf {
    fn free(&self, class: Class) -> Option<Slot> {
        let mut connections = self.connections.lock();
        connections.retain(|pooled| !pooled.sender.is_closed());
        let is_free =
            |pooled: &&Arc<Pooled>| pooled.streams.load(Ordering::Acquire) < class.streams().min(pooled.taken.now());
        let free = connections.iter().find(is_free)?;
        free.streams.fetch_add(1, Ordering::AcqRel);
        Some(Slot(free.clone()))
    }
}
