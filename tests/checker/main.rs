//! The checker: writers, readers and watchers at two Millponds and their etcd at once, while faults strike at random, and
//! then an exact judgement of everything that they were told. See docs/checker.md.
//!
//! - [`run`]: a run from beginning to end. [`embedded`]: one on the embedded store.
//! - [`world`], [`clients`], [`faults`]: the servers, who uses them, and what goes wrong.
//! - [`recorder`], [`history`], [`timeline`], [`record`]: what really happened, and what was told.
//! - [`judge`]: the comparison.
//!
//! `MILLPOND_CHECKER_SECONDS` sets how long it runs, `MILLPOND_TEST_SEED` repeats a schedule.

mod clients;
mod context;
mod embedded;
mod faults;
mod history;
mod judge;
mod record;
mod recorder;
mod run;
#[path = "../support/mod.rs"]
mod support;
mod timeline;
mod world;

use std::{collections::BTreeMap, env, time::Duration};

use judge::Counts;
use support::random::seed;
use tokio::time::Instant;

/// How long one run lasts; a longer check is many runs, each with servers and a seed of its own.
const RUN: Duration = Duration::from_secs(30);

/// How long Millponds in front of an etcd are checked when nobody says: three runs, one of them on a cluster of three.
const SHORT_CHECK: Duration = Duration::from_secs(90);

/// How long to check: as long as is said, or else as long as is usual.
fn duration(usual: Duration) -> Duration {
    let seconds = |text: String| text.parse().expect("MILLPOND_CHECKER_SECONDS is a number of seconds");
    env::var("MILLPOND_CHECKER_SECONDS").map_or(usual, |text| Duration::from_secs(seconds(text)))
}

/// How long the embedded store is checked when nobody says.
const EMBEDDED: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_told_is_so_whatever_breaks() {
    let (duration, seed, start) = (duration(SHORT_CHECK), seed(), Instant::now());
    let mut total = Total::default();
    while start.elapsed() < duration {
        // Every third run has a cluster of three; the others restore their etcd from backups.
        let members = if total.runs % 3 == 1 { 3 } else { 1 };
        let remaining = duration.saturating_sub(start.elapsed()).max(Duration::from_secs(5));
        let seed = seed.wrapping_add(total.runs);
        total.add(seed, &format!("{members} members"), &run::run(seed, members, remaining.min(RUN)).await);
    }
    total.print(start);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_store_keeps_everything_it_told_whenever_it_is_killed() {
    let (seed, duration, start) = (seed(), duration(EMBEDDED), Instant::now());
    let mut total = Total::default();
    while start.elapsed() < duration {
        let remaining = duration.saturating_sub(start.elapsed()).max(Duration::from_secs(5));
        let seed = seed.wrapping_add(total.runs);
        total.add(seed, "embedded store", &embedded::run(seed, remaining.min(RUN)).await);
    }
    total.print(start);
}

/// What all runs of a check come to.
#[derive(Default)]
struct Total {
    runs: u64,
    counts: Counts,
    faults: BTreeMap<String, usize>,
}

impl Total {
    /// Takes a run in, and fails if anything is wrong with it.
    fn add(&mut self, seed: u64, what: &str, outcome: &run::Outcome) {
        println!("run {}, {what}, seed {seed}: {:?} {:?}", self.runs, outcome.counts, outcome.faults);
        self.runs += 1;
        self.counts.add(&outcome.counts);
        outcome.faults.iter().for_each(|(kind, count)| *self.faults.entry(kind.clone()).or_default() += count);
        report(seed, what, outcome);
    }

    fn print(&self, start: Instant) {
        let Self { runs, counts, faults } = self;
        println!("{runs} runs in {:?}: {counts:?}\nfaults: {faults:?}", start.elapsed());
        assert!(counts.reads > 0 && counts.events > 0 && counts.progress > 0, "something was compared");
    }
}

/// Fails with the smallest breach of each check.
fn report(seed: u64, what: &str, outcome: &run::Outcome) {
    if outcome.breaches.is_empty() {
        return;
    }
    println!("faults of the run:\n{}", outcome.log);
    for (number, log) in outcome.millponds.iter().enumerate() {
        println!("log of millpond {number}:\n{log}");
    }
    let mut shown = "";
    for breach in &outcome.breaches {
        if breach.check != shown {
            shown = breach.check;
            let count = outcome.breaches.iter().filter(|other| other.check == shown).count();
            println!("BREACH ({count} of this kind): {shown}\n    {}", breach.text);
        }
    }
    panic!("{} breaches; seed {seed}, {what}", outcome.breaches.len());
}
