//! One simulation from beginning to end.

use std::sync::Arc;

use futures_util::FutureExt;
use millpond::{cache::Tense, feed::Phase, rules::KeyRange};
use parking_lot::Mutex;
use tokio::{
    task::AbortHandle,
    time::{Duration, sleep, timeout},
};

use crate::{
    clients,
    dice::Dice,
    faults,
    judge::oldest_in,
    model::history::Write,
    watchers::{self, Seen},
    world::World,
};

/// How long faults strike, in the simulation's time.
const TROUBLE: Duration = Duration::from_secs(8);
/// After which everything must be well again, once nothing strikes any more.
const RECOVERY: Duration = Duration::from_secs(30);

/// What became of a simulation.
pub struct Outcome {
    pub breaches: Vec<String>,
    /// What happened, each line after its time.
    pub lines: Vec<String>,
}

/// Runs the simulation of `seed`.
pub fn run(seed: u64) -> Outcome {
    simulated(simulate(Dice::new(seed)))
}

/// Runs something on one thread, with a clock that moves on only when nobody has anything to do.
pub fn simulated<T>(something: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(something)
}

async fn simulate(mut dice: Dice) -> Outcome {
    let world = World::start(&mut dice);
    let seen: Vec<Seen> = (0..3).map(|_| Arc::new(Mutex::new(None))).collect();
    let mut tasks: Vec<AbortHandle> = Vec::new();
    for seen in &seen {
        tasks.push(tokio::spawn(watchers::watch(world.clone(), dice.fork(), seen.clone())).abort_handle());
    }
    for lane in 0..world.0.ranges.len() {
        tasks.push(tokio::spawn(clients::observe(world.clone(), lane)).abort_handle());
    }
    for pause in [40, 40, 400] {
        tasks.push(tokio::spawn(clients::read(world.clone(), dice.fork(), pause)).abort_handle());
    }
    tasks.push(tokio::spawn(clients::read_serializable(world.clone(), dice.fork())).abort_handle());
    let mut trouble = vec![
        tokio::spawn(clients::write(world.clone(), dice.fork())),
        tokio::spawn(clients::write(world.clone(), dice.fork())),
        tokio::spawn(faults::strike(world.clone(), dice.fork())),
    ];
    // Whoever writes through the cache tells it much of the history.
    if dice.chance(2) {
        trouble.push(tokio::spawn(clients::relay(world.clone(), dice.fork())));
    }
    sleep(TROUBLE).await;
    while *world.0.restoring.lock() {
        sleep(Duration::from_millis(100)).await;
    }
    trouble.iter().for_each(|task| task.abort());
    // The faults that are there end by themselves before that.
    sleep(Duration::from_secs(3)).await;
    recover(&world, &seen).await;
    if tasks.iter().any(AbortHandle::is_finished) {
        world.0.trace.breach("every client goes on", "one has panicked");
    }
    if world.0.cache.failed().now_or_never().is_some() {
        world.0.trace.breach("the cache goes on", "one of its tasks has panicked");
    }
    tasks.iter().for_each(AbortHandle::abort);
    let trace = &world.0.trace;
    Outcome { breaches: trace.breaches(), lines: trace.lines() }
}

/// Everything is well again within a bounded time, and remains so.
async fn recover(world: &World, seen: &[Seen]) {
    let parts = &world.0;
    world.heal();
    parts.trace.note("healed");
    let last = ["a/1", "b/1"].map(|key| Write::Put(key.into(), "the last".into()));
    let Ok(Ok(header)) = timeout(RECOVERY, parts.cluster.write(0, &last, false)).await else {
        return parts.trace.breach("the model recovers", "it takes no write");
    };
    for (prefix, range) in parts.cache.prefixes().iter().zip(&parts.ranges) {
        let answered = timeout(RECOVERY, answer(world, range)).await.is_ok();
        if !answered || prefix.phase() != Phase::Live {
            let what = format!("{:?} at {:?}", prefix.phase(), prefix.store().view().position);
            return parts.trace.breach("the cache recovers", what);
        }
    }
    if !watchers::all_reach(seen, header.revision, RECOVERY).await {
        let seen: Vec<Option<i64>> = seen.iter().map(|seen| *seen.lock()).collect();
        parts.trace.breach("a watcher is sent everything in the end", format!("{seen:?} of {}", header.revision));
    }
    if timeout(RECOVERY, compactions_known(world)).await.is_err() {
        parts.trace.breach("every compaction is known in the end", parts.cluster.look().compacted().to_string());
    }
    match parts.cache.check().await {
        Ok(report) if report.differing.is_empty() => {}
        other => parts.trace.breach("the cache is what the upstream has", format!("{other:?}")),
    }
}

/// Waits until no prefix offers what the cluster has compacted. Nobody reads meanwhile.
async fn compactions_known(world: &World) {
    let parts = &world.0;
    let is_known = || {
        let compacted = parts.cluster.look().compacted();
        parts.cache.prefixes().iter().all(|prefix| oldest_in(&prefix.store().view()) >= compacted)
    };
    while !is_known() {
        sleep(Duration::from_millis(50)).await;
    }
}

/// Reads until there is an answer.
pub async fn answer(world: &World, range: &KeyRange) {
    loop {
        let before = world.before();
        if let Ok(view) = world.0.cache.linearizable(range, Tense::Present).await {
            return world.judge_linearizable(before, range, &view);
        }
        sleep(Duration::from_millis(50)).await;
    }
}
