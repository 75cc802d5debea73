//! The engine on a database that fails when it is told to.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use tonic::Code;

use super::*;
use crate::{
    proto::etcdserverpb::PutRequest,
    rules::KeyRange,
    sql::{
        alarms::Alarm,
        backend::{EventId, LogPages, Meta, Record, Size, StoredLease, Version, VisitRecord, VisitVersion},
        error::Trouble,
    },
};

type Tested = Result<(), Box<dyn std::error::Error>>;

/// What fails next, and how. Everything works while it is `None`.
#[derive(Default)]
struct Faults {
    commit: Mutex<Option<Trouble>>,
    append: Mutex<Option<Trouble>>,
    commits: AtomicBool,
}

struct Faulty {
    inner: Sqlite,
    faults: Arc<Faults>,
}

fn fail(fault: &Mutex<Option<Trouble>>) -> Result<(), SqlError> {
    match *fault.lock() {
        Some(kind) => Err(SqlError::Database { context: "testing", kind, source: "made up".into() }),
        None => Ok(()),
    }
}

impl Reader for Faulty {
    fn begin(&mut self) -> Result<(), SqlError> {
        self.inner.begin()
    }
    fn end(&mut self) {
        self.inner.end();
    }
    fn newest(&mut self, key: &[u8], bound: EventId) -> Result<Option<Version>, SqlError> {
        self.inner.newest(key, bound)
    }
    fn scan(&mut self, range: &KeyRange, bound: EventId, visit: &mut VisitVersion<'_>) -> Result<(), SqlError> {
        self.inner.scan(range, bound, visit)
    }
    fn record(&mut self, id: EventId) -> Result<Option<Record>, SqlError> {
        self.inner.record(id)
    }
    fn records(&mut self, ids: &[EventId]) -> Result<Vec<Option<Record>>, SqlError> {
        self.inner.records(ids)
    }
    fn log(&mut self, from: EventId, to: EventId, visit: &mut VisitRecord<'_>) -> Result<(), SqlError> {
        self.inner.log(from, to, visit)
    }
    fn last_event(&mut self) -> Result<Option<EventId>, SqlError> {
        self.inner.last_event()
    }
    fn older(&mut self, key: &[u8], id: EventId) -> Result<Vec<EventId>, SqlError> {
        self.inner.older(key, id)
    }
    fn meta(&mut self, name: Meta) -> Result<Option<i64>, SqlError> {
        self.inner.meta(name)
    }
    fn leases(&mut self) -> Result<Vec<StoredLease>, SqlError> {
        self.inner.leases()
    }
    fn lease_keys(&mut self, lease: i64) -> Result<Vec<Bytes>, SqlError> {
        self.inner.lease_keys(lease)
    }
    fn alarms(&mut self) -> Result<Vec<Alarm>, SqlError> {
        self.inner.alarms()
    }
    fn size(&mut self) -> Result<Size, SqlError> {
        self.inner.size()
    }
}

impl Writer for Faulty {
    fn begin_write(&mut self) -> Result<(), SqlError> {
        self.inner.begin_write()
    }
    fn commit(&mut self) -> Result<(), SqlError> {
        fail(&self.faults.commit)?;
        self.faults.commits.store(true, SeqCst);
        self.inner.commit()
    }
    fn rollback(&mut self) -> Result<(), SqlError> {
        self.inner.rollback()
    }
    fn savepoint(&mut self) -> Result<(), SqlError> {
        self.inner.savepoint()
    }
    fn release(&mut self) -> Result<(), SqlError> {
        self.inner.release()
    }
    fn rollback_to_savepoint(&mut self) -> Result<(), SqlError> {
        self.inner.rollback_to_savepoint()
    }
    fn append(&mut self, record: &Record) -> Result<(), SqlError> {
        fail(&self.faults.append)?;
        self.inner.append(record)
    }
    fn remove(&mut self, key: &[u8], id: EventId) -> Result<(), SqlError> {
        self.inner.remove(key, id)
    }
    fn set_meta(&mut self, name: Meta, value: i64) -> Result<(), SqlError> {
        self.inner.set_meta(name, value)
    }
    fn put_lease(&mut self, lease: StoredLease) -> Result<(), SqlError> {
        self.inner.put_lease(lease)
    }
    fn delete_lease(&mut self, id: i64) -> Result<(), SqlError> {
        self.inner.delete_lease(id)
    }
    fn attach(&mut self, lease: i64, key: &[u8]) -> Result<(), SqlError> {
        self.inner.attach(lease, key)
    }
    fn detach(&mut self, lease: i64, key: &[u8]) -> Result<(), SqlError> {
        self.inner.detach(lease, key)
    }
    fn put_alarm(&mut self, alarm: Alarm) -> Result<(), SqlError> {
        self.inner.put_alarm(alarm)
    }
    fn delete_alarm(&mut self, alarm: Alarm) -> Result<(), SqlError> {
        self.inner.delete_alarm(alarm)
    }
    fn log_pages(&mut self) -> Result<LogPages, SqlError> {
        self.inner.log_pages()
    }
    fn checkpoint(&mut self) -> Result<(), SqlError> {
        self.inner.checkpoint()
    }
    fn defragment(&mut self) -> Result<(), SqlError> {
        self.inner.defragment()
    }
}

fn open(dir: &Path) -> Result<(Engine, Arc<Faults>), SqlError> {
    let faults = Arc::new(Faults::default());
    let store = Faulty { inner: Sqlite::open_writer(dir, 1 << 20)?, faults: faults.clone() };
    Ok((Engine::start(dir, lock(dir)?, Box::new(store), Options::default())?, faults))
}

