//! Runs a load: threads, connections, the warm-up and the window that counts, and the CPU time of both sides meanwhile.

use std::{
    cell::RefCell,
    io,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::future::try_join_all;
use tokio::sync::watch;

use super::{
    link::LinkError,
    tally::{Tally, Window},
};
use crate::telemetry::process::ProcessStat;

/// How often a watching person is told how far the run is.
const TICK: Duration = Duration::from_millis(100);

/// Time for a server to settle between the set-up and the look at its memory.
const SETTLE: Duration = Duration::from_millis(500);

/// A load as seen by one of its connections.
pub trait Load: Sync {
    /// A connection that is set up.
    type Ready;

    /// How many connections there are.
    fn connections(&self) -> usize;

    /// Sets one up.
    fn connect(&self, connection: usize) -> impl Future<Output = Result<Self::Ready, LinkError>>;

    /// Loads the server from now until the window ends. `done` counts along for whoever watches.
    fn run(
        &self,
        ready: Self::Ready,
        window: Window,
        tally: &RefCell<Tally>,
        done: &AtomicU64,
    ) -> impl Future<Output = Result<(), LinkError>>;
}

/// How a load is run.
#[derive(Clone, Copy, Debug)]
pub struct Conduct {
    /// Threads, over which the connections are spread.
    pub threads: usize,
    /// Time before counting starts.
    pub warmup: Duration,
    /// Time that counts.
    pub duration: Duration,
    /// The server's process, when its CPU time and memory are to be measured.
    pub pid: Option<u32>,
}

/// What a run came to.
#[derive(Clone)]
pub struct Outcome {
    /// All counts of the window.
    pub tally: Tally,
    /// The window's length.
    pub duration: Duration,
    /// CPU time of the server in the window.
    pub server_cpu: Option<Duration>,
    /// CPU time of this process in the window.
    pub own_cpu: Duration,
    /// Resident memory of the server before the first connection, and once all were set up.
    pub server_memory: Option<(u64, u64)>,
}

/// Why a run came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// A connection could not be set up or broke.
    #[error("connection {connection}: {source}")]
    Connection {
        /// Its number.
        connection: usize,
        /// What happened.
        source: LinkError,
    },
    /// The process to be measured cannot be seen.
    #[error("pid {pid}: {source}")]
    Process {
        /// Its id.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// Threads or their runtimes cannot be had.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A thread panicked.
    #[error("a load thread failed")]
    Thread,
}

/// CPU time of the server, if it is measured, and of this process.
struct Look {
    server: Option<ProcessStat>,
    own: ProcessStat,
}

impl Look {
    fn now(pid: Option<u32>) -> Result<Self, DriveError> {
        let read = |pid| ProcessStat::read(pid).map_err(|source| DriveError::Process { pid, source });
        Ok(Self { server: pid.map(read).transpose()?, own: ProcessStat::read_own()? })
    }
}

/// Sets all connections up, runs the load and counts. `progress` is told the operations so far and the share of the run that is
/// over, several times a second.
pub fn drive<L: Load>(load: &L, conduct: Conduct, progress: impl Fn(u64, f64)) -> Result<Outcome, DriveError> {
    let before = Look::now(conduct.pid)?;
    let done = AtomicU64::new(0);
    let (publish, window) = watch::channel(None);
    let (ready, is_ready) = mpsc::channel();
    let threads = conduct.threads.clamp(1, load.connections().max(1));
    thread::scope(|scope| {
        let mut running = Vec::new();
        for index in 0..threads {
            let (ready, window, done) = (ready.clone(), window.clone(), &done);
            running.push(scope.spawn(move || run_thread(load, index, threads, &ready, window, done)));
        }
        drop(ready);
        let all_ready = (0..load.connections()).all(|_| is_ready.recv().is_ok());
        let measured = if all_ready { Some(measure(conduct, &before, &publish, &done, progress)) } else { None };
        drop(publish);
        let mut tally = Tally::default();
        for thread in running {
            tally.add(&thread.join().map_err(|_| DriveError::Thread)??);
        }
        let outcome = measured.unwrap_or(Err(DriveError::Thread))?;
        Ok(Outcome { tally, ..outcome })
    })
}

fn measure(
    conduct: Conduct,
    before: &Look,
    publish: &watch::Sender<Option<Window>>,
    done: &AtomicU64,
    progress: impl Fn(u64, f64),
) -> Result<Outcome, DriveError> {
    thread::sleep(SETTLE);
    let set_up = Look::now(conduct.pid)?;
    let start = Instant::now() + conduct.warmup;
    let end = start + conduct.duration;
    publish.send_replace(Some(Window { start, end }));
    thread::sleep(start.saturating_duration_since(Instant::now()));
    let first = Look::now(conduct.pid)?;
    while Instant::now() < end {
        thread::sleep(TICK.min(end.saturating_duration_since(Instant::now())));
        let over = start.elapsed().as_secs_f64() / conduct.duration.as_secs_f64().max(f64::EPSILON);
        progress(done.load(Ordering::Relaxed), over.min(1.0));
    }
    let last = Look::now(conduct.pid)?;
    let both = |a: &Look, b: &Look| a.server.zip(b.server);
    Ok(Outcome {
        tally: Tally::default(),
        duration: conduct.duration,
        server_cpu: both(&first, &last).map(|(first, last)| last.cpu.saturating_sub(first.cpu)),
        own_cpu: last.own.cpu.saturating_sub(first.own.cpu),
        server_memory: both(before, &set_up).map(|(before, after)| (before.resident_bytes, after.resident_bytes)),
    })
}

/// Runs every `threads`-th connection from `index` on, all on this thread.
fn run_thread<L: Load>(
    load: &L,
    index: usize,
    threads: usize,
    ready: &mpsc::Sender<()>,
    window: watch::Receiver<Option<Window>>,
    done: &AtomicU64,
) -> Result<Tally, DriveError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = RefCell::new(Tally::default());
    let connection = async |connection: usize| {
        let failed = |source| DriveError::Connection { connection, source };
        let held = load.connect(connection).await.map_err(failed)?;
        let mut window = window.clone();
        let _ = ready.send(());
        // The sender is dropped unpublished when another connection failed, which tells more than we could.
        let Ok(published) = window.wait_for(Option::is_some).await.map(|window| *window) else { return Ok(()) };
        let Some(window) = published else { return Ok(()) };
        load.run(held, window, &tally, done).await.map_err(failed)
    };
    runtime.block_on(try_join_all((index..load.connections()).step_by(threads).map(connection)))?;
    Ok(tally.into_inner())
}
