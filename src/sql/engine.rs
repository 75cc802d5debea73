//! A store that is open: what it is in memory, how to read it and how to write it.

use std::{fs::File, path::Path, sync::Arc, thread};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{
    SqlError,
    backend::{Reader, Writer},
    checkpoint::{Checkpoints, Reads},
    clock,
    compaction::Compaction,
    directory::lock,
    error::Fault,
    options::Options,
    range::Position,
    snapshot,
    sqlite::{self, Sqlite},
    state::{State, load},
    transaction::Transaction,
    writer::{Job, Write, WriterThread},
};
use crate::status::Status;

/// Writes that may wait for the writer.
const QUEUE: usize = 8192;

/// KiB of requests that may wait for the writer.
const QUEUE_KIB: usize = 128 << 10;

/// An open store that speaks the etcd API. Clones are cheap and share it; it stays open until the last one (and every
/// connection) is gone, or until [`Engine::close`].
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    state: Arc<State>,
    dir: std::path::PathBuf,
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    queue: Arc<Semaphore>,
    readers: Mutex<Vec<Box<dyn Reader>>>,
    reading: Arc<Semaphore>,
    copying: Arc<Semaphore>,
    closed: CancellationToken,
    writer_gone: watch::Receiver<bool>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl Engine {
    /// Opens the store in `dir`, creating both as needed.
    ///
    /// # Errors
    /// When another process has it open, the directory cannot be used, the layout is too new, or the database fails.
    pub fn open(dir: &Path, options: Options) -> Result<Self, SqlError> {
        let lock = lock(dir)?;
        snapshot::remove_leftovers(dir);
        sqlite::admit_log(dir)?;
        let store = Sqlite::open_writer(dir, options.cache_bytes / 2)?;
        Self::start(dir, lock, Box::new(store), options)
    }

    /// Starts on an open database, whose directory is locked by `lock`.
    fn start(dir: &Path, lock: File, mut store: Box<dyn Writer>, options: Options) -> Result<Self, SqlError> {
        let state = Arc::new(load(&mut *store, options)?);
        let compaction = Compaction::open(&mut *store)?;
        let (jobs, queue) = mpsc::channel(QUEUE);
        let (gone, writer_gone) = watch::channel(false);
        let reading = Arc::new(Semaphore::new(state.options.readers.max(1)));
        let reads = Reads::new(reading.clone());
        let checkpoints = Checkpoints::start(Box::new(Sqlite::open_checkpointer(dir)?), dir, reads)?;
        let writer = WriterThread::new(store, queue, state.clone(), compaction, checkpoints);
        let run = move || {
            writer.run();
            drop(lock);
            gone.send_replace(true);
        };
        spawn("sql-writer", dir, run)?;
        let shared = Shared {
            dir: dir.to_owned(),
            jobs: Mutex::new(Some(jobs)),
            queue: Arc::new(Semaphore::new(QUEUE_KIB)),
            readers: Mutex::default(),
            reading,
            copying: Arc::new(Semaphore::new(snapshot::AT_ONCE)),
            closed: CancellationToken::new(),
            writer_gone,
            state,
        };
        let engine = Self { shared: Arc::new(shared) };
        let at = engine.state().position();
        tracing::info!(dir = %dir.display(), revision = at.current, compacted = at.compacted, "store opened");
        clock::start(&engine, dir)?;
        Ok(engine)
    }

    /// Finishes the writes under way, refuses new ones, ends watches, and returns when the directory is free again.
    pub async fn close(&self) {
        self.shared.closed.cancel();
        drop(self.shared.jobs.lock().take());
        let mut gone = self.shared.writer_gone.clone();
        // An error means that the writer is gone as well.
        let _ = gone.wait_for(|gone| *gone).await;
        self.shared.readers.lock().clear();
    }

    /// Fires when the store is being closed.
    pub fn closed(&self) -> &CancellationToken {
        &self.shared.closed
    }

    /// What is known without reading.
    pub fn state(&self) -> &State {
        &self.shared.state
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Leave to make a copy of the database and keep it until it is sent.
    pub async fn copying(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.shared.copying.clone().acquire_owned().await.map_err(|_| Status::STOPPED)
    }

    /// A handle that does not keep the store open.
    pub fn downgrade(&self) -> WeakEngine {
        WeakEngine(Arc::downgrade(&self.shared))
    }

    /// Evaluates a write of about `cost` bytes and waits until it is durable.
    ///
    /// # Errors
    /// What `apply` refuses with; too many requests when the queue is full; why the store failed, or that it is closed.
    pub async fn write<T, F>(&self, cost: usize, apply: F) -> Result<T, Status>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, Fault> + Send + 'static,
        T: Send + 'static,
    {
        self.enqueue(cost, apply)?.await.unwrap_or(Err(Status::STOPPED))
    }

    /// Hands a write to the writer; the receiver tells how it went.
    pub fn enqueue<T, F>(&self, cost: usize, apply: F) -> Result<oneshot::Receiver<Result<T, Status>>, Status>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, Fault> + Send + 'static,
        T: Send + 'static,
    {
        let kib = u32::try_from(cost / 1024 + 1).unwrap_or(u32::MAX);
        let permit = self.shared.queue.clone().try_acquire_many_owned(kib).map_err(|_| Status::TOO_MANY_REQUESTS)?;
        let (reply, result) = oneshot::channel();
        self.send(Job::Write(Box::new(Write::new(apply, reply, cost, permit))))?;
        Ok(result)
    }

    /// Runs something on the writer's connection outside a transaction.
    pub async fn alone<T, F>(&self, run: F) -> Result<T, Status>
    where
        F: FnOnce(&mut dyn Writer) -> Result<T, SqlError> + Send + 'static,
        T: Send + 'static,
    {
        let (reply, result) = oneshot::channel();
        self.send(Job::Alone(Box::new(move |store| drop(reply.send(run(store))))))?;
        result.await.map_err(|_| Status::STOPPED)?.map_err(|error| error.status())
    }

    /// Waits until compaction has removed what `revision` has made superfluous.
    pub async fn compaction_finished(&self, revision: i64) -> Result<(), Status> {
        let mut done = self.state().compaction_done();
        tokio::select! {
            () = self.closed().cancelled() => Err(Status::STOPPED),
            result = done.wait_for(|done| *done >= revision) => result.map(drop).map_err(|_| Status::STOPPED),
        }
    }

    fn send(&self, job: Job) -> Result<(), Status> {
        let jobs = self.shared.jobs.lock();
        let jobs = jobs.as_ref().ok_or(Status::STOPPED)?;
        jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Status::TOO_MANY_REQUESTS,
            mpsc::error::TrySendError::Closed(_) => Status::STOPPED,
        })
    }

    /// Evaluates a read on one state of the store, which is at least as new as the position it is given.
    pub async fn read<T, F>(&self, read: F) -> Result<T, Status>
    where
        F: FnOnce(&mut dyn Reader, Position) -> Result<T, Fault> + Send + 'static,
        T: Send + 'static,
    {
        let permit = self.shared.reading.clone().acquire_owned().await.map_err(|_| Status::STOPPED)?;
        let engine = self.clone();
        let run = move || {
            let _permit = permit;
            engine.read_blocking(read)
        };
        tokio::task::spawn_blocking(run).await.unwrap_or(Err(Status::STOPPED))
    }

    fn read_blocking<T>(&self, read: impl FnOnce(&mut dyn Reader, Position) -> Result<T, Fault>) -> Result<T, Status> {
        if self.closed().is_cancelled() {
            return Err(Status::STOPPED);
        }
        let mut reader = self.take_reader().map_err(|error| error.status())?;
        let result = self.read_at_one_state(&mut *reader, read);
        reader.end();
        self.shared.readers.lock().push(reader);
        result.map_err(|fault| {
            if let Fault::Store(error) = &fault {
                tracing::error!(%error, "a read failed");
            }
            fault.status()
        })
    }

    fn read_at_one_state<T>(
        &self,
        reader: &mut dyn Reader,
        read: impl FnOnce(&mut dyn Reader, Position) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        loop {
            let current = self.state().position().current;
            reader.begin()?;
            // Read after the state was pinned: whatever compaction had removed by then, it had announced before.
            let compacted = self.state().position().compacted;
            if compacted <= current {
                return read(reader, Position { current, compacted });
            }
            reader.end();
        }
    }

    fn take_reader(&self) -> Result<Box<dyn Reader>, SqlError> {
        if let Some(reader) = self.shared.readers.lock().pop() {
            return Ok(reader);
        }
        let options = &self.state().options;
        let cache = options.cache_bytes / 2 / options.readers.max(1);
        Ok(Box::new(Sqlite::open_reader(&self.shared.dir, cache)?))
    }
}

/// An [`Engine`] that does not keep the store open.
pub struct WeakEngine(std::sync::Weak<Shared>);

impl WeakEngine {
    /// The engine, while the store is open.
    pub fn upgrade(&self) -> Option<Engine> {
        self.0.upgrade().map(|shared| Engine { shared })
    }
}

/// Starts a named thread.
pub fn spawn(name: &str, dir: &Path, run: impl FnOnce() + Send + 'static) -> Result<(), SqlError> {
    let started = thread::Builder::new().name(name.to_owned()).spawn(run);
    started.map(drop).map_err(|source| SqlError::Directory { dir: dir.to_owned(), source })
}

#[cfg(test)]
mod tests;
