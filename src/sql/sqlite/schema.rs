//! The tables, and how an older file becomes a current one.
//!
//! `log` holds every event, clustered by its packed revision and place, so that commits append and watches read in
//! order. `versions` orders the same events by key and, within a key, newest first: it carries all that a write or a
//! keys-only read needs, so that only reads of values touch the log.

use rand::Rng;
use rusqlite::{Connection, TransactionBehavior, params};

use super::doing;
use crate::sql::{backend::Meta, error::SqlError};

/// The layout that this program writes, kept as SQLite's `user_version`.
pub const LAYOUT_VERSION: i64 = 2;

/// Step `n` brings a file from layout version `n` to `n + 1`.
const STEPS: [&str; LAYOUT_VERSION as usize] = [
    "
    CREATE TABLE log (
        id INTEGER PRIMARY KEY,
        key BLOB NOT NULL,
        create_revision INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lease INTEGER NOT NULL,
        value BLOB NOT NULL
    );
    CREATE TABLE versions (
        key BLOB NOT NULL,
        id INTEGER NOT NULL,
        create_revision INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lease INTEGER NOT NULL,
        PRIMARY KEY (key, id DESC)
    ) WITHOUT ROWID;
    CREATE TABLE leases (id INTEGER PRIMARY KEY, ttl INTEGER NOT NULL, remaining INTEGER NOT NULL);
    CREATE TABLE lease_keys (lease INTEGER NOT NULL, key BLOB NOT NULL, PRIMARY KEY (lease, key)) WITHOUT ROWID;
    CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
",
    // The first layout kept the alarms of its one member as a number, a bit for each type.
    "
    CREATE TABLE alarms (kind INTEGER NOT NULL, member INTEGER NOT NULL, PRIMARY KEY (kind, member)) WITHOUT ROWID;
    INSERT INTO alarms (kind, member)
        SELECT kinds.column1, member.value FROM meta AS bits, meta AS member, (VALUES (1), (2)) AS kinds
        WHERE bits.name = 'alarms' AND member.name = 'member_id' AND bits.value >> kinds.column1 & 1;
    DELETE FROM meta WHERE name = 'alarms';
",
];

/// Creates the tables or brings them up to date, in one transaction. A new file also gets its identity; one that is up to date
/// is not written to, since its disk may be full.
pub fn upgrade(connection: &mut Connection) -> Result<(), SqlError> {
    let failed = doing("upgrading the database's layout");
    let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&failed)?;
    let found: i64 = tx.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(&failed)?;
    let known = LAYOUT_VERSION;
    let steps = usize::try_from(found).ok().and_then(|done| STEPS.get(done..));
    let Some(steps) = steps else { return Err(SqlError::LayoutTooNew { found, known }) };
    if steps.is_empty() {
        return Ok(());
    }
    for step in steps {
        tx.execute_batch(step).map_err(&failed)?;
    }
    if found == 0 {
        new_identity(&tx).map_err(&failed)?;
    }
    tx.pragma_update(None, "user_version", known).map_err(&failed)?;
    tx.commit().map_err(&failed)
}

/// Draws new ids and starts the term over, as a new or restored store needs.
pub fn new_identity(connection: &Connection) -> rusqlite::Result<()> {
    let mut rng = rand::rng();
    let mut set = connection.prepare("INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)")?;
    for (name, value) in [(Meta::ClusterId, rng.next_u64()), (Meta::MemberId, rng.next_u64()), (Meta::Term, 0)] {
        set.execute(params![name.name(), value.cast_signed()])?;
    }
    Ok(())
}
