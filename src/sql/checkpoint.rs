//! Moves committed pages to where they stay, without stalling the writer.
//!
//! A commit only appends to SQLite's write-ahead log. When that has grown, a thread of its own copies the pages into the
//! database while writes go on; what they added meanwhile is little, and the writer copies it between two commits, after
//! which the log starts from its beginning again.

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

/// How far the emptying under way has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// None is under way.
    Idle,
    /// The thread copies.
    Copying,
}

/// The writer's side.
pub struct Checkpoints {
    stage: Stage,
    /// Pages in the log from which on to begin.
    begin_at: u64,
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
        Ok(Self { stage: Stage::Idle, begin_at: LIMIT, requests, copied })
    }

    /// Looks after the log after a commit on `store`.
    pub fn after_commit(&mut self, store: &mut dyn Writer) -> Result<(), SqlError> {
        match self.stage {
            Stage::Idle if store.log_pages()?.total >= self.begin_at => {
                if self.requests.send(()).is_ok() {
                    self.stage = Stage::Copying;
                }
            }
            Stage::Copying if self.copied.swap(false, Ordering::AcqRel) => {
                self.stage = Stage::Idle;
                store.checkpoint()?;
                // A long read keeps the log from starting over: then try again once it has grown by as much.
                let pages = store.log_pages()?;
                let blocked = if pages.copied < pages.total { pages.total } else { 0 };
                self.begin_at = blocked.saturating_add(LIMIT);
            }
            Stage::Idle | Stage::Copying => {}
        }
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
