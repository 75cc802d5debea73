//! Values that every call looks at, and that change now and then.
//!
//! tokio's `watch` tells of changes, but a look at its value takes a lock, and so writes to memory that all cores share: with a
//! few looks for each call, they would spend their time on taking it from each other. A look at a [`SignalReader`] writes
//! nothing, unless the value is changing at that moment.

use std::sync::Arc;

use crossbeam_utils::{CachePadded, atomic::AtomicCell};
use tokio::sync::watch;

/// A value, for the one who changes it.
pub struct Signal<T> {
    changes: watch::Sender<T>,
    now: Arc<CachePadded<AtomicCell<T>>>,
}

/// A value, for those who look at it.
#[derive(Clone)]
pub struct SignalReader<T> {
    changes: watch::Receiver<T>,
    now: Arc<CachePadded<AtomicCell<T>>>,
}

impl<T: Copy + PartialEq> Signal<T> {
    /// A value that is `first` to begin with.
    pub fn new(first: T) -> Self {
        Self { changes: watch::Sender::new(first), now: Arc::new(CachePadded::new(AtomicCell::new(first))) }
    }

    /// The value.
    pub fn now(&self) -> T {
        self.now.load()
    }

    /// For somebody who looks at it.
    pub fn reader(&self) -> SignalReader<T> {
        SignalReader { changes: self.changes.subscribe(), now: self.now.clone() }
    }

    /// Changes the value, if `value` is another one. Who is woken by that sees it.
    pub fn set(&self, value: T) {
        self.changes.send_if_modified(|before| {
            let is_another = *before != value;
            if is_another {
                self.now.store(value);
                *before = value;
            }
            is_another
        });
    }
}

impl<T: Copy> SignalReader<T> {
    /// The value.
    pub fn now(&self) -> T {
        self.now.load()
    }

    /// To wait for changes. The first wait is over at once if there has been one since this, or what it is a clone of, was made.
    pub fn changes(&self) -> watch::Receiver<T> {
        self.changes.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_told_of_a_change_sees_it() {
        const LAST: u64 = 10_000;
        let signal = Signal::new(0);
        let reader = signal.reader();
        let mut changes = reader.changes();
        let waiter = std::thread::spawn(move || {
            let mut told_by_change = 0;
            while told_by_change < LAST {
                told_by_change = *changes.borrow_and_update();
                assert!(told_by_change <= reader.now());
            }
        });
        (1..=LAST).for_each(|value| signal.set(value));
        waiter.join().unwrap();
    }

    #[test]
    fn nobody_is_woken_by_what_is_no_change() {
        let signal = Signal::new(7);
        let changes = signal.reader().changes();
        signal.set(7);
        assert!(!changes.has_changed().unwrap());
        signal.set(8);
        assert!(changes.has_changed().unwrap());
    }
}
