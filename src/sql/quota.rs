//! The quota on the database's size and what alarms forbid, as etcd has them: a write that needs room beyond the quota raises the
//! NOSPACE alarm, and while it is on only writes that free room are taken.

use tonic::Code;

use super::{Engine, alarms::Alarm, error::Fault, transaction::Transaction};
use crate::{
    proto::etcdserverpb::{AlarmType, PutRequest, RequestOp, TxnRequest, request_op::Request},
    status::Status,
};

/// What etcd reckons a key takes besides its bytes.
const KEY_OVERHEAD: i64 = 256;

/// What etcd reckons a lease takes.
pub const LEASE_COST: i64 = 64;

/// The room that a put may need, by etcd's reckoning.
pub fn put_cost(request: &PutRequest) -> i64 {
    let bytes = request.key.len().saturating_add(request.value.len());
    KEY_OVERHEAD.saturating_add(i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// The room that the larger branch of a transaction may need; 0 when it puts nothing.
pub fn txn_cost(request: &TxnRequest) -> i64 {
    let branch = |ops: &[RequestOp]| ops.iter().map(operation_cost).fold(0, i64::saturating_add);
    branch(&request.success).max(branch(&request.failure))
}

fn operation_cost(op: &RequestOp) -> i64 {
    match &op.request {
        Some(Request::RequestPut(request)) => put_cost(request),
        Some(Request::RequestTxn(request)) => txn_cost(request),
        Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => 0,
    }
}

/// Refuses a write that needs `cost` bytes if they would reach the quota, and raises the alarm.
pub async fn check(engine: &Engine, cost: i64) -> Result<(), Status> {
    let quota = engine.state().options.quota_bytes;
    if cost == 0 || quota <= 0 || engine.state().size().saturating_add(cost) < quota {
        return Ok(());
    }
    if !engine.state().alarms().any(AlarmType::Nospace) {
        tracing::warn!(quota, size = engine.state().size(), "the database has reached its quota: raising the alarm");
        let alarm = Alarm { kind: AlarmType::Nospace.into(), member_id: engine.state().identity.member_id };
        engine.write(0, move |transaction| transaction.activate(alarm)).await?;
    }
    Err(Status::NO_SPACE)
}

/// Refuses a write while an alarm forbids it.
pub fn admit(transaction: &Transaction<'_>, needs_room: bool) -> Result<(), Fault> {
    let alarms = transaction.alarms();
    if alarms.any(AlarmType::Corrupt) {
        return Err(Status::fixed(Code::DataLoss, "etcdserver: corrupt cluster").into());
    }
    if needs_room && alarms.any(AlarmType::Nospace) {
        return Err(Status::NO_SPACE.into());
    }
    Ok(())
}
