//! The feed and the consistent reads, simulated: one thread, a clock that stands still while anybody has something to do,
//! and everything that is up to chance drawn from a seed. See docs/checker.md.
//!
//! The subject is the real `Cache` on the real `Upstream`: its feed, its store, its proof of currency, its hub and sessions.
//! What is around it is a model: etcd members that speak etcd's API ([`model`]) over pipes that break in chosen ways
//! ([`link`]), clients ([`clients`], [`watchers`]) and faults ([`faults`]). The model knows the whole history, so every view
//! and every event can be compared with what is so ([`judge`]); when all has healed, the cache must be well again in bounded
//! time ([`run`]). What it once found is told again step by step ([`scenarios`]).
//!
//! `MILLPOND_SIMULATION_SEEDS` says how many simulations are run, `MILLPOND_TEST_SEED` which is the first; each has the
//! seed after the last one's. A failure names its seed.
//!
//! A seed repeats what happens to the millisecond, which is how fine tokio's clock is. In what order things happen within
//! the same millisecond is not always repeated: `tokio::sync::watch` wakes its receivers, and `select!` tries its branches,
//! in an order that tokio draws by itself. Of three seeds, two have traces that are always the same but for the order of lines of
//! the same instant. For the others such an order decides what follows, and there are a few traces that come again and again, which a
//! test asserts of most seeds; a breach that hangs on it may need a few tries.

mod call;
mod clients;
mod dice;
mod faults;
mod judge;
mod link;
mod model;
mod run;
mod scenarios;
mod watchers;
mod world;

use std::{
    env,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use run::{Outcome, run};

/// How many simulations are run, unless it is said.
const SEEDS: u64 = 100;
/// How many of them are run again, up to so many times, to see that they are repeated.
const REPEATED: u64 = 5;
const RUNS: usize = 4;
/// Lines of the trace that are shown of a failure, up to the first breach.
const SHOWN: usize = 400;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// The same each time, unless others are asked for: a failure is to come from a change.
fn first_seed() -> u64 {
    number("MILLPOND_TEST_SEED").unwrap_or(1)
}

/// Runs the seeds from `first` on, on every core, until one fails or all have been run.
fn run_all(first: u64, count: u64) -> Option<(u64, Outcome)> {
    let next = AtomicU64::new(0);
    let failed = parking_lot::Mutex::new(None);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count || failed.lock().is_some() {
                return;
            }
            let outcome = run(first.wrapping_add(index));
            if !outcome.breaches.is_empty() {
                failed.lock().get_or_insert((first.wrapping_add(index), outcome));
            }
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    failed.into_inner()
}

#[test]
fn everything_told_is_so_in_every_interleaving() {
    let (first, count) = (first_seed(), number("MILLPOND_SIMULATION_SEEDS").unwrap_or(SEEDS));
    println!("MILLPOND_TEST_SEED={first}: {count} simulations");
    let Some((seed, outcome)) = run_all(first, count) else { return };
    let end = outcome.lines.iter().position(|line| line.contains("BREACH")).unwrap_or(outcome.lines.len());
    println!("up to the first breach:\n{}", outcome.lines[end.saturating_sub(SHOWN)..end].join("\n"));
    println!("BREACHES:\n{}", outcome.breaches.join("\n"));
    panic!("{} breaches; MILLPOND_TEST_SEED={seed} MILLPOND_SIMULATION_SEEDS=1", outcome.breaches.len());
}

/// Whether two of a few runs of `seed` are the same but for the order of lines of the same instant.
fn repeats(seed: u64) -> bool {
    let mut seen = Vec::new();
    (0..RUNS).any(|_| {
        let mut lines = run(seed).lines;
        lines.sort();
        let is_known = seen.contains(&lines);
        seen.push(lines);
        is_known
    })
}

#[test]
fn a_seed_repeats_what_happens() {
    let first = first_seed();
    let repeated = (0..REPEATED).filter(|index| repeats(first.wrapping_add(*index))).count() as u64;
    assert!(repeated * 2 > REPEATED, "only {repeated} of {REPEATED} seeds from {first} on");
}
