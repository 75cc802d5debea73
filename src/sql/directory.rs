//! The data directory: one process has it, and only its user can read what is in it, as with etcd's.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use rustix::fs::{FlockOperation, flock};

use super::SqlError;

/// The file in it that one process holds locked.
const LOCK: &str = "lock";

/// The modes of a new directory and of new files.
const PRIVATE_DIRECTORY: u32 = 0o700;
const PRIVATE_FILE: u32 = 0o600;

/// The bits of a mode that let others in.
const OTHERS: u32 = 0o077;

/// Takes the data directory for this process, creating it as needed. The lock lasts as long as the file is open.
///
/// One that is there keeps its mode: whoever made it may have meant it so.
pub fn lock(dir: &Path) -> Result<File, SqlError> {
    let failed = |source| SqlError::Directory { dir: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(PRIVATE_DIRECTORY).create(dir).map_err(failed)?;
    let file = private().create(true).open(dir.join(LOCK)).map_err(failed)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => SqlError::InUse(dir.to_owned()),
        other => failed(other.into()),
    })?;
    let mode = dir.metadata().map_err(failed)?.permissions().mode() & 0o777;
    if mode & OTHERS != 0 {
        tracing::warn!(dir = %dir.display(), mode = format!("{mode:o}"), "others may enter the data directory; 700 keeps them out");
    }
    Ok(file)
}

/// Makes an empty file, unless there is a file. What SQLite creates beside its database (`-wal`, `-shm`) takes that one's mode, so
/// SQLite finds it made.
pub fn create(file: &Path) -> io::Result<()> {
    match private().create_new(true).open(file) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(PRIVATE_FILE);
    options
}
