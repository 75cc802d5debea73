//! Status, alarms, defragmentation, hashes and snapshots.

use std::{future::pending, path::Path, time::Duration};

use millpond::{
    proto::{
        etcdserverpb::{
            AlarmRequest, CompactionRequest, DefragmentRequest, HashKvRequest, HashRequest, MemberListRequest,
            PutRequest, SnapshotRequest, StatusRequest, cluster_client::ClusterClient, kv_client::KvClient,
            maintenance_client::MaintenanceClient,
        },
        v3lockpb::{UnlockRequest, lock_client::LockClient},
    },
    sql::{Engine, Options, SqlError, restore},
};
use sha2::{Digest, Sha256};
use tokio::time::sleep;
use tonic::Code;

use crate::store::{Result, Store, everything, put, refusal};

#[tokio::test]
async fn the_one_member_is_the_leader() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    let status = store.maintenance().status(StatusRequest {}).await?.into_inner();
    let header = status.header.ok_or("no header")?;
    assert_eq!((status.leader, status.raft_term), (header.member_id, header.raft_term));
    assert!(status.version.starts_with("3.7."));
    assert!(status.db_size >= status.db_size_in_use && status.db_size_in_use > 0 && status.errors.is_empty());
    let list = ClusterClient::new(store.channel.clone()).member_list(MemberListRequest::default()).await?.into_inner();
    assert_eq!(list.members.iter().map(|member| member.id).collect::<Vec<_>>(), [header.member_id]);
    Ok(())
}

