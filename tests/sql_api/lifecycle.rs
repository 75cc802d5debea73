//! Opening, closing, and what stays.

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use millpond::{
    proto::etcdserverpb::{SnapshotRequest, maintenance_client::MaintenanceClient},
    sql::{Engine, Options, SqlError, backend::Reader},
};
use tokio::time::sleep;

use crate::store::{Result, Store, everything, keys, range};

#[tokio::test]
async fn a_restart_keeps_everything_but_the_term() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    store.put("a", "2").await?;
    store.delete("a", "").await?;
    store.put("b", "1").await?;
    store.compact(3).await?;
    let before = store.range(everything()).await?;
    let store = store.reopen(Options::default()).await?;
    let after = store.range(everything()).await?;
    assert_eq!(before.kvs, after.kvs);
    let (before, after) = (before.header.ok_or("no header")?, after.header.ok_or("no header")?);
    assert_eq!(
        (before.cluster_id, before.member_id, before.revision),
        (after.cluster_id, after.member_id, after.revision)
    );
    assert_eq!(after.raft_term, before.raft_term + 1);
    assert_eq!(store.put("c", "1").await?, 6);
    assert!(
        store.kv().range(millpond::proto::etcdserverpb::RangeRequest { revision: 2, ..range("a", "") }).await.is_err()
    );
    Ok(())
}

#[tokio::test]
async fn a_directory_has_one_engine() -> Result {
    let store = Store::open().await?;
    let second = Engine::open(store.dir(), Options::default());
    assert!(matches!(second, Err(SqlError::InUse(_))), "{:?}", second.err());
    Ok(())
}

#[tokio::test]
async fn a_store_of_a_newer_layout_is_not_touched() -> Result {
    let dir = tempfile::tempdir()?;
    Engine::open(dir.path(), Options::default())?.close().await;
    let file = dir.path().join(millpond::sql::sqlite::FILE);
    rusqlite::Connection::open(&file)?.pragma_update(None, "user_version", 99)?;
    let refused = Engine::open(dir.path(), Options::default()).err().ok_or("it was opened")?;
    assert!(matches!(refused, SqlError::LayoutTooNew { found: 99, .. }), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_file_that_is_no_store_is_a_clear_error() -> Result {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join(millpond::sql::sqlite::FILE), "not a database, whatever its name".repeat(100))?;
    let refused = Engine::open(dir.path(), Options::default()).err().ok_or("it was opened")?;
    assert_eq!(refused.trouble(), millpond::sql::Trouble::Corrupt, "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_closed_store_refuses_everything() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    store.engine.close().await;
    for refused in [store.kv().put(crate::store::put("a", "2")).await.err(), store.kv().range(everything()).await.err()]
    {
        let status = refused.ok_or("it was served")?;
        assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, "etcdserver: server stopped"));
    }
    Ok(())
}

#[tokio::test]
async fn a_compaction_cut_short_is_finished_after_a_restart() -> Result {
    let store = Store::open().await?;
    for round in 0..2000 {
        store.put(&format!("k{}", round % 10), &round.to_string()).await?;
    }
    let request = millpond::proto::etcdserverpb::CompactionRequest { revision: 2001, physical: false };
    store.kv().compact(request).await?;
    let store = store.reopen(Options::default()).await?;
    let mut done = store.engine.state().compaction_done();
    crate::store::soon(done.wait_for(|done| *done == 2001)).await??;
    assert_eq!(keys(&store.range(everything()).await?).len(), 10);
    let file = rusqlite::Connection::open(store.dir().join(millpond::sql::sqlite::FILE))?;
    let rows = |table| file.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get::<_, i64>(0));
    assert_eq!((rows("log")?, rows("versions")?), (10, 10));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_emptied_while_writes_go_on() -> Result {
    let store = Store::open().await?;
    let mut writes = tokio::task::JoinSet::new();
    for writer in 0..16 {
        let mut kv = store.kv();
        writes.spawn(async move {
            for round in 0..40 {
                kv.put(crate::store::put(&format!("k{writer}/{round}"), &"v".repeat(200_000))).await?;
            }
            Ok::<_, tonic::Status>(())
        });
    }
    while let Some(result) = writes.join_next().await {
        result??;
    }
    let log = std::fs::metadata(store.dir().join(format!("{}-wal", millpond::sql::sqlite::FILE)))?.len();
    assert!(log < 100 << 20, "128 MB were written and the log has {log} bytes");
    assert_eq!(
        store.range(millpond::proto::etcdserverpb::RangeRequest { count_only: true, ..everything() }).await?.count,
        640
    );
    Ok(())
}

