//! What Lock and Election share: a key under a lease that waits for its turn among the keys of a prefix, the oldest first.

use bytes::Bytes;
use tonic::Code;

use super::{lease, limits};
use crate::{
    proto::{
        etcdserverpb::{
            Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader,
            TxnRequest, TxnResponse,
            compare::TargetUnion,
            range_request::{SortOrder, SortTarget},
            request_op::Request,
            response_op::Response,
        },
        mvccpb::{KeyValue, event::EventType},
    },
    rules::{KeyRange, validate},
    sql::{Engine, quota, range::evaluate, transaction::Transaction, watch},
    status::Status,
};

/// Seconds that a lease lives which a client did not bring along, as in etcd.
const SESSION_TTL: i64 = 60;

/// A key in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The key.
    pub key: Bytes,
    /// The revision at which it was created: its place in the queue.
    pub revision: i64,
}

/// An error as etcd's Lock and Election give it: those services are clients of their own server, and what such a client gets
/// loses its code on the way.
pub fn without_code(status: Status) -> Status {
    match status.code {
        Code::Unavailable => status,
        _ => Status { code: Code::Unknown, ..status },
    }
}

/// The lease that a client brought along, or a new one.
pub async fn lease_or_new(engine: &Engine, lease: i64) -> Result<i64, Status> {
    if lease != 0 {
        return Ok(lease);
    }
    Ok(lease::grant(engine, LeaseGrantRequest { ttl: SESSION_TTL, id: 0 }).await?.id)
}

/// The key of a lease under a prefix, as etcd's clients write it.
pub fn key_of(prefix: &[u8], lease: i64) -> Bytes {
    let sign = if lease < 0 { "-" } else { "" };
    let mut key = prefix.to_vec();
    key.extend_from_slice(format!("{sign}{:x}", lease.unsigned_abs()).as_bytes());
    key.into()
}

/// The prefix of the queue called `name`.
pub fn prefix_of(name: &[u8]) -> Bytes {
    let mut prefix = name.to_vec();
    prefix.push(b'/');
    prefix.into()
}

/// Puts the key if it does not exist. Returns the header, the key's place, and its value if it existed.
pub async fn enter(
    engine: &Engine,
    key: Bytes,
    value: Bytes,
    lease: i64,
) -> Result<(ResponseHeader, Place, Option<Bytes>), Status> {
    let put = Request::RequestPut(PutRequest { key: key.clone(), value, lease, ..Default::default() });
    let get = Request::RequestRange(RangeRequest { key: key.clone(), ..Default::default() });
    let answer = transact(engine, compare_created(&key, 0), put, Some(get)).await?;
    let header = answer.header.unwrap_or_default();
    let existing = answer.responses.into_iter().find_map(|response| match response.response {
        Some(Response::ResponseRange(found)) => found.kvs.into_iter().next(),
        _ => None,
    });
    Ok(match existing {
        Some(kv) => (header, Place { key, revision: kv.create_revision }, Some(kv.value)),
        None => (header, Place { key, revision: header.revision }, None),
    })
}

/// Runs `then` if the compare holds, `otherwise` if not; the answer's header is complete.
pub async fn transact(
    engine: &Engine,
    compare: Compare,
    then: Request,
    otherwise: Option<Request>,
) -> Result<TxnResponse, Status> {
    let op = |request| RequestOp { request: Some(request) };
    let (success, failure) = (vec![op(then)], otherwise.map(op).into_iter().collect());
    let request = TxnRequest { compare: vec![compare], success, failure };
    let options = &engine.state().options;
    validate::txn(&request, options.max_txn_ops)?;
    let cost = limits::check(&request, options.max_request_bytes)?;
    let needs = quota::txn_cost(&request);
    quota::check(engine, needs).await?;
    let write = move |transaction: &mut Transaction<'_>| {
        quota::admit(transaction, needs > 0)?;
        transaction.txn(request)
    };
    let mut answer = engine.write(cost, write).await?;
    engine.state().fill(&mut answer.header);
    Ok(answer)
}

/// A compare that holds when a key was created at `revision`, 0 for a key that is not there.
pub fn compare_created(key: &Bytes, revision: i64) -> Compare {
    Compare {
        target: 1,
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
        ..Default::default()
    }
}

