//! What happens by the passing of time: leases run out, what remains of them is kept, old revisions are compacted.

use std::{
    collections::VecDeque,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    SqlError,
    engine::{Engine, WeakEngine, spawn},
    options::AutoCompaction,
};
use crate::status::Status;

/// How often to look.
const TICK: Duration = Duration::from_millis(200);

/// Leases revoked together.
const REVOKE_BATCH: usize = 512;

/// How often automatic compaction by number of revisions looks, as in etcd.
const REVISION_CHECK: Duration = Duration::from_secs(300);

/// Starts the clock's thread; it ends with the store.
pub fn start(engine: &Engine, dir: &Path) -> Result<(), SqlError> {
    let closed = engine.closed().clone();
    let weak = engine.downgrade();
    let mut clock = Clock::new(engine);
    let run = move || {
        while !closed.is_cancelled() && clock.tick(&weak) {
            thread::sleep(TICK);
        }
    };
    spawn("sql-clock", dir, run)
}

struct Clock {
    checkpoint_interval: Duration,
    next_checkpoint: Instant,
    compaction: Option<AutoCompaction>,
    next_look: Instant,
    /// Revisions as they were at times past, the oldest first.
    seen: VecDeque<(Instant, i64)>,
}

impl Clock {
    fn new(engine: &Engine) -> Self {
        let options = &engine.state().options;
        let now = Instant::now();
        Self {
            checkpoint_interval: options.lease_checkpoint_interval,
            next_checkpoint: now + options.lease_checkpoint_interval,
            compaction: options.auto_compaction,
            next_look: now,
            seen: VecDeque::new(),
        }
    }

    /// Does what is due. Whether the store is still open.
    fn tick(&mut self, weak: &WeakEngine) -> bool {
        let Some(engine) = weak.upgrade() else { return false };
        let now = Instant::now();
        revoke_expired(&engine, now);
        if now >= self.next_checkpoint {
            self.next_checkpoint = now + self.checkpoint_interval;
            self.checkpoint_leases(&engine, now);
        }
        if let Some(policy) = self.compaction
            && now >= self.next_look
        {
            self.auto_compact(&engine, policy, now);
        }
        true
    }

    fn checkpoint_leases(&self, engine: &Engine, now: Instant) {
        let due = engine.state().leases.lock().long_running(self.checkpoint_interval, now);
        for batch in due.chunks(1000) {
            let batch = batch.to_vec();
            wait(engine.enqueue(0, move |transaction| transaction.checkpoint_leases(&batch)), "keeping leases' times");
        }
    }

    fn auto_compact(&mut self, engine: &Engine, policy: AutoCompaction, now: Instant) {
        let at = engine.state().position();
        let target = match policy {
            AutoCompaction::Revisions(keep) => {
                self.next_look = now + REVISION_CHECK;
                at.current.saturating_sub(keep.max(0))
            }
            AutoCompaction::Periodic(period) => {
                self.next_look = now + (period / 10).min(Duration::from_secs(360)).max(TICK);
                self.seen.push_back((now, at.current));
                self.aged(now, period)
            }
        };
        if target > at.compacted && target > 1 {
            tracing::info!(revision = target, "compacting automatically");
            wait(engine.enqueue(0, move |transaction| transaction.compact(target)), "compacting automatically");
        }
    }

    /// The newest revision seen at least `period` ago, or 0.
    fn aged(&mut self, now: Instant, period: Duration) -> i64 {
        let mut aged = 0;
        while let Some((at, revision)) = self.seen.front()
            && now.duration_since(*at) >= period
        {
            aged = *revision;
            self.seen.pop_front();
        }
        aged
    }
}

/// Revokes all leases that have run out, each in a revision of its own.
fn revoke_expired(engine: &Engine, now: Instant) {
    loop {
        let due = engine.state().leases.lock().take_expired(now, REVOKE_BATCH);
        if due.is_empty() {
            return;
        }
        let revoked: Vec<_> =
            due.into_iter().map(|id| (id, engine.enqueue(0, move |transaction| transaction.expire(id)))).collect();
        let mut failed = false;
        for (id, result) in revoked {
            if wait(result, "revoking a lease that ran out").is_none() {
                engine.state().leases.lock().revocation_failed(id);
                failed = true;
            }
        }
        if failed {
            return;
        }
    }
}

fn wait<T>(result: Result<oneshot::Receiver<Result<T, Status>>, Status>, what: &str) -> Option<T> {
    let result = result.and_then(|result| result.blocking_recv().unwrap_or(Err(Status::STOPPED)));
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(%error, "{what} failed; it will be tried again");
            None
        }
    }
}
