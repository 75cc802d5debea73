//! Reading from SQLite.

use bytes::Bytes;
use rusqlite::{OptionalExtension, Row, params, types::ValueRef};

use super::{Sqlite, doing};
use crate::{
    rules::{KeyRange, successor},
    sql::{
        alarms::Alarm,
        backend::{EventId, Meta, Reader, Record, Size, StoredLease, Version, VisitRecord, VisitVersion},
        error::SqlError,
    },
};

/// How many versions of one key a scan steps over before it looks up the next key instead.
const STEP_OVER: u32 = 16;

const FROM: &str =
    "SELECT key, id, create_revision, version, lease FROM versions WHERE key >= ?1 ORDER BY key, id DESC";
const BETWEEN: &str = "SELECT key, id, create_revision, version, lease FROM versions
     WHERE key >= ?1 AND key < ?2 ORDER BY key, id DESC";
const NEWEST: &str =
    "SELECT id, create_revision, version, lease FROM versions WHERE key = ?1 AND id <= ?2 ORDER BY id DESC LIMIT 1";
const RECORD: &str = "SELECT key, value, id, create_revision, version, lease FROM log WHERE id = ?1";
const LOG: &str =
    "SELECT key, value, id, create_revision, version, lease FROM log WHERE id BETWEEN ?1 AND ?2 ORDER BY id";

impl Reader for Sqlite {
    fn begin(&mut self) -> Result<(), SqlError> {
        let begin = || {
            self.connection.prepare_cached("BEGIN")?.execute([])?;
            // The first read is what pins the state.
            self.connection.prepare_cached("SELECT value FROM meta WHERE name = ''")?.exists([])
        };
        begin().map(drop).map_err(doing("starting a read"))
    }

    fn end(&mut self) {
        if !self.connection.is_autocommit()
            && let Err(error) = self.connection.prepare_cached("COMMIT").and_then(|mut end| end.execute([]))
        {
            tracing::warn!(%error, "a read could not be ended");
        }
    }

    fn newest(&mut self, key: &[u8], bound: EventId) -> Result<Option<Version>, SqlError> {
        let find = || {
            self.connection.prepare_cached(NEWEST)?.query_row(params![key, bound.0], |row| version(row, 0)).optional()
        };
        find().map_err(doing("looking up a key"))
    }

    fn scan(&mut self, range: &KeyRange, bound: EventId, visit: &mut VisitVersion<'_>) -> Result<(), SqlError> {
        if range.is_single() {
            if let Some(version) = self.newest(&range.start, bound)?.filter(|version| !version.is_deletion()) {
                let _ = visit(&range.start, version);
            }
            return Ok(());
        }
        if range.is_empty() {
            return Ok(());
        }
        let mut start = range.start.clone();
        loop {
            match self.scan_from(&start, range.end.as_deref(), bound, visit).map_err(doing("reading a range"))? {
                Scan::Done => return Ok(()),
                Scan::Crowded(key) => {
                    start = successor(&key);
                    let newest = self.newest(&key, bound)?.filter(|version| !version.is_deletion());
                    if newest.is_some_and(|version| visit(&key, version).is_break()) {
                        return Ok(());
                    }
                }
                Scan::Passed(key) => start = successor(&key),
            }
        }
    }

    fn record(&mut self, id: EventId) -> Result<Option<Record>, SqlError> {
        Ok(self.records(&[id])?.pop().flatten())
    }

    fn records(&mut self, ids: &[EventId]) -> Result<Vec<Option<Record>>, SqlError> {
        let find = || -> rusqlite::Result<Vec<Option<Record>>> {
            let mut statement = self.connection.prepare_cached(RECORD)?;
            ids.iter().map(|id| statement.query_row([id.0], record).optional()).collect()
        };
        find().map_err(doing("reading a value"))
    }

    fn log(&mut self, from: EventId, to: EventId, visit: &mut VisitRecord<'_>) -> Result<(), SqlError> {
        let mut read = || {
            let mut statement = self.connection.prepare_cached(LOG)?;
            let mut rows = statement.query(params![from.0, to.0])?;
            while let Some(row) = rows.next()? {
                if visit(record(row)?).is_break() {
                    break;
                }
            }
            Ok(())
        };
        read().map_err(doing("reading the log"))
    }

    fn last_event(&mut self) -> Result<Option<EventId>, SqlError> {
        let find = || -> rusqlite::Result<Option<i64>> {
            self.connection.prepare_cached("SELECT max(id) FROM log")?.query_row([], |row| row.get(0))
        };
        Ok(find().map_err(doing("finding the log's end"))?.map(EventId))
    }

    fn older(&mut self, key: &[u8], id: EventId) -> Result<Vec<EventId>, SqlError> {
        let find = || -> rusqlite::Result<Vec<EventId>> {
            let mut statement = self.connection.prepare_cached("SELECT id FROM versions WHERE key = ?1 AND id < ?2")?;
            statement.query_map(params![key, id.0], |row| row.get(0).map(EventId))?.collect()
        };
        find().map_err(doing("looking up older versions"))
    }

