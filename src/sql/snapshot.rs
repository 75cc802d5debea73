//! Snapshots: a copy of the database as a stream, and a new data directory from one.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use sha2::{Digest, Sha256};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{
    Engine, SqlError,
    directory::{self, lock},
    sqlite::{self, Sqlite},
    version,
};
use crate::{proto::etcdserverpb::SnapshotResponse, status::Status};

/// Bytes of one message of the stream.
const PIECE: usize = 64 << 10;

/// What clients demand the size of the copy to be a multiple of.
const BLOCK: u64 = 512;

/// Bytes of the checksum at the end.
const CHECKSUM: u64 = 32;

type Pieces = ReceiverStream<Result<SnapshotResponse, tonic::Status>>;

/// Copies that may be under way at once: each takes as much room on the disk as the database.
pub(super) const AT_ONCE: usize = 4;

/// How long a client may take for a piece before its copy is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the names of copies begin and end with.
const NAME: (&str, &str) = ("snapshot-", ".tmp");

/// Copies the database as of now, then streams the copy followed by its SHA-256, in pieces of 64 KiB.
pub async fn stream(engine: &Engine) -> Result<Pieces, Status> {
    let permit = engine.copying().await?;
    let (pieces, stream) = mpsc::channel(4);
    let dir = engine.dir().to_owned();
    let cache = engine.state().options.cache_bytes / 8;
    let made = blocking(move || {
        let copy = Copy::new(&dir)?;
        let reader = Sqlite::open_reader(&dir, cache)?;
        reader.copy_to(&copy.0)?;
        Ok::<_, SqlError>(copy)
    });
    let copy = made.await.map_err(|_| Status::STOPPED)?.map_err(|error| error.status())?;
    tokio::spawn(async move {
        let sent = send(copy, &pieces).await;
        drop(permit);
        if let Err(error) = sent {
            tracing::warn!(%error, "a snapshot could not be sent");
            let status = Status::new(Code::Internal, format!("etcdserver: the snapshot cannot be read: {error}"));
            // The client may be gone, which is the usual reason. One that has stopped reading is told when it goes on.
            let _ = pieces.send(Err(status.into())).await;
        }
    });
    Ok(ReceiverStream::new(stream))
}

/// Runs what waits for the disk.
async fn blocking<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(run).await.map_err(io::Error::other)
}

/// Removes the copies that a process left behind which did not end by itself. The directory is locked.
pub(super) fn remove_leftovers(dir: &Path) {
    let is_copy = |name: &str| name.starts_with(NAME.0) && name.contains(NAME.1);
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_copy) {
            tracing::info!(file = %entry.path().display(), "removing what is left of a snapshot");
            remove(&entry.path());
        }
    }
}

fn remove(file: &Path) {
    if let Err(error) = std::fs::remove_file(file)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, file = %file.display(), "a temporary snapshot could not be removed");
    }
}

/// A temporary file beside the database, removed when dropped.
struct Copy(PathBuf);

