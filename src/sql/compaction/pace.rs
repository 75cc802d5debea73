//! How large the steps of a compaction are: as large as writers hardly notice.
//!
//! A step makes the commit that it is part of longer, or keeps the next write waiting when it has a commit of its own. So it is
//! sized by the clock: beside writes, a step may take half as long as a commit takes without one; it has a commit of its own only
//! when no write has come for as long as that, and may take as long then. One commit in [`SAMPLE`] has no step, which keeps that
//! measure true.

use std::time::{Duration, Instant};

/// Log entries in the smallest and the largest step.
const SMALLEST: usize = 8;
const LARGEST: usize = 2048;

/// One in so many commits with writes goes without a step.
const SAMPLE: u32 = 16;

/// How long after the last write nobody is likely to come.
const QUIET: Duration = Duration::from_millis(100);

/// How long a step may take then.
const QUIET_STEP: Duration = Duration::from_millis(10);

/// Bounds of what a commit is taken to need.
const SHORTEST_COMMIT: Duration = Duration::from_micros(200);
const LONGEST_COMMIT: Duration = Duration::from_millis(5);

/// The present size, and what it follows from.
#[derive(Debug)]
pub struct Pace {
    size: usize,
    /// How long a commit with writes takes without a step, smoothed.
    usual: Duration,
    last_write: Option<Instant>,
    commits: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { size: SMALLEST, usual: Duration::from_micros(500), last_write: None, commits: 0 }
    }
}

impl Pace {
    /// Log entries to look at in one step.
    pub fn step(&self) -> usize {
        self.size
    }

    /// Whether a commit with so many writes takes a step.
    pub fn has_turn(&mut self, writes: usize) -> bool {
        self.commits = self.commits.wrapping_add(u32::from(writes > 0));
        writes == 0 || !self.commits.is_multiple_of(SAMPLE)
    }

    /// Learns from a commit.
    pub fn committed(&mut self, writes: usize, stepped: bool, took: Duration) {
        if writes > 0 {
            self.last_write = Some(Instant::now());
        }
        if stepped {
            let share = if writes > 0 { took.saturating_sub(self.usual) } else { took };
            self.resize(share <= self.allowed(writes));
        } else if writes > 0 {
            self.usual = ((self.usual * 7 + took) / 8).clamp(SHORTEST_COMMIT, LONGEST_COMMIT);
        }
    }

    /// How long to wait for a write before a step has a commit of its own.
    pub fn gap(&self) -> Duration {
        if self.is_quiet() { Duration::ZERO } else { self.usual }
    }

    fn is_quiet(&self) -> bool {
        self.last_write.is_none_or(|at| at.elapsed() > QUIET)
    }

    fn allowed(&self, writes: usize) -> Duration {
        match writes {
            0 if self.is_quiet() => QUIET_STEP,
            0 => self.usual,
            _ => self.usual / 2,
        }
    }

    fn resize(&mut self, grow: bool) {
        let size = if grow { self.size + self.size / 8 + 1 } else { self.size - self.size / 4 };
        self.size = size.clamp(SMALLEST, LARGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: Duration = Duration::from_millis(1);

    /// Commits with `writes` for a while, each entry of a step taking that long: the size in the end.
    fn settled(pace: &mut Pace, writes: usize, entry: Duration) -> usize {
        for _ in 0..2000 {
            let stepped = pace.has_turn(writes);
            let step = if stepped { entry * u32::try_from(pace.step()).unwrap() } else { Duration::ZERO };
            let commit = if writes > 0 { COMMIT } else { Duration::ZERO };
            pace.committed(writes, stepped, commit + step);
        }
        pace.step()
    }

    #[test]
    fn a_step_takes_half_as_long_as_a_commit_while_there_are_writes() {
        let mut pace = Pace::default();
        let size = settled(&mut pace, 1, Duration::from_micros(10));
        assert!((30..=70).contains(&size), "{size} entries of 10 µs beside commits of 1 ms");
        assert_eq!(pace.gap(), pace.usual);
        let size = settled(&mut pace, 1, Duration::from_millis(5));
        assert_eq!(size, SMALLEST);
    }

    #[test]
    fn steps_are_larger_while_nobody_writes() {
        let mut pace = Pace::default();
        let size = settled(&mut pace, 0, Duration::from_micros(10));
        assert!((600..=1300).contains(&size), "{size} entries of 10 µs in quiet");
        assert_eq!(pace.gap(), Duration::ZERO);
    }

    #[test]
    fn some_commits_go_without_a_step() {
        let mut pace = Pace::default();
        let steps = (0..160).filter(|_| pace.has_turn(1)).count();
        assert_eq!(steps, 150);
        assert!((0..160).all(|_| pace.has_turn(0)));
    }
}
