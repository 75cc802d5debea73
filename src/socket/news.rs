//! Whether what waits for many things has anything to do.
//!
//! Going through all of them to find that there is nothing costs as much as doing something. So all are given a waker which
//! remembers that it was called. A Watch stream waits so, which is asked again after every piece and whenever anything about its
//! call changes, and so do the calls of a connection. What seldom has news has a waker of its own: a stream that is woken for an
//! event, as nearly always, need not look at it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Wake, Waker},
};

use futures_util::task::AtomicWaker;

const OFTEN: u8 = 1;
const SELDOM: u8 = 2;

/// Whether anything has become known since somebody has looked last.
pub(crate) struct News {
    shared: Arc<Shared>,
    often: Waker,
    seldom: Waker,
}

/// What there is news of, and so what is to be polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Of what often has some: what is woken by [`News::often`].
    Usual,
    /// Of anything: what is woken by [`News::seldom`] as well.
    Everything,
}

struct Shared {
    known: AtomicU8,
    waiting: AtomicWaker,
}

/// What wakes for that which seldom has news.
struct Seldom(Arc<Shared>);

impl Default for News {
    /// There is news of everything to begin with.
    fn default() -> Self {
        let shared = Arc::new(Shared { known: AtomicU8::new(OFTEN | SELDOM), waiting: AtomicWaker::new() });
        let seldom = Waker::from(Arc::new(Seldom(shared.clone())));
        Self { often: Waker::from(shared.clone()), seldom, shared }
    }
}

impl News {
    /// What there is news of. If of nothing, the task of `cx` is woken when there is.
    pub(crate) fn take(&self, cx: &Context<'_>) -> Option<Extent> {
        self.shared.waiting.register(cx.waker());
        match self.shared.known.swap(0, Ordering::AcqRel) {
            0 => None,
            OFTEN => Some(Extent::Usual),
            _ => Some(Extent::Everything),
        }
    }

    /// What is to wake for most things.
    pub(crate) fn often(&self) -> &Waker {
        &self.often
    }

    /// What is to wake for things that seldom happen.
    pub(crate) fn seldom(&self) -> &Waker {
        &self.seldom
    }

    /// There is more of everything than was done. Wakes nobody.
    pub(crate) fn keep(&self) {
        self.shared.known.fetch_or(OFTEN | SELDOM, Ordering::AcqRel);
    }
}

impl Shared {
    fn tell(&self, news: u8) {
        // Who left the news there has woken the task, or goes on by itself.
        if self.known.fetch_or(news, Ordering::AcqRel) == 0 {
            self.waiting.wake();
        }
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.tell(OFTEN);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.tell(OFTEN);
    }
}

impl Wake for Seldom {
    fn wake(self: Arc<Self>) {
        self.0.tell(SELDOM);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.tell(SELDOM);
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
        assert_eq!(look(&news, &first_waker), Some(Extent::Everything), "there is news to begin with");
        assert!(look(&news, &first_waker).is_none() && look(&news, &second_waker).is_none());
        news.often().wake_by_ref();
        news.often().wake_by_ref();
        assert_eq!(woken(), (0, 1), "a task that is woken already need not be told again");
        assert_eq!(look(&news, &first_waker), Some(Extent::Usual));
        assert!(look(&news, &first_waker).is_none());
        news.keep();
        assert_eq!(woken(), (0, 1));
        assert_eq!(look(&news, &first_waker), Some(Extent::Everything));
    }

    #[test]
    fn what_seldom_has_news_is_told_apart_and_wakes_as_well() {
        let (wakes, waker) = Wakes::task();
        let cx = Context::from_waker(&waker);
        let news = News::default();
        news.take(&cx);
        news.seldom().wake_by_ref();
        assert_eq!((wakes.count(), news.take(&cx)), (1, Some(Extent::Everything)));
        news.often().wake_by_ref();
        news.seldom().wake_by_ref();
        assert_eq!((wakes.count(), news.take(&cx), news.take(&cx)), (2, Some(Extent::Everything), None));
    }

    #[test]
    fn news_that_comes_while_the_stream_works_is_not_lost() {
        let (wakes, waker) = Wakes::task();
        let news = News::default();
        news.take(&Context::from_waker(&waker)).unwrap();
        news.often().wake_by_ref();
        assert_eq!(wakes.count(), 1);
        assert!(news.take(&Context::from_waker(&waker)).is_some());
    }
}
