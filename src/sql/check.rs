//! Whether a store's file is sound.

use std::{io, path::Path};

use super::{
    SqlError,
    backend::{Meta, Reader, Size},
    sqlite::{self, FILE, Sqlite},
};

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, in words; nothing if the store is sound.
    pub problems: Vec<String>,
    /// The latest revision.
    pub revision: i64,
    /// The compacted revision, -1 before the first compaction.
    pub compacted: i64,
    /// How much room the file takes.
    pub size: Size,
}

/// Reads every page of the store in `dir` and of SQLite's log, and compares the store's index with its own log. Harmless while
/// the store is open.
///
/// # Errors
/// When there is no store, or it or SQLite's log is too damaged to be read to its end.
pub fn check(dir: &Path) -> Result<Report, SqlError> {
    let file = dir.join(FILE);
    if !file.is_file() {
        let source = io::Error::new(io::ErrorKind::NotFound, format!("there is no {FILE} in it"));
        return Err(SqlError::Directory { dir: dir.to_owned(), source });
    }
    // First: what SQLite does not take from the log, nothing below may miss.
    sqlite::check_log(dir)?;
    let mut sqlite = Sqlite::open_reader(dir, 16 << 20)?;
    let mut problems = sqlite.integrity_problems()?;
    problems.extend(sqlite.index_problems()?);
    let compacted = sqlite.meta(Meta::Compacted)?.unwrap_or(-1);
    let last = sqlite.last_event()?.map_or(1, |event| event.revision());
    Ok(Report { problems, revision: last.max(compacted).max(1), compacted, size: sqlite.size()? })
}
