//! Transactions against a model: a map of histories that is evaluated in the most naive way.

use std::{cmp::Ordering, collections::BTreeMap};

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::{
    proto::etcdserverpb::{
        Compare, RangeRequest, RequestOp, ResponseOp, TxnRequest, compare::TargetUnion, request_op::Request,
        response_op::Response,
    },
    sql::{sqlite::Sqlite, validate},
};

/// A key as the model has it: create revision, mod revision, version, value.
type Pair = (i64, i64, i64, Bytes);

#[derive(Clone, Debug, Default)]
struct Model {
    revision: i64,
    keys: BTreeMap<Bytes, Pair>,
}

impl Model {
    /// Runs a transaction; what it answers, operation by operation, in words.
    fn txn(&mut self, request: &TxnRequest) -> String {
        let before = self.clone();
        let mut told = Vec::new();
        let mut wrote = false;
        self.branch(&before, request, &mut wrote, &mut told);
        self.revision += i64::from(wrote);
        told.join(" ")
    }

    fn branch(&mut self, before: &Model, request: &TxnRequest, wrote: &mut bool, told: &mut Vec<String>) {
        let succeeded = request.compare.iter().all(|compare| before.holds(compare));
        told.push(format!("{succeeded}["));
        for op in if succeeded { &request.success } else { &request.failure } {
            match op.request.as_ref() {
                Some(Request::RequestRange(range)) => told.push(self.range(&range.key, &range.range_end)),
                Some(Request::RequestPut(put)) => {
                    let next = before.revision + 1;
                    let (created, version) = self.keys.get(&put.key).map_or((next, 0), |pair| (pair.0, pair.2));
                    self.keys.insert(put.key.clone(), (created, next, version + 1, put.value.clone()));
                    *wrote = true;
                    told.push("put".to_owned());
                }
                Some(Request::RequestDeleteRange(delete)) => {
                    let range = KeyRange::new(&delete.key, &delete.range_end);
                    let count = self.keys.len();
                    self.keys.retain(|key, _| !range.contains(key));
                    *wrote |= count > self.keys.len();
                    told.push(format!("deleted {}", count - self.keys.len()));
                }
                Some(Request::RequestTxn(nested)) => self.branch(before, nested, wrote, told),
                None => {}
            }
        }
        told.push("]".to_owned());
    }

    fn range(&self, key: &Bytes, end: &Bytes) -> String {
        let range = KeyRange::new(key, end);
        let found = self.keys.iter().filter(|(key, _)| range.contains(key));
        found
            .map(|(key, (created, modified, version, value))| tell_pair(key, *created, *modified, *version, value))
            .collect()
    }

    fn holds(&self, compare: &Compare) -> bool {
        let range = KeyRange::new(&compare.key, &compare.range_end);
        let found: Vec<&Pair> = self.keys.iter().filter(|(key, _)| range.contains(key)).map(|(_, pair)| pair).collect();
        let by_value = matches!(compare.target_union, Some(TargetUnion::Value(_)));
        let nothing = (0, 0, 0, Bytes::new());
        match (found.is_empty(), by_value) {
            (true, true) => false,
            (true, false) => Self::pair_holds(compare, &nothing),
            (false, _) => found.iter().all(|pair| Self::pair_holds(compare, pair)),
        }
    }

    fn pair_holds(compare: &Compare, pair: &Pair) -> bool {
        let ordering = match &compare.target_union {
            Some(TargetUnion::Version(number)) => pair.2.cmp(number),
            Some(TargetUnion::CreateRevision(number)) => pair.0.cmp(number),
            Some(TargetUnion::ModRevision(number)) => pair.1.cmp(number),
            Some(TargetUnion::Value(value)) => pair.3.cmp(value),
            Some(TargetUnion::Lease(_)) | None => Ordering::Equal,
        };
        match compare.result {
            0 => ordering.is_eq(),
            1 => ordering.is_gt(),
            2 => ordering.is_lt(),
            _ => ordering.is_ne(),
        }
    }
}

fn tell_pair(key: &Bytes, created: i64, modified: i64, version: i64, value: &Bytes) -> String {
    format!("({key:?} {created} {modified} {version} {value:?})")
}

/// The same words for what the engine answered.
fn tell(response: &crate::proto::etcdserverpb::TxnResponse, told: &mut Vec<String>) {
    told.push(format!("{}[", response.succeeded));
    for ResponseOp { response } in &response.responses {
        match response {
            Some(Response::ResponseRange(found)) => told.push(
                found
                    .kvs
                    .iter()
                    .map(|kv| tell_pair(&kv.key, kv.create_revision, kv.mod_revision, kv.version, &kv.value))
                    .collect(),
            ),
            Some(Response::ResponsePut(_)) => told.push("put".to_owned()),
            Some(Response::ResponseDeleteRange(deleted)) => told.push(format!("deleted {}", deleted.deleted)),
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
        (0..3_u8).prop_map(|value| TargetUnion::Value(vec![value].into())),
    ];
    (key(), end(), 0..4_i32, union).prop_map(|(key, range_end, result, union)| {
        let target = match &union {
            TargetUnion::Version(_) => 0,
            TargetUnion::CreateRevision(_) => 1,
            TargetUnion::ModRevision(_) => 2,
            TargetUnion::Value(_) | TargetUnion::Lease(_) => 3,
        };
        Compare { key, range_end, result, target, target_union: Some(union) }
    })
}

fn op() -> impl Strategy<Value = RequestOp> {
    let put = (key(), 0..3_u8).prop_map(|(key, value)| {
        Request::RequestPut(PutRequest { key, value: vec![value].into(), ..Default::default() })
    });
    let range = (key(), end())
        .prop_map(|(key, range_end)| Request::RequestRange(RangeRequest { key, range_end, ..Default::default() }));
    let delete = (key(), end()).prop_map(|(key, range_end)| {
        Request::RequestDeleteRange(DeleteRangeRequest { key, range_end, ..Default::default() })
    });
    prop_oneof![4 => put, 2 => range, 1 => delete].prop_map(|request| RequestOp { request: Some(request) })
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
        let mut transaction = Transaction::new(&mut store, &leases, Position { current: 1, compacted: -1 }, 0);
        let mut model = Model { revision: 1, ..Default::default() };
        for request in requests.into_iter().filter(|request| validate::txn(request, 128).is_ok()) {
            let expected = model.txn(&request);
            let response = transaction.txn(request).expect("a valid transaction");
            let mut found = Vec::new();
            tell(&response, &mut found);
            prop_assert_eq!(expected, found.join(" "));
            prop_assert_eq!(response.header.map(|header| header.revision), Some(model.revision));
        }
        let all = RangeRequest { key: Bytes::from_static(b"\0"), range_end: Bytes::from_static(b"\0"), ..Default::default() };
        let position = transaction.position();
        let found = range::evaluate(transaction.store, &all, position).expect("a range");
        prop_assert_eq!(found.kvs.len(), model.keys.len());
    }
}
