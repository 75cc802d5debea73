//! Transactions against a model: a map of histories that is evaluated in the most naive way.

use std::{cmp::Ordering, collections::BTreeMap};

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::{
    proto::etcdserverpb::{
        Compare, LeaseGrantRequest, RangeRequest, RequestOp, ResponseOp, TxnRequest, TxnResponse, compare::TargetUnion,
        range_request::SortOrder, request_op::Request, response_op::Response,
    },
    rules::validate,
    sql::sqlite::Sqlite,
};

/// The leases that there are, and one that there is not.
const LEASES: [i64; 2] = [1, 2];
const NO_LEASE: i64 = 9;

#[derive(Clone, Debug, Default)]
struct Model {
    revision: i64,
    keys: BTreeMap<Bytes, KeyValue>,
}

/// What has been told and written so far.
#[derive(Default)]
struct Progress {
    told: Vec<String>,
    wrote: bool,
}

impl Model {
    /// Runs a transaction; what it answers, operation by operation, in words, or with what it is refused.
    fn txn(&mut self, request: &TxnRequest) -> Result<String, String> {
        let before = self.clone();
        before.check(request)?;
        let mut progress = Progress::default();
        if let Err(refusal) = self.branch(&before, request, &mut progress) {
            *self = before;
            return Err(refusal);
        }
        self.revision += i64::from(progress.wrote);
        Ok(progress.told.join(" "))
    }

