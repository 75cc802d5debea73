//! Writes: what was acknowledged happened at the revision told, what was refused did not, and nothing happened twice.

use std::collections::HashMap;

use bytes::Bytes;
use millpond::proto::{
    etcdserverpb::{PutRequest, RequestOp, TxnRequest, request_op::Request},
    mvccpb::event::EventType,
};
use tonic::Code;

use super::{
    super::{history::History, record::Call},
    Breach, Case, Counts, brief,
    placing::Placing,
};
use crate::support::operation::{Answer, Operation};

pub const ACKNOWLEDGED: &str = "an acknowledged write is in the history at its revision";
pub const REFUSED: &str = "a refused write is not in the history";
pub const TWICE: &str = "no write is done twice";

/// Where each value that a writer chose was written.
type Written<'a> = HashMap<&'a Bytes, i64>;

pub fn judge(case: &Case, placing: &Placing, counts: &mut Counts) -> Vec<Breach> {
    let mut breaches = Vec::new();
    let written: Vec<Written<'_>> = case.histories.iter().map(|history| written(history, &mut breaches)).collect();
    for call in &case.calls {
        let (lowest, highest) = placing.eras_of(call);
        match &call.outcome {
            Some(Ok(answer)) => {
                counts.writes += usize::from(!matches!(answer, Answer::Range(_)));
                let mut problems = (lowest..=highest).map(|era| acknowledged(&case.histories[era], call, answer));
                let first = problems.next().flatten();
                if let Some(problem) = first.filter(|_| problems.all(|problem| problem.is_some())) {
                    breaches.push(breach(ACKNOWLEDGED, call, &problem));
                }
            }
            Some(Err(failure)) if is_final(failure.code) => {
                let puts = puts(&call.operation, None);
                let done = puts.iter().find_map(|put| written[highest].get(&put.value));
                breaches
                    .extend(done.map(|revision| breach(REFUSED, call, &format!("it is there at revision {revision}"))));
            }
            _ => {}
        }
    }
    breaches
}

fn breach(check: &'static str, call: &Call, text: &str) -> Breach {
    let text = format!("{text}\n    {call:?}");
    Breach { check, tick: call.begin, size: text.len(), text }
}

/// Whether a refusal with this code says that nothing was done.
fn is_final(code: Code) -> bool {
    matches!(code, Code::InvalidArgument | Code::NotFound | Code::OutOfRange | Code::FailedPrecondition)
}

/// Writers' values are unique and made of a worker, a number and something more; what the faults write is not.
fn is_unique(value: &[u8]) -> bool {
    value.first().is_some_and(u8::is_ascii_digit) && value.contains(&b':')
}

fn written<'a>(history: &'a History, breaches: &mut Vec<Breach>) -> Written<'a> {
    let mut written = HashMap::new();
    for (revision, events) in history.revisions() {
        let puts = events.iter().filter(|event| event.r#type == EventType::Put as i32);
        for record in puts.filter_map(|event| event.kv.as_ref()).filter(|record| is_unique(&record.value)) {
            if let Some(first) = written.insert(&record.value, *revision) {
                let text = format!("{record:?} was written at revisions {first} and {revision}");
                breaches.push(Breach { check: TWICE, tick: 0, size: text.len(), text });
            }
        }
    }
    written
}

/// The puts that a request does, when its transaction took the branch `succeeded`; of both branches when that is unknown.
fn puts(operation: &Operation, succeeded: Option<bool>) -> Vec<&PutRequest> {
    let put = |op: &'_ RequestOp| matches!(op.request, Some(Request::RequestPut(_)));
    match operation {
        Operation::Put(request) => vec![request],
        Operation::Txn(TxnRequest { success, failure, .. }) => {
            let branches = [(success, succeeded != Some(false)), (failure, succeeded != Some(true))];
            let taken = branches.into_iter().filter(|(_, taken)| *taken).flat_map(|(ops, _)| ops);
            taken
                .filter(|op| put(op))
                .filter_map(|op| match &op.request {
                    Some(Request::RequestPut(request)) => Some(request),
                    _ => None,
                })
                .collect()
        }
        _ => Vec::new(),
    }
}

/// What is wrong with an acknowledgement.
fn acknowledged(history: &History, call: &Call, answer: &Answer) -> Option<String> {
    let revision = answer.header()?.revision;
    let events = history.at(revision);
    let happened = format!("at revision {revision} there happened:{}", brief(events.iter()));
    let succeeded = match answer {
        Answer::Put(_) => None,
        Answer::Txn(answer) => Some(answer.succeeded),
        Answer::Delete(answer) => {
            let deleted = events.iter().filter(|event| event.r#type == EventType::Delete as i32).count() as i64;
            let wrong = answer.deleted > 0 && answer.deleted != deleted;
            return wrong.then(|| format!("{} keys were said to be deleted; {happened}", answer.deleted));
        }
        _ => return None,
    };
    let has = |put: &PutRequest| {
        let mut records = events.iter().filter_map(|event| event.kv.as_ref());
        records.any(|record| record.key == put.key && record.value == put.value)
    };
    let missing = puts(&call.operation, succeeded).into_iter().find(|put| !has(put))?;
    Some(format!("the put of {:?} is not there; {happened}", missing.key))
}
