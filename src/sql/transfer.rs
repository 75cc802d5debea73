//! Keys and leases from another etcd into a new store, and from a store into another etcd. Revisions cannot be kept: no etcd
//! lets a client choose them.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use bytes::Bytes;
use etcd_client::{Client, Error, GetOptions, LeaseGrantOptions, PutOptions, SortOrder, SortTarget, Txn, TxnOp};

use super::{
    Engine, SqlError,
    options::Options,
    range::{self, evaluate},
    transaction::Transaction,
};
use crate::{
    proto::{
        etcdserverpb::{LeaseGrantRequest, PutRequest, RangeRequest},
        mvccpb::KeyValue,
    },
    rules::successor,
};

/// Bytes that are moved at a time, about.
const BATCH_BYTES: usize = 1 << 20;

/// Keys that are moved at a time, at most; an etcd takes no more operations in one transaction.
const BATCH_KEYS: usize = 100;

/// How far a transfer has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Keys that were moved.
    pub keys: u64,
    /// Keys that there are to move.
    pub total: u64,
    /// Leases that were granted anew, each with its full time to live.
    pub leases: u64,
    /// Keys left out because their lease ran out while they were being moved.
    pub expired: u64,
}

/// Copies all keys and leases of the etcd behind `client`, as of one revision, into a new store in `dir`. `report` is told
/// after every batch.
///
/// # Errors
/// When `dir` holds a store with anything in it, the etcd fails or compacts the revision meanwhile, or the store fails. What
/// was copied until then stays in `dir`.
pub async fn import(
    client: &Client,
    dir: &Path,
    options: Options,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<Progress, SqlError> {
    let engine = Engine::open(dir, options)?;
    let moved = if engine.state().position().current > 1 {
        Err(SqlError::Occupied(dir.to_owned()))
    } else {
        import_into(&engine, client, report).await
    };
    engine.close().await;
    moved
}

/// Copies all keys and leases of the store in `dir` into the etcd behind `client`, over what is there under the same keys.
/// `report` is told after every batch.
///
/// # Errors
/// When the store is in use or fails, or the etcd does. What was copied until then stays.
pub async fn export(
    dir: &Path,
    options: Options,
    client: &Client,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<Progress, SqlError> {
    let engine = Engine::open(dir, options)?;
    let moved = export_from(&engine, client, report).await;
    engine.close().await;
    moved
}

async fn import_into(
    engine: &Engine,
    client: &Client,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<Progress, SqlError> {
    let mut source = Source { client: client.clone(), next: Bytes::from_static(b"\0"), revision: 0, limit: 10 };
    let mut leases: HashMap<i64, bool> = HashMap::new();
    let mut progress = Progress::default();
    while let Some((page, remaining)) = source.page().await? {
        progress.total = progress.keys + progress.expired + remaining;
        let mut puts = Vec::with_capacity(page.len());
        for kv in page {
            if kv.lease != 0 && !import_lease(engine, client, kv.lease, &mut leases, &mut progress).await? {
                progress.expired += 1;
                continue;
            }
            puts.push(PutRequest { key: kv.key, value: kv.value, lease: kv.lease, ..Default::default() });
        }
        progress.keys += puts.len() as u64;
        let write = move |transaction: &mut Transaction<'_>| {
            puts.into_iter().try_for_each(|put| transaction.put(put).map(drop))
        };
        engine.write(0, write).await.map_err(SqlError::Refused)?;
        report(progress);
    }
    Ok(progress)
}

/// Grants a lease as the source has it, once. Whether the source (still) has it.
async fn import_lease(
    engine: &Engine,
    client: &Client,
    id: i64,
    known: &mut HashMap<i64, bool>,
    progress: &mut Progress,
) -> Result<bool, SqlError> {
    if let Some(lives) = known.get(&id) {
        return Ok(*lives);
    }
    let found = client.lease_client().time_to_live(id, None).await.map_err(failed("asking for a lease"))?;
    let lives = found.ttl() > 0;
    if lives {
        let request = LeaseGrantRequest { id, ttl: found.granted_ttl() };
        engine.write(0, move |transaction| transaction.grant(&request)).await.map_err(SqlError::Refused)?;
        progress.leases += 1;
    }
    known.insert(id, lives);
    Ok(lives)
}

/// An etcd's keys in order, at the revision of the first page.
struct Source {
    client: Client,
    next: Bytes,
    revision: i64,
    limit: i64,
}

impl Source {
    /// The next keys, and how many there are from the first of them on; `None` at the end.
    async fn page(&mut self) -> Result<Option<(Vec<KeyValue>, u64)>, SqlError> {
        if self.next.is_empty() {
            return Ok(None);
        }
        let options = GetOptions::new()
            .with_from_key()
            .with_limit(self.limit)
            .with_revision(self.revision)
            .with_sort(SortTarget::Key, SortOrder::Ascend);
        let mut kv = self.client.kv_client().max_decoding_message_size(usize::MAX);
        let mut answer = kv.get(self.next.to_vec(), Some(options)).await.map_err(failed("reading a page of keys"))?;
        if self.revision == 0 {
            self.revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        }
        let remaining = u64::try_from(answer.count()).unwrap_or(0);
        let more = answer.more();
        let page: Vec<KeyValue> = answer.take_kvs().into_iter().map(convert).collect();
        let bytes: usize = page.iter().map(size).sum();
        self.limit =
            if bytes < BATCH_BYTES / 2 { self.limit.saturating_mul(2).min(10_000) } else { (self.limit / 2).max(1) };
        self.next = page.last().filter(|_| more).map_or(Bytes::new(), |kv| successor(&kv.key));
        Ok((!page.is_empty()).then_some((page, remaining)))
    }
}

fn convert(kv: etcd_client::KeyValue) -> KeyValue {
    let lease = kv.lease();
    let (key, value) = kv.into_key_value();
    KeyValue { key: key.into(), value: value.into(), lease, ..Default::default() }
}

fn size(kv: &KeyValue) -> usize {
    kv.key.len() + kv.value.len()
}

async fn export_from(
    engine: &Engine,
    client: &Client,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<Progress, SqlError> {
    let mut progress = Progress::default();
    let mut leases = HashSet::new();
    let everything = || RangeRequest { range_end: Bytes::from_static(b"\0"), ..Default::default() };
    let counted = RangeRequest { key: Bytes::from_static(b"\0"), count_only: true, ..everything() };
    let counted = engine.read(move |store, at| evaluate(store, &counted, at)).await.map_err(SqlError::Refused)?;
    progress.total = u64::try_from(counted.count).unwrap_or(0);
    let revision = counted.header.map_or(0, |header| header.revision);
    let mut next = Bytes::from_static(b"\0");
    loop {
        let limit = BATCH_KEYS as i64;
        let request = RangeRequest { key: next, revision, limit, ..everything() };
        let page = engine.read(move |store, at| range::first(store, &request, at)).await.map_err(SqlError::Refused)?;
        let Some(last) = page.kvs.last() else { return Ok(progress) };
        next = successor(&last.key);
        for lease in page.kvs.iter().map(|kv| kv.lease).filter(|lease| *lease != 0) {
            if leases.insert(lease) {
                progress.leases += u64::from(export_lease(engine, client, lease).await?);
            }
        }
        progress.keys += page.kvs.len() as u64;
        export_page(client, page.kvs).await?;
        report(progress);
        if !page.more {
            return Ok(progress);
        }
    }
}

/// Grants a lease as the store has it. Whether it was not there before.
async fn export_lease(engine: &Engine, client: &Client, id: i64) -> Result<bool, SqlError> {
    let lease = engine.state().leases.lock().without_checkpoint(id);
    let Some(lease) = lease else { return Ok(false) };
    let granted = client.lease_client().grant(lease.ttl, Some(LeaseGrantOptions::new().with_id(id))).await;
    match granted {
        Ok(_) => Ok(true),
        Err(Error::GRpcStatus(status)) if status.message() == "etcdserver: lease already exists" => Ok(false),
        Err(error) => Err(failed("granting a lease")(error)),
    }
}

async fn export_page(client: &Client, page: Vec<KeyValue>) -> Result<(), SqlError> {
    let mut kv = client.kv_client();
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for pair in page {
        if bytes + size(&pair) > BATCH_BYTES && !batch.is_empty() {
            let full = std::mem::take(&mut batch);
            kv.txn(Txn::new().and_then(full)).await.map_err(failed("writing keys"))?;
            bytes = 0;
        }
        bytes += size(&pair);
        batch.push(TxnOp::put(pair.key, pair.value, Some(PutOptions::new().with_lease(pair.lease))));
    }
    kv.txn(Txn::new().and_then(batch)).await.map(drop).map_err(failed("writing keys"))
}

fn failed(context: &'static str) -> impl Fn(Error) -> SqlError {
    move |source| SqlError::Transfer { context, source: Box::new(source) }
}