    fn taken<'a>(&self, request: &'a TxnRequest) -> (bool, &'a [RequestOp]) {
        let succeeded = request.compare.iter().all(|compare| self.holds(compare));
        (succeeded, if succeeded { &request.success } else { &request.failure })
    }

    /// Refuses, before anything is written, a put that cannot be.
    fn check(&self, request: &TxnRequest) -> Result<(), String> {
        for op in self.taken(request).1 {
            match op.request.as_ref() {
                Some(Request::RequestPut(put)) if put.lease == NO_LEASE => {
                    return Err("etcdserver: requested lease not found".to_owned());
                }
                Some(Request::RequestPut(put)) => self.check_kept(put)?,
                Some(Request::RequestTxn(nested)) => self.check(nested)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn check_kept(&self, put: &PutRequest) -> Result<(), String> {
        let keeps = put.ignore_value || put.ignore_lease;
        if keeps && !self.keys.contains_key(&put.key) { Err("etcdserver: key not found".to_owned()) } else { Ok(()) }
    }

    fn branch(&mut self, before: &Model, request: &TxnRequest, progress: &mut Progress) -> Result<(), String> {
        let (succeeded, ops) = before.taken(request);
        progress.told.push(format!("{succeeded}["));
        for op in ops {
            match op.request.as_ref() {
                Some(Request::RequestRange(range)) => progress.told.push(self.range(range)),
                Some(Request::RequestPut(put)) => self.put(before.revision + 1, put, progress)?,
                Some(Request::RequestDeleteRange(delete)) => self.delete(delete, progress),
                Some(Request::RequestTxn(nested)) => self.branch(before, nested, progress)?,
                None => {}
            }
        }
        progress.told.push("]".to_owned());
        Ok(())
    }

    fn put(&mut self, revision: i64, put: &PutRequest, progress: &mut Progress) -> Result<(), String> {
        self.check_kept(put)?;
        let old = self.keys.get(&put.key).cloned();
        let kept = old.clone().unwrap_or(KeyValue { create_revision: revision, ..KeyValue::default() });
        let pair = KeyValue {
            key: put.key.clone(),
            create_revision: kept.create_revision,
            mod_revision: revision,
            version: kept.version + 1,
            value: if put.ignore_value { kept.value } else { put.value.clone() },
            lease: if put.ignore_lease { kept.lease } else { put.lease },
        };
        self.keys.insert(put.key.clone(), pair);
        progress.wrote = true;
        let previous = old.filter(|_| put.prev_kv).map(|pair| tell_pair(&pair)).unwrap_or_default();
        progress.told.push(format!("put {previous}"));
        Ok(())
    }

    fn delete(&mut self, delete: &DeleteRangeRequest, progress: &mut Progress) {
        let range = KeyRange::from_request(&delete.key, &delete.range_end);
        let (gone, left) = std::mem::take(&mut self.keys).into_iter().partition(|(key, _)| range.contains(key));
        self.keys = left;
        let gone: BTreeMap<Bytes, KeyValue> = gone;
        progress.wrote |= !gone.is_empty();
        let previous: String = gone.values().filter(|_| delete.prev_kv).map(tell_pair).collect();
        progress.told.push(format!("deleted {} {previous}", gone.len()));
    }

    fn range(&self, request: &RangeRequest) -> String {
        let range = KeyRange::from_request(&request.key, &request.range_end);
        let mut found: Vec<KeyValue> =
            self.keys.iter().filter(|(key, _)| range.contains(key)).map(|(_, pair)| pair.clone()).collect();
        let count = found.len();
        if request.sort_order == i32::from(SortOrder::Descend) {
            found.reverse();
        }
        let limit = if request.limit > 0 { request.limit as usize } else { count };
        let more = !request.count_only && count > limit;
        found.truncate(if request.count_only { 0 } else { limit });
        if request.keys_only {
            found.iter_mut().for_each(|pair| (pair.value, pair.lease) = (Bytes::new(), 0));
        }
        tell_range(&found, count as i64, more)
    }

    fn holds(&self, compare: &Compare) -> bool {
        let range = KeyRange::from_request(&compare.key, &compare.range_end);
        let found: Vec<&KeyValue> =
            self.keys.iter().filter(|(key, _)| range.contains(key)).map(|(_, pair)| pair).collect();
        let by_value = matches!(compare.target_union, Some(TargetUnion::Value(_)));
        match (found.is_empty(), by_value) {
            (true, true) => false,
            (true, false) => Self::pair_holds(compare, &KeyValue::default()),
            (false, _) => found.iter().all(|pair| Self::pair_holds(compare, pair)),
        }
    }

    fn pair_holds(compare: &Compare, pair: &KeyValue) -> bool {
        let ordering = match &compare.target_union {
            Some(TargetUnion::Version(number)) => pair.version.cmp(number),
            Some(TargetUnion::CreateRevision(number)) => pair.create_revision.cmp(number),
            Some(TargetUnion::ModRevision(number)) => pair.mod_revision.cmp(number),
            Some(TargetUnion::Lease(number)) => pair.lease.cmp(number),
            Some(TargetUnion::Value(value)) => pair.value.cmp(value),
            None => Ordering::Equal,
        };
        match compare.result {
            0 => ordering.is_eq(),
            1 => ordering.is_gt(),
            2 => ordering.is_lt(),
            _ => ordering.is_ne(),
        }
    }
}

fn tell_pair(pair: &KeyValue) -> String {
    let KeyValue { key, create_revision, mod_revision, version, value, lease } = pair;
    format!("({key:?} {create_revision} {mod_revision} {version} {value:?} {lease})")
}

fn tell_range(kvs: &[KeyValue], count: i64, more: bool) -> String {
    format!("{count}{}{}", if more { "+" } else { "" }, kvs.iter().map(tell_pair).collect::<String>())
}

/// The same words for what the engine answered.
fn tell(response: &TxnResponse, told: &mut Vec<String>) {
    told.push(format!("{}[", response.succeeded));
    for ResponseOp { response } in &response.responses {
        match response {
            Some(Response::ResponseRange(found)) => told.push(tell_range(&found.kvs, found.count, found.more)),
            Some(Response::ResponsePut(done)) => {
                told.push(format!("put {}", done.prev_kv.as_ref().map(tell_pair).unwrap_or_default()));
            }
            Some(Response::ResponseDeleteRange(done)) => {
                told.push(format!(
                    "deleted {} {}",
                    done.deleted,
                    done.prev_kvs.iter().map(tell_pair).collect::<String>()
                ));
            }
            Some(Response::ResponseTxn(nested)) => tell(nested, told),
            None => {}
        }
    }
    told.push("]".to_owned());
}

fn key() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["a", "b", "ba", "c", "d"]).prop_map(|key| Bytes::from_static(key.as_bytes()))
}

fn end() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "", "b", "c", "\0"]).prop_map(|end| Bytes::from_static(end.as_bytes()))
}

