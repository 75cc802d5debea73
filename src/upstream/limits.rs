//! How many clients' calls may be under way upstream at once.
//!
//! A call over the limit waits, in a queue that is bounded in length and in time. What does not get its turn is refused in
//! a way that fits its kind: a unary call with ResourceExhausted `etcdserver: too many requests`, which is what etcd itself
//! says when it is behind, and which clients do not repeat at once, so the overload is not fed; a stream with Unavailable,
//! the code on which clients' watches and lease keep-alives carry on with another try instead of ending for good.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use prometheus::{IntCounter, IntGauge};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::metrics::Metrics;
use crate::status::Status;

/// Calls that may wait for each that may run.
const WAITING_PER_PERMIT: usize = 16;
/// How long a call waits at most.
const PATIENCE: Duration = Duration::from_secs(5);

/// What kind of call is forwarded, which decides by which limit it is bound.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum ForwardClass {
    /// A call that etcd answers soon: bound by `forward_limit`.
    Unary,
    /// A stream, or a call that may block for as long as it likes: bound by `stream_limit`.
    Stream,
}

impl ForwardClass {
    fn name(self) -> &'static str {
        match self {
            ForwardClass::Unary => "unary",
            ForwardClass::Stream => "stream",
        }
    }

    fn refusal(self) -> Status {
        match self {
            ForwardClass::Unary => Status::TOO_MANY_REQUESTS,
            ForwardClass::Stream => Status::unavailable("too many streams are forwarded, try again later"),
        }
    }
}

/// How many calls of one class are under way.
pub struct UnderWay {
    gauge: IntGauge,
    first: Notify,
}

impl UnderWay {
    fn new(gauge: IntGauge) -> Self {
        Self { gauge, first: Notify::new() }
    }

    /// How many there are now.
    pub fn now(&self) -> usize {
        usize::try_from(self.gauge.get()).unwrap_or(0)
    }

    /// Waits until one begins when there was none. One that nobody waited for is told of at the next wait, when it may be over.
    pub async fn first(&self) {
        self.first.notified().await;
    }

    fn begin(&self) {
        self.gauge.inc();
        if self.gauge.get() == 1 {
            self.first.notify_one();
        }
    }

    fn end(&self) {
        self.gauge.dec();
    }
}

/// The permits of one class.
pub(super) struct Limit {
    class: ForwardClass,
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    most_waiting: usize,
    patience: Duration,
    running: Arc<UnderWay>,
    waiting_gauge: IntGauge,
    refused: IntCounter,
}

/// Leave to be under way upstream; given back when dropped.
pub(super) struct Permit {
    _permit: OwnedSemaphorePermit,
    running: Arc<UnderWay>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.running.end();
    }
}

impl Limit {
    pub(super) fn new(class: ForwardClass, limit: usize, metrics: &Metrics) -> Self {
        let limit = limit.clamp(1, Semaphore::MAX_PERMITS);
        Self {
            class,
            permits: Arc::new(Semaphore::new(limit)),
            waiting: AtomicUsize::new(0),
            most_waiting: limit.saturating_mul(WAITING_PER_PERMIT),
            patience: PATIENCE,
            running: Arc::new(UnderWay::new(metrics.forwarding.with_label_values(&[class.name()]))),
            waiting_gauge: metrics.waiting.with_label_values(&[class.name()]),
            refused: metrics.refused.with_label_values(&[class.name()]),
        }
    }

    /// Waits for a turn.
    ///
    /// # Errors
    /// The class's refusal when too many wait already, or the turn does not come in time.
    pub(super) async fn permit(&self) -> Result<Permit, Status> {
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            return Ok(self.granted(permit));
        }
        let waiting = Waiting::enter(self);
        if waiting.ahead >= self.most_waiting {
            return Err(self.refuse());
        }
        let turn = timeout(self.patience, self.permits.clone().acquire_owned()).await;
        drop(waiting);
        match turn {
            Ok(Ok(permit)) => Ok(self.granted(permit)),
            Ok(Err(_)) | Err(_) => Err(self.refuse()),
        }
    }

    fn granted(&self, permit: OwnedSemaphorePermit) -> Permit {
        self.running.begin();
        Permit { _permit: permit, running: self.running.clone() }
    }

    /// The calls that have got their turn and are not over.
    pub(super) fn running(&self) -> &Arc<UnderWay> {
        &self.running
    }

    fn refuse(&self) -> Status {
        self.refused.inc();
        self.class.refusal()
    }
}

/// A place in the queue, left when dropped, also when the caller has gone away.
struct Waiting<'a> {
    limit: &'a Limit,
    ahead: usize,
}

impl<'a> Waiting<'a> {
    fn enter(limit: &'a Limit) -> Self {
        limit.waiting_gauge.inc();
        Self { ahead: limit.waiting.fetch_add(1, Ordering::AcqRel), limit }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.limit.waiting_gauge.dec();
        self.limit.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn limit(class: ForwardClass, permits: usize, patience: Duration) -> Limit {
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        Limit { patience, ..Limit::new(class, permits, &metrics) }
    }

    #[tokio::test]
    async fn a_call_over_the_limit_waits_for_its_turn() {
        let limit = limit(ForwardClass::Unary, 1, PATIENCE);
        let first = limit.permit().await.unwrap();
        let mut second = Box::pin(limit.permit());
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(first);
        let _second = second.await.unwrap();
        assert_eq!(limit.running().now(), 1);
    }

    #[tokio::test]
    async fn the_first_call_under_way_is_told_of_and_no_other() {
        let limit = limit(ForwardClass::Unary, 3, PATIENCE);
        let is_told = || Box::pin(limit.running().first()).now_or_never().is_some();
        assert!(!is_told());
        for _ in 0..2 {
            let first = limit.permit().await.unwrap();
            assert!(is_told() && !is_told());
            let second = limit.permit().await.unwrap();
            drop(first);
            let _third = limit.permit().await.unwrap();
            assert!(!is_told());
            drop(second);
        }
        assert_eq!(limit.running().now(), 0);
    }

    #[tokio::test]
    async fn a_call_whose_turn_does_not_come_is_refused_as_fits_its_kind() {
        for (class, refusal) in
            [(ForwardClass::Unary, Status::TOO_MANY_REQUESTS), (ForwardClass::Stream, ForwardClass::Stream.refusal())]
        {
            let limit = limit(class, 1, Duration::from_millis(1));
            let _held = limit.permit().await.unwrap();
            assert_eq!(limit.permit().await.err(), Some(refusal));
            assert_eq!(limit.waiting.load(Ordering::Acquire), 0);
            assert_eq!(limit.refused.get(), 1);
        }
    }

    #[tokio::test]
    async fn the_queue_is_bounded_and_callers_that_leave_make_room() {
        let limit = limit(ForwardClass::Unary, 1, PATIENCE);
        let _held = limit.permit().await.unwrap();
        let mut queue: Vec<_> = (0..WAITING_PER_PERMIT).map(|_| Box::pin(limit.permit())).collect();
        for waiting in &mut queue {
            assert!(futures_util::poll!(waiting).is_pending());
        }
        assert!(limit.permit().await.is_err(), "the queue is full");
        queue.pop();
        assert!(futures_util::poll!(Box::pin(limit.permit())).is_pending(), "there is room");
    }
}