impl Copy {
    /// An empty one.
    fn new(dir: &Path) -> Result<Self, SqlError> {
        let (begin, end) = NAME;
        let copy = Self(dir.join(format!("{begin}{:016x}{end}", rand::random::<u64>())));
        directory::create(&copy.0).map_err(|source| SqlError::Directory { dir: dir.to_owned(), source })?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// A copy that is being read.
struct Reading {
    content: io::Chain<BufReader<File>, io::Take<io::Repeat>>,
    left: u64,
    /// Of what has been read; none when it was given.
    digest: Option<Sha256>,
}

impl Reading {
    fn open(copy: &Copy) -> io::Result<Self> {
        let file = File::open(&copy.0)?;
        let size = file.metadata()?.len();
        let padding = size.next_multiple_of(BLOCK) - size;
        let content = BufReader::with_capacity(PIECE, file).chain(io::repeat(0).take(padding));
        Ok(Self { content, left: size + padding, digest: Some(Sha256::new()) })
    }

    /// The next piece; the last one is the checksum.
    fn next(&mut self) -> io::Result<Option<SnapshotResponse>> {
        let Some(digest) = self.digest.as_mut().filter(|_| self.left > 0) else {
            let checksum = self.digest.take().map(|digest| digest.finalize().to_vec());
            return Ok(checksum.map(|checksum| message(checksum, 0)));
        };
        let mut blob = vec![0; PIECE.min(usize::try_from(self.left).unwrap_or(PIECE))];
        self.content.read_exact(&mut blob)?;
        digest.update(&blob);
        self.left -= blob.len() as u64;
        Ok(Some(message(blob, self.left)))
    }
}

/// One message of the stream; as in etcd, each carries the version.
fn message(blob: Vec<u8>, remaining_bytes: u64) -> SnapshotResponse {
    SnapshotResponse { header: None, remaining_bytes, blob: blob.into(), version: version::STORAGE.to_owned() }
}

/// Sends a copy, which goes with that. No thread waits for the client.
async fn send(copy: Copy, pieces: &mpsc::Sender<Result<SnapshotResponse, tonic::Status>>) -> io::Result<()> {
    let mut reading = Reading::open(&copy)?;
    loop {
        let piece;
        (piece, reading) = blocking(move || Ok::<_, io::Error>((reading.next()?, reading))).await??;
        let Some(piece) = piece else { return Ok(()) };
        let sent = timeout(PATIENCE, pieces.send(Ok(piece))).await;
        let sent = sent.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client had stopped reading"))?;
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
    }
}

/// Makes a new data directory in `dir` from a snapshot file. The store in it has the snapshot's keys, revisions and leases,
/// and ids of its own.
///
/// # Errors
/// When `dir` already holds a store, the file is no snapshot of this program or is damaged, or it cannot be written.
pub fn restore(snapshot: &Path, dir: &Path) -> Result<(), SqlError> {
    let lock = lock(dir)?;
    let target = dir.join(sqlite::FILE);
    // What a log says is newer than what is in the database, to SQLite, whoever's log it is.
    if ["", "-wal", "-shm", "-journal"].iter().any(|end| dir.join(format!("{}{end}", sqlite::FILE)).exists()) {
        return Err(SqlError::Occupied(dir.to_owned()));
    }
    remove_leftovers(dir);
    let copy = Copy::new(dir)?;
    let failed = |source| SqlError::Directory { dir: dir.to_owned(), source };
    copy_checked(snapshot, &copy.0)?;
    sqlite::adopt(&copy.0)?;
    std::fs::rename(&copy.0, &target).map_err(failed)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
    drop(lock);
    Ok(())
}

/// Copies a snapshot without its checksum, which must be right.
fn copy_checked(snapshot: &Path, copy: &Path) -> Result<(), SqlError> {
    let bad = |error: io::Error| SqlError::BadSnapshot(format!("{}: {error}", snapshot.display()));
    let mut file = File::open(snapshot).map_err(bad)?;
    let size = file.metadata().map_err(bad)?.len();
    let content = size.checked_sub(CHECKSUM).filter(|content| content.is_multiple_of(BLOCK) && *content > 0);
    let Some(content) = content else {
        return Err(SqlError::BadSnapshot(format!("{} has no checksum at its end", snapshot.display())));
    };
    let mut digest = Sha256::new();
    let mut out = File::create(copy).map_err(bad)?;
    let mut buffer = vec![0; PIECE];
    let mut left = content;
    while left > 0 {
        let piece = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
        let Some(piece) = buffer.get_mut(..piece) else { break };
        file.read_exact(piece).map_err(bad)?;
        digest.update(&*piece);
        out.write_all(piece).map_err(bad)?;
        left -= piece.len() as u64;
    }
    let mut checksum = Vec::new();
    file.seek(SeekFrom::Start(content)).map_err(bad)?;
    file.read_to_end(&mut checksum).map_err(bad)?;
    if checksum != digest.finalize().as_slice() {
        return Err(SqlError::BadSnapshot(format!("{} does not match its checksum", snapshot.display())));
    }
    out.sync_all().map_err(bad)
}
