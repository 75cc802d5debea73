//! The one thread that writes: it takes writes as they come, evaluates as many as are there, and commits them together.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    backend::{Meta, Writer},
    checkpoint::Checkpoints,
    compaction::Compaction,
    error::{Fault, SqlError, Trouble},
    state::State,
    transaction::{Changes, Transaction},
};
use crate::status::Status;

/// The most writes that share a commit.
const GROUP_LIMIT: usize = 1024;

/// The most bytes of requests that share a commit, so that nobody waits long for others' bulk.
const GROUP_BYTES: usize = 8 << 20;

/// How long compaction waits after a commit that failed.
const RETRY: Duration = Duration::from_millis(100);

/// How long compaction waits at a time while the log is copied.
const LOG_PAUSE: Duration = Duration::from_millis(1);

/// How often compaction looks for writes while it waits for one.
const LOOK: Duration = Duration::from_micros(50);

/// Bytes after which the database is measured again.
const MEASURE_EVERY: usize = 256 << 10;

/// About what a write and a commit take besides the request's bytes.
const WRITE_OVERHEAD: usize = 512;
const COMMIT_OVERHEAD: usize = 4096;

/// About what the removal of an event adds to the log: a page.
const REMOVAL: u64 = 4096;

/// Something for the writer to do.
pub enum Job {
    /// A write, which may share a commit with others.
    Write(Box<dyn Work>),
    /// Something that needs the database alone and outside a transaction.
    Alone(Alone),
}

/// Something to run on the writer's connection.
pub type Alone = Box<dyn FnOnce(&mut dyn Writer) + Send>;

