//! Snapshots: a copy of the database as a stream, and a new data directory from one.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use super::{
    Engine, SqlError,
    engine::lock,
    sqlite::{self, Sqlite},
};
use crate::{proto::etcdserverpb::SnapshotResponse, status::Status};

/// Bytes of one message of the stream.
const PIECE: usize = 64 << 10;

/// What clients demand the size of the copy to be a multiple of.
const BLOCK: u64 = 512;

/// Bytes of the checksum at the end.
const CHECKSUM: u64 = 32;

type Pieces = ReceiverStream<Result<SnapshotResponse, tonic::Status>>;

/// Copies the database as of now, then streams the copy followed by its SHA-256, in pieces of 64 KiB.
pub async fn stream(engine: &Engine) -> Result<Pieces, Status> {
    let (pieces, stream) = mpsc::channel(4);
    let copy = Copy::new(engine.dir());
    let dir = engine.dir().to_owned();
    let cache = engine.state().options.cache_bytes / 8;
    let made = tokio::task::spawn_blocking(move || {
        let reader = Sqlite::open_reader(&dir, cache)?;
        reader.copy_to(&copy.0)?;
        Ok::<_, SqlError>(copy)
    });
    let copy = made.await.map_err(|_| Status::STOPPED)?.map_err(|error| error.status())?;
    tokio::task::spawn_blocking(move || {
        if let Err(error) = send(&copy.0, &pieces) {
            tracing::warn!(%error, "a snapshot could not be sent");
            let status = Status::new(Code::Internal, format!("etcdserver: the snapshot cannot be read: {error}"));
            // The client may be gone, which is the usual reason.
            let _ = pieces.blocking_send(Err(status.into()));
        }
    });
    Ok(ReceiverStream::new(stream))
}

/// A temporary file beside the database, removed when dropped.
struct Copy(PathBuf);

impl Copy {
    fn new(dir: &Path) -> Self {
        Self(dir.join(format!("snapshot-{:016x}.tmp", rand::random::<u64>())))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, file = %self.0.display(), "a temporary snapshot could not be removed");
        }
    }
}

fn send(file: &Path, pieces: &mpsc::Sender<Result<SnapshotResponse, tonic::Status>>) -> io::Result<()> {
    let file = File::open(file)?;
    let size = file.metadata()?.len();
    let padding = size.next_multiple_of(BLOCK) - size;
    let mut left = size + padding;
    let mut content = BufReader::with_capacity(PIECE, file).chain(io::repeat(0).take(padding));
    let mut digest = Sha256::new();
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    while left > 0 {
        let mut blob = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
        content.read_exact(&mut blob)?;
        digest.update(&blob);
        left -= blob.len() as u64;
        let piece = SnapshotResponse { remaining_bytes: left, blob: blob.into(), ..Default::default() };
        pieces.blocking_send(Ok(piece)).map_err(gone)?;
    }
    let checksum = SnapshotResponse { blob: digest.finalize().to_vec().into(), ..Default::default() };
    pieces.blocking_send(Ok(checksum)).map_err(gone)
}

/// Makes a new data directory in `dir` from a snapshot file. The store in it has the snapshot's keys, revisions and leases,
/// and ids of its own.
///
/// # Errors
/// When `dir` already holds a store, the file is no snapshot of this program or is damaged, or it cannot be written.
pub fn restore(snapshot: &Path, dir: &Path) -> Result<(), SqlError> {
    let lock = lock(dir)?;
    let target = dir.join(sqlite::FILE);
    if target.exists() {
        return Err(SqlError::Occupied(dir.to_owned()));
    }
    let copy = Copy::new(dir);
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
