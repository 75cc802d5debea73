//! Writes that nobody was told the outcome of: each is there whole, at one revision, or not at all.

use std::collections::HashMap;

use bytes::Bytes;
use millpond::proto::etcdserverpb::{PutRequest, RequestOp, TxnRequest, request_op::Request};

use super::{
    super::{history::History, record::Call},
    Breach, Case, Counts, brief,
};
use crate::support::operation::Operation;

pub const HALF: &str = "an unanswered write is there whole or not at all";

/// The revision of each value in a history.
type Written<'a> = HashMap<&'a Bytes, i64>;

pub fn judge(case: &Case, counts: &mut Counts) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for history in &case.histories {
        let written = written(history);
        for call in case.calls.iter().filter(|call| !matches!(call.outcome, Some(Ok(_)))) {
            let Operation::Txn(request) = &call.operation else { continue };
            counts.in_doubt += 1;
            let problem = half(history, &written, request);
            breaches.extend(problem.map(|text| breach(call, &text)));
        }
    }
    breaches
}

fn written(history: &History) -> Written<'_> {
    let records = history.revisions().flat_map(|(revision, events)| events.iter().map(move |event| (revision, event)));
    records.filter_map(|(revision, event)| Some((&event.kv.as_ref()?.value, *revision))).collect()
}

/// What is missing of a transaction of which something is there.
fn half(history: &History, written: &Written<'_>, request: &TxnRequest) -> Option<String> {
    let there = |ops: &[RequestOp]| puts(ops).find_map(|put| written.get(&put.value).copied());
    let (revision, taken, other) = match (there(&request.success), there(&request.failure)) {
        (None, None) => return None,
        (Some(revision), other) => (revision, &request.success, other),
        (None, Some(revision)) => (revision, &request.failure, None),
    };
    let happened = || format!("at revision {revision} there happened:{}", brief(history.at(revision).iter()));
    if other.is_some() {
        return Some(format!("both branches were taken; {}", happened()));
    }
    let missing = puts(taken).find(|put| written.get(&put.value) != Some(&revision))?;
    Some(format!("the put of {:?} is not there; {}", missing.key, happened()))
}

fn puts(ops: &[RequestOp]) -> impl Iterator<Item = &PutRequest> {
    ops.iter().filter_map(|op| match &op.request {
        Some(Request::RequestPut(request)) => Some(request),
        _ => None,
    })
}

fn breach(call: &Call, text: &str) -> Breach {
    let text = format!("{text}\n    {call:?}");
    Breach { check: HALF, tick: call.begin, size: text.len(), text }
}
