//! The calls of one HTTP/2 connection, run in the connection's own task.
//!
//! A task per call would cost more than a read from memory does: its allocation, its turn in the scheduler, and often the
//! waking of another thread for it. Here, the calls that one read from the socket brought are begun together as soon as the
//! connection has nothing more to read; most are over at once, and all their answers leave in one write. What has to wait (a
//! watch, a forwarded call, a read that wants proof) is polled when it is woken, which wakes its connection's task once for a
//! burst.
//!
//! On a connection to the upstream, hyper hands over three futures instead: what reads and writes the frames, what sends a
//! request's body, and what waits for its answer. As tasks, they woke each other on several threads for every call.
//!
//! The connection and its calls wake each other all the time. [`Turn`] keeps that from the scheduler.
//!
//! The price: one connection's calls never run on two cores. Its HTTP/2 frames never did.

use std::{
    future::{Future, poll_fn},
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use hyper::rt::Executor;
use parking_lot::Mutex;
use tokio::{io::AsyncWrite, task::coop::has_budget_remaining};

use super::{
    News, Outlet,
    turn::{Next, Turn},
};

/// A call under way.
pub(crate) struct Call(Pin<Box<dyn Future<Output = Option<Call>> + Send>>);

impl Call {
    /// A call that ends with nothing, or with what is left of it. That takes its place, in room of its own size, and has to have
    /// been polled with the same waker just before, and to wait.
    pub(crate) fn new(call: impl Future<Output = Option<Self>> + Send + 'static) -> Self {
        // A panic, should there be one, ends nothing but its call, as if that had a task of its own.
        let isolated = AssertUnwindSafe(call).catch_unwind();
        Self(Box::pin(isolated.map(|outcome| {
            outcome.unwrap_or_else(|_| {
                tracing::error!("a call panicked");
                None
            })
        })))
    }
}

impl Future for Call {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(self.0.as_mut().poll(cx)) {
            Some(left) => {
                *self = left;
                Poll::Pending
            }
            None => Poll::Ready(()),
        }
    }
}

/// Takes the calls of one connection.
#[derive(Clone, Default)]
pub(crate) struct NewCalls(Arc<Mutex<Vec<Call>>>);

