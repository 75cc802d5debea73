//! Transactions: which branches are taken, whether they can be carried out, and carrying them out.
//!
//! As in etcd, all compares of all levels are decided before anything is written, and so is every refusal; the branches
//! then run in order, each operation seeing what the ones before it wrote.

use std::{ops::ControlFlow, vec::IntoIter};

use super::Transaction;
use crate::{
    proto::etcdserverpb::{
        Compare, RequestOp, ResponseOp, TxnRequest, TxnResponse, request_op::Request, response_op::Response,
    },
    rules::{
        KeyRange,
        compare::{compared, holds_for_none, is_by_value, number_holds, value_holds},
        range::read_of,
    },
    sql::{
        backend::{EventId, Reader},
        error::{Fault, SqlError},
        range::{self, Position, header},
    },
    status::Status,
};

/// Whether a transaction consists of ranges alone, so that it needs no write. As in etcd, one with a nested transaction does
/// not count.
pub fn is_read_only(request: &TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).all(|op| read_of(op).is_some())
}

/// Answers a transaction for which [`is_read_only`] holds, from `store` alone.
pub fn read_only(store: &mut dyn Reader, request: TxnRequest, at: Position) -> Result<TxnResponse, Fault> {
    let succeeded = holds(store, &request.compare, at)?;
    let ops = if succeeded { request.success } else { request.failure };
    let mut responses = Vec::with_capacity(ops.len());
    for request in ops.iter().filter_map(read_of) {
        check_revision(request.revision, at)?;
    }
    for request in ops.iter().filter_map(read_of) {
        responses.push(respond(Response::ResponseRange(range::evaluate(store, request, at)?)));
    }
    Ok(TxnResponse { header: header(at.current), succeeded, responses })
}

/// The branches taken, one for each transaction met on the way, outer before inner and in order.
type Path = Vec<bool>;

impl Transaction<'_> {
    /// Carries out a transaction that has passed `validate::txn`.
    pub fn txn(&mut self, request: TxnRequest) -> Result<TxnResponse, Fault> {
        let mut path = Path::new();
        self.decide(&request, &mut path)?;
        self.check(&request, &mut path.clone().into_iter())?;
        let mut response = if can_fail_midway(&request) {
            self.execute_undoably(request, path)?
        } else {
            self.execute(request, &mut path.into_iter())?
        };
        response.header = header(self.position().current);
        self.seal();
        Ok(response)
    }

    fn execute_undoably(&mut self, request: TxnRequest, path: Path) -> Result<TxnResponse, Fault> {
        self.store.savepoint()?;
        match self.execute(request, &mut path.into_iter()) {
            Ok(response) => {
                self.store.release()?;
                Ok(response)
            }
            Err(fault) => {
                self.draft.clear();
                self.store.rollback_to_savepoint()?;
                Err(fault)
            }
        }
    }

    fn decide(&mut self, request: &TxnRequest, path: &mut Path) -> Result<(), Fault> {
        let position = self.position();
        let succeeded = holds(self.store, &request.compare, position)?;
        path.push(succeeded);
        for op in branch(request, succeeded) {
            if let Some(Request::RequestTxn(nested)) = &op.request {
                self.decide(nested, path)?;
            }
        }
        Ok(())
    }

    fn check(&mut self, request: &TxnRequest, path: &mut IntoIter<bool>) -> Result<(), Fault> {
        let succeeded = path.next().unwrap_or_default();
        for op in branch(request, succeeded) {
            match &op.request {
                Some(Request::RequestRange(range)) => check_revision(range.revision, self.at)?,
                Some(Request::RequestPut(put)) => self.check_put(put)?,
                Some(Request::RequestTxn(nested)) => self.check(nested, path)?,
                Some(Request::RequestDeleteRange(_)) | None => {}
            }
        }
        Ok(())
    }

    fn execute(&mut self, request: TxnRequest, path: &mut IntoIter<bool>) -> Result<TxnResponse, Fault> {
        let succeeded = path.next().unwrap_or_default();
        let ops = if succeeded { request.success } else { request.failure };
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            responses.push(match op.request {
                Some(Request::RequestRange(request)) => {
                    let position = self.position();
                    respond(Response::ResponseRange(range::evaluate(self.store, &request, position)?))
                }
                Some(Request::RequestPut(request)) => respond(Response::ResponsePut(self.write_put(request)?)),
                Some(Request::RequestDeleteRange(request)) => {
                    respond(Response::ResponseDeleteRange(self.write_delete(&request)?))
                }
                Some(Request::RequestTxn(request)) => respond(Response::ResponseTxn(self.execute(request, path)?)),
                None => ResponseOp { response: None },
            });
        }
        Ok(TxnResponse { header: header(0), succeeded, responses })
    }
}

/// Whether an operation can still be refused after an earlier one has written: a deletion that is too large, or a put whose
/// key an earlier operation deleted.
fn can_fail_midway(request: &TxnRequest) -> bool {
    request.success.iter().chain(&request.failure).any(|op| match &op.request {
        Some(Request::RequestPut(put)) => put.ignore_value || put.ignore_lease,
        Some(Request::RequestDeleteRange(_) | Request::RequestTxn(_)) => true,
        Some(Request::RequestRange(_)) | None => false,
    })
}

fn respond(response: Response) -> ResponseOp {
    ResponseOp { response: Some(response) }
}

fn branch(request: &TxnRequest, succeeded: bool) -> &[RequestOp] {
    if succeeded { &request.success } else { &request.failure }
}

/// Refuses a range's revision before anything is executed. etcd takes any revision but 0 literally here, so that -1 passes
/// before the first compaction only.
fn check_revision(revision: i64, at: Position) -> Result<(), Status> {
    match revision {
        0 => Ok(()),
        _ if revision > at.current => Err(Status::FUTURE_REVISION),
        _ if revision < at.compacted => Err(Status::COMPACTED),
        _ => Ok(()),
    }
}

fn holds(store: &mut dyn Reader, compares: &[Compare], at: Position) -> Result<bool, Fault> {
    for compare in compares {
        if !compare_holds(store, compare, EventId::last(at.current))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a compare holds for every key of its range, or for the key that is not there.
fn compare_holds(store: &mut dyn Reader, compare: &Compare, bound: EventId) -> Result<bool, SqlError> {
    let range = compared(compare);
    if is_by_value(compare) {
        return values_hold(store, compare, &range, bound);
    }
    let mut found = None;
    store.scan(&range, bound, &mut |_, version| {
        let holds = number_holds(compare, &version);
        found = Some(holds);
        if holds { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(found.unwrap_or_else(|| holds_for_none(compare)))
}

/// The same for values, which are not in the index.
fn values_hold(store: &mut dyn Reader, compare: &Compare, range: &KeyRange, bound: EventId) -> Result<bool, SqlError> {
    let mut ids = Vec::new();
    store.scan(range, bound, &mut |_, version| {
        ids.push(version.id);
        ControlFlow::Continue(())
    })?;
    for id in &ids {
        if !value_holds(compare, &range::fetch_record(store, *id)?.value) {
            return Ok(false);
        }
    }
    Ok(!ids.is_empty() || holds_for_none(compare))
}
