//! The checks that etcd makes on a request before it looks at any data, in etcd's order and words.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Bound,
};

use bytes::Bytes;
use tonic::Code;

use super::{
    KeyRange,
    range::{has_filters, is_default_order},
    successor,
    watch::Refusal,
};
use crate::{
    proto::etcdserverpb::{
        DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest,
        range_request::{SortOrder, SortTarget},
        request_op::Request,
    },
    status::Status,
};

/// Checks a range request: a key, and a known order and target.
pub fn range(request: &RangeRequest) -> Result<(), Status> {
    if request.key.is_empty() {
        return Err(Status::EMPTY_KEY);
    }
    if SortOrder::try_from(request.sort_order).is_err() || SortTarget::try_from(request.sort_target).is_err() {
        return Err(Status::INVALID_SORT_OPTION);
    }
    Ok(())
}

/// Checks a range request that is to be answered in chunks: in the order of keys, and without filters.
pub fn range_stream(request: &RangeRequest) -> Result<(), Status> {
    range(request)?;
    if !is_default_order(request) {
        return Err(Status::fixed(Code::Unimplemented, "RangeStream does not support custom sort orders"));
    }
    if has_filters(request) {
        return Err(Status::fixed(Code::Unimplemented, "RangeStream does not support revision filters"));
    }
    Ok(())
}

/// Checks a put: a key, and no value or lease beside the flag that ignores it.
pub fn put(request: &PutRequest) -> Result<(), Status> {
    if request.key.is_empty() {
        return Err(Status::EMPTY_KEY);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Status::VALUE_PROVIDED);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Status::LEASE_PROVIDED);
    }
    Ok(())
}

/// Checks a deletion: a key.
pub fn delete(request: &DeleteRangeRequest) -> Result<(), Status> {
    if request.key.is_empty() { Err(Status::EMPTY_KEY) } else { Ok(()) }
}

/// Checks a request for a watcher over `range`: a start that is not negative, and a range with room for a key. Its id is
/// looked at after these.
pub fn watch(request: &WatchCreateRequest, range: &KeyRange) -> Result<(), Refusal> {
    if request.start_revision < 0 {
        return Err(Refusal::NegativeStart);
    }
    if range.is_empty() { Err(Refusal::EmptyRange) } else { Ok(()) }
}

/// Checks a transaction: the number of operations, every operation in it, then that no key is written twice.
pub fn txn(request: &TxnRequest, max_ops: usize) -> Result<(), Status> {
    operations(request, max_ops)?;
    overlaps(&request.success)?;
    overlaps(&request.failure).map(drop)
}

fn operations(request: &TxnRequest, max_ops: usize) -> Result<(), Status> {
    let widest = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(left) = max_ops.checked_sub(widest) else { return Err(Status::TOO_MANY_OPS) };
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Status::EMPTY_KEY);
    }
    request.success.iter().chain(&request.failure).try_for_each(|op| operation(op, left))
}

fn operation(op: &RequestOp, max_ops: usize) -> Result<(), Status> {
    match &op.request {
        Some(Request::RequestRange(request)) => range(request),
        Some(Request::RequestPut(request)) => put(request),
        Some(Request::RequestDeleteRange(request)) => delete(request),
        Some(Request::RequestTxn(request)) => operations(request, max_ops),
        None => Err(Status::KEY_NOT_FOUND),
    }
}

/// The keys put, and the ranges deleted, by a list of operations and all below it.
#[derive(Default)]
struct Writes {
    puts: HashSet<Bytes>,
    deletes: Intervals,
}

/// Collects what a list of operations writes, refusing a key that would be written twice on one path. As in etcd, the
/// two branches of one nested transaction may write the same key, and deletions may overlap each other.
fn overlaps(ops: &[RequestOp]) -> Result<Writes, Status> {
    let mut writes = Writes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            writes.deletes.insert(&delete.key, &delete.range_end);
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            writes.add_nested(overlaps(&nested.success)?, overlaps(&nested.failure)?)?;
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(put)) = &op.request {
            writes.add_put(put.key.clone())?;
        }
    }
    Ok(writes)
}

impl Writes {
    fn add_put(&mut self, key: Bytes) -> Result<(), Status> {
        if self.deletes.contains(&key) || !self.puts.insert(key) {
            return Err(Status::DUPLICATE_KEY);
        }
        Ok(())
    }

    fn add_nested(&mut self, then: Writes, otherwise: Writes) -> Result<(), Status> {
        for key in &then.puts {
            self.add_put(key.clone())?;
        }
        for key in otherwise.puts {
            let shared = then.puts.contains(&key);
            if self.deletes.contains(&key) || (!self.puts.insert(key) && !shared) {
                return Err(Status::DUPLICATE_KEY);
            }
        }
        self.deletes.union(then.deletes);
        self.deletes.union(otherwise.deletes);
        Ok(())
    }
}