fn compare() -> impl Strategy<Value = Compare> {
    let union = prop_oneof![
        (0..4_i64).prop_map(TargetUnion::Version),
        (0..12_i64).prop_map(TargetUnion::CreateRevision),
        (0..12_i64).prop_map(TargetUnion::ModRevision),
        (0..3_i64).prop_map(TargetUnion::Lease),
        (0..3_u8).prop_map(|value| TargetUnion::Value(vec![value].into())),
    ];
    (key(), end(), 0..4_i32, union).prop_map(|(key, range_end, result, union)| {
        let target = match &union {
            TargetUnion::Version(_) => 0,
            TargetUnion::CreateRevision(_) => 1,
            TargetUnion::ModRevision(_) => 2,
            TargetUnion::Value(_) => 3,
            TargetUnion::Lease(_) => 4,
        };
        Compare { key, range_end, result, target, target_union: Some(union) }
    })
}

/// Any put, but that one in eight keeps the value and one in eight the lease.
fn put() -> impl Strategy<Value = PutRequest> {
    let lease = prop_oneof![20 => Just(0), 6 => prop::sample::select(&LEASES[..]), 1 => Just(NO_LEASE)];
    (key(), 0..3_u8, lease, 0..8_u8, any::<bool>()).prop_map(|(key, value, lease, kept, prev_kv)| {
        let (ignore_value, ignore_lease) = (kept == 1, kept == 2);
        let value = if ignore_value { Bytes::new() } else { vec![value].into() };
        PutRequest { key, value, lease: if ignore_lease { 0 } else { lease }, prev_kv, ignore_value, ignore_lease }
    })
}

fn range_request() -> impl Strategy<Value = RangeRequest> {
    (key(), end(), 0..4_i64, 0..12_u8).prop_map(|(key, range_end, limit, kind)| RangeRequest {
        key,
        range_end,
        limit,
        sort_order: i32::from(if kind < 3 { SortOrder::Descend } else { SortOrder::None }),
        keys_only: kind == 5,
        count_only: kind == 6,
        ..Default::default()
    })
}

fn op() -> impl Strategy<Value = RequestOp> {
    let delete = (key(), end(), any::<bool>()).prop_map(|(key, range_end, prev_kv)| DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    });
    let request = prop_oneof![
        4 => put().prop_map(Request::RequestPut),
        2 => range_request().prop_map(Request::RequestRange),
        1 => delete.prop_map(Request::RequestDeleteRange)
    ];
    request.prop_map(|request| RequestOp { request: Some(request) })
}

fn txn() -> impl Strategy<Value = TxnRequest> {
    let flat =
        (prop::collection::vec(compare(), 0..3), prop::collection::vec(op(), 0..4), prop::collection::vec(op(), 0..4))
            .prop_map(|(compare, success, failure)| TxnRequest { compare, success, failure });
    flat.prop_recursive(2, 16, 3, |inner| {
        let nested = inner.prop_map(|txn| RequestOp { request: Some(Request::RequestTxn(txn)) });
        let op = prop_oneof![3 => op(), 1 => nested];
        let ops = prop::collection::vec(op, 0..4);
        (prop::collection::vec(compare(), 0..3), ops.clone(), ops).prop_map(|(compare, success, failure)| TxnRequest {
            compare,
            success,
            failure,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..Default::default() })]

    #[test]
    fn every_transaction_does_what_the_model_does(requests in prop::collection::vec(txn(), 1..25)) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut store = Sqlite::open_writer(dir.path(), 1 << 20).expect("a new store");
        store.begin_write().expect("a transaction");
        let leases = Mutex::default();
        let mut transaction = Transaction::new(&mut store, &leases, Position { current: 1, compacted: -1 }, Alarms::default());
        for id in LEASES {
            transaction.grant(&LeaseGrantRequest { id, ttl: 60 }).expect("a lease");
        }
        let mut model = Model { revision: 1, ..Default::default() };
        for request in requests.into_iter().filter(|request| validate::txn(request, 128).is_ok()) {
            let expected = model.txn(&request);
            let found = match transaction.txn(request) {
                Ok(response) => {
                    prop_assert_eq!(response.header.map(|header| header.revision), Some(model.revision));
                    let mut told = Vec::new();
                    tell(&response, &mut told);
                    Ok(told.join(" "))
                }
                Err(fault) => Err(fault.status().message.into_owned()),
            };
            prop_assert_eq!(expected, found);
        }
        let all = RangeRequest { key: Bytes::from_static(b"\0"), range_end: Bytes::from_static(b"\0"), ..Default::default() };
        let position = transaction.position();
        let found = range::evaluate(transaction.store, &all, position).expect("a range");
        prop_assert_eq!(found.kvs, model.keys.into_values().collect::<Vec<_>>());
    }
}