    fn meta(&mut self, name: Meta) -> Result<Option<i64>, SqlError> {
        let find = || {
            let mut statement = self.connection.prepare_cached("SELECT value FROM meta WHERE name = ?1")?;
            statement.query_row([name.name()], |row| row.get(0)).optional()
        };
        find().map_err(doing("reading the store's numbers"))
    }

    fn alarms(&mut self) -> Result<Vec<Alarm>, SqlError> {
        let alarm = |row: &Row<'_>| Ok(Alarm { kind: row.get(0)?, member_id: row.get::<_, i64>(1)?.cast_unsigned() });
        let find = || -> rusqlite::Result<Vec<Alarm>> {
            let mut statement = self.connection.prepare_cached("SELECT kind, member FROM alarms")?;
            statement.query_map([], alarm)?.collect()
        };
        find().map_err(doing("reading the alarms"))
    }

    fn leases(&mut self) -> Result<Vec<StoredLease>, SqlError> {
        let lease = |row: &Row<'_>| Ok(StoredLease { id: row.get(0)?, ttl: row.get(1)?, remaining: row.get(2)? });
        let find = || -> rusqlite::Result<Vec<StoredLease>> {
            let mut statement = self.connection.prepare_cached("SELECT id, ttl, remaining FROM leases ORDER BY id")?;
            statement.query_map([], lease)?.collect()
        };
        find().map_err(doing("reading the leases"))
    }

    fn lease_keys(&mut self, lease: i64) -> Result<Vec<Bytes>, SqlError> {
        let find = || -> rusqlite::Result<Vec<Bytes>> {
            let mut statement =
                self.connection.prepare_cached("SELECT key FROM lease_keys WHERE lease = ?1 ORDER BY key")?;
            statement.query_map([lease], |row| blob(row, 0))?.collect()
        };
        find().map_err(doing("reading a lease's keys"))
    }

    fn size(&mut self) -> Result<Size, SqlError> {
        let number = |pragma: &str| -> rusqlite::Result<i64> {
            self.connection.prepare_cached(pragma)?.query_row([], |row| row.get(0))
        };
        let size = || {
            let page = number("PRAGMA page_size")?;
            let pages = number("PRAGMA page_count")?;
            let free = number("PRAGMA freelist_count")?;
            Ok(Size { total: pages.saturating_mul(page), used: pages.saturating_sub(free).saturating_mul(page) })
        };
        size().map_err(doing("measuring the database"))
    }
}

/// How a pass over the index ended.
enum Scan {
    /// Nothing is left, or the visitor had enough.
    Done,
    /// This key has many versions newer than the bound: look its version up, then go on after it.
    Crowded(Bytes),
    /// This key was visited and has many older versions: go on after it.
    Passed(Bytes),
}

impl Sqlite {
    fn scan_from(
        &self,
        start: &[u8],
        end: Option<&[u8]>,
        bound: EventId,
        visit: &mut VisitVersion<'_>,
    ) -> rusqlite::Result<Scan> {
        let mut statement = self.connection.prepare_cached(if end.is_some() { BETWEEN } else { FROM })?;
        let mut rows = match end {
            Some(end) => statement.query(params![start, end])?,
            None => statement.query(params![start])?,
        };
        let (mut key, mut decided, mut stepped) = (Vec::new(), true, 0_u32);
        let mut first = true;
        while let Some(row) = rows.next()? {
            let bytes = row.get_ref(0)?.as_blob()?;
            if first || bytes != &key[..] {
                key.clear();
                key.extend_from_slice(bytes);
                (first, decided, stepped) = (false, false, 0);
            } else if stepped == STEP_OVER {
                return Ok(if decided { Scan::Passed(key.into()) } else { Scan::Crowded(key.into()) });
            }
            stepped += 1;
            let version = version(row, 1)?;
            if decided || version.id > bound {
                continue;
            }
            decided = true;
            if !version.is_deletion() && visit(&key, version).is_break() {
                return Ok(Scan::Done);
            }
        }
        Ok(Scan::Done)
    }
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    Ok(Record { key: blob(row, 0)?, value: blob(row, 1)?, version: version(row, 2)? })
}

fn version(row: &Row<'_>, at: usize) -> rusqlite::Result<Version> {
    Ok(Version {
        id: EventId(row.get(at)?),
        create_revision: row.get(at + 1)?,
        version: row.get(at + 2)?,
        lease: row.get(at + 3)?,
    })
}

fn blob(row: &Row<'_>, at: usize) -> rusqlite::Result<Bytes> {
    match row.get_ref(at)? {
        ValueRef::Null => Ok(Bytes::new()),
        value => Ok(Bytes::copy_from_slice(value.as_blob()?)),
    }
}