/// A write under way.
pub trait Work: Send {
    /// About how many bytes the request has.
    fn cost(&self) -> usize;
    /// Evaluates the write. An error is the store's, and undoes the whole group; a refusal is kept for the end.
    fn apply(&mut self, transaction: &mut Transaction<'_>) -> Result<(), SqlError>;
    /// Tells the caller how it went; `failure` is what undid the group.
    fn finish(self: Box<Self>, failure: Option<&Status>);
}

/// A write as a closure with someone waiting for its result.
pub struct Write<F, T> {
    state: Progress<F, T>,
    reply: oneshot::Sender<Result<T, Status>>,
    cost: usize,
    _permit: OwnedSemaphorePermit,
}

enum Progress<F, T> {
    Waiting(F),
    Applied(Result<T, Status>),
    Void,
}

impl<F, T> Write<F, T> {
    /// A write that evaluates `apply`. `permit` is its share of the queue's memory.
    pub fn new(apply: F, reply: oneshot::Sender<Result<T, Status>>, cost: usize, permit: OwnedSemaphorePermit) -> Self {
        Self { state: Progress::Waiting(apply), reply, cost, _permit: permit }
    }
}

impl<F, T> Work for Write<F, T>
where
    F: FnOnce(&mut Transaction<'_>) -> Result<T, Fault> + Send,
    T: Send,
{
    fn cost(&self) -> usize {
        self.cost
    }

    fn apply(&mut self, transaction: &mut Transaction<'_>) -> Result<(), SqlError> {
        let Progress::Waiting(apply) = std::mem::replace(&mut self.state, Progress::Void) else { return Ok(()) };
        let result = match apply(transaction) {
            Ok(answer) => Ok(answer),
            Err(Fault::Refused(status)) => Err(status),
            Err(Fault::Store(error)) => return Err(error),
        };
        self.state = Progress::Applied(result);
        Ok(())
    }

    fn finish(self: Box<Self>, failure: Option<&Status>) {
        let result = match (failure, self.state) {
            (None, Progress::Applied(result)) => result,
            (Some(status), _) => Err(status.clone()),
            (None, _) => Err(Status::STOPPED),
        };
        // Nobody waits any more when the caller has given up; the write stands all the same.
        let _ = self.reply.send(result);
    }
}

/// The writer's thread.
pub struct WriterThread {
    store: Box<dyn Writer>,
    jobs: mpsc::Receiver<Job>,
    state: Arc<State>,
    compaction: Compaction,
    checkpoints: Checkpoints,
    /// Whether the last commit failed, so that compaction by itself had better wait a little.
    failing: bool,
    /// Bytes written since the database was last measured, about.
    unmeasured: usize,
    /// Whether it could not be measured the last time.
    blind: bool,
    /// Set once the disk's content is unknown: every write is refused with it until a restart.
    poisoned: Option<Status>,
}

impl WriterThread {
    /// A writer on `store` that takes `jobs` until all senders are gone.
    pub fn new(
        store: Box<dyn Writer>,
        jobs: mpsc::Receiver<Job>,
        state: Arc<State>,
        compaction: Compaction,
        checkpoints: Checkpoints,
    ) -> Self {
        Self {
            store,
            jobs,
            state,
            compaction,
            checkpoints,
            failing: false,
            unmeasured: 0,
            blind: false,
            poisoned: None,
        }
    }

    /// Works until the queue is closed and empty.
    pub fn run(mut self) {
        while let Some(job) = self.next_job() {
            let left = match job {
                Some(Job::Write(work)) => self.commit_group(Some(work)),
                Some(alone @ Job::Alone(_)) => Some(alone),
                None => self.commit_group(None),
            };
            if let Some(Job::Alone(run)) = left {
                run(&mut *self.store);
            }
        }
        if let Err(error) = self.store.checkpoint() {
            tracing::warn!(%error, "the last checkpoint failed");
        }
    }

    /// The next job; inside, `None` when there is none and compaction has work. Outside, `None` at the end.
    fn next_job(&mut self) -> Option<Option<Job>> {
        while self.poisoned.is_none() && self.compaction.is_pending(self.state.position().compacted) {
            if self.failing {
                thread::sleep(RETRY);
            }
            let behind = self.checkpoints.are_behind();
            match self.job_within(if behind { LOG_PAUSE } else { self.compaction.gap() }) {
                Ok(job) => return Some(Some(job)),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) if behind => self.measure(),
                Err(mpsc::error::TryRecvError::Empty) => return Some(None),
            }
        }
        self.jobs.blocking_recv().map(Some)
    }

    /// A job, if one comes within `patience`.
    fn job_within(&mut self, patience: Duration) -> Result<Job, mpsc::error::TryRecvError> {
        let start = Instant::now();
        loop {
            match self.jobs.try_recv() {
                Err(mpsc::error::TryRecvError::Empty) if start.elapsed() < patience => thread::sleep(LOOK),
                other => return other,
            }
        }
    }

    /// Commits `first` and what else is waiting. Returns a job that could not share the commit.
    fn commit_group(&mut self, first: Option<Box<dyn Work>>) -> Option<Job> {
        let mut group = Vec::new();
        let mut left = None;
        let outcome = match &self.poisoned {
            Some(status) => {
                group.extend(first);
                Err(status.clone())
            }
            None => self.evaluate_and_commit(first, &mut group, &mut left).map_err(|error| self.failed(&error)),
        };
        let written =
            group.iter().map(|work| work.cost().saturating_add(WRITE_OVERHEAD)).sum::<usize>() + COMMIT_OVERHEAD;
        let metrics = &self.state.options.metrics;
        metrics.writes.inc_by(group.len() as u64);
        let failure = outcome.err();
        self.failing = failure.is_some();
        if failure.is_some() {
            metrics.failures.inc_by(group.len() as u64);
        }
        for work in group {
            work.finish(failure.as_ref());
        }
        self.unmeasured += written;
        if self.unmeasured >= MEASURE_EVERY {
            self.measure();
        }
        left
    }

    fn evaluate_and_commit(
        &mut self,
        first: Option<Box<dyn Work>>,
        group: &mut Vec<Box<dyn Work>>,
        left: &mut Option<Job>,
    ) -> Result<(), SqlError> {
        let started = Instant::now();
        let begun = self.store.begin_write();
        let (at, alarms) = (self.state.position(), self.state.alarms());
        let mut transaction = Transaction::new(&mut *self.store, &self.state.leases, at, alarms);
        let (mut next, mut bytes) = (first, 0_usize);
        let mut applied = begun;
        while let Some(mut work) = next.take() {
            bytes = bytes.saturating_add(work.cost());
            if applied.is_ok() {
                applied = work.apply(&mut transaction);
            }
            group.push(work);
            if applied.is_ok() && group.len() < GROUP_LIMIT && bytes < GROUP_BYTES {
                match self.jobs.try_recv() {
                    Ok(Job::Write(work)) => next = Some(work),
                    Ok(alone) => *left = Some(alone),
                    Err(_) => {}
                }
            }
        }
        let changes = transaction.into_changes();
        applied?;
        // Only what has been announced: who reads beside this commit knows of nothing else.
        let announced = self.state.position().compacted;
        let compacting = self.compaction.is_pending(announced)
            && !self.checkpoints.are_behind()
            && self.compaction.has_turn(group.len());
        let removed = if compacting { self.compaction.step(&mut *self.store, announced)? } else { 0 };
        if !changes.wrote && !compacting {
            return self.store.rollback();
        }
        let committing = Instant::now();
        self.store.commit()?;
        self.record_commit(group.len(), removed, committing);
        self.compaction.committed(group.len(), compacting, started.elapsed());
        self.state.publish(changes);
        self.state.set_compaction_done(self.compaction.done());
        Ok(())
    }

    fn record_commit(&mut self, writes: usize, removed: u64, started: Instant) {
        self.unmeasured += usize::try_from(removed.saturating_mul(REMOVAL)).unwrap_or(MEASURE_EVERY);
        let metrics = &self.state.options.metrics;
        metrics.commits.inc();
        metrics.commit_seconds.observe(started.elapsed().as_secs_f64());
        metrics.removed.inc_by(removed);
        if writes > 0 {
            metrics.group_size.observe(writes as f64);
        }
    }

    /// Measures the database, and looks after its log.
    fn measure(&mut self) {
        self.unmeasured = 0;
        let measured = self.store.size().and_then(|size| {
            self.state.set_size(size.total);
            self.checkpoints.after_commit(&mut *self.store)
        });
        let was_blind = std::mem::replace(&mut self.blind, measured.is_err());
        match measured {
            Ok(()) => {}
            // While the log is waited for, this comes round every millisecond; once is enough to say so.
            Err(error) if was_blind => tracing::debug!(%error, "the database could again not be measured"),
            Err(error) => tracing::warn!(%error, "the database could not be measured, or its log not emptied"),
        }
    }

    /// Undoes the transaction after `error`, and says what its members are told.
    fn failed(&mut self, error: &SqlError) -> Status {
        // A full disk fails every commit from then on; once is enough to say so.
        if self.failing {
            tracing::debug!(%error, "another commit failed and was undone");
        } else {
            tracing::error!(%error, "a commit failed and was undone");
        }
        let mut undone = self.store.rollback();
        self.compaction.rolled_back();
        if error.trouble() == Trouble::Unindexed {
            undone = undone.and_then(|()| self.write_over());
        }
        if error.trouble() == Trouble::SyncFailed || undone.is_err() {
            tracing::error!("the disk's content is unknown: no more writes until a restart");
            self.poisoned = Some(error.status());
        }
        error.status()
    }

    /// Commits something small in the place of a commit that is in the log without its index. Nobody may find that one after a
    /// restart: its callers were told that it failed.
    fn write_over(&mut self) -> Result<(), SqlError> {
        self.store.begin_write()?;
        let before = self.store.meta(Meta::WrittenOver)?.unwrap_or(0);
        self.store.set_meta(Meta::WrittenOver, before.wrapping_add(1))?;
        match self.store.commit() {
            // Then this is in the log without its index, in the other's place.
            Err(error) if error.trouble() == Trouble::Unindexed => self.store.rollback(),
            committed => committed,
        }
    }
}

impl State {
    /// Makes durable changes visible: the recent events first, then the position, which reads and watchers follow.
    fn publish(&self, changes: Changes) {
        {
            let mut leases = self.leases.lock();
            let now = Instant::now();
            for (id, change) in changes.lease_changes {
                match change {
                    Some(ttl) => leases.grant(id, ttl, now),
                    None => leases.remove(id),
                }
            }
            self.options.metrics.leases.set(i64::try_from(leases.len()).unwrap_or(i64::MAX));
        }
        self.history.extend(changes.revisions);
        self.set_alarms(changes.alarms);
        self.set_position(changes.at);
    }
}