/// A union of half-open intervals of keys, disjoint and by start. `None` as an end is beyond every key.
#[derive(Default)]
struct Intervals(BTreeMap<Bytes, Option<Bytes>>);

impl Intervals {
    /// Adds a deleted range. etcd reads `range_end = "\0"` here as a plain key, which makes the interval empty: so do
    /// we.
    fn insert(&mut self, key: &Bytes, range_end: &Bytes) {
        let end = if range_end.is_empty() { successor(key) } else { range_end.clone() };
        if end > *key {
            self.add(key.clone(), Some(end));
        }
    }

    fn add(&mut self, mut start: Bytes, mut end: Option<Bytes>) {
        loop {
            let upper = end.as_ref().map_or(Bound::Unbounded, Bound::Included);
            let touching = self.0.range::<Bytes, _>((Bound::Unbounded, upper)).next_back();
            let Some((from, to)) = touching.map(|(from, to)| (from.clone(), to.clone())) else { break };
            if to.as_ref().is_some_and(|to| *to < start) {
                break;
            }
            self.0.remove(&from);
            start = start.min(from);
            end = end.zip(to).map(|(one, other)| one.max(other));
        }
        self.0.insert(start, end);
    }

    fn union(&mut self, mut other: Intervals) {
        if other.0.len() > self.0.len() {
            std::mem::swap(self, &mut other);
        }
        for (start, end) in other.0 {
            self.add(start, end);
        }
    }

    fn contains(&self, key: &Bytes) -> bool {
        let before = self.0.range::<Bytes, _>(..=key).next_back();
        before.is_some_and(|(_, end)| end.as_ref().is_none_or(|end| key < end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put_op(key: &'static str) -> RequestOp {
        let put = PutRequest { key: Bytes::from_static(key.as_bytes()), ..Default::default() };
        RequestOp { request: Some(Request::RequestPut(put)) }
    }

    fn delete_op(key: &'static str, end: &'static str) -> RequestOp {
        let (key, range_end) = (Bytes::from_static(key.as_bytes()), Bytes::from_static(end.as_bytes()));
        RequestOp { request: Some(Request::RequestDeleteRange(DeleteRangeRequest { key, range_end, prev_kv: false })) }
    }

    fn nested(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
        RequestOp { request: Some(Request::RequestTxn(TxnRequest { compare: Vec::new(), success, failure })) }
    }

    fn check(success: Vec<RequestOp>) -> Result<(), Status> {
        txn(&TxnRequest { success, ..Default::default() }, 128)
    }

    #[test]
    fn a_key_is_written_once_on_a_path() {
        assert_eq!(check(vec![put_op("a"), put_op("a")]), Err(Status::DUPLICATE_KEY));
        assert_eq!(check(vec![put_op("b"), delete_op("a", "c")]), Err(Status::DUPLICATE_KEY));
        assert_eq!(check(vec![put_op("c"), delete_op("a", "c"), delete_op("a", "b")]), Ok(()));
        assert_eq!(check(vec![nested(vec![put_op("a")], vec![put_op("a")])]), Ok(()));
        assert_eq!(check(vec![nested(vec![put_op("a")], vec![]), put_op("a")]), Err(Status::DUPLICATE_KEY));
        assert_eq!(check(vec![nested(vec![delete_op("a", "")], vec![]), put_op("a")]), Err(Status::DUPLICATE_KEY));
        assert_eq!(
            check(vec![nested(vec![put_op("a")], vec![]), nested(vec![], vec![put_op("a")])]),
            Err(Status::DUPLICATE_KEY)
        );
    }

    #[test]
    fn operations_are_limited_along_a_path() {
        assert_eq!(check((0..128).map(|_| delete_op("a", "")).collect()), Ok(()));
        assert_eq!(check((0..129).map(|_| delete_op("a", "")).collect()), Err(Status::TOO_MANY_OPS));
        let deep = nested((0..127).map(|_| delete_op("a", "")).collect(), vec![]);
        assert_eq!(check(vec![deep.clone()]), Ok(()));
        assert_eq!(check(vec![deep, delete_op("b", "")]), Err(Status::TOO_MANY_OPS));
    }

    #[test]
    fn an_operation_without_content_is_refused_as_etcd_does() {
        assert_eq!(check(vec![RequestOp { request: None }]), Err(Status::KEY_NOT_FOUND));
    }

    #[test]
    fn intervals_merge() {
        let key = |text: &'static str| Bytes::from_static(text.as_bytes());
        let mut intervals = Intervals::default();
        for (start, end) in [("c", "e"), ("a", "b"), ("g", "h"), ("b", "c"), ("d", "g")] {
            intervals.insert(&key(start), &key(end));
        }
        assert_eq!(intervals.0.len(), 1);
        assert!(intervals.contains(&key("a")) && intervals.contains(&key("gz")) && !intervals.contains(&key("h")));
    }
}
