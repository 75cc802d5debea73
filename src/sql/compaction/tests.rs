//! Steps of compactions on a database of their own.

use super::*;
use crate::sql::{
    backend::{Record, Version},
    sqlite::Sqlite,
};

type Tested = Result<(), Box<dyn std::error::Error>>;

const KEYS: i64 = 100;
const PUT: i64 = 2;
const DELETED: i64 = 3;

fn event(revision: i64, key: i64, version: i64) -> Record {
    let create_revision = if version == 0 { 0 } else { PUT };
    let version = Version { id: EventId::new(revision, key), create_revision, version, lease: 0 };
    Record { key: format!("{key:03}").into(), value: Bytes::new(), version }
}

/// A store whose keys were all put at one revision and deleted at the next.
fn with_deletions(dir: &std::path::Path) -> Result<Sqlite, SqlError> {
    let mut store = Sqlite::open_writer(dir, 1 << 20)?;
    store.begin_write()?;
    for key in 0..KEYS {
        store.append(&event(PUT, key, 1))?;
        store.append(&event(DELETED, key, 0))?;
    }
    store.commit()?;
    Ok(store)
}

fn step(compaction: &mut Compaction, store: &mut Sqlite, announced: i64) -> Result<u64, SqlError> {
    store.begin_write()?;
    let removed = compaction.step(store, announced)?;
    store.commit()?;
    compaction.committed(0, true, Duration::from_secs(1));
    Ok(removed)
}

fn finish(compaction: &mut Compaction, store: &mut Sqlite, announced: i64) -> Result<u64, SqlError> {
    let mut removed = 0;
    while compaction.is_pending(announced) {
        removed += step(compaction, store, announced)?;
    }
    Ok(removed)
}

#[test]
fn a_deletion_at_the_compacted_revision_goes_with_the_next_compaction() -> Tested {
    let dir = tempfile::tempdir()?;
    let mut store = with_deletions(dir.path())?;
    let mut compaction = Compaction::open(&mut store)?;
    assert_eq!(finish(&mut compaction, &mut store, DELETED)?, KEYS.cast_unsigned());
    assert_eq!(store.last_event()?, Some(EventId::new(DELETED, KEYS - 1)));
    finish(&mut compaction, &mut store, DELETED + 1)?;
    assert_eq!(store.last_event()?, None);
    Ok(())
}

/// Deletions that were passed while they were at the compacted revision stayed for good once a later one was announced.
#[test]
fn a_compaction_during_another_leaves_nothing_behind_even_over_a_restart() -> Tested {
    for restarts in [false, true] {
        let dir = tempfile::tempdir()?;
        let mut store = with_deletions(dir.path())?;
        let mut compaction = Compaction::open(&mut store)?;
        for _ in 0..20 {
            step(&mut compaction, &mut store, DELETED)?;
        }
        assert!(compaction.is_pending(DELETED), "the first compaction had finished");
        if restarts {
            compaction = Compaction::open(&mut store)?;
        }
        finish(&mut compaction, &mut store, DELETED + 1)?;
        assert_eq!(compaction.done(), DELETED + 1);
        assert_eq!(store.last_event()?, None);
    }
    Ok(())
}

#[test]
fn what_a_version_without_a_target_left_behind_goes_with_the_next_compaction() -> Tested {
    for target in [None, Some(PUT)] {
        let dir = tempfile::tempdir()?;
        let mut store = with_deletions(dir.path())?;
        store.begin_write()?;
        store.set_meta(Meta::CompactionDone, DELETED + 1)?;
        store.set_meta(Meta::CompactionCursor, EventId::first(DELETED + 1).0)?;
        if let Some(target) = target {
            store.set_meta(Meta::CompactionTarget, target)?;
        }
        store.commit()?;
        let mut compaction = Compaction::open(&mut store)?;
        assert_eq!(compaction.done(), DELETED + 1);
        finish(&mut compaction, &mut store, DELETED + 2)?;
        assert_eq!(store.last_event()?, None);
    }
    Ok(())
}
