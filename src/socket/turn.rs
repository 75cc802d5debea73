//! Wakes a connection's task for its calls, without the scheduler where that has nothing to add.
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

/// How often the task looks again at most, before others have their turn.
const LOOKS: u8 = 32;

/// The turns of one task.
pub(crate) struct Turn {
    shared: Arc<Shared>,
    waker: Waker,
    looks: u8,
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
        Self { waker: Waker::from(shared.clone()), shared, looks: 0 }
    }
}

impl Turn {
    /// Begins a turn of the task that `cx` wakes. What is polled in it is to be woken by the waker that this gives.
    pub(crate) fn begin(&mut self, cx: &Context<'_>) -> Waker {
        self.looks = 0;
        self.shared.task.register(cx.waker());
        self.shared.thread.store(this_thread(), Ordering::Relaxed);
        self.shared.state.swap(POLLED, Ordering::AcqRel);
        self.waker.clone()
    }

    /// What follows when everything was polled. Until the next turn, everything that is woken wakes the task.
    pub(crate) fn next(&mut self) -> Next {
        let state = &self.shared.state;
        let Err(woken) = state.compare_exchange(POLLED, 0, Ordering::AcqRel, Ordering::Acquire) else {
            return Next::Rest;
        };
        self.looks += 1;
        // Without budget, everything of tokio's wakes its task at once and does nothing.
        if woken == POLLED | WOKEN_HERE && self.looks < LOOKS && has_budget_remaining() {
            state.swap(POLLED, Ordering::AcqRel);
            return Next::Look;
        }
        state.fetch_and(!POLLED, Ordering::AcqRel);
        self.shared.task.wake();
        Next::Turn
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let here = self.thread.load(Ordering::Relaxed) == this_thread();
        let before = self.state.fetch_or(if here { WOKEN_HERE } else { WOKEN_ELSEWHERE }, Ordering::AcqRel);
        if before == 0 {
            self.task.wake();
        }
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
        let waker = turn.begin(&Context::from_waker(&task));
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
        let waker = turn.begin(&Context::from_waker(&task));
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
    fn a_wake_from_another_thread_gives_it_time_for_more() {
        let ((wakes, task), mut turn) = (Wakes::task(), Turn::default());
        let waker = turn.begin(&Context::from_waker(&task));
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
        let waker = turn.begin(&Context::from_waker(&task));
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
