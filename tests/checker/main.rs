//! The checker: writers, readers and watchers at two Millponds and their etcd at once, while faults strike at random, and
//! then an exact judgement of everything that they were told. See docs/checker.md.
//!
//! - [`run`]: a run from beginning to end.
//! - [`world`], [`clients`], [`faults`]: the servers, who uses them, and what goes wrong.
//! - [`recorder`], [`history`], [`timeline`], [`record`]: what really happened, and what was told.
//! - [`judge`]: the comparison.
//!
//! `MILLPOND_CHECKER_SECONDS` sets how long it runs, `MILLPOND_TEST_SEED` repeats a schedule.

mod clients;
mod context;
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

/// Three runs: one of them on a cluster of three.
const SHORT_CHECK: Duration = Duration::from_secs(90);

fn duration() -> Duration {
    let seconds = |text: String| text.parse().expect("MILLPOND_CHECKER_SECONDS is a number of seconds");
    env::var("MILLPOND_CHECKER_SECONDS").map_or(SHORT_CHECK, |text| Duration::from_secs(seconds(text)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_told_is_so_whatever_breaks() {
    let (duration, seed, start) = (duration(), seed(), Instant::now());
    let mut counts = Counts::default();
    let mut faults: BTreeMap<String, usize> = BTreeMap::new();
    let mut runs = 0;
    while start.elapsed() < duration {
        // Every third run has a cluster of three; the others restore their etcd from backups.
        let members = if runs % 3 == 1 { 3 } else { 1 };
        let remaining = duration.saturating_sub(start.elapsed()).max(Duration::from_secs(5));
        let outcome = run::run(seed.wrapping_add(runs), members, remaining.min(RUN)).await;
        counts.add(&outcome.counts);
        outcome.faults.iter().for_each(|(kind, count)| *faults.entry(kind.clone()).or_default() += count);
        println!("run {runs}, {members} members, seed {}: {:?}", seed.wrapping_add(runs), outcome.counts);
        report(seed.wrapping_add(runs), members, &outcome);
        runs += 1;
    }
    println!("{runs} runs in {:?}: {counts:?}\nfaults: {faults:?}", start.elapsed());
    assert!(counts.reads > 0 && counts.events > 0 && counts.progress > 0, "something was compared");
}

/// Fails with the smallest breach of each check.
fn report(seed: u64, members: usize, outcome: &run::Outcome) {
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
    panic!("{} breaches; seed {seed}, {members} members", outcome.breaches.len());
}