impl NewCalls {
    pub(crate) fn add(&self, call: Call) {
        self.0.lock().push(call);
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for NewCalls {
    fn execute(&self, call: F) {
        self.add(Call::new(call.map(|()| None)));
    }
}

/// Runs the calls of one connection.
#[derive(Default)]
pub(crate) struct Calls {
    new: NewCalls,
    running: FuturesUnordered<Call>,
    /// Whether one of them was woken.
    news: News,
    turn: Turn,
}

impl Calls {
    /// Where the connection's calls are to be handed over.
    pub(crate) fn executor(&self) -> NewCalls {
        self.new.clone()
    }

    /// Polls the calls and the connection that were woken, and then writes what they have to send. Ready when the connection is; what
    /// was left of its calls is dropped with `self`.
    pub(crate) fn poll<C: Future + ?Sized, S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        outlet: &mut Outlet<S>,
        mut connection: Pin<&mut C>,
    ) -> Poll<C::Output> {
        self.poll_until(cx, outlet, |calls, cx| match calls.turn.takes_connection() {
            true => connection.as_mut().poll(cx),
            false => Poll::Pending,
        })
    }

    /// Runs the calls, of which the connection is one, until none is left.
    pub(crate) async fn run<S: AsyncWrite + Unpin>(mut self, mut outlet: Outlet<S>) {
        let is_over = |calls: &mut Self| if calls.is_empty() { Poll::Ready(()) } else { Poll::Pending };
        poll_fn(|cx| self.poll_until(cx, &mut outlet, |calls, _| is_over(calls))).await;
    }

    /// Polls the calls, and then `end`, for as long as one of them has something to do. Ready when `end` is.
    fn poll_until<T, S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        outlet: &mut Outlet<S>,
        mut end: impl FnMut(&mut Self, &mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let wakers = self.turn.begin(cx);
        // The connection is told, too, when the outlet finds that the socket is broken.
        let cx = &mut Context::from_waker(&wakers.connection);
        loop {
            self.run_woken(&Context::from_waker(&wakers.calls));
            if let Poll::Ready(end) = end(self, cx) {
                return Poll::Ready(end);
            }
            let new = std::mem::take(&mut *self.new.0.lock());
            if new.is_empty() {
                match self.turn.next() {
                    Next::Look => continue,
                    next => {
                        outlet.end_turn(cx, next == Next::Turn);
                        return Poll::Pending;
                    }
                }
            }
            new.into_iter().for_each(|call| self.begin(call));
        }
    }

    /// Polls the calls that were woken.
    fn run_woken(&mut self, cx: &Context<'_>) {
        // The set comes back as soon as two calls have woken themselves while they were polled, and h2 wakes every call that
        // sends. If the others were left for later, the events of a burst would leave two by two.
        for _ in 0..=self.running.len() {
            if self.news.take(cx).is_none() {
                break;
            }
            let cx = &mut Context::from_waker(self.news.often());
            while let Poll::Ready(Some(())) = self.running.poll_next_unpin(cx) {}
            if !has_budget_remaining() {
                break;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.running.is_empty() && self.new.0.lock().is_empty()
    }

    /// Runs a call to its first wait. One that has to wait is polled again at once, with the others that run, so nobody has to
    /// be woken for the first time.
    fn begin(&mut self, mut call: Call) {
        if call.poll_unpin(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.running.push(call);
            self.news.keep();
        }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        // A call holds its executor, which holds what was not begun.
        let new = std::mem::take(&mut *self.new.0.lock());
        drop(new);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, poll_fn},
        pin::pin,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use tokio::sync::oneshot;

    use super::{super::Gather, *};

    type CallFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

    /// A connection that hands over `calls`, then waits for `end`.
    async fn connection(executor: NewCalls, calls: Vec<CallFuture>, end: oneshot::Receiver<()>) {
        calls.into_iter().for_each(|call| executor.execute(call));
        let _ = end.await;
    }

    async fn run(calls: Vec<CallFuture>, end: oneshot::Receiver<()>) {
        let mut running = Calls::default();
        let mut connection = Box::pin(connection(running.executor(), calls, end));
        let mut outlet = Gather::new(tokio::io::empty()).outlet();
        poll_fn(|cx| running.poll(cx, &mut outlet, connection.as_mut())).await;
    }

    /// Tells when it is dropped.
    struct Witness(Arc<AtomicUsize>);

    impl Drop for Witness {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_call_that_waits_is_woken_and_lets_others_pass() {
        let (end, ended) = oneshot::channel();
        let (go, gone) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        let waits = async move {
            gone.await.unwrap();
            tell.send(()).unwrap();
        };
        let passes = async move { go.send(()).unwrap() };
        let ends = async move {
            told.await.unwrap();
            end.send(()).unwrap();
        };
        run(vec![Box::pin(waits), Box::pin(ends), Box::pin(passes)], ended).await;
    }

    /// As the streams of a connection that are all sent an event: h2 wakes each of them while it sends.
    #[tokio::test]
    async fn calls_that_wake_themselves_are_all_polled_before_their_connection() {
        const CALLS: usize = 100;
        let (mut running, polls) = (Calls::default(), Arc::new(AtomicUsize::new(0)));
        let (executor, done) = (running.executor(), Arc::new(AtomicUsize::new(0)));
        let event = tokio::sync::watch::Sender::new(false);
        for _ in 0..CALLS {
            let (mut events, done) = (event.subscribe(), done.clone());
            executor.execute(async move {
                events.changed().await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
                poll_fn(|cx| {
                    cx.waker().wake_by_ref();
                    Poll::Ready(())
                })
                .await;
                pending::<()>().await;
            });
        }
        let mut connection = pin!(poll_fn(|_| {
            polls.fetch_add(1, Ordering::Relaxed);
            Poll::<()>::Pending
        }));
        let mut outlet = Gather::new(tokio::io::empty()).outlet();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(running.poll(&mut cx, &mut outlet, connection.as_mut()).is_pending());
        event.send(true).unwrap();
        let before = polls.load(Ordering::Relaxed);
        assert!(running.poll(&mut cx, &mut outlet, connection.as_mut()).is_pending());
        assert_eq!(done.load(Ordering::Relaxed), CALLS);
        let polls = polls.load(Ordering::Relaxed) - before;
        assert!(polls <= 2, "the connection was polled {polls} times");
    }

    #[tokio::test]
    async fn without_a_connection_calls_run_until_none_is_left() {
        let over = Arc::new(AtomicUsize::new(0));
        let calls = Calls::default();
        let (first, second) = (calls.executor(), over.clone());
        calls.executor().execute(async move {
            tokio::task::yield_now().await;
            first.execute(async move {
                tokio::task::yield_now().await;
                second.fetch_add(1, Ordering::Relaxed);
            });
        });
        calls.run(Gather::new(tokio::io::empty()).outlet()).await;
        assert_eq!(over.load(Ordering::Relaxed), 1);
    }

    /// A call of which something is left takes its waker along: nobody polls what is left before it is woken.
    #[tokio::test]
    async fn what_is_left_of_a_call_goes_on_in_its_place() {
        for is_late in [false, true] {
            let ((go, mut gone), (end, ended)) = (oneshot::channel::<()>(), oneshot::channel());
            let polls = Arc::new(AtomicUsize::new(0));
            let (calls, counted) = (Calls::default(), polls.clone());
            let executor = calls.executor();
            let left = poll_fn(move |cx| {
                counted.fetch_add(1, Ordering::Relaxed);
                gone.poll_unpin(cx).map(drop)
            });
            let mut left = Some(Box::pin(left.map(move |()| end.send(()).unwrap())));
            executor.add(Call::new(async move {
                if is_late {
                    tokio::task::yield_now().await;
                }
                poll_fn(move |cx| {
                    let waits = left.as_mut().is_some_and(|left| left.poll_unpin(cx).is_pending());
                    assert!(waits);
                    Poll::Ready(left.take().map(|left| Call::new(left.map(|()| None))))
                })
                .await
            }));
            let running = tokio::spawn(calls.run(Gather::new(tokio::io::empty()).outlet()));
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            // One that is left at once is polled again with the others that run.
            assert_eq!(polls.load(Ordering::Relaxed), if is_late { 1 } else { 2 });
            go.send(()).unwrap();
            ended.await.unwrap();
            running.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_call_that_panics_ends_alone() {
        let (end, ended) = oneshot::channel();
        let panics = async { panic!("on purpose") };
        let ends = async move { end.send(()).unwrap() };
        run(vec![Box::pin(panics), Box::pin(ends)], ended).await;
    }

    #[tokio::test]
    async fn what_was_not_over_goes_with_the_connection() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let waits = |witness: Witness| -> CallFuture {
            Box::pin(async move {
                pending::<()>().await;
                drop(witness);
            })
        };
        let mut running = Calls::default();
        let executor = running.executor();
        executor.execute(waits(Witness(dropped.clone())));
        // The second poll is the end of the connection, at which a call was handed over that nobody begins.
        let mut polls = 0;
        let mut connection = Box::pin(poll_fn(move |cx| {
            polls += 1;
            if polls == 1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            executor.execute(waits(Witness(dropped.clone())));
            Poll::Ready(dropped.clone())
        }));
        let mut outlet = Gather::new(tokio::io::empty()).outlet();
        let dropped = poll_fn(|cx| running.poll(cx, &mut outlet, connection.as_mut())).await;
        drop(connection);
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        drop(running);
        assert_eq!(dropped.load(Ordering::Relaxed), 2);
    }
}
