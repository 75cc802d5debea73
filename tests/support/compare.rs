//! Whether two servers gave the same answer: every field, but for what etcd itself leaves open.
//!
//! Left open are the order of records that tie in a sort (and so which of them a limit keeps), the order of a lease's keys
//! and of the leases, and a few seconds of a lease's remaining time.

use std::fmt::Debug;

use millpond::proto::{
    etcdserverpb::{self as pb, range_request::SortTarget, request_op::Request, response_op::Response},
    mvccpb::KeyValue,
};

use super::{
    operation::{Answer, Operation, Outcome},
    random::can_tie,
};

/// How much clocks may differ between two servers that were asked one after the other, in seconds.
const TTL_SLACK: i64 = 5;

/// Compares the outcomes of `operation`; the error says what differs.
pub fn outcomes(operation: &Operation, expected: &Outcome, found: &Outcome) -> Result<(), String> {
    let (expected, found) = match (expected, found) {
        (Ok(expected), Ok(found)) => (expected, found),
        (expected, found) => return equal("outcome", expected, found),
    };
    equal("header", &expected.header(), &found.header())?;
    match (operation, expected, found) {
        (
            Operation::Range(request) | Operation::RangeStream(request),
            Answer::Range(expected),
            Answer::Range(found),
        ) => ranges(request, expected, found),
        (Operation::Txn(request), Answer::Txn(expected), Answer::Txn(found)) => txns(request, expected, found),
        (_, Answer::TimeToLive(expected), Answer::TimeToLive(found)) => times_to_live(expected, found),
        (_, Answer::Leases(expected), Answer::Leases(found)) => equal("leases", &ids(expected), &ids(found)),
        _ => equal("answer", expected, found),
    }
}

fn equal<T: PartialEq + Debug>(what: &str, expected: &T, found: &T) -> Result<(), String> {
    if expected == found { Ok(()) } else { Err(format!("{what} differs\nexpected: {expected:?}\n   found: {found:?}")) }
}

fn ids(answer: &pb::LeaseLeasesResponse) -> Vec<i64> {
    let mut ids: Vec<i64> = answer.leases.iter().map(|lease| lease.id).collect();
    ids.sort_unstable();
    ids
}

fn times_to_live(expected: &pb::LeaseTimeToLiveResponse, found: &pb::LeaseTimeToLiveResponse) -> Result<(), String> {
    let normal = |answer: &pb::LeaseTimeToLiveResponse| {
        let mut answer = answer.clone();
        answer.keys.sort();
        answer.ttl = 0;
        answer
    };
    equal("lease", &normal(expected), &normal(found))?;
    if expected.ttl.abs_diff(found.ttl) > TTL_SLACK as u64 {
        return Err(format!("remaining time differs: expected {}, found {}", expected.ttl, found.ttl));
    }
    Ok(())
}

fn ranges(request: &pb::RangeRequest, expected: &pb::RangeResponse, found: &pb::RangeResponse) -> Result<(), String> {
    let shape = |answer: &pb::RangeResponse| (answer.count, answer.more, answer.kvs.len());
    equal("count, more, number of keys", &shape(expected), &shape(found))?;
    if !can_tie(request) {
        return equal("keys", &expected.kvs, &found.kvs);
    }
    let (expected_groups, found_groups) = (groups(request, &expected.kvs), groups(request, &found.kvs));
    let sizes = |groups: &[Vec<KeyValue>]| groups.iter().map(Vec::len).collect::<Vec<_>>();
    equal("sizes of ties", &sizes(&expected_groups), &sizes(&found_groups))?;
    // A limit may cut the last tie in two, and then either part of it is right.
    let whole = expected_groups.len() - usize::from(expected.more && !expected_groups.is_empty());
    equal("keys", &&expected_groups[..whole], &&found_groups[..whole])?;
    let ranks = |groups: &[Vec<KeyValue>]| groups.iter().map(|group| rank(request, &group[0])).collect::<Vec<_>>();
    equal("order", &ranks(&expected_groups), &ranks(&found_groups))
}

/// What a record is sorted by, as an ordinal that is equal for ties.
#[derive(Debug, PartialEq)]
enum Rank {
    Number(i64),
    Value(Vec<u8>),
}

fn rank(request: &pb::RangeRequest, record: &KeyValue) -> Rank {
    match SortTarget::try_from(request.sort_target) {
        Ok(SortTarget::Version) => Rank::Number(record.version),
        Ok(SortTarget::Create) => Rank::Number(record.create_revision),
        Ok(SortTarget::Mod) => Rank::Number(record.mod_revision),
        // Without values every record seems to tie: which ones are there is compared, their order is not.
        _ => Rank::Value(record.value.to_vec()),
    }
}

/// The records in runs of equal rank, each run sorted by key.
fn groups(request: &pb::RangeRequest, records: &[KeyValue]) -> Vec<Vec<KeyValue>> {
    let runs = records.chunk_by(|left, right| rank(request, left) == rank(request, right));
    runs.map(|run| {
        let mut run = run.to_vec();
        run.sort_by(|left, right| left.key.cmp(&right.key));
        run
    })
    .collect()
}

fn txns(request: &pb::TxnRequest, expected: &pb::TxnResponse, found: &pb::TxnResponse) -> Result<(), String> {
    equal("succeeded", &expected.succeeded, &found.succeeded)?;
    equal("number of responses", &expected.responses.len(), &found.responses.len())?;
    let branch = if expected.succeeded { &request.success } else { &request.failure };
    for (number, op) in branch.iter().enumerate() {
        let (expected, found) = (&expected.responses[number].response, &found.responses[number].response);
        responses(op, expected.as_ref(), found.as_ref())
            .map_err(|difference| format!("response {number}: {difference}"))?;
    }
    Ok(())
}

fn responses(op: &pb::RequestOp, expected: Option<&Response>, found: Option<&Response>) -> Result<(), String> {
    match (&op.request, expected, found) {
        (
            Some(Request::RequestRange(request)),
            Some(Response::ResponseRange(expected)),
            Some(Response::ResponseRange(found)),
        ) => {
            equal("inner header", &expected.header, &found.header)?;
            ranges(request, expected, found)
        }
        (
            Some(Request::RequestTxn(request)),
            Some(Response::ResponseTxn(expected)),
            Some(Response::ResponseTxn(found)),
        ) => {
            equal("inner header", &expected.header, &found.header)?;
            txns(request, expected, found)
        }
        _ => equal("inner response", &expected, &found),
    }
}
