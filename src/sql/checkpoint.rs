//! Moves committed pages to where they stay, without stalling the writer.
//!
//! A commit only appends to SQLite's write-ahead log. When that has grown, a thread of its own copies the pages into the
//! database while writes go on, and again what they added meanwhile, until that is little; the writer copies this last bit
//! between two commits, after which the log starts from its beginning again.
//!
//! A read that began before the last bit keeps that from being copied. Reads that overlap would for as long as they go on, so
//! when the log has become long, new ones are held back for a moment.

use std::{
    future::Future,
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::{SqlError, backend::Writer, engine::spawn};

/// Pages in the log from which on it is emptied.
const LIMIT: u64 = 8192;

/// Pages that the writer copies itself: hardly more than a commit's own.
const LAST_BIT: u64 = 64;

/// How often the thread is sent again before the writer copies whatever is left.
const ROUNDS: u32 = 8;

/// Pages in the log from which on the thread is not sent again: a disk that hardly keeps up with the writes would let the
/// log grow for as many rounds.
const FULL: u64 = 2 * LIMIT;

/// Pages in the log from which on the thread is given time to come up with what is not urgent.
const LONG: u64 = 4 * LIMIT;

/// How long writes wait for reads to end, and between looks.
const PATIENCE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(1);

/// How far the emptying under way has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// None is under way.
    Idle,
    /// The thread copies, for the so manyth time.
    Copying(u32),
}

/// The writer's side.
pub struct Checkpoints {
    stage: Stage,
    /// Pages in the log from which on to begin.
    begin_at: u64,
    /// Pages in the log when it was last looked at.
    pages: u64,
    requests: Sender<()>,
    copied: Arc<AtomicBool>,
    reads: Reads,
}

impl Checkpoints {
    /// Starts the thread, which uses `store` for nothing else. It ends with the writer.
    pub fn start(store: Box<dyn Writer>, dir: &Path, reads: Reads) -> Result<Self, SqlError> {
        let (requests, receiver) = mpsc::channel();
        let copied = Arc::new(AtomicBool::new(false));
        let done = copied.clone();
        spawn("sql-checkpoint", dir, move || copy(store, receiver, &done))?;
        Ok(Self { stage: Stage::Idle, begin_at: LIMIT, pages: 0, requests, copied, reads })
    }

    /// Looks after the log after a commit on `store`.
    pub fn after_commit(&mut self, store: &mut dyn Writer) -> Result<(), SqlError> {
        let pages = store.log_pages()?;
        if pages.total < self.pages {
            // It has begun anew, whatever kept it from that.
            self.begin_at = LIMIT;
        }
        self.pages = pages.total;
        match self.stage {
            Stage::Idle if pages.total >= self.begin_at => self.copy(1),
            Stage::Copying(rounds) if self.copied.swap(false, Ordering::AcqRel) => {
                let left = pages.total.saturating_sub(pages.copied);
                if rounds < ROUNDS && pages.total < FULL && left > LAST_BIT {
                    self.copy(rounds + 1);
                } else {
                    self.finish(store)?;
                }
            }
            Stage::Idle | Stage::Copying(_) => {}
        }
        Ok(())
    }

    /// Whether the log has become long while the thread copies.
    pub fn are_behind(&self) -> bool {
        self.stage != Stage::Idle && self.pages >= LONG
    }

    fn copy(&mut self, round: u32) {
        let sent = self.requests.send(()).is_ok();
        self.stage = if sent { Stage::Copying(round) } else { Stage::Idle };
    }

    fn finish(&mut self, store: &mut dyn Writer) -> Result<(), SqlError> {
        self.stage = Stage::Idle;
        let mut is_blocked = Self::copy_the_rest(store)?;
        if is_blocked && self.pages >= FULL {
            let paused = self.reads.pause();
            is_blocked = Self::copy_the_rest(store)?;
            if is_blocked {
                tracing::warn!(
                    pages = self.pages,
                    held = paused.is_some(),
                    "a long read keeps the log from being emptied"
                );
            }
        }
        // Then try again once it has grown by as much.
        self.begin_at = if is_blocked { self.pages.saturating_add(LIMIT) } else { LIMIT };
        Ok(())
    }

    /// Whether something is left.
    fn copy_the_rest(store: &mut dyn Writer) -> Result<bool, SqlError> {
        store.checkpoint()?;
        let pages = store.log_pages()?;
        Ok(pages.copied < pages.total)
    }
}

/// The reads of a store: as many at a time as there are permits.
pub struct Reads {
    permits: Arc<Semaphore>,
    all: u32,
}

impl Reads {
    /// Those that `permits` lets through, of which none is taken yet.
    pub fn new(permits: Arc<Semaphore>) -> Self {
        let all = u32::try_from(permits.available_permits()).unwrap_or(u32::MAX);
        Self { permits, all }
    }

    /// Waits until no read is under way, unless that takes too long. None begins for as long as what this gives is kept.
    fn pause(&self) -> Option<SemaphorePermit<'_>> {
        let began = Instant::now();
        let mut pausing = pin!(self.permits.acquire_many(self.all));
        // The writer has a thread and no runtime. What is asked for keeps its place in the queue between looks.
        let cx = &mut Context::from_waker(Waker::noop());
        loop {
            match pausing.as_mut().poll(cx) {
                Poll::Ready(paused) => return paused.ok(),
                Poll::Pending if began.elapsed() >= PATIENCE => return None,
                Poll::Pending => thread::sleep(LOOK),
            }
        }
    }
}

fn copy(mut store: Box<dyn Writer>, requests: Receiver<()>, copied: &AtomicBool) {
    while let Ok(()) = requests.recv() {
        if let Err(error) = store.checkpoint() {
            tracing::warn!(%error, "a checkpoint failed; the log goes on growing");
        }
        copied.store(true, Ordering::Release);
    }
}
