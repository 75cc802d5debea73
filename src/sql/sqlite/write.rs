//! Writing to SQLite.

use rusqlite::{Params, params};

use super::{Sqlite, doing};
use crate::sql::{
    alarms::Alarm,
    backend::{EventId, LogPages, Meta, Record, StoredLease, Writer},
    error::SqlError,
};

impl Writer for Sqlite {
    fn begin_write(&mut self) -> Result<(), SqlError> {
        self.run("BEGIN IMMEDIATE", []).map_err(doing("starting a write"))
    }

    fn commit(&mut self) -> Result<(), SqlError> {
        self.run("COMMIT", []).map_err(doing("committing"))
    }

    fn rollback(&mut self) -> Result<(), SqlError> {
        if self.connection.is_autocommit() {
            return Ok(());
        }
        self.run("ROLLBACK", []).map_err(doing("rolling back"))
    }

    fn savepoint(&mut self) -> Result<(), SqlError> {
        self.run("SAVEPOINT mark", []).map_err(doing("marking a savepoint"))
    }

    fn release(&mut self) -> Result<(), SqlError> {
        self.run("RELEASE mark", []).map_err(doing("releasing a savepoint"))
    }

    fn rollback_to_savepoint(&mut self) -> Result<(), SqlError> {
        self.run("ROLLBACK TO mark", []).map_err(doing("going back to a savepoint"))?;
        self.release()
    }

    fn append(&mut self, record: &Record) -> Result<(), SqlError> {
        let (key, value, v) = (&record.key[..], &record.value[..], &record.version);
        self.run(
            "INSERT INTO log (id, key, create_revision, version, lease, value) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![v.id.0, key, v.create_revision, v.version, v.lease, value],
        )
        .and_then(|()| {
            self.run(
                "INSERT INTO versions (key, id, create_revision, version, lease) VALUES (?1, ?2, ?3, ?4, ?5)",
                params![key, v.id.0, v.create_revision, v.version, v.lease],
            )
        })
        .map_err(doing("writing an event"))
    }

    fn remove(&mut self, key: &[u8], id: EventId) -> Result<(), SqlError> {
        self.run("DELETE FROM log WHERE id = ?1", [id.0])
            .and_then(|()| self.run("DELETE FROM versions WHERE key = ?1 AND id = ?2", params![key, id.0]))
            .map_err(doing("removing a compacted event"))
    }

    fn set_meta(&mut self, name: Meta, value: i64) -> Result<(), SqlError> {
        self.run("INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)", params![name.name(), value])
            .map_err(doing("writing the store's numbers"))
    }

    fn put_lease(&mut self, lease: StoredLease) -> Result<(), SqlError> {
        let values = params![lease.id, lease.ttl, lease.remaining];
        self.run("INSERT OR REPLACE INTO leases (id, ttl, remaining) VALUES (?1, ?2, ?3)", values)
            .map_err(doing("writing a lease"))
    }

    fn delete_lease(&mut self, id: i64) -> Result<(), SqlError> {
        self.run("DELETE FROM leases WHERE id = ?1", [id]).map_err(doing("deleting a lease"))
    }

    fn attach(&mut self, lease: i64, key: &[u8]) -> Result<(), SqlError> {
        self.run("INSERT OR REPLACE INTO lease_keys (lease, key) VALUES (?1, ?2)", params![lease, key])
            .map_err(doing("attaching a key to a lease"))
    }

    fn detach(&mut self, lease: i64, key: &[u8]) -> Result<(), SqlError> {
        self.run("DELETE FROM lease_keys WHERE lease = ?1 AND key = ?2", params![lease, key])
            .map_err(doing("detaching a key from a lease"))
    }

    fn put_alarm(&mut self, alarm: Alarm) -> Result<(), SqlError> {
        let values = params![alarm.kind, alarm.member_id.cast_signed()];
        self.run("INSERT OR IGNORE INTO alarms (kind, member) VALUES (?1, ?2)", values)
            .map_err(doing("writing an alarm"))
    }

    fn delete_alarm(&mut self, alarm: Alarm) -> Result<(), SqlError> {
        let values = params![alarm.kind, alarm.member_id.cast_signed()];
        self.run("DELETE FROM alarms WHERE kind = ?1 AND member = ?2", values).map_err(doing("deleting an alarm"))
    }

    fn log_pages(&mut self) -> Result<LogPages, SqlError> {
        let pages = || {
            let mut statement = self.connection.prepare_cached("PRAGMA wal_checkpoint(NOOP)")?;
            statement.query_row([], |row| Ok((row.get::<_, i64>(1)?, row.get::<_, i64>(2)?)))
        };
        let (total, copied) = pages().map_err(doing("measuring the log"))?;
        // SQLite says -1 where there is no log.
        Ok(LogPages { total: u64::try_from(total).unwrap_or(0), copied: u64::try_from(copied).unwrap_or(0) })
    }

    fn checkpoint(&mut self) -> Result<(), SqlError> {
        let run = || self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        run().map_err(doing("checkpointing"))
    }

    fn defragment(&mut self) -> Result<(), SqlError> {
        // The copy that it makes may be larger than memory. Where SQLite finds no place for it in the file system, as in a container
        // without one that can be written, memory has to do.
        let vacuum = |store: &str| {
            self.connection.pragma_update(None, "temp_store", store)?;
            self.connection.execute_batch("VACUUM")
        };
        let run = || {
            let vacuumed = vacuum("FILE").or_else(|error| {
                tracing::warn!(%error, "defragmenting again, in memory: no temporary file could be used");
                vacuum("MEMORY")
            });
            self.connection.pragma_update(None, "temp_store", "MEMORY")?;
            vacuumed?;
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        };
        run().map_err(doing("defragmenting"))
    }
}

impl Sqlite {
    fn run(&self, sql: &'static str, values: impl Params) -> rusqlite::Result<()> {
        self.connection.prepare_cached(sql)?.execute(values).map(drop)
    }
}