/// A read keeps the log from starting over, and without a moment between two of them, so would all together.
#[tokio::test]
async fn the_log_is_emptied_though_there_is_always_somebody_who_reads() -> Result {
    let store = Store::open().await?;
    let reading: Vec<_> = (0..3)
        .map(|reader| {
            let engine = store.engine.clone();
            tokio::spawn(async move {
                sleep(Duration::from_millis(20 * reader)).await;
                let read = |_: &mut dyn Reader, _| {
                    std::thread::sleep(Duration::from_millis(60));
                    Ok(())
                };
                while engine.read(read).await.is_ok() {}
            })
        })
        .collect();
    let mut longest = 0;
    for round in 0..240 {
        store.put(&format!("k{}", round % 7), &"v".repeat(1_000_000)).await?;
        let log = std::fs::metadata(store.dir().join(format!("{}-wal", millpond::sql::sqlite::FILE)))?.len();
        longest = longest.max(log);
    }
    reading.iter().for_each(tokio::task::JoinHandle::abort);
    assert!(longest < 150 << 20, "240 MB were written and the log had {longest} bytes");
    Ok(())
}

/// The mode of each file in a directory, and of the directory itself.
fn modes(dir: &Path) -> Result<BTreeMap<PathBuf, u32>> {
    let mut modes = BTreeMap::from([(dir.to_owned(), dir.metadata()?.mode() & 0o777)]);
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        modes.insert(entry.path(), entry.metadata()?.mode() & 0o777);
    }
    Ok(modes)
}

fn assert_private(dir: &Path, files: usize) -> Result {
    let modes = modes(dir)?;
    assert_eq!(modes.len(), files + 1, "{modes:?}");
    for (path, mode) in modes {
        assert_eq!(mode, if path == dir { 0o700 } else { 0o600 }, "{mode:o} {}", path.display());
    }
    Ok(())
}

/// Whoever could read the files could read all keys.
#[tokio::test]
async fn what_a_store_creates_is_for_its_user_only() -> Result {
    let home = tempfile::tempdir()?;
    let (dir, restored) = (home.path().join("new/store"), home.path().join("restored"));
    let engine = Engine::open(&dir, Options::default())?;
    let mut maintenance = MaintenanceClient::new(crate::store::channel(&engine).await?);
    let mut pieces = maintenance.snapshot(SnapshotRequest {}).await?.into_inner();
    // The copy goes when it has been read for sending, which may be soon.
    let copies = modes(&dir)?.into_iter().filter(|(path, _)| path.extension().is_some_and(|end| end == "tmp"));
    assert!(copies.into_iter().all(|(_, mode)| mode == 0o600));
    let mut snapshot = Vec::new();
    while let Some(piece) = pieces.message().await? {
        snapshot.extend_from_slice(&piece.blob);
    }
    crate::store::eventually(async || Ok(modes(&dir)?.len() == 5)).await?;
    // The database, its log and the log's index, and the lock.
    assert_private(&dir, 4)?;
    engine.close().await;
    std::fs::write(home.path().join("snapshot"), snapshot)?;
    millpond::sql::restore(&home.path().join("snapshot"), &restored)?;
    assert_private(&restored, 2)
}

#[tokio::test]
async fn a_directory_that_is_there_keeps_its_mode() -> Result {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o750))?;
    Engine::open(dir.path(), Options::default())?.close().await;
    assert_eq!(dir.path().metadata()?.mode() & 0o777, 0o750);
    Ok(())
}
