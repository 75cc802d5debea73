//! What can go wrong below the API: the data directory, the database, and how each shows to a client.

use std::{io, path::PathBuf};

use tonic::Code;

use crate::status::Status;

/// Why the store could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// Another process (or another engine in this one) holds the data directory. Retry after it has gone.
    #[error("data directory {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The data directory cannot be created, locked or read.
    #[error("data directory {}: {source}", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The directory was written by a newer Millpond.
    #[error("the store has layout version {found}, this program knows up to {known}: use a newer Millpond")]
    LayoutTooNew {
        /// The version in the file.
        found: i64,
        /// The newest version that is understood.
        known: i64,
    },
    /// The target of a restore or an import is already a store.
    #[error("{} already holds a store, or what is left of one (millpond.db-wal, -shm, -journal): name another directory, or move all of it away", .0.display())]
    Occupied(PathBuf),
    /// A file that should be a snapshot is none, or is damaged.
    #[error("not a usable snapshot: {0}")]
    BadSnapshot(String),
    /// The log is damaged, and commits behind that place were acknowledged. To go on without them would give out their revisions again.
    #[error("{} is damaged at byte {offset}, and writes that were acknowledged follow: restore a snapshot into another directory", file.display())]
    DamagedLog {
        /// The log.
        file: PathBuf,
        /// Where.
        offset: u64,
    },
    /// The database refused an operation.
    #[error("{context}: {source}{}", kind.explained())]
    Database {
        /// What was being done.
        context: &'static str,
        /// What kind of trouble it is.
        kind: Trouble,
        /// The database's own error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store refused an operation of an import or export.
    #[error(transparent)]
    Refused(Status),
    /// Talking to the other end of an import or export failed.
    #[error("{context}: {source}")]
    Transfer {
        /// What was being done.
        context: &'static str,
        /// The client's error.
        source: Box<etcd_client::Error>,
    },
}

/// Kinds of trouble with a database, by what can still be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No room left. Nothing of the write remains; it may work later.
    Full,
    /// No room left for the index of the database's log. A commit that fails so is in the log all the same, and would be
    /// found there after a restart, unless it is written over. It may work later.
    Unindexed,
    /// The file or its file system is read-only. Reads go on.
    ReadOnly,
    /// The file is damaged.
    Corrupt,
    /// A sync failed, so what the disk holds is unknown: no more writes until a restart.
    SyncFailed,
    /// Anything else.
    Other,
}

impl Trouble {
    /// What the database's own words leave out.
    fn explained(self) -> &'static str {
        match self {
            Self::Unindexed => ": no room on the disk for the index of the log",
            _ => "",
        }
    }
}

impl SqlError {
    /// The kind of trouble, for errors of the database.
    pub fn trouble(&self) -> Trouble {
        match self {
            Self::Database { kind, .. } => *kind,
            _ => Trouble::Other,
        }
    }

    /// What a client is told: etcd's words where etcd has some.
    pub fn status(&self) -> Status {
        match self.trouble() {
            Trouble::Full | Trouble::Unindexed => Status::NO_SPACE,
            Trouble::Corrupt => Status::fixed(Code::DataLoss, "etcdserver: corrupt cluster"),
            Trouble::ReadOnly => Status::unavailable("etcdserver: the store is read-only"),
            Trouble::SyncFailed | Trouble::Other => {
                Status::unavailable(format!("etcdserver: the store failed: {self}"))
            }
        }
    }
}

/// Why an operation on the store did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The request is refused; nothing was written and others are not concerned.
    #[error(transparent)]
    Refused(#[from] Status),
    /// The store failed; whatever shared the transaction is undone.
    #[error(transparent)]
    Store(#[from] SqlError),
}

impl Fault {
    /// What a client is told.
    pub fn status(self) -> Status {
        match self {
            Self::Refused(status) => status,
            Self::Store(error) => error.status(),
        }
    }
}
