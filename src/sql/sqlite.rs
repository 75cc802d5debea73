//! The backend on SQLite: one connection that writes, a few that read, in WAL mode with every commit synced.

mod log;
mod read;
mod schema;
mod write;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, config::DbConfig};

pub use schema::LAYOUT_VERSION;

use super::{
    directory,
    error::{SqlError, Trouble},
};

/// The database's file in the data directory.
pub const FILE: &str = "millpond.db";

/// How long to wait for a lock that SQLite's own checkpoints and recovery hold briefly.
const BUSY: Duration = Duration::from_secs(10);

/// Prepared statements kept per connection; more than there are.
const STATEMENTS: usize = 64;

/// A connection. It reads anywhere, and writes if opened so.
pub struct Sqlite {
    connection: Connection,
}

impl Sqlite {
    /// Opens the database of `dir` for writing, creating or upgrading it as needed.
    ///
    /// `cache_bytes` bounds the page cache. Errors with the layout too new, or what SQLite says.
    pub fn open_writer(dir: &Path, cache_bytes: usize) -> Result<Self, SqlError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let file = dir.join(FILE);
        directory::create(&file).map_err(|source| SqlError::Directory { dir: dir.to_owned(), source })?;
        let mut sqlite = Self::open(&file, flags, cache_bytes)?;
        sqlite.configure().map_err(doing("setting up the database"))?;
        schema::upgrade(&mut sqlite.connection)?;
        Ok(sqlite)
    }

    /// Opens the database of `dir`, which has a writer already, for checkpoints.
    pub fn open_checkpointer(dir: &Path) -> Result<Self, SqlError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut sqlite = Self::open(&dir.join(FILE), flags, 1 << 20)?;
        sqlite.configure().map_err(doing("setting up the database"))?;
        Ok(sqlite)
    }

    /// Opens the database of `dir`, which must exist, for reading.
    pub fn open_reader(dir: &Path, cache_bytes: usize) -> Result<Self, SqlError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Self::open(&dir.join(FILE), flags, cache_bytes)
    }

    fn open(file: &Path, flags: OpenFlags, cache_bytes: usize) -> Result<Self, SqlError> {
        let open = || {
            let connection = Connection::open_with_flags(file, flags)?;
            connection.busy_timeout(BUSY)?;
            // Without this promise of stable plans, statements are compiled anew whenever their values change.
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
            connection.set_prepared_statement_cache_capacity(STATEMENTS);
            let kib = i64::try_from(cache_bytes / 1024).unwrap_or(i64::MAX);
            connection.pragma_update(None, "cache_size", -kib)?;
            Ok(Self { connection })
        };
        open().map_err(doing("opening the database"))
    }

    fn configure(&mut self) -> rusqlite::Result<()> {
        let connection = &self.connection;
        connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        connection.pragma_update(None, "journal_size_limit", 256 << 20)?;
        connection.pragma_update(None, "temp_store", "MEMORY")
    }

    /// Writes a compact copy of the database, as of one moment, to `file`, which must be empty or not exist.
    pub fn copy_to(&self, file: &Path) -> Result<(), SqlError> {
        let copy = || self.connection.execute("VACUUM INTO ?1", [file.to_string_lossy()]);
        copy().map(drop).map_err(doing("copying the database"))
    }

    /// What SQLite finds wrong with the file; nothing if it is sound.
    pub fn integrity_problems(&self) -> Result<Vec<String>, SqlError> {
        let check = || {
            let mut statement = self.connection.prepare("PRAGMA integrity_check")?;
            let found: rusqlite::Result<Vec<String>> = statement.query_map([], |row| row.get(0))?.collect();
            found
        };
        let found = check().map_err(doing("checking the database"))?;
        Ok(found.into_iter().filter(|line| line != "ok").collect())
    }
}

#[cfg(test)]
impl Sqlite {
    /// Makes the disk as good as full beyond this many pages.
    pub fn limit_pages(&self, pages: i64) -> Result<(), SqlError> {
        self.connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).map_err(doing("testing"))
    }
}

