//! Whether what waits for many things has anything to do.
//!
//! Going through all of them to find that there is nothing costs as much as doing something. So all are given a waker which
//! remembers that it was called. A Watch stream waits so, which hyper asks again after every piece and whenever anything about its
//! call changes, and so do the calls of a connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// Whether anything has become known since somebody has looked last.
pub(crate) struct News {
    shared: Arc<Shared>,
    waker: Waker,
}

struct Shared {
    is_there: AtomicBool,
    waiting: AtomicWaker,
}

impl Default for News {
    /// There is news to begin with.
    fn default() -> Self {
        let shared = Arc::new(Shared { is_there: AtomicBool::new(true), waiting: AtomicWaker::new() });
        Self { waker: Waker::from(shared.clone()), shared }
    }
}

impl News {
    /// If there is news: the waker for everything that is waited for, all of which is to be polled now. If not, the task of `cx`
    /// is woken when there is.
    pub(crate) fn take(&self, cx: &Context<'_>) -> Option<Waker> {
        self.shared.waiting.register(cx.waker());
        self.shared.is_there.swap(false, Ordering::AcqRel).then(|| self.waker.clone())
    }

    /// There is more than was done. Wakes nobody.
    pub(crate) fn keep(&self) {
        self.shared.is_there.store(true, Ordering::Release);
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Who left the news there has woken the task, or goes on by itself.
        if !self.is_there.swap(true, Ordering::AcqRel) {
            self.waiting.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::wakes::Wakes, *};

    #[test]
    fn news_is_told_once_and_wakes_whoever_looked_last() {
        let ((first, first_waker), (second, second_waker)) = (Wakes::task(), Wakes::task());
        let look = |news: &News, waker: &Waker| news.take(&Context::from_waker(waker));
        let woken = || (first.count(), second.count());
        let news = News::default();
        let inner = look(&news, &first_waker).expect("there is news to begin with");
        assert!(look(&news, &first_waker).is_none() && look(&news, &second_waker).is_none());
        inner.wake_by_ref();
        inner.wake_by_ref();
        assert_eq!(woken(), (0, 1), "a task that is woken already need not be told again");
        assert!(look(&news, &first_waker).is_some() && look(&news, &first_waker).is_none());
        news.keep();
        assert_eq!(woken(), (0, 1));
        assert!(look(&news, &first_waker).is_some());
    }

    #[test]
    fn news_that_comes_while_the_stream_works_is_not_lost() {
        let (wakes, waker) = Wakes::task();
        let news = News::default();
        let inner = news.take(&Context::from_waker(&waker)).unwrap();
        inner.wake_by_ref();
        assert_eq!(wakes.count(), 1);
        assert!(news.take(&Context::from_waker(&waker)).is_some());
    }
}
