//! Moves committed pages to where they stay, without stalling the writer.
//!
//! A commit only appends to SQLite's write-ahead log. When that has grown, a thread of its own copies the pages into the
//! database while writes go on, and again what they added meanwhile, until that is little; the writer copies this last bit
//! between two commits, after which the log starts from its beginning again.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
};

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
}

impl Checkpoints {
    /// Starts the thread, which uses `store` for nothing else. It ends with the writer.
    pub fn start(store: Box<dyn Writer>, dir: &Path) -> Result<Self, SqlError> {
        let (requests, receiver) = mpsc::channel();
        let copied = Arc::new(AtomicBool::new(false));
        let done = copied.clone();
        spawn("sql-checkpoint", dir, move || copy(store, receiver, &done))?;
        Ok(Self { stage: Stage::Idle, begin_at: LIMIT, pages: 0, requests, copied })
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
        store.checkpoint()?;
        // A long read keeps the log from starting over: then try again once it has grown by as much.
        let pages = store.log_pages()?;
        let blocked = if pages.copied < pages.total { pages.total } else { 0 };
        self.begin_at = blocked.saturating_add(LIMIT);
        Ok(())
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
