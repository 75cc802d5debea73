//! Wakes a connection's task for its calls, without the scheduler where that has nothing to add, and tells when the connection itself was
//! woken: where only a call was, there is no frame to look for.
//!
//! A call that is ready wakes its connection to write, and a connection that has read wakes its calls. Told to the scheduler,
//! each of these would put the task at the end of the queue and, often, another thread to work. While the task is being polled,
//! it is enough to look again. Only a wake from another thread goes the long way, since more of its kind are about to follow: the
//! events of a burst for the other watchers of the connection, which are to leave in one write.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    task::{Context, Wake, Waker},
};

use futures_util::task::AtomicWaker;
use tokio::task::coop::has_budget_remaining;

/// The task is being polled.
const POLLED: u8 = 1;
/// It was woken by the thread that polls it.
const WOKEN_HERE: u8 = 2;
/// It was woken by another.
const WOKEN_ELSEWHERE: u8 = 4;

/// The connection is to be polled, not only its calls.
const CONNECTION: u8 = 8;

/// How often the task looks again at most, before others have their turn.
const LOOKS: u8 = 32;

/// The turns of one task.
pub(crate) struct Turn {
    shared: Arc<Shared>,
    wakers: Wakers,
    looks: u8,
    /// The connection was woken, and not polled since.
    is_due: bool,
}

/// What wakes the task. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Wakers {
    /// For the calls.
    pub(crate) calls: Waker,
    /// For the connection, and what it waits for.
    pub(crate) connection: Waker,
}

/// What follows when everything was polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Something was woken meanwhile: everything is to be polled again.
    Look,
    /// The turn is over, and the task will have another one at once.
    Turn,
    /// The turn is over, until something is woken.
    Rest,
}

#[derive(Default)]
struct Shared {
    task: AtomicWaker,
    state: AtomicU8,
    /// The thread that polls the task, or did so last.
    thread: AtomicUsize,
}

impl Default for Turn {
    fn default() -> Self {
        let shared = Arc::<Shared>::default();
        let connection = Waker::from(Arc::new(OfConnection(shared.clone())));
        Self { wakers: Wakers { calls: Waker::from(shared.clone()), connection }, shared, looks: 0, is_due: true }
    }
}

impl Turn {
    /// Begins a turn of the task that `cx` wakes. What is polled in it is to be woken by the wakers that this gives.
    pub(crate) fn begin(&mut self, cx: &Context<'_>) -> Wakers {
        self.looks = 0;
        self.shared.task.register(cx.waker());
        self.shared.thread.store(this_thread(), Ordering::Relaxed);
        self.look();
        self.wakers.clone()
    }

    /// From now on, what is woken is looked after before the turn is over.
    fn look(&mut self) {
        let woken = self.shared.state.swap(POLLED, Ordering::AcqRel);
        self.is_due |= woken & CONNECTION != 0;
    }

    /// Whether the connection is to be polled: it has not been yet, or was woken since. To be polled then.
    pub(crate) fn takes_connection(&mut self) -> bool {
        let was_due = std::mem::take(&mut self.is_due);
        let state = &self.shared.state;
        let is_woken = state.load(Ordering::Acquire) & CONNECTION != 0;
        was_due | (is_woken && state.fetch_and(!CONNECTION, Ordering::AcqRel) & CONNECTION != 0)
    }

    /// What follows when everything was polled. Until the next turn, everything that is woken wakes the task.
    pub(crate) fn next(&mut self) -> Next {
        let state = &self.shared.state;
        let Err(woken) = state.compare_exchange(POLLED, 0, Ordering::AcqRel, Ordering::Acquire) else {
            return Next::Rest;
        };
        self.looks += 1;
        // Without budget, everything of tokio's wakes its task at once and does nothing.
        if woken & WOKEN_ELSEWHERE == 0 && self.looks < LOOKS && has_budget_remaining() {
            self.look();
            return Next::Look;
        }
        state.fetch_and(!POLLED, Ordering::AcqRel);
        self.shared.task.wake();
        Next::Turn
    }
}

impl Shared {
    fn tell(&self, who: u8) {
        let here = self.thread.load(Ordering::Relaxed) == this_thread();
        let woken = who | if here { WOKEN_HERE } else { WOKEN_ELSEWHERE };
        if self.state.fetch_or(woken, Ordering::AcqRel) == 0 {
            self.task.wake();
        }
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.tell(0);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.tell(0);
    }
}

