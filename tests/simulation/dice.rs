//! Chance, from a seed. Every task of a simulation has dice of its own, so that what one does draws nothing from another.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// A generator with the few questions that a simulation asks.
pub struct Dice(StdRng);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Dice for another task.
    pub fn fork(&mut self) -> Self {
        Self::new(self.0.random())
    }

    pub fn chance(&mut self, one_in: u32) -> bool {
        self.0.random_ratio(1, one_in)
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end.max(1))
    }

    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        self.0.random_range(low..=high.max(low))
    }

    /// A time below `milliseconds`, to the microsecond, so that two tasks seldom wake at the same instant.
    pub fn pause(&mut self, milliseconds: u64) -> Duration {
        Duration::from_micros(self.0.random_range(1..=milliseconds * 1000))
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}