/// Ways in which the tables can disagree, each with the query that counts the cases.
const DISAGREEMENTS: [(&str, &str); 4] = [
    (
        "events are in the log and not in the index",
        "SELECT count(*) FROM log WHERE NOT EXISTS
             (SELECT 1 FROM versions WHERE versions.key = log.key AND versions.id = log.id)",
    ),
    (
        "events are in the index and not in the log",
        "SELECT count(*) FROM versions WHERE NOT EXISTS (SELECT 1 FROM log WHERE log.id = versions.id)",
    ),
    (
        "keys hang on a lease that does not exist",
        "SELECT count(*) FROM lease_keys WHERE NOT EXISTS (SELECT 1 FROM leases WHERE leases.id = lease_keys.lease)",
    ),
    (
        "keys are said to hang on another lease than they do",
        "SELECT count(*) FROM lease_keys WHERE lease IS NOT
             (SELECT lease FROM versions WHERE versions.key = lease_keys.key ORDER BY id DESC LIMIT 1)",
    ),
];

impl Sqlite {
    /// In how many places the tables disagree with each other; nothing if they agree.
    pub fn index_problems(&self) -> Result<Vec<String>, SqlError> {
        let mut problems = Vec::new();
        for (what, query) in DISAGREEMENTS {
            let count = self.connection.query_row(query, [], |row| row.get::<_, i64>(0));
            let count = count.map_err(doing("comparing the index with the log"))?;
            if count > 0 {
                problems.push(format!("{count} {what}"));
            }
        }
        Ok(problems)
    }
}

/// Makes a copied database a store of its own: upgrades its layout as needed and gives it new ids.
pub fn adopt(file: &Path) -> Result<(), SqlError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut sqlite = Sqlite::open(file, flags, 4 << 20)?;
    schema::upgrade(&mut sqlite.connection)?;
    schema::new_identity(&sqlite.connection).map_err(doing("giving the copy its own ids"))
}

/// Looks at the log of a database that nobody has open, before SQLite takes what it can use of it.
///
/// # Errors
/// When durable commits lie behind damage in it, or it cannot be read.
pub fn admit_log(dir: &Path) -> Result<(), SqlError> {
    let file = log_of(dir);
    log::settle(&file).map_err(|source| SqlError::Directory { dir: dir.to_owned(), source })?;
    match damage(dir)? {
        Some(offset) => Err(SqlError::DamagedLog { file, offset }),
        None => Ok(()),
    }
}

/// Looks at the log of a database that may be in use.
///
/// # Errors
/// As [`admit_log`].
pub fn check_log(dir: &Path) -> Result<(), SqlError> {
    match damage(dir)? {
        // What is being written at the moment looks damaged once.
        Some(offset) if damage(dir)? == Some(offset) => Err(SqlError::DamagedLog { file: log_of(dir), offset }),
        _ => Ok(()),
    }
}

fn damage(dir: &Path) -> Result<Option<u64>, SqlError> {
    log::damage(&log_of(dir)).map_err(|source| SqlError::Directory { dir: dir.to_owned(), source })
}

fn log_of(dir: &Path) -> PathBuf {
    dir.join(format!("{FILE}-wal"))
}

/// Says what was being done when SQLite failed.
pub fn doing(context: &'static str) -> impl Fn(rusqlite::Error) -> SqlError {
    move |error| SqlError::Database { context, kind: trouble(&error), source: Box::new(error) }
}

fn trouble(error: &rusqlite::Error) -> Trouble {
    use rusqlite::ffi;
    let Some(code) = error.sqlite_error() else { return Trouble::Other };
    match (code.code, code.extended_code) {
        (_, ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC) => Trouble::SyncFailed,
        (_, ffi::SQLITE_IOERR_SHMSIZE) => Trouble::Unindexed,
        (ErrorCode::DiskFull, _) => Trouble::Full,
        (ErrorCode::ReadOnly, _) => Trouble::ReadOnly,
        (ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase, _) => Trouble::Corrupt,
        _ => Trouble::Other,
    }
}