/// A request to delete one key.
pub fn delete(key: &Bytes) -> Request {
    Request::RequestDeleteRange(DeleteRangeRequest { key: key.clone(), ..Default::default() })
}

/// The oldest key of a prefix, and the header of the read.
pub async fn oldest(engine: &Engine, prefix: &Bytes) -> Result<(ResponseHeader, Option<KeyValue>), Status> {
    first_created(engine, prefix, SortOrder::Ascend, 0).await
}

async fn first_created(
    engine: &Engine,
    prefix: &Bytes,
    order: SortOrder,
    max_create_revision: i64,
) -> Result<(ResponseHeader, Option<KeyValue>), Status> {
    let request = RangeRequest {
        key: prefix.clone(),
        range_end: KeyRange::prefix(prefix.clone()).request_end(),
        limit: 1,
        sort_order: order.into(),
        sort_target: SortTarget::Create.into(),
        max_create_revision,
        ..Default::default()
    };
    let mut answer = engine.read(move |store, at| evaluate(store, &request, at)).await?;
    engine.state().fill(&mut answer.header);
    Ok((answer.header.unwrap_or_default(), answer.kvs.into_iter().next()))
}

/// Waits until no key of the prefix is older than `place`.
pub async fn wait_for_turn(engine: &Engine, prefix: &Bytes, place: &Place) -> Result<(), Status> {
    loop {
        let (header, before) = first_created(engine, prefix, SortOrder::Descend, place.revision - 1).await?;
        let Some(before) = before else { return Ok(()) };
        wait_for_deletion(engine, &before.key, header.revision).await?;
    }
}

/// Waits until a key is deleted at `from` or later. May return early when history has been compacted past the point: look
/// again.
async fn wait_for_deletion(engine: &Engine, key: &Bytes, from: i64) -> Result<(), Status> {
    let mut changes = Changes::new(engine, from);
    while let Some(events) = changes.next().await? {
        let is_deletion = |kind: i32| kind == i32::from(EventType::Delete);
        if events.iter().any(|(_, kind, kv)| is_deletion(*kind) && kv.key == *key) {
            return Ok(());
        }
    }
    Ok(())
}

/// Reads history on from a revision, waiting for it to happen.
pub struct Changes<'a> {
    engine: &'a Engine,
    next: i64,
}

/// One change: its revision, etcd's event type, and the pair.
pub type Change = (i64, i32, KeyValue);

impl<'a> Changes<'a> {
    /// What happens from revision `from` on.
    pub fn new(engine: &'a Engine, from: i64) -> Self {
        Self { engine, next: from.max(1) }
    }

    /// The next stretch of changes; `None` when history has been compacted past it.
    pub async fn next(&mut self) -> Result<Option<Vec<Change>>, Status> {
        let mut revisions = self.engine.state().revisions();
        let next = self.next;
        tokio::select! {
            () = self.engine.closed().cancelled() => return Err(Status::STOPPED),
            result = revisions.wait_for(|revision| *revision >= next) => drop(result.map_err(|_| Status::STOPPED)?),
        }
        let Some(chunk) = watch::next_chunk(self.engine, next).await? else { return Ok(None) };
        self.next = chunk.last.saturating_add(1);
        let mut changes = Vec::new();
        for revision in &chunk.revisions {
            let events = revision.events.iter();
            changes.extend(events.filter_map(|event| Some((revision.revision, event.r#type, event.kv.clone()?))));
        }
        Ok(Some(changes))
    }
}

/// Takes a key out of its queue when dropped: for a caller that goes away while waiting.
pub struct Leave {
    engine: Engine,
    place: Option<Place>,
}

impl Leave {
    /// Guards `place`.
    pub fn new(engine: &Engine, place: &Place) -> Self {
        Self { engine: engine.clone(), place: Some(place.clone()) }
    }

    /// The key stays.
    pub fn stay(mut self) {
        self.place = None;
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        let Some(Place { key, revision }) = self.place.take() else { return };
        let compare = vec![compare_created(&key, revision)];
        let success = vec![RequestOp { request: Some(delete(&key)) }];
        let request = TxnRequest { compare, success, failure: Vec::new() };
        if let Err(error) = self.engine.enqueue(0, move |transaction| transaction.txn(request)) {
            tracing::warn!(%error, "the key of a caller that went away stays until its lease runs out");
        }
    }
}