async fn put(engine: &Engine, key: &'static str) -> Result<i64, Status> {
    let request = PutRequest { key: Bytes::from_static(key.as_bytes()), ..Default::default() };
    let answer = engine.write(0, move |transaction| transaction.put(request)).await?;
    Ok(answer.header.map_or(0, |header| header.revision))
}

async fn keys(engine: &Engine) -> Result<i64, Status> {
    let all = KeyRange::everything();
    engine.read(move |store, at| crate::sql::range::count(store, &all, EventId::last(at.current))).await
}

#[tokio::test]
async fn a_full_disk_undoes_the_write_and_later_ones_go_on_with_its_revision() -> Tested {
    let dir = tempfile::tempdir()?;
    let (engine, faults) = open(dir.path())?;
    assert_eq!(put(&engine, "a").await?, 2);
    for fault in [&faults.append, &faults.commit] {
        *fault.lock() = Some(Trouble::Full);
        assert_eq!(put(&engine, "b").await, Err(Status::NO_SPACE));
        assert_eq!((keys(&engine).await?, engine.state().position().current), (1, 2));
        *fault.lock() = None;
    }
    assert_eq!(put(&engine, "b").await?, 3);
    engine.close().await;
    Ok(())
}

#[tokio::test]
async fn a_failure_undoes_the_whole_group_and_what_it_knew_of_leases() -> Tested {
    let dir = tempfile::tempdir()?;
    let (engine, faults) = open(dir.path())?;
    *faults.commit.lock() = Some(Trouble::Other);
    let grant = crate::proto::etcdserverpb::LeaseGrantRequest { id: 7, ttl: 60 };
    let refused = engine.write(0, move |transaction| transaction.grant(&grant)).await;
    assert_eq!(refused.err().map(|status| status.code), Some(Code::Unavailable));
    *faults.commit.lock() = None;
    let lease = PutRequest { key: Bytes::from_static(b"a"), lease: 7, ..Default::default() };
    let refused = engine.write(0, move |transaction| transaction.put(lease)).await;
    assert_eq!(refused.err(), Some(Status::LEASE_NOT_FOUND));
    engine.close().await;
    Ok(())
}

/// One that had run out was found twice, and revoked and granted anew in between.
#[tokio::test]
async fn a_lease_does_not_expire_in_the_place_of_one_with_its_id() -> Tested {
    let dir = tempfile::tempdir()?;
    let (engine, _) = open(dir.path())?;
    let grant = crate::proto::etcdserverpb::LeaseGrantRequest { id: 7, ttl: 60 };
    let in_one_group = engine.write(0, move |transaction| {
        transaction.grant(&grant)?;
        transaction.expire(7)
    });
    assert_eq!(in_one_group.await, Ok(false));
    assert_eq!(engine.write(0, |transaction| transaction.expire(7)).await, Ok(false));
    assert_eq!(engine.write(0, |transaction| Ok(transaction.lease_exists(7))).await, Ok(true));
    engine.close().await;
    Ok(())
}

#[tokio::test]
async fn after_a_failed_sync_nothing_is_written_until_a_restart_and_reads_go_on() -> Tested {
    let dir = tempfile::tempdir()?;
    let (engine, faults) = open(dir.path())?;
    put(&engine, "a").await?;
    *faults.commit.lock() = Some(Trouble::SyncFailed);
    assert_eq!(put(&engine, "b").await.err().map(|status| status.code), Some(Code::Unavailable));
    *faults.commit.lock() = None;
    faults.commits.store(false, SeqCst);
    assert_eq!(put(&engine, "c").await.err().map(|status| status.code), Some(Code::Unavailable));
    assert!(!faults.commits.load(SeqCst), "a write went through to a disk whose content is unknown");
    assert_eq!(keys(&engine).await?, 1);
    engine.close().await;
    let (engine, _) = open(dir.path())?;
    assert_eq!(put(&engine, "b").await?, 3);
    engine.close().await;
    Ok(())
}

#[tokio::test]
async fn a_damaged_database_is_a_corrupt_cluster() -> Tested {
    let dir = tempfile::tempdir()?;
    let (engine, faults) = open(dir.path())?;
    *faults.append.lock() = Some(Trouble::Corrupt);
    let refused = put(&engine, "a").await.err().ok_or("it was written")?;
    assert_eq!((refused.code, &refused.message[..]), (Code::DataLoss, "etcdserver: corrupt cluster"));
    engine.close().await;
    Ok(())
}

#[test]
fn sqlites_own_errors_are_told_apart() -> Tested {
    let dir = tempfile::tempdir()?;
    let mut store = Sqlite::open_writer(dir.path(), 1 << 20)?;
    store.limit_pages(30)?;
    store.begin_write()?;
    let large = |sub| Record {
        key: Bytes::from_static(b"k"),
        value: vec![0; 100_000].into(),
        version: Version { id: EventId::new(2, sub), create_revision: 2, version: 1, lease: 0 },
    };
    let full = (0..10).map(large).find_map(|record| store.append(&record).err()).ok_or("it was never full")?;
    assert_eq!(full.trouble(), Trouble::Full);
    store.rollback()?;
    let mut reader = Sqlite::open_reader(dir.path(), 1 << 20)?;
    assert_eq!(reader.last_event()?, None);
    assert_eq!(
        reader.begin_write().and_then(|()| reader.append(&large(0))).err().map(|e| e.trouble()),
        Some(Trouble::ReadOnly)
    );
    Ok(())
}
