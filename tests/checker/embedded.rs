//! The embedded store as the one server, killed with SIGKILL in the middle of everything and started again.
//!
//! The clients and the judge are those of the other runs. The recorder watches the same server, loses its stream with every
//! kill, and goes on with the first revision that it has not seen. That nothing was lost on its way is shown afterwards:
//! the store is asked for its whole log anew, and its file is checked.

use std::{sync::Arc, time::Duration};

use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    clients::writer,
    context::{Context, Stage},
    faults::FaultLog,
    history::History,
    judge::{Breach, Case, brief, judge},
    record::Target,
    recorder::Recorder,
    run::{Outcome, await_watchers, start_clients},
};
use crate::support::{millpond::Millpond, random::Generator};

/// Writers besides the usual ones, so that a kill finds writes under way that share a commit.
const MORE_WRITERS: usize = 8;

/// For each request that a compaction takes.
const PATIENCE: Duration = Duration::from_secs(5);

const KEPT: &str = "the log in the end is the one that was recorded";
const SOUND: &str = "the file is sound";

/// The server and what happens to it.
struct Director {
    millpond: Millpond,
    recorder: Recorder,
    context: Arc<Context>,
    log: FaultLog,
    random: Generator,
}

/// Runs with everything that follows from `seed`.
pub async fn run(seed: u64, duration: Duration) -> Outcome {
    let dir = TempDir::with_prefix("millpond-store-").unwrap();
    let data = format!("--data-dir={}", dir.path().display());
    // Little history, so that watchers who come back are served from the store's own log.
    let flags = ["--progress-interval=300ms", "--history-bytes=128KiB", &data];
    let millpond = Millpond::start(&[], &flags).await;
    let context = Context::new(seed, vec![(Target::Millpond(0), millpond.endpoint.clone())]);
    let recorder = Recorder::start(vec![millpond.endpoint.clone()], History::empty(), 1);
    let (mut workers, mut sessions) = (JoinSet::new(), JoinSet::new());
    start_clients(&context, &mut workers, &mut sessions);
    (0..MORE_WRITERS).for_each(|more| drop(workers.spawn(writer::run(10 + more, Arc::clone(&context)))));
    let (log, random) = (FaultLog::new(), Generator::new(context.seed_of(2000)));
    let mut director = Director { millpond, recorder, context, log, random };
    let work_over = Arc::clone(&director.context);
    tokio::join!(director.strike_until_over(), async {
        sleep(duration).await;
        work_over.stage.send_replace(Stage::Drain);
    });
    while let Some(worker) = workers.join_next().await {
        worker.expect("no worker fails");
    }
    let case = director.drain(&mut sessions).await;
    let (mut breaches, counts) = judge(&case);
    breaches.extend(director.log_is_kept(&case).await);
    director.millpond.assert_well();
    director.millpond.terminate().await;
    breaches.extend(file_is_sound(&dir));
    let millponds = vec![director.millpond.process.log()];
    Outcome { breaches, counts, faults: director.log.counts(), log: director.log.text(), millponds }
}

impl Director {
    async fn strike_until_over(&mut self) {
        while self.context.works() {
            sleep(Duration::from_millis(100 + self.random.below(900) as u64)).await;
            match self.random.below(10) {
                _ if !self.context.works() => {}
                0..6 => self.kill().await,
                6 => self.kill_at_its_start().await,
                _ => self.compact().await,
            }
        }
    }

    async fn kill(&mut self) {
        let down = self.random.pick(&[0, 0, 100, 1000]);
        self.log.note(format!("killed: {down} ms down"));
        self.millpond.assert_well();
        self.millpond.process.kill();
        sleep(Duration::from_millis(down)).await;
        self.millpond.restart().await;
    }

    /// Kills it again while it opens its store, or shortly after.
    async fn kill_at_its_start(&mut self) {
        let millis = self.random.below(60) as u64;
        self.log.note(format!("killed at its start: after {millis} ms"));
        self.millpond.assert_well();
        // When it is ready sooner, it is killed while everybody comes back.
        let _ = timeout(Duration::from_millis(millis), self.millpond.restart()).await;
        self.millpond.restart().await;
    }

    /// Compacts, never ahead of the recorder.
    async fn compact(&mut self) {
        let revision = self.recorder.position() - self.random.pick(&[0, 10, 100, 500]);
        if revision <= self.context.bounds().compacted {
            return;
        }
        self.log.note(format!("compaction: to {revision}"));
        self.context.timeline.compacting(revision);
        // Half of them are still at work when the next fault strikes.
        let patience = self.random.pick(&[Duration::from_millis(5), PATIENCE]);
        if let Ok(Ok(())) = timeout(patience, self.millpond.client().compact(revision)).await {
            self.context.timeline.compacted(revision);
        }
        self.context.note_compacted(revision);
    }

    /// Waits until everybody has been sent everything, and ends the run.
    async fn drain(&mut self, sessions: &mut JoinSet<()>) -> Case {
        let end = self.record_all().await;
        await_watchers(&self.context, &self.recorder.history(), end).await;
        self.context.stage.send_replace(Stage::Over);
        while let Some(session) = sessions.join_next().await {
            session.expect("no session fails");
        }
        self.record_all().await;
        let notes = &self.context.notes;
        let calls = std::mem::take(&mut *notes.calls.lock().unwrap());
        let lives = notes.lives.lock().unwrap().iter().map(|life| life.lock().unwrap().clone()).collect();
        let histories = vec![self.recorder.history()];
        Case { eras: self.context.timeline.eras(), histories, calls, lives, end }
    }

    /// The newest revision, once everything up to it has been recorded.
    async fn record_all(&self) -> i64 {
        let revision = self.millpond.client().revision().await.expect("a store that nobody disturbs answers");
        self.recorder.until(revision).await;
        revision
    }

    /// Asks for the log anew, as far as it was not compacted, and compares it with what was recorded while it grew.
    async fn log_is_kept(&self, case: &Case) -> Vec<Breach> {
        let recorded = &case.histories[0];
        let first = self.context.bounds().compacted + 1;
        if first > case.end {
            return Vec::new();
        }
        let again = Recorder::start(vec![self.millpond.endpoint.clone()], History::empty(), first);
        again.until(case.end).await;
        let again = again.history();
        let revisions = first..=case.end;
        let differs = |revision: &i64| again.at(*revision) != recorded.at(*revision);
        let breach = |revision: i64| {
            let (was, is) = (brief(recorded.at(revision).iter()), brief(again.at(revision).iter()));
            let text = format!("revision {revision} was{was}\n    and is{is}");
            Breach { check: KEPT, tick: 0, size: text.len(), text }
        };
        revisions.filter(differs).map(breach).collect()
    }
}

fn file_is_sound(dir: &TempDir) -> Vec<Breach> {
    let report = millpond::sql::check(dir.path()).expect("the store can be read");
    let breach = |text: String| Breach { check: SOUND, tick: 0, size: text.len(), text };
    report.problems.into_iter().map(breach).collect()
}
