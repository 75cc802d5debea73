//! Writers: puts, deletes, transactions and leases. No value is ever written twice, so each write can be told in the history.

use std::sync::Arc;

use bytes::Bytes;
use millpond::proto::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, PutRequest, RequestOp,
    TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
};

use super::{super::context::Context, calls::Caller};
use crate::support::operation::{Answer, Operation};

/// The most operations that etcd takes in one transaction.
const LARGEST_TXN: usize = 128;
/// How many leases a writer remembers.
const LEASES: usize = 8;

struct Writer {
    caller: Caller,
    values: u64,
    leases: Vec<i64>,
}

/// Writes until the work is over.
pub async fn run(worker: usize, context: Arc<Context>) {
    let mut writer = Writer { caller: Caller::new(worker, &context), values: 0, leases: Vec::new() };
    while context.works() {
        let operation = writer.choose();
        let outcome = writer.caller.call(operation).await;
        if let Some(Ok(Answer::Grant(answer))) = &outcome {
            writer.leases.insert(0, answer.id);
            writer.leases.truncate(LEASES);
        }
        writer.caller.pause(if outcome.is_some() { 60 } else { 200 }).await;
    }
}

impl Writer {
    fn choose(&mut self) -> Operation {
        match self.caller.random.below(40) {
            0 => Operation::Grant(LeaseGrantRequest { id: 0, ttl: self.caller.random.pick(&[2, 3, 5, 60]) }),
            1 if !self.leases.is_empty() => {
                Operation::Revoke(LeaseRevokeRequest { id: self.caller.random.pick(&self.leases) })
            }
            2 if !self.leases.is_empty() => {
                Operation::KeepAlive(LeaseKeepAliveRequest { id: self.caller.random.pick(&self.leases) })
            }
            3..8 => Operation::Delete(self.delete()),
            8..14 => Operation::Txn(self.txn()),
            14 => Operation::Txn(self.large_txn()),
            _ => Operation::Put(self.put()),
        }
    }

    fn key(&mut self) -> Bytes {
        let key = self.caller.random.key();
        if key.is_empty() { "b/0/0".into() } else { key }
    }

    /// A value that nobody else writes, and this writer never again.
    fn value(&mut self) -> Bytes {
        self.values += 1;
        let padding = if self.caller.random.chance(20) { self.caller.random.below(4000) } else { 0 };
        format!("{}:{}:{}", self.caller.worker, self.values, "x".repeat(padding)).into()
    }

    fn put(&mut self) -> PutRequest {
        let with_lease = !self.leases.is_empty() && self.caller.random.chance(4);
        let lease = if with_lease { self.caller.random.pick(&self.leases) } else { 0 };
        PutRequest { key: self.key(), value: self.value(), lease, ..Default::default() }
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        let range = self.caller.random.chance(4);
        let (key, range_end) = if range { self.caller.random.span() } else { (self.key(), Bytes::new()) };
        let key = if key.is_empty() { "a".into() } else { key };
        DeleteRangeRequest { key, range_end, prev_kv: self.caller.random.chance(2) }
    }

    /// Different keys in both branches, behind a condition that holds about as often as not.
    fn txn(&mut self) -> TxnRequest {
        let compare = Compare {
            result: CompareResult::Greater as i32,
            target: CompareTarget::Version as i32,
            key: self.key(),
            target_union: Some(TargetUnion::Version(self.caller.random.below(3) as i64)),
            ..Default::default()
        };
        let size = 1 + self.caller.random.below(5);
        TxnRequest { compare: vec![compare], success: self.puts(size), failure: self.puts(1) }
    }

    fn large_txn(&mut self) -> TxnRequest {
        TxnRequest { success: self.puts(LARGEST_TXN), ..Default::default() }
    }

    /// Puts of as many different keys: etcd refuses to put a key twice in one transaction.
    fn puts(&mut self, count: usize) -> Vec<RequestOp> {
        let mut keys: Vec<Bytes> = if count < LARGEST_TXN {
            (0..count).map(|_| self.key()).collect()
        } else {
            (0..count).map(|number| format!("b/9/{number:03}").into()).collect()
        };
        keys.sort();
        keys.dedup();
        let mut put = |key| Request::RequestPut(PutRequest { key, value: self.value(), ..Default::default() });
        keys.into_iter().map(|key| RequestOp { request: Some(put(key)) }).collect()
    }
}