/// What wakes for the connection.
struct OfConnection(Arc<Shared>);

impl Wake for OfConnection {
    fn wake(self: Arc<Self>) {
        self.0.tell(CONNECTION);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.tell(CONNECTION);
    }
}

/// A number that no other living thread has.
fn this_thread() -> usize {
    thread_local!(static HERE: Cell<u8> = const { Cell::new(0) });
    HERE.with(|here| std::ptr::from_ref(here).addr())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::{super::wakes::Wakes, *};

    #[test]
    fn a_wake_between_turns_is_told_once() {
        let ((wakes, task), mut turn) = (Wakes::task(), Turn::default());
        let waker = turn.begin(&Context::from_waker(&task)).calls;
        assert_eq!(turn.next(), Next::Rest);
        (0..3).for_each(|_| waker.wake_by_ref());
        assert_eq!(wakes.count(), 1);
        turn.begin(&Context::from_waker(&task));
        assert_eq!(turn.next(), Next::Rest);
        assert_eq!(wakes.count(), 1);
    }

    #[test]
    fn a_wake_within_a_turn_is_looked_after_there_but_not_for_ever() {
        let ((wakes, task), mut turn) = (Wakes::task(), Turn::default());
        let waker = turn.begin(&Context::from_waker(&task)).calls;
        for _ in 1..LOOKS {
            waker.wake_by_ref();
            assert_eq!(turn.next(), Next::Look);
        }
        assert_eq!(wakes.count(), 0);
        waker.wake_by_ref();
        assert_eq!(turn.next(), Next::Turn);
        assert_eq!(wakes.count(), 1);
    }

    #[test]
    fn a_connection_is_polled_when_it_was_woken_and_only_then() {
        let ((wakes, task), mut turn) = (Wakes::task(), Turn::default());
        let Wakers { calls, connection } = turn.begin(&Context::from_waker(&task));
        assert!(turn.takes_connection() && !turn.takes_connection(), "it has to begin");
        calls.wake_by_ref();
        assert_eq!((turn.next(), turn.takes_connection()), (Next::Look, false));
        connection.wake_by_ref();
        assert!(turn.takes_connection() && !turn.takes_connection(), "a call has woken it in this turn");
        connection.wake_by_ref();
        assert_eq!((turn.next(), turn.next()), (Next::Look, Next::Rest));
        connection.wake_by_ref();
        assert_eq!(wakes.count(), 1);
        turn.begin(&Context::from_waker(&task));
        thread::scope(|scope| drop(scope.spawn(|| connection.wake_by_ref())));
        assert_eq!(turn.next(), Next::Turn);
        turn.begin(&Context::from_waker(&task));
        assert!(
            turn.takes_connection() && !turn.takes_connection(),
            "several wakes, before and between turns, and no look since"
        );
    }

    #[test]
    fn a_wake_from_another_thread_gives_it_time_for_more() {
        let ((wakes, task), mut turn) = (Wakes::task(), Turn::default());
        let waker = turn.begin(&Context::from_waker(&task)).calls;
        thread::scope(|scope| drop(scope.spawn(|| waker.wake_by_ref())));
        assert_eq!(turn.next(), Next::Turn);
        // The task is to be polled already, so more of them need not tell it.
        thread::scope(|scope| drop(scope.spawn(|| waker.wake_by_ref())));
        assert_eq!(wakes.count(), 1);
    }

    /// However wakes and turns meet, the last wake is followed by a turn.
    #[test]
    fn no_wake_is_lost() {
        let (wakes, task) = Wakes::task();
        let mut turn = Turn::default();
        let work = AtomicUsize::new(0);
        let (mut done, mut seen) = (0, 0);
        let waker = turn.begin(&Context::from_waker(&task)).calls;
        assert_eq!(turn.next(), Next::Rest);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..50_000 {
                        work.fetch_add(1, Ordering::Relaxed);
                        waker.wake_by_ref();
                    }
                });
            }
            while done < 100_000 {
                let told = wakes.count();
                if told == seen {
                    std::hint::spin_loop();
                    continue;
                }
                seen = told;
                turn.begin(&Context::from_waker(&task));
                loop {
                    done = work.load(Ordering::Relaxed);
                    if turn.next() != Next::Look {
                        break;
                    }
                }
            }
        });
    }
}
