//! A run: servers, clients and faults for a while, then peace, then judgement.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    clients::{reader, session, writer},
    context::{Context, Stage},
    faults::{FaultLog, links, servers::Director},
    history::History,
    judge::{
        Breach, Case, Counts, judge,
        watches::{is_behind, is_outlived},
    },
    record::Target,
    recorder::Recorder,
    world::{Link, World},
};
use crate::support::client::PATIENCE;

const WRITERS: usize = 3;
const READERS: usize = 6;
const SESSIONS_PER_TARGET: usize = 2;

/// What came of a run.
pub struct Outcome {
    pub breaches: Vec<Breach>,
    pub counts: Counts,
    pub faults: BTreeMap<String, usize>,
    pub log: String,
    /// What each Millpond has logged.
    pub millponds: Vec<String>,
}

/// Runs with everything that follows from `seed`, on an etcd of so many members.
pub async fn run(seed: u64, members: usize, duration: Duration) -> Outcome {
    let world = World::start(members).await;
    let context = Context::new(seed, world.targets());
    let log = FaultLog::new();
    let recorder = Recorder::start(world.cluster.endpoints(), History::empty(), 1);
    let mut workers = JoinSet::new();
    let mut sessions = JoinSet::new();
    start_clients(&context, &mut workers, &mut sessions);
    for (number, link) in world.links.iter().enumerate() {
        workers.spawn(links::run(number, Arc::clone(link), Arc::clone(&context), log.clone()));
    }
    let director = Director::new(world, recorder, Arc::clone(&context), log.clone());
    let (mut director, ()) = tokio::join!(director.run(), async {
        sleep(duration).await;
        context.stage.send_replace(Stage::Drain);
    });
    while let Some(worker) = workers.join_next().await {
        worker.expect("no worker fails");
    }
    director.world.links.iter().for_each(|link| Link::heal(link));
    let end = drain(&mut director).await;
    context.stage.send_replace(Stage::Over);
    while let Some(session) = sessions.join_next().await {
        session.expect("no session fails");
    }
    director.world.millponds.iter_mut().for_each(|millpond| millpond.assert_well());
    let logs = director.world.millponds.iter().map(|millpond| millpond.process.log()).collect();
    let (breaches, counts) = judge(&case(director, end).await);
    Outcome { breaches, counts, faults: log.counts(), log: log.text(), millponds: logs }
}

/// Starts the writers and readers, and the watchers of every server.
pub fn start_clients(context: &Arc<Context>, workers: &mut JoinSet<()>, sessions: &mut JoinSet<()>) {
    (0..WRITERS).for_each(|worker| drop(workers.spawn(writer::run(worker, Arc::clone(context)))));
    (0..READERS).for_each(|worker| drop(workers.spawn(reader::run(100 + worker, Arc::clone(context)))));
    let watched = context.targets.iter().map(|(target, _)| *target);
    // One member's watches are as good as another's: the etcd is not what is under test.
    let watched: Vec<Target> = watched.filter(|target| !matches!(target, Target::Etcd(1..))).collect();
    for (number, target) in watched.iter().enumerate() {
        for one in 0..SESSIONS_PER_TARGET {
            let worker = 200 + number * SESSIONS_PER_TARGET + one;
            sessions.spawn(session::run(worker, *target, Arc::clone(context)));
        }
    }
}

/// Waits until every watcher has been sent everything, or for as long as patience lasts: the revision that was waited for.
async fn drain(director: &mut Director) -> i64 {
    director.world.cluster.ready().await;
    let client = director.world.cluster.client(0);
    let end = client.revision().await.expect("a healed etcd answers");
    director.recorder.until(end).await;
    await_watchers(&director.context, &director.recorder.history(), end).await;
    end
}

/// Waits until every watcher has been sent everything up to `end`, or for as long as patience lasts.
pub async fn await_watchers(context: &Context, history: &History, end: i64) {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let lives = context.notes.lives.lock().unwrap().clone();
        let eras = context.timeline.eras();
        let waits = lives.iter().any(|life| {
            let life = life.lock().unwrap();
            let waits =
                || life.start.is_none() || is_outlived(&life, &eras) || is_behind(&life, life.next, history, end);
            !life.over && waits()
        });
        if !waits {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

async fn case(mut director: Director, end: i64) -> Case {
    let last = director.world.cluster.client(0).revision().await.expect("a healed etcd answers");
    director.recorder.until(last).await;
    let mut histories = std::mem::take(&mut director.ended);
    histories.push(director.recorder.history());
    let notes = &director.context.notes;
    let calls = std::mem::take(&mut *notes.calls.lock().unwrap());
    let lives = notes.lives.lock().unwrap().iter().map(|life| life.lock().unwrap().clone()).collect();
    Case { eras: director.context.timeline.eras(), histories, calls, lives, end }
}