#[tokio::test]
async fn the_quota_raises_an_alarm_that_only_freeing_room_survives() -> Result {
    let store = Store::with(Options { quota_bytes: 1 << 20, ..Options::default() }).await?;
    let full = (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded".to_owned());
    let large = PutRequest { value: vec![7; 300_000].into(), ..put("large", "") };
    let mut refused = None;
    for _ in 0..10 {
        if let Err(status) = store.kv().put(large.clone()).await {
            refused = Some((status.code(), status.message().to_owned()));
            break;
        }
    }
    assert_eq!(refused, Some(full.clone()));
    assert_eq!(refusal(store.kv().put(put("small", "")).await), full);
    let grant = millpond::proto::etcdserverpb::LeaseGrantRequest { id: 1, ttl: 60 };
    assert_eq!(refusal(store.lease().lease_grant(grant).await), full);
    let alarms = store.maintenance().alarm(AlarmRequest::default()).await?.into_inner().alarms;
    let member_id = alarms.first().ok_or("no alarm")?.member_id;
    assert_eq!(alarms.iter().map(|alarm| alarm.alarm).collect::<Vec<_>>(), [1]);
    let store = store.reopen(Options { quota_bytes: 1 << 20, ..Options::default() }).await?;
    assert_eq!(store.maintenance().status(StatusRequest {}).await?.into_inner().errors.len(), 1, "alarms last");
    store.delete("\0", "\0").await?;
    let current = store.range(everything()).await?.header.ok_or("no header")?.revision;
    store.compact(current).await?;
    store.maintenance().defragment(DefragmentRequest {}).await?;
    let disarm = AlarmRequest { action: 2, member_id, alarm: 1 };
    assert_eq!(store.maintenance().alarm(disarm).await?.into_inner().alarms.len(), 1);
    store.put("small", "").await?;
    Ok(())
}

/// The alarms that are on, as `(member, type)`.
async fn alarms(store: &Store) -> Result<Vec<(u64, i32)>> {
    let alarms = store.maintenance().alarm(AlarmRequest::default()).await?.into_inner().alarms;
    Ok(alarms.into_iter().map(|alarm| (alarm.member_id, alarm.alarm)).collect())
}

#[tokio::test]
async fn alarms_of_any_member_last_and_are_not_without_number() -> Result {
    let store = Store::open().await?;
    for (member_id, alarm) in [(77, 1), (0, 1), (u64::MAX, 2)] {
        store.maintenance().alarm(AlarmRequest { action: 1, member_id, alarm }).await?;
    }
    let store = store.reopen(Options::default()).await?;
    assert_eq!(alarms(&store).await?, [(0, 1), (77, 1), (u64::MAX, 2)]);
    let off = AlarmRequest { action: 2, member_id: u64::MAX, alarm: 2 };
    assert_eq!(store.maintenance().alarm(off).await?.into_inner().alarms.len(), 1);
    let store = store.reopen(Options::default()).await?;
    assert_eq!(alarms(&store).await?, [(0, 1), (77, 1)]);
    let mut turned_on = 0;
    let refused = loop {
        let alarm = AlarmRequest { action: 1, member_id: 1000 + turned_on, alarm: 1 };
        match store.maintenance().alarm(alarm).await {
            Ok(_) => turned_on += 1,
            Err(status) => break status,
        }
        assert!(turned_on < 10_000, "any number of alarms");
    };
    assert_eq!((refused.code(), refused.message()), (Code::ResourceExhausted, "etcdserver: too many alarms"));
    let again = AlarmRequest { action: 1, member_id: 77, alarm: 1 };
    assert_eq!(store.maintenance().alarm(again).await?.into_inner().alarms.len(), 1);
    Ok(())
}

#[tokio::test]
async fn alarms_of_the_first_layout_are_the_one_members() -> Result {
    let store = Store::open().await?;
    let member_id = store.range(everything()).await?.header.ok_or("no header")?.member_id;
    store.engine.close().await;
    let database = rusqlite::Connection::open(store.dir().join(millpond::sql::sqlite::FILE))?;
    database.execute_batch("DROP TABLE alarms; INSERT INTO meta VALUES ('alarms', 2); PRAGMA user_version = 1")?;
    drop(database);
    let store = store.reopen(Options::default()).await?;
    assert_eq!(alarms(&store).await?, [(member_id, 1)]);
    let full = (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded".to_owned());
    assert_eq!(refusal(store.kv().put(put("a", "1")).await), full);
    Ok(())
}

#[tokio::test]
async fn defragmentation_gives_room_back() -> Result {
    let store = Store::open().await?;
    let large = PutRequest { value: vec![7; 1_000_000].into(), ..put("large", "") };
    for _ in 0..10 {
        store.put_with(large.clone()).await?;
    }
    store.compact(11).await?;
    let before = store.maintenance().status(StatusRequest {}).await?.into_inner();
    assert!(before.db_size_in_use < before.db_size / 2);
    store.maintenance().defragment(DefragmentRequest {}).await?;
    let after = store.maintenance().status(StatusRequest {}).await?.into_inner();
    assert!(after.db_size < before.db_size / 2, "{} to {}", before.db_size, after.db_size);
    assert_eq!(store.range(everything()).await?.kvs.first().map(|kv| kv.version), Some(10));
    Ok(())
}

#[tokio::test]
async fn equal_histories_have_equal_hashes() -> Result {
    let (one, other) = (Store::open().await?, Store::open().await?);
    for store in [&one, &other] {
        for round in 0..20 {
            store.put(&format!("k{}", round % 3), &round.to_string()).await?;
        }
        store.delete("k0", "").await?;
    }
    let hash = async |store: &Store, revision| {
        let answer = store.maintenance().hash_kv(HashKvRequest { revision }).await?.into_inner();
        Ok::<_, Box<dyn std::error::Error>>((answer.hash, answer.compact_revision, answer.hash_revision))
    };
    assert_eq!(hash(&one, 0).await?, hash(&other, 0).await?);
    assert_ne!(hash(&one, 0).await?.0, hash(&one, 20).await?.0);
    one.compact(10).await?;
    assert_ne!(hash(&one, 0).await?, hash(&other, 0).await?);
    other.compact(10).await?;
    assert_eq!(hash(&one, 15).await?, hash(&other, 15).await?);
    let compacted = (Code::OutOfRange, "etcdserver: mvcc: required revision has been compacted".to_owned());
    assert_eq!(refusal(one.maintenance().hash_kv(HashKvRequest { revision: 9 }).await), compacted);
    let hashes = [one.maintenance().hash(HashRequest {}).await?, other.maintenance().hash(HashRequest {}).await?];
    let [first, second] = hashes.map(|answer| answer.into_inner().hash);
    assert_eq!(first, second);
    Ok(())
}

#[tokio::test]
async fn a_corrupt_store_compacts_nothing() -> Result {
    let store = Store::open().await?;
    store.put("a", "1").await?;
    let header = store.range(everything()).await?.header.ok_or("no header")?;
    store.maintenance().alarm(AlarmRequest { action: 1, member_id: header.member_id, alarm: 2 }).await?;
    let corrupt = (Code::DataLoss, "etcdserver: corrupt cluster".to_owned());
    let compaction = CompactionRequest { revision: 2, ..Default::default() };
    assert_eq!(refusal(store.kv().compact(compaction).await), corrupt);
    let unlock = UnlockRequest { key: "a".into() };
    let refused = refusal(LockClient::new(store.channel.clone()).unlock(unlock).await);
    assert_eq!(refused, (Code::Unknown, corrupt.1));
    Ok(())
}

async fn snapshot(store: &Store) -> Result<Vec<u8>> {
    let mut pieces = store.maintenance().snapshot(SnapshotRequest {}).await?.into_inner();
    let mut content = Vec::new();
    while let Some(piece) = pieces.message().await? {
        content.extend_from_slice(&piece.blob);
    }
    Ok(content)
}

#[tokio::test]
async fn a_snapshot_makes_a_new_store_with_the_same_content() -> Result {
    let store = Store::open().await?;
    store.grant(5, 600).await?;
    store.put("a", "1").await?;
    store.put_with(PutRequest { lease: 5, ..put("a", "2") }).await?;
    let content = snapshot(&store).await?;
    let (database, checksum) = content.split_at(content.len() - 32);
    assert_eq!(database.len() % 512, 0);
    assert_eq!(checksum, Sha256::digest(database).as_slice());
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("snapshot");
    std::fs::write(&file, &content)?;
    let target = dir.path().join("restored");
    restore(&file, &target)?;
    assert!(matches!(restore(&file, &target), Err(SqlError::Occupied(_))));
    let restored = millpond::sql::Engine::open(&target, Options::default())?;
    let channel = crate::store::channel(&restored).await?;
    let mut kv = millpond::proto::etcdserverpb::kv_client::KvClient::new(channel);
    let (before, after) = (store.range(everything()).await?, kv.range(everything()).await?.into_inner());
    assert_eq!(before.kvs, after.kvs);
    let (before, after) = (before.header.ok_or("no header")?, after.header.ok_or("no header")?);
    assert_eq!((before.revision, after.raft_term), (after.revision, 1));
    assert!(before.cluster_id != after.cluster_id && before.member_id != after.member_id);
    assert_eq!(restored.state().leases.lock().ids(), [5]);
    restored.close().await;
    Ok(())
}

#[tokio::test]
async fn a_damaged_snapshot_is_refused() -> Result {
    let store = Store::open().await?;
    let mut content = snapshot(&store).await?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("snapshot");
    if let Some(byte) = content.get_mut(5000) {
        *byte ^= 1;
    }
    for damaged in [&content[..], &content[..content.len() - 1], &[]] {
        std::fs::write(&file, damaged)?;
        let refused = restore(&file, &dir.path().join("restored"));
        assert!(matches!(refused, Err(SqlError::BadSnapshot(_))), "{refused:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_sound_store_has_no_problems_and_a_tampered_one_is_found_out() -> Result {
    let store = Store::open().await?;
    store.grant(5, 600).await?;
    for round in 0..50 {
        store.put_with(PutRequest { lease: 5, ..put(&format!("k{}", round % 7), "v") }).await?;
    }
    store.compact(20).await?;
    let report = millpond::sql::check(store.dir())?;
    assert_eq!((report.problems, report.revision, report.compacted), (Vec::new(), 51, 20));
    store.engine.close().await;
    let database = rusqlite::Connection::open(store.dir().join(millpond::sql::sqlite::FILE))?;
    database.execute("DELETE FROM log WHERE id = (SELECT max(id) FROM log)", [])?;
    let problems = millpond::sql::check(store.dir())?.problems;
    assert_eq!(problems, ["1 events are in the index and not in the log"]);
    assert!(millpond::sql::check(&store.dir().join("nowhere")).is_err());
    Ok(())
}

/// SQLite would take it for what was written last.
#[tokio::test]
async fn a_snapshot_is_not_restored_beside_what_is_left_of_another_store() -> Result {
    let content = snapshot(&Store::open().await?).await?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("snapshot");
    std::fs::write(&file, &content)?;
    for left in ["millpond.db-wal", "millpond.db-shm", "millpond.db-journal"] {
        let target = dir.path().join(left);
        std::fs::create_dir(&target)?;
        std::fs::write(target.join(left), "")?;
        assert!(matches!(restore(&file, &target), Err(SqlError::Occupied(_))), "{left}");
    }
    Ok(())
}

/// How many files in a directory have names that end so.
fn count(dir: &Path, end: &str) -> std::io::Result<usize> {
    let names = std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: std::io::Result<Vec<String>> = names.collect();
    Ok(names?.iter().filter(|name| name.ends_with(end)).count())
}

#[tokio::test]
async fn copies_that_a_crash_left_behind_go_at_the_next_start() -> Result {
    let dir = tempfile::tempdir()?;
    for name in ["snapshot-00000000000000aa.tmp", "snapshot-00000000000000aa.tmp-journal"] {
        std::fs::write(dir.path().join(name), "left")?;
    }
    let engine = Engine::open(dir.path(), Options::default())?;
    assert_eq!((count(dir.path(), ".tmp")?, count(dir.path(), ".tmp-journal")?), (0, 0));
    engine.close().await;
    Ok(())
}

/// Each used to keep a thread and a copy for as long as its client liked; with enough of them nothing was served any more.
#[tokio::test]
async fn snapshots_that_nobody_reads_hold_up_nothing_and_are_few() -> Result {
    let dir = tempfile::tempdir()?;
    let engine = Engine::open(dir.path(), Options::default())?;
    let channel = crate::store::channel(&engine).await?;
    let mut kv = KvClient::new(channel.clone());
    for number in 0..10 {
        kv.put(PutRequest { value: vec![number; 1_000_000].into(), ..put(&format!("large/{number}"), "") }).await?;
    }
    let unread = async |engine: Engine| {
        let mut client = MaintenanceClient::new(crate::store::channel(&engine).await.unwrap());
        let mut pieces = client.snapshot(SnapshotRequest {}).await.unwrap().into_inner();
        pieces.message().await.unwrap();
        pending::<()>().await;
    };
    let readers: Vec<_> = (0..12).map(|_| tokio::spawn(unread(engine.clone()))).collect();
    while count(dir.path(), ".tmp")? < 4 {
        sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..20 {
        kv.put(put("small", "")).await?;
        assert_eq!(count(dir.path(), ".tmp")?, 4);
        sleep(Duration::from_millis(10)).await;
    }
    // Whoever comes gets one when another's client is gone.
    readers.iter().for_each(tokio::task::JoinHandle::abort);
    let mut pieces = MaintenanceClient::new(channel).snapshot(SnapshotRequest {}).await?.into_inner();
    let mut size = 0;
    while let Some(piece) = pieces.message().await? {
        size += piece.blob.len();
    }
    assert!(size > 10_000_000);
    engine.close().await;
    Ok(())
}
